"""Measure loaded bundles for a page: their checks, maps, sensitivities and, if asked, latencies."""

from __future__ import annotations

from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from phreg_deploy import __version__
from phreg_deploy.bundle.bundle import Bundle
from phreg_deploy.bundle.manifest import CALIBRATION
from phreg_deploy.errors import PhregError
from phreg_deploy.explorer.exploration import Exploration, Explored
from phreg_deploy.json_files import read_json
from phreg_deploy.profiling.latency import conditions, measure_bundle
from phreg_deploy.progress import Progress
from phreg_deploy.runtime.backends.options import BackendOptions
from phreg_deploy.runtime.features import FeatureExtractor
from phreg_deploy.verify.checking import check_extractors
from phreg_deploy.verify.measuring import CheckRequest

PACKAGES = ("numpy", "pillow", "onnxruntime", "onnxruntime-gpu", "openvino", "tensorrt", "torch", "timm", "onnx")
# (height, width) of the frame that preprocessing is measured on.
FRAME = (480, 640)


def explore_extractors(
    extractors: Mapping[str, FeatureExtractor],
    request: CheckRequest,
    options: BackendOptions,
    latency: float | None,
    commands: tuple[str, ...],
    progress: Progress,
) -> Exploration:
    """Measure ``extractors``, by name; arguments and errors as of ``phreg_deploy.explorer.measure``."""
    checks, maps = check_extractors(extractors, request, progress)
    bundles = []
    for check, (name, extractor) in zip(checks, extractors.items()):
        measured = None
        if latency:
            measured = measure_bundle(
                extractor,
                batches=None,
                size=None,
                seconds=latency,
                threads=options.threads,
                mode=options.mode,
                frame=FRAME,
                progress=progress,
            )
        bundles.append(Explored(name, check, extractor.manifest, calibrated_layers(extractor.bundle), measured))
    first = next(iter(extractors.values()))
    here = conditions(first, options.threads, options.mode, FRAME, first.manifest.sizes.default)
    machine = {"processor": here.processor, "cores": str(here.cores), "GPU": here.gpu, "system": here.system}
    versions = {"phreg-deploy": __version__, "Python": here.python} | _installed()
    known = {name: value for name, value in machine.items() if value is not None}
    return Exploration(tuple(bundles), maps, commands, known | versions)


def calibrated_layers(bundle: Bundle) -> tuple[dict[str, Any], ...]:
    """Return the layers of ``calibration.json`` with their sensitivities, () for a bundle in float."""
    if bundle.manifest.quantisation is None:
        return ()
    path = bundle.folder / CALIBRATION
    try:
        layers = read_json(path)["layers"]
        return tuple(
            {
                "name": str(layer["name"]),
                "precision": str(layer["precision"]),
                "reason": layer["reason"] or "",
                "macs": float(layer["macs"]),
                "mean": float(layer["sensitivity"]["mean"]),
                "p1": float(layer["sensitivity"]["p1"]),
            }
            for layer in layers
        )
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise PhregError(f"calibration: {path} is damaged ({error!r}); calibrate the bundle again.") from None


def _installed() -> dict[str, str]:
    found = {}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found
