"""Name the layers whose features a bundle serves beside those of the last, and the outputs that hold them.

A layer is named by how many blocks its tokens have passed: of a model of depth 12, layer 12 is the output of the last
block, and timm's index of layer L is L - 1.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from fractions import Fraction

from phreg_deploy.errors import PhregError
from phreg_deploy.spec import Stored

EXPECTED = "expected numbers of blocks (3,6,9,12), fractions of the depth (1/4,1/2,3/4,1), or all"
# The outputs of one layer, each followed by a dot and the layer's number.
FEATURES, CLS, NORM = "features", "cls", "token_norm"
ATTENTION = "attention"
# The outputs of heads: logits, classes, depth; a dot and the head's name may follow.
SEGMENTATION, LABELS, DEPTH = "segmentation", "labels", "depth"
HEADS = (SEGMENTATION, LABELS, DEPTH)


@dataclass(frozen=True)
class Layers(Stored):
    """``blocks``: how many blocks each layer's tokens have passed, from 1 to the depth, in growing order.

    ``norm``: whether the model's final norm is applied to their features and class tokens.
    """

    blocks: tuple[int, ...]
    norm: bool


def check_layers(text: str | None, norm: bool = True) -> None:
    """Check the form of ``--layers`` before the model is loaded.

    Raises:
        PhregError: the text has another form, or ``norm`` is False without layers.
    """
    if text is not None:
        _read(text)
    elif not norm:
        raise PhregError("layers: got --no-layer-norm without --layers; expected both, or neither.")


def parse_layers(text: str, depth: int) -> tuple[int, ...]:
    """Read ``3,6,9,12``, ``1/4,1/2,3/4,1`` or ``all`` for a model of ``depth`` blocks.

    In a list with a fraction, 1 is the whole depth. A fraction of the depth is rounded to the nearest block.

    Returns:
        Numbers of blocks, each once, in growing order.

    Raises:
        PhregError: the text has another form, or a number is not from 1 to the depth.
    """
    parts = _read(text)
    if parts is None:
        return tuple(range(1, depth + 1))
    if any(part.denominator > 1 for part in parts):
        blocks = {max(1, math.floor(part * depth + Fraction(1, 2))) for part in parts}
    else:
        blocks = {int(part) for part in parts}
    beyond = [block for block in sorted(blocks) if not 1 <= block <= depth]
    if beyond:
        raise PhregError(
            f"layers: got {beyond[0]}, expected numbers from 1 to {depth}: the model has {depth} blocks, and layer "
            f"{depth} is the output of the last."
        )
    return tuple(sorted(blocks))


def output_names(class_token: bool, layers: Layers | None, attention: bool) -> list[str]:
    """List the outputs of a graph in their order."""
    kinds = [FEATURES, *([CLS] if class_token else []), NORM]
    blocks = () if layers is None else layers.blocks
    return kinds + [f"{kind}.{block}" for block in blocks for kind in kinds] + ([ATTENTION] if attention else [])


def kind_of(output: str) -> str:
    """Return what an output holds: ``features`` for ``features.6``."""
    return output.partition(".")[0]


def _read(text: str) -> list[Fraction] | None:
    """Return the numbers and fractions in the text; None for all layers."""
    if text.strip() == "all":
        return None
    parts = [part.strip() for part in text.split(",")]
    if not all(re.fullmatch(r"[1-9]\d{0,5}(/[1-9]\d{0,5})?", part) for part in parts):
        raise PhregError(f"layers: got {text!r}, {EXPECTED}.")
    values = [Fraction(part) for part in parts]
    if any("/" in part for part in parts) and any(value > 1 for value in values):
        raise PhregError(f"layers: got {text!r}, {EXPECTED}; with fractions, each is at most 1.")
    if any("/" in part for part in parts) and all(value.denominator == 1 for value in values):
        raise PhregError(f"layers: got {text!r}, {EXPECTED}; write 1 with a smaller fraction, or the number of blocks.")
    return values
