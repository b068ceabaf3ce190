"""Features as Parquet: one row for each image, each output a column of fixed-shape tensors."""

from __future__ import annotations

import json
from typing import Any

import numpy as np

from phreg_deploy.extraction.blocks import BlockWriter, Row
from phreg_deploy.extraction.parts import Part
from phreg_deploy.extraction.task import ExtractionTask


class ParquetWriter(BlockWriter):
    """``features-03-of-16-000000.parquet`` and so on: a file for each block.

    Columns: ``name`` and ``image`` (strings), ``artifact_rate`` (float32), and one for each output, of Arrow's
    canonical type ``arrow.fixed_shape_tensor`` over a fixed-size list; readers that do not know the type see the list.
    Booleans are uint8, since pyarrow gives tensors of booleans no numpy array. The metadata key ``phreg`` has the
    settings.
    """

    def __init__(self, part: Part, task: ExtractionTask) -> None:
        super().__init__(part, task)
        self.taken = {entry["file"] for entry in part.done.values()}
        self.number = 0

    def write(self, rows: list[Row]) -> None:
        """Write one file, in one row group."""
        import pyarrow as pa
        import pyarrow.parquet as pq

        columns: dict[str, Any] = {
            "name": pa.array([row.source.name for row in rows], pa.string()),
            "image": pa.array([str(row.source) for row in rows], pa.string()),
            "artifact_rate": pa.array([row.artifact_rate for row in rows], pa.float32()),
        }
        for kind in self.task.outputs:
            array = np.stack([row.arrays[kind] for row in rows])
            array = array.view(np.uint8) if array.dtype == bool else array
            columns[kind] = pa.FixedShapeTensorArray.from_numpy_ndarray(array)
        table = pa.table(columns).replace_schema_metadata({"phreg": json.dumps(self.task.settings)})
        file = self._free()
        pq.write_table(
            table, self.part.scratch / file, row_group_size=len(rows), compression="zstd", use_dictionary=False
        )
        self.part.publish([file], [row.entry(file, number) for number, row in enumerate(rows)])

    def _free(self) -> str:
        """The next name that no kept block has."""
        while True:
            file = f"features-{self.part.shard.name}-{self.number:06d}.parquet"
            self.number += 1
            if file not in self.taken:
                return file
