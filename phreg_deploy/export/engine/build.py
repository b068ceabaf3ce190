"""Build a bundle's TensorRT plan, inspect it, and examine it on the GPU that will run it."""

from __future__ import annotations

import re
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from phreg_deploy.bundle.bundle import Bundle
from phreg_deploy.bundle.manifest import CALIBRATION
from phreg_deploy.bundle.plans import (
    FOLDER,
    BuildSettings,
    PlanKey,
    StoredPlan,
    list_plans,
    make_key,
    prefer,
    write_plan,
    write_sidecar,
)
from phreg_deploy.bundle.profiles import profiles_of
from phreg_deploy.errors import GateFailed, PhregError, write_error
from phreg_deploy.export.engine.builder import SerializedPlan, build_plan
from phreg_deploy.export.engine.exam import examine
from phreg_deploy.export.engine.inspection import Census, read_layers, shortfalls, take_census
from phreg_deploy.export.engine.report import BuildReport, read_report
from phreg_deploy.files.atomic import write_atomic
from phreg_deploy.files.temporary import temporary
from phreg_deploy.json_files import read_json
from phreg_deploy.progress import SILENT, Progress
from phreg_deploy.runtime.gpu.cuda import Cuda, Gpu
from phreg_deploy.runtime.gpu.trt_library import deserialise, load_tensorrt, make_logger

# Precision -> the first compute capability, times ten, whose GPUs compute in it.
LEAST_ARCHITECTURE = {"bf16": 80, "fp8": 89}


@dataclass(frozen=True)
class BuildRequest:
    """What to build, see ``phreg_deploy.export.build``."""

    bundle: Path
    settings: BuildSettings = field(default_factory=BuildSettings)
    device: int = 0
    workspace: int | None = None
    timing_cache: Path | None = None
    check: bool = True
    allow_unfused: bool = False


