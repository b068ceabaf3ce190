"""``DenseFeatures``: the result of a ``FeatureExtractor``. B batch, (Hp, Wp) patch grid, C width, H heads."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

import numpy as np

from phreg_deploy.artifacts.measures import OUTLIER_FACTOR
from phreg_deploy.bundle.heads import LEAST_NORM, ServedHead
from phreg_deploy.errors import PhregError
from phreg_deploy.layers import DEPTH, LABELS, SEGMENTATION

# The outputs of a layer, in the order of the fields.
KINDS = ("features", "cls", "token_norm")
D = TypeVar("D", bound="DenseFeatures")


class FeaturesNotServed(PhregError, AttributeError):
    """The features of a bundle that serves only heads were asked for; ``hasattr`` is then False."""


@dataclass(frozen=True)
class LayerFeatures:
    """Features of a batch of images at one layer.

    The constructor takes, by place, ``features`` or None, ``cls``, ``token_norm``, ``norm_median`` and ``mask``.

    ``features`` float32 ``(B, Hp, Wp, C)``, registers dropped, after the model's final norm unless the bundle was
    exported with ``--no-layer-norm``; ``cls`` float32 ``(B, C)`` or None; ``token_norm`` float32 ``(B, Hp, Wp)``: L2
    norms of the layer's patch tokens before the final norm. ``norm_median``: always None, since a layer's norms are
    compared with each image's own median. ``mask``: as of ``DenseFeatures``.
    """

    _features: np.ndarray | None
    cls: np.ndarray | None
    token_norm: np.ndarray
    norm_median: float | None = None
    mask: np.ndarray | None = None

    @property
    def features(self) -> np.ndarray:
        """See the class. Raises ``FeaturesNotServed``, a ``PhregError``, where the bundle serves only heads."""
        if self._features is None:
            raise FeaturesNotServed(
                "features: this bundle was written with --only-head, and serves its heads' answers alone. Read heads, "
                "labels, segmentation or depth, or load the bundle that the heads were attached to."
            )
        return self._features

    @property
    def artifact_rate(self) -> np.ndarray:
        """Share (0-1) of high-norm or low-norm patch tokens per image, ``(B,)``; needs no extra forward pass.

        Norms are compared with ``norm_median``, or with each image's own median where it is None. Patches outside the
        ``mask`` are left out.
        """
        flat = self.token_norm.reshape(len(self.token_norm), -1)
        if self.mask is None:
            return _outlier_share(flat, self.norm_median)
        chosen = zip(flat, self.mask.reshape(len(flat), -1))
        return np.concatenate([_outlier_share(norms[None, mask], self.norm_median) for norms, mask in chosen])

    def similarity(self, embedding: Any) -> np.ndarray:
        """Compute the cosine of every patch's features with one embedding or several, float32.

        Args:
            embedding: numbers ``(C,)`` or ``(K, C)`` of any length: a text's in a space that the features were
                projected into (``export --project``), or another patch's features.

        Returns:
            ``(B, Hp, Wp)`` for one embedding, ``(B, Hp, Wp, K)`` for several; 0 where one of both is 0.

        Raises:
            PhregError: another number of channels, or values that are not finite numbers.
        """
        try:
            given = np.asarray(embedding, np.float32)
        except (TypeError, ValueError) as error:
            raise PhregError(f"similarity: the embedding is no array of numbers ({error}).") from None
        width = self.features.shape[-1]
        if given.ndim not in (1, 2) or given.shape[-1] != width or not np.isfinite(given).all():
            got = f"an embedding {given.shape}" if given.shape[-1:] != (width,) else "values that are not finite"
            raise PhregError(
                f"similarity: got {got}, expected finite numbers ({width},) or (K, {width}), as many channels as the "
                "features. For a text's embedding, export the bundle with --project."
            )
        lengths = np.linalg.norm(self.features, axis=-1, keepdims=True) * np.linalg.norm(np.atleast_2d(given), axis=-1)
        cosines = self.features @ np.atleast_2d(given).T / np.maximum(lengths, np.float32(LEAST_NORM))
        return cosines[..., 0] if given.ndim == 1 else cosines


@dataclass(frozen=True)
class DenseFeatures(LayerFeatures):
    """Features of a batch of images after the last block, and what else the bundle serves.

    ``features`` float32 ``(B, Hp, Wp, C)`` after the final norm, registers dropped; ``cls`` float32 ``(B, C)`` or None;
    ``token_norm`` float32 ``(B, Hp, Wp)``: L2 norms of the last block's output before the final norm.
    ``norm_median``: the base model's median norm, where the bundle holds it. ``layers``: of ``export --layers``, by the
    number of blocks that their tokens have passed. ``attention`` float32 ``(B, H, Hp, Wp)``: the class token's in the
    last block, of ``export --attention``; softmax over all tokens, so a head's patches sum to less than 1. ``heads``:
    answers of the bundle's heads by output (``bundle.heads.ServedHead``), such as ``labels`` or ``depth.indoor``.
    ``mask`` bool ``(B, Hp, Wp)``: False for patches that are padding, not image, whose features mean nothing; None
    where there is no padding. Of a bundle with heads alone (``attach --only-head``) there are ``heads``,
    ``token_norm`` and ``artifact_rate``; ``cls`` is None, and ``features`` raises ``FeaturesNotServed``.
    """

    layers: Mapping[int, LayerFeatures] = field(default_factory=dict)
    attention: np.ndarray | None = None
    heads: Mapping[str, np.ndarray] = field(default_factory=dict)

    @property
    def segmentation(self) -> np.ndarray | None:
        """Logits of the head without name, float32 ``(B, Hp, Wp, K)`` or ``(B, H, W, K)``; None if there are none."""
        return self.heads.get(SEGMENTATION)

    @property
    def labels(self) -> np.ndarray | None:
        """Classes by the head without name, uint8 ``(B, Hp, Wp)`` or ``(B, H, W)``; None if there are none."""
        if self.segmentation is not None and LABELS not in self.heads:
            return self.segmentation.argmax(-1).astype(np.uint8)
        return self.heads.get(LABELS)

    @property
    def depth(self) -> np.ndarray | None:
        """Depth by the head without name, float32 ``(B, Hp, Wp)`` or ``(B, H, W)``; None if there is none."""
        return self.heads.get(DEPTH)

    @classmethod
    def of(
        cls: type[D], outputs: Mapping[str, np.ndarray], norm_median: float | None, heads: Sequence[ServedHead] = ()
    ) -> D:
        """Build it from a graph's outputs by name; all but classes become float32."""
        outputs = {
            name: value if value.dtype == np.uint8 else value.astype(np.float32, copy=False)
            for name, value in outputs.items()
        }
        blocks = sorted(int(name.partition(".")[2]) for name in outputs if name.startswith("features."))
        layers = {b: LayerFeatures(*(outputs.get(f"{kind}.{b}") for kind in KINDS)) for b in blocks}  # type: ignore[arg-type]
        own = (outputs.get("features"), outputs.get("cls"), outputs["token_norm"])
        answers = {head.output: outputs[head.output] for head in heads}
        return cls(*own, norm_median, layers=layers, attention=outputs.get("attention"), heads=answers)

    def masked(self: D, mask: np.ndarray | None) -> D:
        """Return the same features with a mask ``(B, Hp, Wp)``, for all layers."""
        layers = {block: replace(layer, mask=mask) for block, layer in self.layers.items()}
        return replace(self, mask=mask, layers=layers)

    def single(self: D, index: int) -> D:
        """Return the features of one image of the batch, with B = 1."""

        def part(array: np.ndarray | None) -> Any:
            return None if array is None else array[index : index + 1]

        own = ("_features", "cls", "token_norm", "mask")
        layers = {
            block: replace(layer, **{name: part(getattr(layer, name)) for name in own})
            for block, layer in self.layers.items()
        }
        arrays = {name: part(getattr(self, name)) for name in (*own, "attention")}
        return replace(self, layers=layers, heads={name: part(a) for name, a in self.heads.items()}, **arrays)

    def outputs(self) -> dict[str, np.ndarray]:
        """Return every array by the name of its output in the graph, such as ``features.3``."""
        named = dict(zip(KINDS, (self._features, self.cls, self.token_norm)))
        for block, layer in self.layers.items():
            named.update({f"{kind}.{block}": getattr(layer, kind) for kind in KINDS})
        named.update({"attention": self.attention, **self.heads})
        return {name: value for name, value in named.items() if value is not None}


def _outlier_share(norms: np.ndarray, median: float | None) -> np.ndarray:
    """Share of outliers in each row of ``(B, N)``."""
    centre = np.median(norms, axis=1, keepdims=True) if median is None else median
    return ((norms > OUTLIER_FACTOR * centre) | (norms < centre / OUTLIER_FACTOR)).mean(axis=1)  # type: ignore[no-any-return]
