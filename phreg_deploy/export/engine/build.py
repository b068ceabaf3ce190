"""A bundle -> a TensorRT engine in its ``engines/``, built, read back and examined on the GPU that it will run on. No torch."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from phreg_deploy.bundle.bundle import Bundle
from phreg_deploy.bundle.manifest import CALIBRATION
from phreg_deploy.bundle.plans import (
    FOLDER,
    BuildSettings,
    Engine,
    Key,
    list_engines,
    make_key,
    prefer,
    profiles_of,
    write_plan,
    write_sidecar,
)
from phreg_deploy.errors import GateFailed, PhregError, write_error
from phreg_deploy.export.engine.builder import build_plan
from phreg_deploy.export.engine.inspection import Census, read_layers, shortfalls, take_census
from phreg_deploy.files.atomic import write_atomic
from phreg_deploy.files.temporary import temporary
from phreg_deploy.json_files import read_json
from phreg_deploy.progress import SILENT, Progress
from phreg_deploy.runtime.backends.options import BackendOptions
from phreg_deploy.runtime.backends.tensorrt_backend import TensorRtBackend
from phreg_deploy.runtime.features import FeatureExtractor
from phreg_deploy.runtime.gpu.cuda import Cuda, Gpu
from phreg_deploy.runtime.gpu.trt_library import deserialise, load_tensorrt, make_logger
from phreg_deploy.runtime.parity import gates_of, run_exam, verdict, worst

ARITHMETIC = {"bf16": 80, "fp8": 89}  # compute capability times ten from which on a GPU has it


@dataclass(frozen=True)
class BuildRequest:
    """What to build.

    ``workspace``: MiB at most for tactics. ``timing_cache``: a file to read and write; by default one in the bundle per
    GPU and TensorRT. ``allow_unfused``: keep an engine whose attention or 8-bit layers are not all what was meant.
    """

    bundle: Path
    settings: BuildSettings = field(default_factory=BuildSettings)
    device: int = 0
    workspace: int | None = None
    timing_cache: Path | None = None
    check: bool = True
    allow_unfused: bool = False


def build_engine(request: BuildRequest, *, force: bool = False, progress: Progress = SILENT) -> dict[str, Any]:
    """Build the engine of a bundle for this machine's GPU, unless it is there already.

    The saved plan is what is examined: read back, its layers counted, its answers compared with the bundle's reference.
    An engine that fails is not left behind.

    Args:
        force: build again what is there; keep also an engine that misses the parity gate.

    Returns:
        ``engine`` (file), ``key``, ``cached``, ``census``, ``seconds``, ``warnings``, ``parity``, ``missed``.

    Raises:
        BackendMissing: no TensorRT or no GPU here. PhregError: a refusal, with the node. GateFailed: attention or 8-bit
            layers are not what was meant, or the parity gate is missed.
    """
    bundle = Bundle.read(request.bundle)
    bundle.verify()
    eight_bit = eight_bit_layers(bundle)  # refuses before minutes of building
    trt = load_tensorrt()
    cuda = Cuda(request.device)
    _check_gpu(bundle, cuda.gpu)
    key = make_key(
        bundle, cuda.gpu.name, cuda.gpu.architecture, trt.__version__, cuda.gpu.driver // 1000, request.settings
    )
    there = next((e for e in list_engines(bundle) if e.key == key and _whole(e.report, request.check)), None)
    if there is not None and not force:
        there.read()  # its hash
        there = prefer(bundle, there)
        return {"engine": str(there.path), "key": key.to_json(), "cached": True, **there.report}
    cache = _timing_cache(request, bundle, key)
    built = build_plan(
        trt, bundle.graph, profiles_of(bundle.manifest), request.settings, workspace=request.workspace,
        timing_cache=cache.read_bytes() if cache.is_file() else b"", strict_cache=request.timing_cache is not None,
        progress=progress,
    )  # fmt: skip
    warnings = [*built.warnings, *_keep(cache, built.timing_cache)]
    _, opened = deserialise(trt, built.plan, make_logger(trt), request.settings.compatibility == "version")
    census = take_census(read_layers(trt, opened))
    del opened
    short = shortfalls(census, bundle.manifest, eight_bit)
    if short and not request.allow_unfused:
        raise GateFailed(
            f"engine: {'; '.join(short)} in TensorRT {trt.__version__} for {key.gpu}. It would be slower than it should be; nothing was kept. "
            "Add --allow-unfused to keep it as it is.",
            {"census": census.to_json()},
        )
    report: dict[str, Any] = {
        "census": census.to_json(), "short": short, "seconds": built.seconds, "warnings": warnings, "megabytes": len(built.plan) / 2**20,
    }  # fmt: skip
    engine = write_plan(bundle, key, built.plan)
    del built
    try:
        if request.check:
            report.update(examine(bundle, engine, request.device))
        if report.get("missed") and not force:
            raise GateFailed(
                f"parity: {bundle.folder} on TensorRT {trt.__version__}: {'; '.join(report['missed'])}. The engine was not kept. See where it "
                f"diverges: phreg-deploy build {bundle.folder} --bisect (needs onnx, onnxruntime and a second build); or --force to keep it.",
                report,
            )
        engine = write_sidecar(bundle, engine, report)  # only now does it count
    except BaseException:
        engine.path.unlink(missing_ok=True)
        raise
    return {"engine": str(engine.path), "key": key.to_json(), "cached": False, **engine.report}


def _check_gpu(bundle: Bundle, gpu: Gpu) -> None:
    """Raise where the GPU has no arithmetic for the bundle's precision, before TensorRT says so after minutes."""
    least = ARITHMETIC.get(bundle.manifest.precision, 0)
    if gpu.architecture < least:
        raise PhregError(
            f"build: {bundle.folder} is in {bundle.manifest.precision}, which {gpu.name} (SM {gpu.architecture / 10:.1f}) lacks; it needs SM "
            f"{least / 10:.1f}. Use a bundle in fp16, or in int8 with --target trt."
        )


