"""The formats of features: ``.npy`` files, Parquet files and Zarr arrays."""

from __future__ import annotations

from typing import Any, Protocol

from phreg_deploy.errors import PhregError
from phreg_deploy.extraction.feature_files import FeatureWriter, file_names
from phreg_deploy.extraction.inputs.sources import ImageSource
from phreg_deploy.extraction.parts import Part
from phreg_deploy.extraction.task import ExtractionOptions, ExtractionTask
from phreg_deploy.extras import require
from phreg_deploy.runtime.dense_features import DenseFeatures

FORMATS = ("npy", "parquet", "zarr")
MODULES = {"parquet": ("pyarrow",), "zarr": ("zarr",)}


def check_format(name: str, options: ExtractionOptions) -> None:
    """Check a format before any work.

    Raises:
        PhregError: another name; or options whose results only ``.npy`` files can hold.
        BackendMissing: the format's library is not installed.
    """
    if name not in FORMATS:
        raise PhregError(f"format: got {name!r}, expected {', '.join(FORMATS[:-1])} or {FORMATS[-1]}.")
    if name == "npy":
        return
    if options.window is not None:
        raise PhregError(
            f"format: got --window with {name}, whose images must have one shape; use --format npy, or --fit pad."
        )
    if options.pictures:
        raise PhregError(f"format: got --pictures with {name}; pictures go with --format npy.")
    require(f"`--format {name}`", **{name: MODULES[name]})


def open_writer(name: str, part: Part, task: ExtractionTask) -> ImageWriter:
    """Return the writer of a format; its library is imported now."""
    if name == "parquet":
        from phreg_deploy.extraction.parquet_files import ParquetWriter

        return ParquetWriter(part, task)
    if name == "zarr":
        from phreg_deploy.extraction.zarr_arrays import ZarrWriter

        return ZarrWriter(part, task)
    return NpyWriter(part, task)


class ImageWriter(Protocol):
    """Writes one image after another into a part."""

    def add(self, source: ImageSource, pixels: Any, dense: DenseFeatures) -> None: ...

    def flush(self) -> None:
        """Publish what is not yet published."""


class NpyWriter:
    """``NAME.npy`` for each image and output; each image is published at once."""

    def __init__(self, part: Part, task: ExtractionTask) -> None:
        self.part, self.task = part, task
        self.files = FeatureWriter(part.scratch, task.dtype, task.extractor.manifest.heads)

    def add(self, source: ImageSource, pixels: Any, dense: DenseFeatures) -> None:
        files = file_names(source.name, self.task.outputs, self.task.pictures)
        image = self.files.write(source, files, pixels, dense)
        self.part.publish(list(files.values()), [{"name": source.name, **image.to_json()}])

    def flush(self) -> None:
        pass
