"""What an extraction computes of each image: its options, checked against a bundle, and the call of the extractor."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from phreg_deploy.bundle.heads import NAME, ServedHead
from phreg_deploy.errors import PhregError
from phreg_deploy.extraction.inputs.archives import ArchiveReader
from phreg_deploy.extraction.inputs.sources import MASK, OUTPUTS, ImageSource
from phreg_deploy.images.fitting import check_fit
from phreg_deploy.images.intake import rgb
from phreg_deploy.layers import ATTENTION, HEADS, LABELS, SEGMENTATION
from phreg_deploy.runtime.dense_features import DenseFeatures
from phreg_deploy.runtime.features import FeatureExtractor
from phreg_deploy.runtime.tiling import window_sizes

DTYPES = ("float32", "float16")


@dataclass(frozen=True)
class ExtractionOptions:
    """What to compute of each image, and what to write of it.

    ``size``, ``fit``: as in a call of the extractor. ``window``, ``stride``: of ``FeatureExtractor.tiled``; without a
    window, images are resized to ``size``. ``outputs``: of the bundle's, and "mask", which "pad" and a window always
    write. ``dtype``: of features, class tokens and attention; token norms are always float32. ``pictures``: also write
    ``NAME.png``: the image, its features as colours, its norms as heat, its heads' answers.
    """

    size: tuple[int, int] | None = None
    fit: str | None = None
    window: tuple[int, int] | None = None
    stride: tuple[int, int] | None = None
    outputs: tuple[str, ...] = ("features",)
    dtype: str = "float32"
    pictures: bool = False

    def check(self) -> None:
        """Raise ``PhregError`` for an unknown fit, or an option that another leaves without effect."""
        check_fit(self.fit)
        if self.stride is not None and self.window is None:
            raise PhregError("stride: got a stride without a window; expected both: --window 518 --stride 259.")
        for name, value in (("fit", self.fit), ("image-size", self.size)):
            if self.window is not None and value is not None:
                raise PhregError(f"window: got --window and --{name}; expected one of them. Windows are not resized.")


class ExtractionTask:
    """Options for one extractor: ``settings`` identify what is written, ``outputs`` name it.

    ``heads``: for each written answer of a head, its ``output``, ``kind`` and ``classes``, as in the manifest.
    """

    def __init__(self, extractor: FeatureExtractor, options: ExtractionOptions) -> None:
        """Check the options.

        Raises:
            PhregError: an output that the bundle lacks, a size that it does not serve, or options that exclude each
                other.
        """
        options.check()
        manifest = extractor.manifest
        self.extractor, self.fit, self.pictures = extractor, options.fit, options.pictures
        self.dtype = options.dtype
        self.outputs = _with_mask(options.outputs, masked=options.fit == "pad" or options.window is not None)
        served = {MASK, *manifest.outputs, *([LABELS] if SEGMENTATION in manifest.outputs else [])}
        if missing := [name for name in self.outputs if name not in served]:
            advice = f" Choose, e.g. --outputs {manifest.heads[0].output}." if manifest.only_heads else ""
            raise PhregError(f"outputs: this bundle has no {missing[0]}; it has {', '.join(manifest.outputs)}.{advice}")
        self.heads = _describe_heads(manifest.heads, self.outputs)
        self.size = options.size or options.window or manifest.sizes.default
        manifest.sizes.check(self.size, extractor.spec.patch)
        windowed = options.window is not None
        self.tiles = window_sizes(manifest, options.window, options.stride) if windowed else None
        self.settings: dict[str, Any] = {
            "graph_sha256": manifest.files.get("model.onnx"),
            "size": list(self.size),
            "fit": options.fit,
            "stride": None if self.tiles is None else list(self.tiles[1]),
            "outputs": list(self.outputs),
            "dtype": options.dtype,
            "pictures": options.pictures,
            "preprocess": json.loads(json.dumps(extractor.preprocess.to_json())),
        }

    def read(self, source: ImageSource, archives: ArchiveReader) -> Any:
        """The whole image, upright, or the image of the model's size with its mask.

        Raises:
            PhregError: it cannot be read; the message names it.
        """
        image = source.path if source.member is None else archives.read(source.path, source.member)
        try:
            if self.tiles is not None:
                return rgb(image, self.extractor.preprocess.exif, whole=True)
            return self.extractor.fitted(image, self.size, fit=self.fit)
        except PhregError as error:
            if source.member is None:
                raise
            raise PhregError(f"image: {source}: {str(error).removeprefix('image: ')}") from None

    def dense(self, image: Any, advance: Callable[..., None]) -> tuple[Any, DenseFeatures]:
        """The pixels and the features of an image of ``read``; windows are reported to ``advance``."""
        if self.tiles is not None:
            report = lambda done, of: advance(0, note=f"window {done} of {of}")  # noqa: E731
            return image, self.extractor.tiled(image, *self.tiles, exif=False, report=report)
        mask = None if image.mask is None else image.mask[None]
        return image.image, self.extractor.dense(image.image[None]).masked(mask)


def parse_outputs(text: str) -> tuple[str, ...]:
    """Read names of outputs with commas between, such as ``features,features.6``; a bundle may lack some.

    Raises ``PhregError`` for anything else.
    """
    names = tuple(dict.fromkeys(part.strip() for part in text.split(",")))
    layer = rf"({'|'.join(OUTPUTS)})\.[1-9]\d{{0,5}}"
    head = rf"({'|'.join(HEADS)})(\.{NAME.pattern})?"
    known = [name for name in names if name in (*OUTPUTS, ATTENTION, MASK) or re.fullmatch(f"{layer}|{head}", name)]
    if len(known) < len(names):
        expected = (
            f"{', '.join(OUTPUTS)}, {ATTENTION}, {MASK}, of a layer (features.6), or of a head ({', '.join(HEADS)})"
        )
        raise PhregError(f"outputs: got {text!r}, expected one or more of {expected}, with commas between.")
    return names


def _with_mask(outputs: tuple[str, ...], masked: bool) -> tuple[str, ...]:
    """Add the mask where there is one."""
    if MASK in outputs and not masked:
        raise PhregError("outputs: got mask without padding; expected --fit pad or --window with it.")
    return (*outputs, MASK) if masked and MASK not in outputs else outputs


def _describe_heads(heads: Sequence[ServedHead], outputs: Sequence[str]) -> list[dict[str, Any]]:
    """Describe the heads whose answers are among the outputs; ``labels`` may be those of ``segmentation``."""
    served = {head.output: {"kind": head.kind, "classes": list(head.classes)} for head in heads}
    if SEGMENTATION in served:
        served.setdefault(LABELS, {**served[SEGMENTATION], "kind": LABELS})
    return [{"output": output, **facts} for output, facts in served.items() if output in outputs]
