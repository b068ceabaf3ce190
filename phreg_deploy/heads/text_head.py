"""``TextHead``: class scores per patch from cosines with text embeddings. S embeddings, C channels, K classes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from phreg_deploy.bundle.heads import LEAST_NORM, MOST_CLASSES, PromptRule
from phreg_deploy.bundle.manifest import Manifest
from phreg_deploy.errors import PhregError
from phreg_deploy.heads.inputs import input_names, join_layers
from phreg_deploy.images.upsampling import upsample
from phreg_deploy.layers import SEGMENTATION


@dataclass(frozen=True)
class TextHead:
    """Scores of classes: the cosine of a patch's features with each text embedding times a scale, plus a bias.

    ``weight`` float32 ``(S, C)``: embeddings of unit length times the scale. ``bias`` float32 ``(S,)``. ``rule``: which
    embeddings are a class's, and the background. ``classes``: names of the K outputs, with the background's.
    ``vision``: timm names of the image towers that the embeddings belong to; empty if they are not known.
    ``ClassEmbeddings.head`` builds it. It has the members of a segmentation ``Head`` that a bundle needs.
    """

    weight: np.ndarray
    bias: np.ndarray
    rule: PromptRule
    classes: tuple[str, ...]
    vision: tuple[str, ...] = ()

    task: ClassVar[str] = SEGMENTATION
    colours: ClassVar[None] = None
    layers: ClassVar[None] = None
    ignore: ClassVar[None] = None
    bins: ClassVar[None] = None
    depth_range: ClassVar[None] = None

    def __post_init__(self) -> None:
        if len(self.classes) > MOST_CLASSES:
            raise PhregError(
                f"classes: got {len(self.classes)}, expected at most {MOST_CLASSES}, since label maps have 8 bits."
            )

    @property
    def width(self) -> int:
        """C, the channels of the embeddings."""
        return int(self.weight.shape[1])

    @property
    def inputs(self) -> tuple[str, ...]:
        """The outputs of a bundle's graph that the head reads."""
        return input_names(None)

    def select(self, outputs: Mapping[str, np.ndarray]) -> np.ndarray:
        """Return the features out of a bundle's outputs by name: ``(B, Hp, Wp, C)``."""
        return join_layers(outputs, None)

    def scores(self, features: np.ndarray) -> np.ndarray:
        """Compute the scores of embeddings, float32 ``(B, Hp, Wp, S)``, of ``features`` ``(B, Hp, Wp, C)``.

        Raises:
            PhregError: features of another width.
        """
        if features.ndim != 4 or features.shape[-1] != self.width:
            raise PhregError(f"head: got features {features.shape}, expected (B, Hp, Wp, {self.width}).")
        x = features.astype(np.float32, copy=False)
        length = np.maximum(np.linalg.norm(x, axis=-1, keepdims=True), np.float32(LEAST_NORM))
        return x @ self.weight.T / length + self.bias

    def combine(self, scores: np.ndarray) -> np.ndarray:
        """Turn scores of embeddings ``(..., S)`` into scores of classes ``(..., K)``, background included."""
        rule = self.rule
        best = np.maximum.reduceat(scores, np.cumsum((0, *rule.counts[:-1])), axis=-1)
        if rule.background is None:
            return best
        top = scores.max(-1, keepdims=True)
        least = np.log(np.exp(scores - top).sum(-1, keepdims=True)) + top + np.float32(rule.background)
        if rule.first:
            return np.concatenate([np.maximum(best[..., :1], least), best[..., 1:]], -1)
        return np.concatenate([least, best], -1)

    def logits(self, features: np.ndarray) -> np.ndarray:
        """Compute the scores of classes, float32 ``(B, Hp, Wp, K)``; raises as ``scores``."""
        return self.combine(self.scores(features))

    def labels(self, features: np.ndarray, size: tuple[int, int] | None = None) -> np.ndarray:
        """Predict classes, uint8 ``(B, Hp, Wp)``, or ``(B, H, W)`` by scores enlarged bilinearly to ``size`` (H, W)."""
        logits = self.logits(features)
        return self.decide(logits if size is None else upsample(logits, size))

    def decide(self, logits: np.ndarray) -> np.ndarray:
        """Turn scores of classes ``(..., K)`` into classes, uint8 ``(...)``."""
        return logits.argmax(-1).astype(np.uint8)


def check_space(manifest: Manifest, head: TextHead, verb: str) -> None:
    """Check that a bundle's features are in the space of the head's embeddings, as far as can be known.

    Raises:
        PhregError: features without projection, of another width, or of another model; ``verb`` begins the message.
    """
    own, width = str(manifest.source.get("model")), manifest.channels("features")
    if not manifest.readout.project:
        raise PhregError(
            f"{verb}: the bundle serves features that are not projected into the space of text. Export it with "
            "--project (and, for CLIP, --readout value or neighbour), then use the classes."
        )
    if width != head.width:
        raise PhregError(
            f"{verb}: the text embeddings have {head.width} channels, and the features of the bundle {width}; expected "
            f"classes.npz of the CLIP or SigLIP that the bundle came from, {own}."
        )
    check_tower(own, head, verb)


def check_tower(model: str, head: TextHead, verb: str) -> None:
    """Check that a timm name, with its tag where that is known, is one that the embeddings go with.

    Raises:
        PhregError: it is another one; ``verb`` begins the message.
    """
    # Weights of a file have no tag; their architecture alone is compared.
    architectures = {name.partition(".")[0] for name in head.vision}
    known = {name for name in head.vision if "." in name}
    fits = model.partition(".")[0] in architectures and (not known or "." not in model or model in known)
    if head.vision and not fits:
        raise PhregError(
            f"{verb}: the text embeddings go with {' or '.join(head.vision)}, and the features come from {model}; "
            "expected classes.npz of the same model: `phreg-deploy classes --model`."
        )
