"""A bundle -> a TensorRT engine in its ``engines/``, built, read back and examined on the GPU that it will run on. No torch."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from phreg_deploy.bundle import CALIBRATION, Bundle
from phreg_deploy.engines import FOLDER, Engine, Key, Settings, list_engines, make_key, profiles_of, store
from phreg_deploy.errors import GateFailed, PhregError
from phreg_deploy.export.builder import build_plan
from phreg_deploy.export.inspection import read_layers, shortfalls, take_census
from phreg_deploy.progress import SILENT, Progress
from phreg_deploy.runtime.cuda import Cuda
from phreg_deploy.runtime.features import FeatureExtractor
from phreg_deploy.runtime.parity import check_reference, judge, worst
from phreg_deploy.runtime.tensorrt_library import deserialise, load_tensorrt, make_diary
from phreg_deploy.whole import write_whole


@dataclass(frozen=True)
class BuildRequest:
    """What to build.

    ``workspace``: MiB at most for tactics. ``timing_cache``: a file to read and write; by default one in the bundle per
    GPU and TensorRT. ``allow_unfused``: keep an engine whose attention or 8-bit layers are not all what was meant.
    """

    bundle: Path
    settings: Settings = field(default_factory=Settings)
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
    key = make_key(
        bundle, cuda.gpu.name, cuda.gpu.architecture, trt.__version__, cuda.gpu.driver // 1000, request.settings
    )
    there = next((e for e in list_engines(bundle) if e.key == key), None)
    if there is not None and not force:
        there.read()  # its hash
        return {"engine": str(there.path), "key": key.to_json(), "cached": True, **there.report}
    engine = _build(trt, request, bundle, key, eight_bit, progress)
    report: dict[str, Any] = {"engine": str(engine.path), "key": key.to_json(), "cached": False, **engine.report}
    if request.check:
        try:
            parity, missed = examine(bundle.folder, request.device)
        except BaseException:  # what was not examined does not count
            _drop(engine)
            raise
        report.update(parity=parity, missed=missed)
        if missed and not force:
            _drop(engine)
            raise GateFailed(
                f"parity: {bundle.folder} on TensorRT {trt.__version__}: {'; '.join(missed)}. The engine was not kept. See where it diverges: "
                f"phreg-deploy build {bundle.folder} --bisect; or --force to keep it.",
                report,
            )
        store(bundle, key, engine.read(), {**engine.report, "parity": parity, "missed": missed})
    return report


def _build(
    trt: Any, request: BuildRequest, bundle: Bundle, key: Key, eight_bit: list[str], progress: Progress
) -> Engine:
    gpu = re.sub(r"[^A-Za-z0-9]+", "-", key.gpu).strip("-")  # TensorRT takes timings of this very kind of GPU only
    cache = (
        request.timing_cache or bundle.folder / FOLDER / f"timing-{gpu}-sm{key.architecture}-trt{key.tensorrt}.cache"
    )
    built = build_plan(
        trt, bundle.graph, profiles_of(bundle.manifest), request.settings, workspace=request.workspace,
        timing_cache=cache.read_bytes() if cache.is_file() else b"", progress=progress,
    )  # fmt: skip
    _, engine = deserialise(trt, built.plan, make_diary(trt), request.settings.compatibility == "version")
    census = take_census(read_layers(trt, engine))
    del engine
    short = shortfalls(census, bundle.manifest, eight_bit)
    if short and not request.allow_unfused:
        raise GateFailed(
            f"engine: {'; '.join(short)} in TensorRT {trt.__version__} for {key.gpu}. It would be slower than it should be; nothing was kept. "
            "Add --allow-unfused to keep it as it is.",
            {"census": census.to_json()},
        )
    report = {
        "census": census.to_json(),
        "short": short,
        "seconds": built.seconds,
        "warnings": built.warnings,
        "megabytes": len(built.plan) / 2**20,
    }
    found = store(bundle, key, built.plan, report)
    if built.timing_cache:
        try:
            write_whole(cache, built.timing_cache)
        except PhregError:
            _drop(found)
            raise
    return found


def examine(folder: Path, device: int = 0) -> tuple[dict[str, Any], list[str]]:
    """Parity of the saved engine with the bundle's reference, and the gates that it misses."""
    with FeatureExtractor.load(folder, "tensorrt", device=device, verify=False) as extractor:
        parity = worst([case["parity"] for case in check_reference(extractor)])
        return parity.to_json(), judge(parity, extractor.precision, exam=True)


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
        layers = json.loads((bundle.folder / CALIBRATION).read_text())["layers"]
        return [layer["name"] for layer in layers if layer["precision"] != "float"]
    except (OSError, ValueError, KeyError, TypeError):
        raise PhregError(
            f"build: {bundle.folder / CALIBRATION} cannot be read; copy or calibrate the bundle again."
        ) from None


def _drop(engine: Engine) -> None:
    engine.path.with_suffix(".json").unlink(missing_ok=True)
    engine.path.unlink(missing_ok=True)
