"""Profile a bundle: open it, compare the conditions with the baseline's, then measure."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from phreg_deploy.bundle.bundle import Bundle
from phreg_deploy.errors import PhregError
from phreg_deploy.profiling.baseline import Baseline, Case
from phreg_deploy.profiling.device.peaks import find_peaks
from phreg_deploy.profiling.device.telemetry import Telemetry, watched
from phreg_deploy.profiling.gpu import GpuRequest, pci_of, profile_gpu
from phreg_deploy.profiling.latency import backend_version, conditions, measure_bundle, measured_cases
from phreg_deploy.profiling.register_cost import register_cost
from phreg_deploy.profiling.report import Comparison, GpuReport, ProfileReport
from phreg_deploy.profiling.scenarios import run_scenario
from phreg_deploy.progress import Progress
from phreg_deploy.runtime.backends.options import BackendOptions
from phreg_deploy.runtime.backends.registry import GPU
from phreg_deploy.runtime.features import FeatureExtractor


@dataclass(frozen=True)
class ProfileRequest:
    """What to measure, see ``phreg_deploy.profiling.profile``; ``size`` and ``frame`` are (height, width)."""

    bundle: Path
    backend: str
    options: BackendOptions
    batches: list[int] | None
    size: tuple[int, int] | None
    frame: tuple[int, int]
    seconds: float
    streams: list[int]
    fps: float | None
    without: Path | None
    scenarios: tuple[str, ...] = ()

    def cases(self, bundle: Path) -> list[Case]:
        """The batches and sizes to measure. Raises ``PhregError`` if ``bundle`` does not serve one of them."""
        return measured_cases(Bundle.read(bundle).manifest, self.batches, self.size)

    def load(self, bundle: Path, threads: int | None) -> FeatureExtractor:
        return FeatureExtractor.load(bundle, self.backend, **asdict(replace(self.options, threads=threads)))

    def on_gpu(self, fps: float | None) -> GpuRequest:
        return GpuRequest(self.batches, self.size, self.seconds, self.streams, fps)


def profile_bundle(
    request: ProfileRequest, baseline: Baseline | None, tolerance: float, any_conditions: bool, progress: Progress
) -> ProfileReport:
    """Measure as ``request`` says; for the rest see ``phreg_deploy.profiling.profile``."""
    cases, how = request.cases(request.bundle), request.options
    differences: list[str] = []
    with request.load(request.bundle, how.threads) as extractor, _sensors(extractor) as telemetry:
        if (request.fps or request.without) and telemetry is None:
            raise PhregError(f"profile: --fps and --without are for a GPU; this would run on {extractor.backend}.")
        if request.without is not None:
            request.cases(request.without)
        clocks = None if telemetry is None else telemetry.clocks()
        if baseline is not None:
            now = conditions(extractor, how.threads, how.mode, request.frame, cases[0][1], clocks)
            differences = baseline.differences(now, cases)
            _check_conditions(baseline, differences, any_conditions)
        with watched(telemetry) as watch:
            report = measure_bundle(
                extractor,
                batches=request.batches,
                size=request.size,
                seconds=request.seconds,
                threads=how.threads,
                mode=how.mode,
                frame=request.frame,
                progress=progress,
                clocks=clocks,
            )
        if telemetry is not None:
            whole = {"batch": cases[0][0], "size": list(cases[0][1]), "measurement": "extractor", **watch.summary(0)}
            on_gpu = _measure_gpu(extractor, request.on_gpu(request.fps), telemetry, report.remarks, progress)
            report = replace(report, gpu=replace(on_gpu, watched=[whole, *on_gpu.watched]))
        for name in request.scenarios:
            report = _add_scenario(report, request, extractor, telemetry, name, progress)
    if request.without is not None and report.gpu is not None:
        with request.load(request.without, None) as extractor, _sensors(extractor) as telemetry:
            assert telemetry is not None
            plain = _measure_gpu(extractor, request.on_gpu(None), telemetry, report.remarks, progress)
        report = replace(report, registers=register_cost(report.gpu, plain), without=plain)
    if baseline is not None:
        rows = baseline.rows(report.results)
        differences += baseline.held_back(report.gpu)
        report = replace(report, baseline=Comparison(str(baseline.path), differences, tolerance, rows))
    return report


def _add_scenario(
    report: ProfileReport,
    request: ProfileRequest,
    extractor: FeatureExtractor,
    telemetry: Telemetry | None,
    name: str,
    progress: Progress,
) -> ProfileReport:
    size = request.size or extractor.manifest.sizes.default
    threads = max(request.streams) if telemetry is not None or request.options.mode == "throughput" else 1
    with watched(telemetry) as watch:
        measured = run_scenario(extractor, name, seconds=request.seconds, size=size, threads=threads, progress=progress)
    report = replace(report, scenarios=[*(report.scenarios or []), measured])
    if report.gpu is None:
        return report
    case = {"batch": measured.batch, "size": list(size), "measurement": name}
    entry = {**case, **watch.summary(measured.samples)}
    return replace(report, gpu=replace(report.gpu, watched=[*report.gpu.watched, entry]))


def _check_conditions(baseline: Baseline, differences: list[str], any_conditions: bool) -> None:
    if differences and not any_conditions:
        raise PhregError(
            f"baseline: {baseline.path} was measured under other conditions: {'; '.join(differences)}. Measure the "
            "baseline again under these, or add --allow-other-conditions to compare all the same.",
            {"differences": differences},
        )


def _measure_gpu(
    extractor: FeatureExtractor, request: GpuRequest, telemetry: Telemetry, remarks: list[str], progress: Progress
) -> GpuReport:
    """``profile_gpu`` with the peaks of this GPU; what fails on the way goes to ``remarks``."""
    backend: Any = extractor.opened
    product, metadata = None, None
    versions = {"backend": backend_version(extractor.backend)}
    # The lean runtime has no builder and no inspector.
    if extractor.backend == "tensorrt" and hasattr(backend.trt, "Builder"):
        from phreg_deploy.export.engine.gemm import measure_product, side_of
        from phreg_deploy.export.engine.inspection import inspect, parse_layers

        def product(precision: str) -> float:
            return measure_product(backend.trt, backend.cuda, precision)

        versions["side"] = str(side_of(backend.cuda))
        layers = parse_layers(inspect(backend.trt, backend.engine))
        metadata = {str(layer.get("Name", "")): str(layer.get("Metadata", "")) for layer in layers}
    how = {**versions, "clocks": telemetry.clocks()}
    peaks, said = find_peaks(backend.cuda, extractor.manifest.precision, product, how)
    remarks.extend(said)
    return profile_gpu(extractor, request, progress=progress, telemetry=telemetry, peaks=peaks, metadata=metadata)


@contextmanager
def _sensors(extractor: FeatureExtractor) -> Iterator[Telemetry | None]:
    """Open the sensors of the GPU that an extractor runs on; None on the processor."""
    backend: Any = extractor.opened
    if extractor.backend not in GPU:
        yield None
        return
    # NVML numbers devices in another order than CUDA.
    telemetry = Telemetry(backend.cuda.index, pci=pci_of(backend.cuda))
    try:
        yield telemetry
    finally:
        telemetry.close()
