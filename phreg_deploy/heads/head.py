"""``Head``: a linear layer on dense features. B images, (Hp, Wp) patch grid, C channels, K outputs."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from phreg_deploy.bundle.heads import LARGEST_EXPONENT, MOST_CLASSES
from phreg_deploy.errors import PhregError
from phreg_deploy.heads.inputs import input_names, join_layers
from phreg_deploy.heads.state_dict import EPS, linear_of
from phreg_deploy.heads.storage import TENSORS, read_facts, read_tensors, write_head
from phreg_deploy.images.upsampling import upsample
from phreg_deploy.layers import DEPTH, SEGMENTATION

TASKS = (SEGMENTATION, DEPTH)
Colour = tuple[int, int, int]


@dataclass(frozen=True)
class Head:
    """A linear layer that turns each patch's features into class scores or depth; equal to a 1x1 convolution.

    ``weight`` float32 ``(K, C)`` and ``bias`` float32 ``(K,)``: any normalisation of the features is folded in.
    ``layers``: the layers whose features are joined along C, in this order, by the number of blocks that their tokens
    have passed; None for the features after the last block.

    ``task`` "segmentation": ``classes`` names the K outputs, ``colours`` are 8-bit RGB or None, ``ignore`` is the value
    of masks that means no class, or None. ``task`` "depth": ``classes`` is empty. Without ``bins`` K is 1 and depth is
    the exponential of the output; with ``bins`` ``(K,)``, depth is their mean weighted by the softmax of the outputs.
    Depth is clipped to ``depth_range``, in the unit of the ground truth.
    ``trained_on``: facts about the training, JSON.
    """

    weight: np.ndarray
    bias: np.ndarray
    task: str = SEGMENTATION
    classes: tuple[str, ...] = ()
    colours: tuple[Colour, ...] | None = None
    layers: tuple[int, ...] | None = None
    ignore: int | None = None
    bins: tuple[float, ...] | None = None
    depth_range: tuple[float, float] | None = None
    trained_on: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        outputs = len(self.weight)
        if self.weight.ndim != 2 or 0 in self.weight.shape or self.bias.shape != (outputs,):
            got = f"weight {self.weight.shape} and bias {self.bias.shape}"
            raise PhregError(f"head: got {got}, expected (K, C) and (K,).")
        if self.task not in TASKS:
            raise PhregError(f"head: got the task {self.task!r}, expected {' or '.join(TASKS)}.")
        layers = self.layers
        if layers is not None and (not layers or not all(type(n) is int and n > 0 for n in layers)):
            raise PhregError(f"head: got the layers {layers}, expected numbers of blocks from 1, or none.")
        if layers is not None and self.width % len(layers):
            raise PhregError(f"head: got {self.width} channels over {len(layers)} layers, expected as many from each.")
        if self.task == SEGMENTATION:
            _check_classes(self)
        else:
            _check_depth(self)

    @property
    def width(self) -> int:
        """C, the channels of all its layers together."""
        return int(self.weight.shape[1])

    @property
    def inputs(self) -> tuple[str, ...]:
        """The outputs of a bundle's graph that the head reads, such as ``features`` or ``features.6``."""
        return input_names(self.layers)

    def select(self, outputs: Mapping[str, np.ndarray]) -> np.ndarray:
        """Join the head's ``inputs`` out of a bundle's outputs by name: ``(B, Hp, Wp, C)``.

        Raises:
            PhregError: an output is missing.
        """
        return join_layers(outputs, self.layers)

    def logits(self, features: np.ndarray) -> np.ndarray:
        """Apply the layer to ``features`` ``(B, Hp, Wp, C)``: float32 ``(B, Hp, Wp, K)``.

        Raises:
            PhregError: features of another width.
        """
        if features.ndim != 4 or features.shape[-1] != self.width:
            raise PhregError(f"head: got features {features.shape}, expected (B, Hp, Wp, {self.width}).")
        return features.astype(np.float32, copy=False) @ self.weight.T + self.bias

    def labels(self, features: np.ndarray, size: tuple[int, int] | None = None) -> np.ndarray:
        """Predict classes, uint8 ``(B, Hp, Wp)``, or depth, float32 ``(B, Hp, Wp)``.

        Args:
            features: ``(B, Hp, Wp, C)``.
            size: (H, W); logits are enlarged bilinearly first, and the result is ``(B, H, W)``. None: one per patch.
        """
        logits = self.logits(features)
        return self.decide(logits if size is None else upsample(logits, size))

    def decide(self, logits: np.ndarray) -> np.ndarray:
        """Turn logits ``(..., K)`` into classes, uint8, or depth, float32, ``(...)``."""
        if self.task == SEGMENTATION:
            return logits.argmax(-1).astype(np.uint8)
        low, high = self.depth_range or (0.0, np.inf)
        if self.bins is None:
            bounded = np.clip(logits[..., 0], -LARGEST_EXPONENT, LARGEST_EXPONENT)
            return np.clip(np.exp(bounded), low, high).astype(np.float32)
        share = np.exp(logits - logits.max(-1, keepdims=True))
        depth = share @ np.asarray(self.bins, np.float32) / share.sum(-1)
        return np.clip(depth, low, high).astype(np.float32)

    @classmethod
    def read(cls, path: Path | str, prefix: str = "") -> Head:
        """Read a folder with ``head.json`` and ``head.safetensors``, or a state dict of another program.

        A state dict (``.safetensors``, or ``.pth`` read by ``weights_only``) holds one linear layer or 1x1 convolution,
        and perhaps a batch norm before it, whose ``eps`` is taken as 1e-5. It is read as a segmentation head of the
        final features, with classes named by number; ``dataclasses.replace`` sets what it does not say.

        Args:
            prefix: of the names to read in a state dict, such as ``decode_head.``.

        Raises:
            PhregError: nothing there, damaged files, a newer format, or another kind of head.
            BackendMissing: safetensors, or PyTorch for a ``.pth``, is not installed.
        """
        path = Path(path)
        if not path.is_dir():
            weight, bias = linear_of(read_tensors(path), path.name, prefix)
            return cls(weight, bias, classes=tuple(f"class {k}" for k in range(len(weight))))
        facts = read_facts(path)
        eps, width = facts.pop("eps"), facts.pop("width")
        weight, bias = linear_of(read_tensors(path / TENSORS), TENSORS, prefix, EPS if eps is None else eps)
        if width != weight.shape[1]:
            raise PhregError(f"head: {path} says {width} channels, but the weight has {weight.shape[1]}.")
        try:
            # Lists of JSON become tuples, also within a list.
            tuples: dict[str, Any] = {k: _tuples(v) if k != "trained_on" else dict(v or {}) for k, v in facts.items()}
            return cls(weight, bias, **{**tuples, "classes": tuples["classes"] or ()})
        except (TypeError, ValueError) as error:
            raise PhregError(f"head: {path} is damaged ({error}); copy the head again.") from None

    def write(self, folder: Path | str, force: bool = False, reads: Iterable[Path | None] = ()) -> None:
        """Write the head as a folder (``docs/heads.md``).

        Args:
            force: replace an output of this project. reads: inputs that must not be replaced.

        Raises:
            PhregError: the folder exists, or cannot be written.
        """
        facts = {
            "task": self.task,
            "classes": list(self.classes),
            "colours": self.colours,
            "layers": self.layers,
            "width": self.width,
            "ignore": self.ignore,
            "bins": self.bins,
            "depth_range": self.depth_range,
            "trained_on": self.trained_on,
        }
        write_head(Path(folder), {"weight": self.weight, "bias": self.bias}, facts, force, reads)


