"""Features as Zarr: one array for each output, chunked by image."""

from __future__ import annotations

from typing import Any

import numpy as np

from phreg_deploy.extraction.blocks import BlockWriter, Row
from phreg_deploy.extraction.parts import Part
from phreg_deploy.extraction.task import ExtractionTask


class ZarrWriter(BlockWriter):
    """``features-03-of-16.zarr``: a Zarr 3 group with an array ``(images, ...)`` for each output.

    A chunk is one image; Zarr's sharding codec puts the chunks of a block into one file. Rows that the index does not
    name, left by interruptions, hold NaN, or 0 in arrays of integers. The group's attribute ``phreg`` has the settings.
    """

    def __init__(self, part: Part, task: ExtractionTask) -> None:
        import zarr

        super().__init__(part, task)
        self.file = f"features-{part.shard.name}.zarr"
        for path in (part.output / self.file).rglob("*.partial"):  # of a killed process
            path.unlink(missing_ok=True)
        self.group: Any = zarr.open_group(part.output / self.file, mode="a", attributes={"phreg": task.settings})
        self.used = [entry["row"] for entry in part.done.values()]
        self.block = 0

    def rows_like(self, row: Row) -> int:
        """Make the arrays, or take the number of images of a block from those that are there."""
        rows = super().rows_like(row)
        if self.task.outputs[0] in self.group:
            rows = int(self.group[self.task.outputs[0]].shards[0])
        for kind, array in row.arrays.items():
            if kind not in self.group:
                self.group.create_array(
                    kind,
                    shape=(0, *array.shape),
                    chunks=(1, *array.shape),
                    shards=(rows, *array.shape),
                    dtype=array.dtype,
                    fill_value=np.nan if array.dtype.kind == "f" else 0,
                )
        self.blocks = {used // rows for used in self.used}
        return rows

    def write(self, rows: list[Row]) -> None:
        """Write one file for each output."""
        import zarr

        while self.block in self.blocks:
            self.block += 1
        start, files = self.block * self.rows, []
        self.blocks.add(self.block)
        # A label map of zeros is a result, too. An array takes this setting when it is opened.
        with zarr.config.set({"array.write_empty_chunks": True}):
            arrays = {kind: self.group[kind] for kind in self.task.outputs}
        for kind, array in arrays.items():
            if array.shape[0] < start + len(rows):
                array.resize((start + len(rows), *array.shape[1:]))
            array[start : start + len(rows)] = np.stack([row.arrays[kind] for row in rows])
            zeros = "/".join("0" for _ in array.shape[1:])
            files.append(f"{self.file}/{kind}/c/{self.block}/{zeros}")
        self.part.publish(files, [row.entry(self.file, start + number) for number, row in enumerate(rows)])
