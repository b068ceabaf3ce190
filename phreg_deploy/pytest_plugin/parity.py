"""``assert_parity``: a bundle answers as its exam says, and as a student or another bundle does on photographs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from phreg_deploy.bundle.bundle import is_bundle
from phreg_deploy.errors import PhregError
from phreg_deploy.images.photographs import read_photographs
from phreg_deploy.images.pictures import sheet
from phreg_deploy.pytest_plugin.comparison import Answers, Comparison, compare_exam, compare_photographs
from phreg_deploy.pytest_plugin.context import Assertion, CaseContext, refusing
from phreg_deploy.pytest_plugin.failures import Miss, Verdict
from phreg_deploy.pytest_plugin.pictures import Rows, parity_row
from phreg_deploy.pytest_plugin.settings import PathLike, Settings
from phreg_deploy.runtime.features import FeatureExtractor
from phreg_deploy.runtime.parity import gates_of, writes_exams

# Images that are read where no limit is given.
LIMIT = 64


class AssertParity(Assertion):
    """The fixture ``assert_parity``."""

    @refusing
    def __call__(
        self,
        bundle: PathLike | None = None,
        *,
        reference: PathLike | None = None,
        images: PathLike | None = None,
        limit: int | None = None,
        cosine: float | None = None,
        outlier_points: float | None = None,
        backend: str | None = None,
    ) -> None:
        """Compare a bundle's answers with its exam and, with ``reference``, on photographs with that.

        The gates are those of the bundle's precision (``bundle.gates``). What is None is taken from the settings.

        Args:
            reference: a student's folder or a timm name, which needs PyTorch; or another bundle, which does not.
            images: folder of photographs for the reference; the first ``limit`` (64) are read.
            cosine: least 1st-percentile patch cosine, in place of the precision's.
            outlier_points: largest change of the norm-outlier rate in percentage points, in place of the precision's.

        Raises:
            AssertionError: a gate was missed; names the images and patches.
        """
        __tracebackhide__ = True
        context, settings = self._context, self._context.settings
        bars = settings.number("cosine", cosine, 1), settings.number("outlier_points", outlier_points, 100)
        name = _reference_name(settings, reference)
        count = settings.count("limit", limit, LIMIT)
        folder = None
        if name is not None:
            folder = settings.needed_path("images", images, "the folder of photographs to compare the reference on")
        elif images is not None:
            raise PhregError("assert_parity: images are for a comparison with a reference; give both, or neither.")
        extractor = context.load(bundle, backend)
        comparisons = [compare_exam(extractor)]
        if name is not None and folder is not None:
            manifest = extractor.manifest
            answers = _reference_answers(extractor, name, context, backend)
            photographs = read_photographs(folder, manifest.sizes.default, manifest.preprocess, count)
            comparisons.append(compare_photographs(extractor, name, answers, photographs))
        _settle(context, extractor, comparisons, bars)


def _reference_name(settings: Settings, given: PathLike | None) -> str | None:
    """Return the path of a reference or, where there is nothing, the name as it was given: a timm name has no path."""
    path = settings.path("reference", given)
    if path is not None and path.exists():
        return str(path)
    return settings.text("reference", None if given is None else str(given))


def _settle(
    context: CaseContext,
    extractor: FeatureExtractor,
    comparisons: list[Comparison],
    bars: tuple[float | None, float | None],
) -> None:
    __tracebackhide__ = True
    label = context.label("parity", extractor)
    again = writes_exams(extractor.manifest, extractor.backend)
    misses: list[Miss] = []
    document: list[dict[str, Any]] = []
    rows: Rows = []
    drawn: set[str] = set()
    for comparison in comparisons:
        parity = comparison.parity
        context.record(f"{label}.{comparison.label}", parity.to_json())
        gates = gates_of(parity, extractor.precision, *bars, exam=comparison.label == "exam", again=again)
        for gate in gates:
            if gate.passed:
                continue
            miss, places = comparison.miss(gate)
            misses.append(miss)
            for image, place, errors in places:
                if image.name not in drawn:
                    drawn.add(image.name)
                    rows.append(parity_row(image, place, errors))
        document.append(
            {
                "with": comparison.reference,
                "parity": parity.to_json(),
                "gates": [gate.to_json() for gate in gates],
                "images": [image.to_json() for image in comparison.images],
            }
        )
    picture = sheet(rows) if rows else None
    Verdict("assert_parity", label, extractor, misses, {"comparisons": document}, picture).settle(context)


def _reference_answers(
    extractor: FeatureExtractor, reference: str, context: CaseContext, backend: str | None
) -> Answers:
    """Return what a student or another bundle answers to uint8 images ``(B, H, W, 3)``."""
    manifest, size = extractor.manifest, extractor.manifest.sizes.default
    if is_bundle(reference):
        other = context.load_reference(Path(reference), backend)
        try:
            other.manifest.sizes.check(size, other.manifest.model.patch)
        except PhregError as error:
            raise PhregError(f"reference: {reference} does not serve the bundle's size: {error}") from None
        return lambda images: other.dense(images).outputs()
    from phreg_deploy.arguments import check_model
    from phreg_deploy.extras import DISTILL, require

    check_model(reference)
    require("assert_parity with a student as reference", distill=DISTILL)
    from phreg_deploy.heads.answers import answers_of, with_heads
    from phreg_deploy.models.loading import load_model
    from phreg_deploy.models.readouts import with_readout

    model = with_readout(load_model(reference, image_size=size), manifest.readout)
    return with_heads(answers_of(model, [manifest]), extractor.bundle)
