"""Formats that hold many images in a file: images are collected, and written and published in blocks."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any

import numpy as np

from phreg_deploy.extraction.feature_files import output_arrays, shape_of
from phreg_deploy.extraction.inputs.sources import ImageSource
from phreg_deploy.extraction.parts import Part
from phreg_deploy.extraction.task import ExtractionTask
from phreg_deploy.runtime.dense_features import DenseFeatures

# Bytes of features in a block; a killed process extracts up to so many again.
BLOCK_BYTES = 32 << 20
MOST_ROWS = 4096


@dataclass(frozen=True)
class Row:
    """One image: its source, its ``arrays`` by output, its ``shape`` (``shape_of``), and its artifact rate."""

    source: ImageSource
    arrays: dict[str, np.ndarray]
    shape: list[int]
    artifact_rate: float

    def entry(self, file: str, row: int) -> dict[str, Any]:
        """The image's entry in the index: it is row ``row`` of ``file``."""
        return {
            "name": self.source.name,
            "image": str(self.source),
            "file": file,
            "row": row,
            "shape": self.shape,
            "artifact_rate": self.artifact_rate,
            "stamp": self.source.stamp,
        }


class BlockWriter(ABC):
    """Collects images of equal shapes, and writes ``rows`` of them at once."""

    def __init__(self, part: Part, task: ExtractionTask) -> None:
        self.part, self.task = part, task
        self.rows = 0
        self.pending: list[Row] = []

    def add(self, source: ImageSource, pixels: Any, dense: DenseFeatures) -> None:
        """Collect one image; ``pixels`` are not written. Raises ``PhregError`` for values beyond float16."""
        arrays = output_arrays(dense, self.task.outputs, self.task.dtype)
        row = Row(source, arrays, shape_of(dense), float(dense.artifact_rate[0]))
        self.rows = self.rows or self.rows_like(row)
        self.pending.append(row)
        if len(self.pending) >= self.rows:
            self.flush()

    def flush(self) -> None:
        """Write and publish what is collected."""
        if self.pending:
            self.write(self.pending)
            self.pending = []

    def rows_like(self, row: Row) -> int:
        """The number of images of a block, from the first one."""
        return max(1, min(MOST_ROWS, BLOCK_BYTES // sum(array.nbytes for array in row.arrays.values())))

    @abstractmethod
    def write(self, rows: list[Row]) -> None:
        """Write a block, and publish it in the part."""
