"""``assert_artifact_rate``: few patch tokens of photographs are norm outliers."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from phreg_deploy.artifacts.measures import norm_outliers, outlier_mask
from phreg_deploy.errors import PhregError
from phreg_deploy.images.photographs import Photographs, read_photographs
from phreg_deploy.images.pictures import sheet
from phreg_deploy.pytest_plugin.context import Assertion, CaseContext, refusing
from phreg_deploy.pytest_plugin.failures import IMAGES, Miss, Place, Verdict
from phreg_deploy.pytest_plugin.parity import LIMIT
from phreg_deploy.pytest_plugin.pictures import artifact_row
from phreg_deploy.pytest_plugin.settings import PathLike
from phreg_deploy.runtime.features import FeatureExtractor

MEASURE = "norm over the median"


@dataclass(frozen=True)
class Norms:
    """Token norms ``(M, Hp, Wp)`` of M photographs, and the ``median`` that outliers are relative to."""

    photographs: Photographs
    norms: np.ndarray
    median: float

    @property
    def outliers(self) -> np.ndarray:
        """Bool ``(M, Hp, Wp)``."""
        return outlier_mask(self.norms, self.median)

    def worst(self) -> list[int]:
        """The images with the most outliers."""
        rates = self.outliers.mean((1, 2))
        return [int(i) for i in np.argsort(-rates, kind="stable")[:IMAGES] if rates[i] > 0]

    def place(self, index: int) -> Place:
        """The outliers of an image that are farthest from the median, each with its norm over the median."""
        ratio = self.norms[index].astype(np.float64) / self.median
        far = np.where(self.outliers[index], np.abs(np.log(np.maximum(ratio, 1e-12))), 0)
        found = Place.of(self.photographs.names[index], MEASURE, far)
        patches = tuple((row, column, float(ratio[row, column])) for row, column, _ in found.patches)
        return Place(found.image, MEASURE, found.grid, patches)


class AssertArtifactRate(Assertion):
    """The fixture ``assert_artifact_rate``."""

    @refusing
    def __call__(
        self,
        bundle: PathLike | None = None,
        images: PathLike | None = None,
        *,
        at_most: float | None = None,
        limit: int | None = None,
        backend: str | None = None,
    ) -> None:
        """Measure the norm-outlier rate as ``phreg-deploy artifacts`` does, without the shifted views.

        Args:
            images: folder of photographs, of which the first ``limit`` (64) are read.
            at_most: largest share of patch tokens, 0-1.

        Raises:
            AssertionError: there are more; names the images and patches.
        """
        __tracebackhide__ = True
        context, settings = self._context, self._context.settings
        bar = settings.number("artifact_rate", at_most, 1)
        if bar is None:
            raise PhregError(
                "assert_artifact_rate: no bar; give at_most to the call, or phreg_artifact_rate in the ini."
            )
        folder = settings.needed_path("images", images, "a folder of photographs")
        count = settings.count("limit", limit, LIMIT)
        extractor = context.load(bundle, backend)
        _settle(context, extractor, _measure(extractor, folder, count), bar)


def _measure(extractor: FeatureExtractor, folder: PathLike, limit: int | None) -> Norms:
    manifest = extractor.manifest
    photographs = read_photographs(folder, manifest.sizes.default, manifest.preprocess, limit)
    step = manifest.batches.highest
    batches = (photographs.batch(start, start + step) for start in range(0, len(photographs), step))
    norms = np.concatenate([extractor.dense(batch).token_norm for batch in batches])
    return Norms(photographs, norms, norm_outliers(norms, manifest.norm_median).median)


def _settle(context: CaseContext, extractor: FeatureExtractor, measured: Norms, bar: float) -> None:
    __tracebackhide__ = True
    label = context.label("artifact_rate", extractor)
    found = norm_outliers(measured.norms, measured.median)
    photographs, rates = measured.photographs, measured.outliers.mean((1, 2))
    figures = {"rate": found.rate, "upper": found.upper, "lower": found.lower, "largest": found.largest}
    context.record(label, {**figures, "images": len(photographs)})
    document = {
        "norm_outliers": found.to_json(),
        "images": [{"image": name, "rate": float(rate)} for name, rate in zip(photographs.names, rates)],
        "skipped": photographs.skipped,
    }
    if found.rate <= bar:
        Verdict("assert_artifact_rate", label, extractor, (), document).settle(context)
        return
    worst = measured.worst()
    places = [measured.place(i) for i in worst]
    share = f"{found.rate:.4%} of the patch tokens of {len(photographs)} images"
    sentence = f"{share} are norm outliers, expected at most {bar:.4%}"
    miss = Miss("artifact_rate", found.rate, bar, sentence, tuple(places))
    rows = []
    for i, place in zip(worst, places):
        pixels = photographs.array(i)
        dense = extractor.dense(pixels[None])
        features = None if extractor.manifest.only_heads else dense.features[0]
        rows.append(artifact_row(pixels, features, measured.norms[i], measured.median, place))
    Verdict("assert_artifact_rate", label, extractor, [miss], document, sheet(rows)).settle(context)
