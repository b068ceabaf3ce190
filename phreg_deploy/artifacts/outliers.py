"""Find the patch tokens whose norm stands apart from the other norms, without a factor chosen for a model.

The logarithms of ordinary norms are close to normal in every ViT that was looked at, whatever their width. Outliers are
the tokens that such a distribution would not hold. B images, N patch tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

# A token is an outlier from this distance to the median on, in standard deviations of the logarithm: a normal
# distribution holds 6 in 100,000 tokens beyond it.
DEVIATIONS = 4.0
# Fewer tokens than this share are the tail of an ordinary distribution.
LEAST_RATE = 5e-4
# The interquartile range of a normal distribution in standard deviations.
_QUARTILES = 1.349


@dataclass(frozen=True)
class NormBand:
    """Where the norms of ordinary tokens lie at one block: ``median``, and ``spread`` of the natural logarithm."""

    median: float
    spread: float

    @classmethod
    def of(cls, norms: np.ndarray) -> NormBand:
        """Measure the band of ``norms``, any shape. Quartiles decide, so that a quarter of outliers moves nothing."""
        low, middle, high = np.quantile(np.log(norms), (0.25, 0.5, 0.75))
        return cls(float(np.exp(middle)), float(max(high - low, 1e-6) / _QUARTILES))

    def deviations(self, norms: np.ndarray) -> np.ndarray:
        """Signed distance of each norm to the median, in spreads; positive for long tokens."""
        return (np.log(norms) - np.log(self.median)) / self.spread

    def outside(self, norms: np.ndarray) -> np.ndarray:
        """Which tokens are outliers: bool, of the shape of ``norms``; long and short ones alike."""
        return np.abs(self.deviations(norms)) > DEVIATIONS


def clearest_block(block_norms: Sequence[np.ndarray]) -> int:
    """The block whose outlier tokens stand out most, summed over tokens.

    Args:
        block_norms: norms after each block, ``(B, N)`` each.
    """
    clarity = []
    for norms in block_norms:
        distance = np.abs(NormBand.of(norms).deviations(norms))
        clarity.append(float(np.where(distance > DEVIATIONS, distance, 0).mean()))
    return int(np.argmax(clarity))
