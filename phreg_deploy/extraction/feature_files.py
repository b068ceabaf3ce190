"""The files of one extracted image: ``.npy`` for each output, and a picture. ``extraction`` writes their index."""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from PIL import Image

from phreg_deploy.bundle.heads import ServedHead
from phreg_deploy.errors import PhregError
from phreg_deploy.extraction.inputs.sources import MASK
from phreg_deploy.images.overlays import SHARE, class_key, classes_of, draw_answer
from phreg_deploy.images.pictures import colours, components, heat, sheet
from phreg_deploy.layers import FEATURES, LABELS, NORM, kind_of
from phreg_deploy.runtime.dense_features import DenseFeatures

# The index of an output.
INDEX = "features.json"
# Types that ``--dtype`` does not change.
FIXED_DTYPES = {"token_norm": "float32", MASK: "bool", LABELS: "uint8"}


class Stamped(Protocol):
    """An image with a ``stamp``; see ``stamp_of``."""

    @property
    def stamp(self) -> list[int]: ...


@dataclass(frozen=True)
class ExtractedImage:
    """One image and its ``files`` by output; ``shape``: see ``shape_of``; ``stamp``: see ``stamp_of``."""

    image: str
    files: dict[str, str]
    shape: list[int]
    artifact_rate: float
    stamp: list[int]

    def to_json(self) -> dict[str, Any]:
        facts = dict(vars(self))
        return {"image": facts.pop("image"), **facts.pop("files"), **facts}


class FeatureWriter:
    """Writes the files of one image after another; all pictures share the colours of the first."""

    def __init__(self, folder: Path, dtype: str, heads: Sequence[ServedHead] = ()) -> None:
        self.folder, self.dtype, self.heads = folder, dtype, heads
        self.basis: np.ndarray | None = None

    def write(
        self, source: Stamped, files: dict[str, str], image: Image.Image | np.ndarray, dense: DenseFeatures
    ) -> ExtractedImage:
        """Write what ``files`` of ``file_names`` asks for.

        Args:
            source: the image's source, whose text is its name. image: its pixels, for the picture.

        Raises:
            PhregError: values beyond float16.
        """
        arrays = output_arrays(dense, [kind for kind in files if kind != "picture"], self.dtype)
        for kind, file in files.items():
            (self.folder / file).parent.mkdir(parents=True, exist_ok=True)
            if kind == "picture":
                if self.basis is None and FEATURES in dense.outputs():
                    self.basis = components([dense.features[0]])
                _picture(image, dense, self.basis, self.heads).save(self.folder / file)
            else:
                _save(self.folder / file, arrays[kind])
        return ExtractedImage(str(source), files, shape_of(dense), float(dense.artifact_rate[0]), source.stamp)


def shape_of(dense: DenseFeatures) -> list[int]:
    """Return the shape of an image's features, or its patch grid where only heads are served."""
    outputs = dense.outputs()
    return list(outputs.get(FEATURES, outputs[NORM]).shape[1:])


def file_name(name: str, kind: str) -> str:
    """The file of an image's output."""
    return f"{name}.npy" if kind == "features" else f"{name}.{kind}.npy"


def file_names(name: str, outputs: tuple[str, ...], pictures: bool) -> dict[str, str]:
    """The files of an image by output; "picture" is that of the picture."""
    return {kind: file_name(name, kind) for kind in outputs} | ({"picture": f"{name}.png"} if pictures else {})


def output_arrays(dense: DenseFeatures, outputs: Sequence[str], dtype: str) -> dict[str, np.ndarray]:
    """The arrays of the first image by output, in the types that are written. ``dtype``: of all without a fixed one.

    Raises ``PhregError`` for values beyond float16.
    """
    others = {MASK: dense.mask, LABELS: dense.labels}
    arrays = dense.outputs() | {name: value for name, value in others.items() if value is not None}
    return {kind: _narrow(arrays[kind][0], FIXED_DTYPES.get(kind_of(kind), dtype)) for kind in outputs}


def _narrow(array: np.ndarray, dtype: str) -> np.ndarray:
    with np.errstate(over="ignore"):
        narrow = array.astype(dtype)
    if not np.isfinite(narrow).all() and np.isfinite(array).all():
        raise PhregError(f"dtype: features reach {np.abs(array).max():.0f}, beyond float16; use --dtype float32.")
    return narrow


def _save(path: Path, array: np.ndarray) -> None:
    """Write one ``.npy`` at once: ``np.save`` to a file does not report a full disk as such."""
    data = io.BytesIO()
    np.save(data, array, allow_pickle=False)
    path.write_bytes(data.getbuffer())


def _picture(
    image: Image.Image | np.ndarray, dense: DenseFeatures, basis: np.ndarray | None, heads: Sequence[ServedHead]
) -> Image.Image:
    top = 3 * (dense.norm_median or float(np.median(dense.token_norm)))
    picture = Image.fromarray(image) if isinstance(image, np.ndarray) else image
    row = [("image", picture)]
    if basis is not None:
        row.append(("features (PCA)", colours(dense.features[0], basis)))
    row.append(("token norms", heat(dense.token_norm[0], top)))
    for head in heads:
        answer = dense.heads[head.output][0]
        row.append((head.output, draw_answer(picture, head.kind, answer, head.colours)))
        if head.classes:
            key = class_key(classes_of(head.kind, answer), head.classes, head.colours, SHARE)
            row.append((f"classes of {head.output}", key))
    return sheet([row])