def build_engine(request: BuildRequest, *, force: bool = False, progress: Progress = SILENT) -> BuildReport:
    """Build the plan of a bundle for this machine's GPU; see ``phreg_deploy.export.build``."""
    bundle = Bundle.read(request.bundle)
    bundle.verify()
    eight_bit = eight_bit_layers(bundle)
    trt = load_tensorrt()
    gpu = Cuda(request.device).gpu
    _check_gpu(bundle, gpu)
    key = make_key(bundle, gpu.name, gpu.architecture, trt.__version__, gpu.driver // 1000, request.settings)
    if not force and (cached := _take_cached(bundle, key, request.check)) is not None:
        return cached
    serialized = _build(trt, bundle, key, request, progress)
    census = _inspect(trt, serialized.plan, request.settings)
    missing = shortfalls(census, bundle.manifest, eight_bit)
    if missing and not request.allow_unfused:
        raise GateFailed(
            f"engine: {'; '.join(missing)} in TensorRT {trt.__version__} for {key.gpu}. It would be slower than it "
            "should be; nothing was kept. Add --allow-unfused to keep it.",
            {"census": census.to_json()},
        )
    plan = write_plan(bundle, key, serialized.plan)
    report = BuildReport(
        plan=plan.path,
        key=key,
        cached=False,
        census=census,
        shortfalls=missing,
        seconds=serialized.seconds,
        megabytes=len(serialized.plan) / 2**20,
        warnings=serialized.warnings,
        verdict={},
    )
    del serialized
    return _examine_and_keep(bundle, plan, report, request, force)


def _check_gpu(bundle: Bundle, gpu: Gpu) -> None:
    """Raise if the GPU cannot compute in the bundle's precision; TensorRT would say so only after minutes."""
    precision = bundle.manifest.precision
    least = LEAST_ARCHITECTURE.get(precision, 0)
    if gpu.architecture < least:
        raise PhregError(
            f"build: {bundle.folder} is in {precision}, which {gpu.name} (SM {gpu.architecture / 10:.1f}) lacks; it "
            f"needs SM {least / 10:.1f}. Use a bundle in fp16, or in int8 with --target trt."
        )


def _take_cached(bundle: Bundle, key: PlanKey, examined: bool) -> BuildReport | None:
    """Return the report of the plan with this key, and prefer it from now on; None if there is none.

    Raises ``PhregError`` if the plan was changed since it was built.
    """
    for plan in list_plans(bundle):
        if plan.key == key and read_report(plan, examined) is not None:
            plan.read()
            return read_report(prefer(bundle, plan), examined)
    return None


def _build(trt: Any, bundle: Bundle, key: PlanKey, request: BuildRequest, progress: Progress) -> SerializedPlan:
    """Build with the timings of earlier builds, and store the new ones."""
    cache = _timing_cache(request, bundle, key)
    serialized = build_plan(
        trt,
        bundle.graph,
        profiles_of(bundle.manifest),
        request.settings,
        workspace=request.workspace,
        timing_cache=cache.read_bytes() if cache.is_file() else b"",
        strict_cache=request.timing_cache is not None,
        progress=progress,
    )
    return replace(serialized, warnings=[*serialized.warnings, *_write_timings(cache, serialized.timing_cache)])


def _timing_cache(request: BuildRequest, bundle: Bundle, key: PlanKey) -> Path:
    """Return the file of timings, and check its folder before the build, which takes minutes."""
    chosen = request.timing_cache
    if chosen is not None and (chosen.is_dir() or not chosen.absolute().parent.is_dir()):
        raise PhregError(f"timing cache: got {chosen}, expected a file in a folder that exists.")
    probe = temporary(bundle.folder / FOLDER / "engine", "probe")
    try:
        probe.parent.mkdir(exist_ok=True)
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise write_error(error, probe.parent) from error
    # TensorRT accepts timings of the same kind of GPU only.
    gpu = re.sub(r"[^A-Za-z0-9]+", "-", key.gpu).strip("-")
    return chosen or bundle.folder / FOLDER / f"timing-{gpu}-sm{key.architecture}-trt{key.tensorrt}.cache"


def _write_timings(cache: Path, timings: bytes) -> list[str]:
    """Write the timings; a failure is a warning, because the plan is worth more."""
    try:
        if timings:
            write_atomic(cache, timings)
    except PhregError as error:
        return [f"the timing cache was not written: {error}"]
    return []


def _inspect(trt: Any, plan: bytes, settings: BuildSettings) -> Census:
    """Load the plan and count its layers."""
    runtime, engine = deserialise(trt, plan, make_logger(trt), settings.compatibility == "version")
    census = take_census(read_layers(trt, engine))
    # The runtime must outlive the engine.
    del engine, runtime
    return census


def _examine_and_keep(
    bundle: Bundle, plan: StoredPlan, report: BuildReport, request: BuildRequest, force: bool
) -> BuildReport:
    """Examine the saved plan and write its sidecar; remove the plan if that fails."""
    try:
        if request.check:
            report = replace(report, verdict=examine(bundle, plan, request.device))
        if report.missed and not force:
            raise GateFailed(
                f"parity: {bundle.folder} on TensorRT {report.key.tensorrt}: {'; '.join(report.missed)}. The engine "
                f"was not kept. See where it diverges: phreg-deploy build {bundle.folder} --bisect (needs onnx, "
                "onnxruntime and a second build); or --force to keep it.",
                report.to_sidecar(),
            )
        return BuildReport.from_plan(write_sidecar(bundle, plan, report.to_sidecar()), cached=False)
    except BaseException:
        plan.path.unlink(missing_ok=True)
        raise


def eight_bit_layers(bundle: Bundle) -> list[str]:
    """Return the linear layers that the calibration left in 8 bits; none for a bundle that was not calibrated.

    Raises ``PhregError`` if it was calibrated for the processor, or if its ``calibration.json`` is missing or damaged.
    """
    calibration = bundle.manifest.quantisation
    if calibration is None:
        return []
    if calibration["target"] != "trt":
        raise PhregError(
            f"build: {bundle.folder} was calibrated for the processor (zero points, FP32 around the 8 bits), which "
            "TensorRT does not take. Run: phreg-deploy calibrate FP32-BUNDLE --target trt --images DIR -o OUTPUT"
        )
    path = bundle.folder / CALIBRATION
    try:
        return [layer["name"] for layer in read_json(path)["layers"] if layer["precision"] != "float"]
    except (OSError, ValueError, KeyError, TypeError):
        raise PhregError(f"build: {path} cannot be read; copy or calibrate the bundle again.") from None