def _check_classes(head: Head) -> None:
    outputs, names = len(head.weight), head.classes
    if len(names) != outputs or not all(isinstance(name, str) for name in names):
        raise PhregError(f"head: got {len(names)} names of classes for {outputs} outputs, expected one for each.")
    if outputs > MOST_CLASSES:
        raise PhregError(f"head: got {outputs} classes, expected at most {MOST_CLASSES}, since masks have 8 bits.")
    if head.bins is not None or head.depth_range is not None:
        raise PhregError("head: bins and depth_range go with the task depth.")
    if head.ignore is not None and not (type(head.ignore) is int and 0 <= head.ignore <= 255):
        raise PhregError(f"head: got the ignored value {head.ignore!r}, expected 0 to 255, or none.")
    if head.colours is not None:
        levels = [level for colour in head.colours for level in colour]
        triples = all(len(colour) == 3 for colour in head.colours)
        if len(head.colours) != outputs or not triples or not all(type(n) is int and 0 <= n <= 255 for n in levels):
            raise PhregError(f"head: got the colours {head.colours}, expected 8-bit RGB for each of {outputs} classes.")


def _check_depth(head: Head) -> None:
    expected = 1 if head.bins is None else len(head.bins)
    if len(head.weight) != expected:
        raise PhregError(f"head: got {len(head.weight)} outputs of a depth head, expected {expected}.")
    if head.classes or head.colours is not None:
        raise PhregError("head: classes and colours go with the task segmentation.")
    if head.bins is not None and not all(isinstance(b, (int, float)) and 0 < b < np.inf for b in head.bins):
        raise PhregError("head: bins should be depths above 0.")
    if head.depth_range is not None and not (
        len(head.depth_range) == 2 and 0 < head.depth_range[0] < head.depth_range[1]
    ):
        raise PhregError(f"head: got the depth range {head.depth_range}, expected two depths above 0, growing.")


def _tuples(value: Any) -> Any:
    return tuple(_tuples(part) for part in value) if isinstance(value, list) else value
