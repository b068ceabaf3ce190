"""Heads on dense features: class scores or depth per patch, trained or from text embeddings of class names.

Reading and computing need numpy, not PyTorch.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from phreg_deploy.heads.class_embeddings import ClassEmbeddings
from phreg_deploy.heads.head import Head
from phreg_deploy.heads.text_head import TextHead

if TYPE_CHECKING:
    from phreg_deploy.bundle.bundle import Bundle

__all__ = ["ClassEmbeddings", "Head", "TextHead", "attach"]


def attach(
    bundle: Path | str,
    heads: Mapping[str, Path | str | Head | TextHead],
    output: Path | str,
    *,
    upsample: str | None = None,
    stride: int = 1,
    labels: bool = False,
    only_head: bool = False,
    force: bool = False,
) -> Bundle:
    """Write a bundle that serves the answers of heads beside its features, or alone.

    The heads compute in float32, and the features stay as they are; so an INT8 bundle takes a head as an FP32 one does.
    The exam gets their answers to its features, computed by numpy.

    Args:
        bundle: of any precision. heads: name -> head, or the path of one, or of ``classes.npz``; the name "" is for the
            only head of a kind, whose output is ``segmentation``, ``labels`` or ``depth``; others are e.g.
            ``labels.street``. With ``only_head`` there may be none, for a bundle that has heads.
        output: the folder to write. It holds no engines.
        upsample: enlarge the logits: "bilinear", or "joint-bilateral", which follows the image's colours (Kopf et al.
            2007); None gives one answer per patch.
        stride: with ``upsample``, the pixels of the input per answer; it divides the patch.
        labels: serve the class of each place, uint8, in place of the logits.
        only_head: drop every output but those of all heads and ``token_norm``, and what only the others need.
        force: replace an output that exists.

    Raises:
        BackendMissing: onnx is not installed.
        PhregError: a damaged bundle or head, a head of another width, a layer that the bundle does not serve, text
            embeddings of another model, a bundle that serves only heads already, or an output that exists.
    """
    from phreg_deploy.bundle.bundle import Bundle
    from phreg_deploy.bundle.heads import check_upsampling
    from phreg_deploy.errors import PhregError
    from phreg_deploy.extras import require
    from phreg_deploy.files.atomic import check_target

    check_upsampling(upsample, stride)
    if not heads and (labels or upsample):
        raise PhregError("attach: got --labels or --upsample without a head; they go with --head HEAD.")
    if not heads and not only_head:
        raise PhregError("attach: got no head, expected at least one.")
    paths = [Path(head) for head in heads.values() if isinstance(head, (str, Path))]
    check_target(Path(output), force, [Path(bundle), *paths])
    opened = Bundle.read(bundle)
    opened.manifest.need_features("attach", "Give the bundle that the heads were attached to.")
    if not heads and not opened.manifest.heads:
        raise PhregError(f"attach: got --only-head, but {bundle} has no head; expected one, or --head HEAD with it.")
    require("`phreg-deploy attach`", calibration=("onnx",))
    read = {name: _read(head) if isinstance(head, (str, Path)) else head for name, head in heads.items()}
    from phreg_deploy.heads.attachment import attach_heads

    return attach_heads(
        opened, read, Path(output), upsample=upsample, stride=stride, labels=labels, only_head=only_head, force=force
    )


def _read(path: Path | str) -> Head | TextHead:
    return ClassEmbeddings.read(path).head() if Path(path).suffix == ".npz" else Head.read(path)