def _whole(report: dict[str, Any], examined: bool) -> bool:
    """Whether a sidecar's report says all that ``build`` prints; without its exam only where none is asked for."""
    try:
        Census.from_json(report["census"])
        figures = [report["megabytes"], report["seconds"], *([report["parity"]["cosine_p1"]] if examined else [])]
        return all(isinstance(f, (int, float)) for f in figures) and isinstance(report["short"], list)
    except (KeyError, TypeError, PhregError):
        return False


def _timing_cache(request: BuildRequest, bundle: Bundle, key: Key) -> Path:
    """The file of timings, in a folder that is there and can be written: asked before the build, not after it."""
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
    gpu = re.sub(r"[^A-Za-z0-9]+", "-", key.gpu).strip("-")  # TensorRT takes timings of this very kind of GPU only
    return chosen or bundle.folder / FOLDER / f"timing-{gpu}-sm{key.architecture}-trt{key.tensorrt}.cache"


def _keep(cache: Path, timings: bytes) -> list[str]:
    """Write the timings; where that fails a warning, for the engine is worth more."""
    try:
        if timings:
            write_atomic(cache, timings)
    except PhregError as error:
        return [f"the timing cache was not written: {error}"]
    return []


def examine(bundle: Bundle, engine: Engine, device: int = 0) -> dict[str, Any]:
    """``parity`` of a saved plan with the bundle's reference, ``gates``, ``missed`` as sentences, and ``passed``."""
    with FeatureExtractor(bundle, TensorRtBackend(bundle, BackendOptions(device=device), engine)) as extractor:
        parity = worst([case.parity for case in run_exam(extractor.bundle, extractor.run)])
        return verdict(parity, gates_of(parity, extractor.precision, exam=True))


def eight_bit_layers(bundle: Bundle) -> list[str]:
    """Linear layers that the bundle's calibration left in 8 bits; none in a bundle that was not calibrated.

    Raises:
        PhregError: the calibration's record is missing or damaged.
    """
    meant = bundle.manifest.quantisation
    if meant is None:
        return []
    if meant["target"] != "trt":
        raise PhregError(
            f"build: {bundle.folder} was calibrated for the processor (zero points, FP32 around the 8 bits), which TensorRT does not take. "
            "Run: phreg-deploy calibrate FP32-BUNDLE --target trt --images DIR -o OUTPUT"
        )
    try:
        layers = read_json(bundle.folder / CALIBRATION)["layers"]
        return [layer["name"] for layer in layers if layer["precision"] != "float"]
    except (OSError, ValueError, KeyError, TypeError):
        raise PhregError(
            f"build: {bundle.folder / CALIBRATION} cannot be read; copy or calibrate the bundle again."
        ) from None
