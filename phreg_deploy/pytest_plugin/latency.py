"""``assert_latency``: a call of the bundle is fast enough on this machine."""

from __future__ import annotations

from pathlib import Path

from phreg_deploy.errors import PhregError
from phreg_deploy.profiling.baseline import Baseline
from phreg_deploy.profiling.latency import conditions, measure_bundle, measured_cases
from phreg_deploy.profiling.report import BatchLatency, Comparison
from phreg_deploy.progress import SILENT
from phreg_deploy.pytest_plugin.context import Assertion, CaseContext, refusing
from phreg_deploy.pytest_plugin.failures import Miss, Verdict
from phreg_deploy.pytest_plugin.settings import PathLike
from phreg_deploy.runtime.features import FeatureExtractor
from phreg_deploy.spec import parse_size

# Measurements at most: another process on the machine only ever adds time, so the lowest figures count.
ATTEMPTS = 3
# Of the frame that preprocessing is measured on, as ``phreg-deploy profile`` does by default.
FRAME = (480, 640)
TOLERANCE = 0.1


class AssertLatency(Assertion):
    """The fixture ``assert_latency``."""

    @refusing
    def __call__(
        self,
        bundle: PathLike | None = None,
        *,
        ms: float | None = None,
        p99_ms: float | None = None,
        baseline: PathLike | None = None,
        tolerance: float | None = None,
        batch: int | None = None,
        image_size: tuple[int, int] | str | None = None,
        seconds: float = 1.0,
        backend: str | None = None,
    ) -> None:
        """Measure a call on an image that is already resized, and compare it with bars, a baseline, or both.

        A figure that misses its bar is measured again, three times at most, and the lowest counts.

        Args:
            ms, p99_ms: largest median and 99th percentile of a call, in milliseconds.
            baseline: a file that ``phreg-deploy profile --json`` wrote, under the same conditions.
            tolerance: growth of the median over the baseline's that is allowed; 0.1 is 10 %.
            batch: images in a call; None for the bundle's best.
            image_size: (height, width), or text such as "480x640"; None for the bundle's default.
            seconds: of each measurement.

        Raises:
            AssertionError: a bar was missed.
        """
        __tracebackhide__ = True
        context, settings = self._context, self._context.settings
        bars = {"p50": settings.number("latency_ms", ms), "p99": settings.number("latency_p99_ms", p99_ms)}
        path = settings.path("baseline", baseline)
        if path is None and all(bar is None for bar in bars.values()):
            raise PhregError(
                "assert_latency: no bar; give ms, p99_ms or baseline to the call, or phreg_latency_ms, "
                "phreg_latency_p99_ms or phreg_baseline in the ini."
            )
        growth = settings.number("tolerance", tolerance)
        before = None if path is None else Baseline.read(Path(path))
        size = parse_size(image_size) if isinstance(image_size, str) else image_size
        extractor = context.load(bundle, backend)
        cases = measured_cases(extractor.manifest, None if batch is None else [batch], size)
        if before is not None:
            now = conditions(extractor, settings.count("threads"), "latency", FRAME, cases[0][1])
            differences = before.differences(now, cases)
            if differences:
                raise PhregError(
                    f"baseline: {before.path} was measured under other conditions: {'; '.join(differences)}. Measure "
                    "the baseline again under these."
                )
        judge = _Judge(bars, before, TOLERANCE if growth is None else growth)
        attempts: list[BatchLatency] = []
        while len(attempts) < ATTEMPTS and (not attempts or judge.misses(attempts)):
            report = measure_bundle(
                extractor,
                batches=[cases[0][0]],
                size=cases[0][1],
                seconds=seconds,
                threads=settings.count("threads"),
                progress=SILENT,
            )
            attempts += report.results
        _settle(context, extractor, attempts, judge.misses(attempts))


class _Judge:
    """``bars``: "p50" and "p99" in milliseconds, each None where there is none."""

    def __init__(self, bars: dict[str, float | None], before: Baseline | None, tolerance: float) -> None:
        self.bars, self.before, self.tolerance = bars, before, tolerance

    def misses(self, attempts: list[BatchLatency]) -> list[Miss]:
        """Judge the lowest figures of several measurements."""
        misses = []
        names = {"p50": "the median of a call", "p99": "the 99th percentile of a call"}
        case = f"batch {attempts[0].batch} at {attempts[0].size[0]}x{attempts[0].size[1]}"
        for figure, bar in self.bars.items():
            lowest = min(float(getattr(attempt.extractor, figure)) for attempt in attempts)
            if bar is not None and lowest > bar:
                sentence = f"{names[figure]} took {lowest:.3f} ms ({case}), expected at most {bar:g} ms"
                misses.append(Miss(f"latency_{figure}", lowest, bar, sentence))
        if self.before is not None:
            fastest = min(attempts, key=lambda attempt: attempt.extractor.p50)
            rows = self.before.rows([fastest])
            slower = Comparison(str(self.before.path), [], self.tolerance, rows).slower()
            for row, sentence in zip(rows, slower):
                allowed = row.before * (1 + self.tolerance)
                sentence += f", expected at most {1 + self.tolerance:g}x"
                misses.append(Miss("latency_baseline", row.now, allowed, sentence))
        return misses


def _settle(
    context: CaseContext, extractor: FeatureExtractor, attempts: list[BatchLatency], misses: list[Miss]
) -> None:
    __tracebackhide__ = True
    label = context.label("latency", extractor)
    fastest = min(attempts, key=lambda attempt: attempt.extractor.p50)
    figures = {
        f"{part}.{figure}_ms": float(getattr(getattr(fastest, part), figure))
        for part in ("graph", "extractor", "preprocess")
        for figure in ("p50", "p99")
    }
    context.record(label, {**figures, "attempts": len(attempts), "stable": fastest.extractor.stable})
    now = conditions(extractor, context.settings.count("threads"), "latency", FRAME, fastest.size)
    document = {"conditions": now.to_json(), "attempts": [attempt.to_json() for attempt in attempts]}
    Verdict("assert_latency", label, extractor, misses, document).settle(context)
