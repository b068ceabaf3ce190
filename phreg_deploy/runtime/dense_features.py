"""``DenseFeatures``: the result of a ``FeatureExtractor``. B batch, (Hp, Wp) patch grid, C width, H heads."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np

from phreg_deploy.artifacts.measures import OUTLIER_FACTOR

# The outputs of a layer, in the order of the fields.
KINDS = ("features", "cls", "token_norm")


@dataclass(frozen=True)
class LayerFeatures:
    """Features of a batch of images at one layer.

    ``features`` float32 ``(B, Hp, Wp, C)``, registers dropped, after the model's final norm unless the bundle was
    exported with ``--no-layer-norm``; ``cls`` float32 ``(B, C)`` or None; ``token_norm`` float32 ``(B, Hp, Wp)``: L2
    norms of the layer's patch tokens before the final norm. ``norm_median``: always None, since a layer's norms are
    compared with each image's own median.
    """

    features: np.ndarray
    cls: np.ndarray | None
    token_norm: np.ndarray
    norm_median: float | None = None

    @property
    def artifact_rate(self) -> np.ndarray:
        """Share (0-1) of high-norm or low-norm patch tokens per image, ``(B,)``; needs no extra forward pass.

        Norms are compared with ``norm_median``, or with each image's own median where it is None.
        """
        flat = self.token_norm.reshape(len(self.token_norm), -1)
        median = np.median(flat, axis=1, keepdims=True) if self.norm_median is None else self.norm_median
        return ((flat > OUTLIER_FACTOR * median) | (flat < median / OUTLIER_FACTOR)).mean(axis=1)  # type: ignore[no-any-return]


@dataclass(frozen=True)
class DenseFeatures(LayerFeatures):
    """Features of a batch of images after the last block, and what else the bundle serves.

    ``features`` float32 ``(B, Hp, Wp, C)`` after the final norm, registers dropped; ``cls`` float32 ``(B, C)`` or None;
    ``token_norm`` float32 ``(B, Hp, Wp)``: L2 norms of the last block's output before the final norm.
    ``norm_median``: the base model's median norm, where the bundle holds it. ``layers``: of ``export --layers``, by the
    number of blocks that their tokens have passed. ``attention`` float32 ``(B, H, Hp, Wp)``: the class token's in the
    last block, of ``export --attention``; softmax over all tokens, so a head's patches sum to less than 1.
    """

    layers: Mapping[int, LayerFeatures] = field(default_factory=dict)
    attention: np.ndarray | None = None

    @classmethod
    def of(cls, outputs: Mapping[str, np.ndarray], norm_median: float | None) -> DenseFeatures:
        """Build it from a graph's outputs by name, float32."""
        blocks = sorted(int(name.partition(".")[2]) for name in outputs if name.startswith("features."))
        layers = {b: LayerFeatures(*(outputs.get(f"{kind}.{b}") for kind in KINDS)) for b in blocks}  # type: ignore[arg-type]
        own = (outputs["features"], outputs.get("cls"), outputs["token_norm"])
        return cls(*own, norm_median, layers, outputs.get("attention"))

    def outputs(self) -> dict[str, np.ndarray]:
        """Return every array by the name of its output in the graph, such as ``features.3``."""
        named = {kind: getattr(self, kind) for kind in KINDS}
        for block, layer in self.layers.items():
            named.update({f"{kind}.{block}": getattr(layer, kind) for kind in KINDS})
        return {name: value for name, value in {**named, "attention": self.attention}.items() if value is not None}
