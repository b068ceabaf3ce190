"""Build a bundle's TensorRT plan, inspect it, and examine it on the GPU that will run it."""

from __future__ import annotations

import re
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from phreg_deploy.bundle.bundle import Bundle
from phreg_deploy.bundle.manifest import CALIBRATION, ENGINES
from phreg_deploy.bundle.plan_keys import BuildSettings, PlanKey, make_key
from phreg_deploy.bundle.plans import (
    StoredPlan,
    draft_plan,
    keep_plan,
    list_plans,
    plan_path,
    prefer,
)
from phreg_deploy.bundle.profiles import profiles_of
from phreg_deploy.errors import FORCE, GateFailed, PhregError, write_error
from phreg_deploy.export.engine.builder import SerializedPlan, build_plan
from phreg_deploy.export.engine.exam import examine
from phreg_deploy.export.engine.findings import judge_census
from phreg_deploy.export.engine.inspection import inspect, parse_layers, take_census
from phreg_deploy.export.engine.report import BuildReport, read_report
from phreg_deploy.files.atomic import write_atomic
from phreg_deploy.files.temporary import temporary
from phreg_deploy.json_files import read_json
from phreg_deploy.progress import SILENT, Progress
from phreg_deploy.runtime.gpu.cuda import Cuda, Gpu
from phreg_deploy.runtime.gpu.jetson import is_jetson
from phreg_deploy.runtime.gpu.trt_library import deserialise, load_tensorrt, make_logger, plan_cuda

# Precision -> the first compute capability, times ten, whose GPUs compute in it.
LEAST_ARCHITECTURE = {"bf16": 80, "fp8": 89}
# Compatibility -> the first compute capability, times ten, whose GPUs it serves: ``HardwareCompatibilityLevel`` of
# TensorRT's ``NvInfer.h``. Neither is for JetPack: "Hardware Compatibility" in TensorRT's developer guide.
LEAST_COMPATIBLE = {"ampere+": 80, "same-cc": 75}


@dataclass(frozen=True)
class BuildRequest:
    """What to build, see ``phreg_deploy.export.build``."""

    bundle: Path
    settings: BuildSettings = field(default_factory=BuildSettings)
    device: int = 0
    workspace: int | None = None
    timing_cache: Path | None = None
    check: bool = True
    strict: bool = False


def build_engine(request: BuildRequest, *, force: bool = False, progress: Progress = SILENT) -> BuildReport:
    """Build the plan of a bundle for this machine's GPU; see ``phreg_deploy.export.build``."""
    bundle = Bundle.read(request.bundle)
    bundle.verify()
    eight_bit = eight_bit_layers(bundle)
    trt = load_tensorrt()
    gpu = Cuda(request.device).gpu
    _check_gpu(bundle, gpu)
    _check_compatibility(request.settings.compatibility, gpu)
    cuda = plan_cuda(trt, gpu.driver)
    key = make_key(bundle, gpu.kind, gpu.architecture, trt.__version__, cuda, request.settings)
    if not force and (cached := _take_cached(bundle, key, request.check)) is not None:
        if request.strict:
            _refuse_shortfalls(cached)
        return cached
    serialized = _build(trt, bundle, key, request, progress)
    text = _inspect(trt, serialized.plan, request.settings)
    census = take_census(parse_layers(text), len(profiles_of(bundle.manifest)))
    report = BuildReport(
        plan=plan_path(bundle, key),
        key=key,
        cached=False,
        census=census,
        findings=judge_census(census, bundle.manifest, eight_bit),
        seconds=serialized.seconds,
        megabytes=len(serialized.plan) / 2**20,
        warnings=serialized.warnings,
        verdict={},
    )
    if request.strict:
        _refuse_shortfalls(report)
    with draft_plan(bundle, key, serialized.plan) as draft:
        del serialized
        report = _check(bundle, draft, report, request, force)
        return BuildReport.from_plan(keep_plan(bundle, draft, report.to_sidecar(), text), cached=False)


def _refuse_shortfalls(report: BuildReport) -> None:
    """Raise if the census of an engine is not as expected, or cannot be told."""
    if report.shortfalls or report.doubts:
        raise GateFailed(
            f"engine: {'; '.join([*report.shortfalls, *report.doubts])} in TensorRT {report.key.tensorrt} for "
            f"{report.key.gpu}. It may be slower than it should be; it was not kept. Leave out --strict to keep it.",
            {"census": report.census.to_json(), "findings": [finding.to_json() for finding in report.findings]},
        )


def _check_gpu(bundle: Bundle, gpu: Gpu) -> None:
    """Raise if the GPU cannot compute in the bundle's precision; TensorRT would say so only after minutes."""
    precision = bundle.manifest.precision
    least = LEAST_ARCHITECTURE.get(precision, 0)
    if gpu.architecture < least:
        raise PhregError(
            f"build: {bundle.folder} is in {precision}, which {gpu.name} (SM {gpu.architecture / 10:.1f}) lacks; it "
            f"needs SM {least / 10:.1f}. Use a bundle in fp16, or in int8 with --target trt."
        )


def _check_compatibility(compatibility: str, gpu: Gpu) -> None:
    """Raise for an engine that is meant for other GPUs, where TensorRT does not support one."""
    least = LEAST_COMPATIBLE.get(compatibility)
    if least is None:
        return
    if is_jetson():
        raise PhregError(
            f"compatibility: got {compatibility}, which TensorRT's developer guide excludes on JetPack; expected none "
            "or version. Leave out --compat, and build on each kind of Jetson."
        )
    if gpu.architecture < least:
        raise PhregError(
            f"compatibility: got {compatibility} on {gpu.name} (SM {gpu.architecture / 10:.1f}), expected a GPU of SM "
            f"{least / 10:.1f} or newer. Leave out --compat."
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
    probe = temporary(bundle.folder / ENGINES / "engine", "probe")
    try:
        probe.parent.mkdir(exist_ok=True)
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise write_error(error, probe.parent) from error
    # TensorRT accepts timings of the same kind of GPU only.
    gpu = re.sub(r"[^A-Za-z0-9]+", "-", key.gpu).strip("-")
    return chosen or bundle.folder / ENGINES / f"timing-{gpu}-sm{key.architecture}-trt{key.tensorrt}.cache"


def _write_timings(cache: Path, timings: bytes) -> list[str]:
    """Write the timings; a failure is a warning, because the plan is worth more."""
    try:
        if timings:
            write_atomic(cache, timings)
    except PhregError as error:
        return [f"the timing cache was not written: {error}"]
    return []


def _inspect(trt: Any, plan: bytes, settings: BuildSettings) -> str:
    """Load the plan and return the inspector's text."""
    runtime, engine = deserialise(trt, plan, make_logger(trt), settings.compatibility == "version")
    text = inspect(trt, engine)
    # The runtime must outlive the engine.
    del engine, runtime
    return text


def _check(bundle: Bundle, draft: StoredPlan, report: BuildReport, request: BuildRequest, force: bool) -> BuildReport:
    """Examine a plan that is written, but not kept yet; returns the report with the verdict."""
    if not request.check:
        return report
    report = replace(report, verdict=examine(bundle, draft, request.device))
    if report.missed and not force:
        raise GateFailed(
            f"parity: {bundle.folder} on TensorRT {report.key.tensorrt}: {'; '.join(report.missed)}. The engine "
            f"was not kept. See where it diverges: phreg-deploy build {bundle.folder} --bisect (needs onnx, "
            f"onnxruntime and a second build); or {FORCE} to keep it.",
            report.to_sidecar(),
        )
    return report


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
