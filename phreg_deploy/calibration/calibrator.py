"""Calibrate an FP32 bundle in the steps of docs/int8.md, and write it or refuse to."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import ModelProto

from phreg_deploy import __version__
from phreg_deploy.bundle.bundle import Bundle
from phreg_deploy.bundle.manifest import CALIBRATION, GRAPH, REFERENCE, TABLES, WEIGHTS, Manifest
from phreg_deploy.bundle.writing import write_manifest, write_npz, write_onnx_metadata
from phreg_deploy.calibration.images import Feeds, Shares, feeds, split_images
from phreg_deploy.calibration.kernels import open_counted
from phreg_deploy.calibration.ranges import observe_magnitudes, observe_ranges
from phreg_deploy.calibration.report import CalibrationReport, FallbackStep, LayerReport, Sensitivity, Trial
from phreg_deploy.calibration.request import CalibrationRequest
from phreg_deploy.calibration.search import CANDIDATES, EvalSet, Search, compare, run_session
from phreg_deploy.errors import FORCE, GateFailed, PhregError
from phreg_deploy.files.atomic import atomic_folder
from phreg_deploy.onnx_graph import external
from phreg_deploy.onnx_graph.external import load_apart, put_together
from phreg_deploy.onnx_graph.linears import find_linears
from phreg_deploy.onnx_graph.mixed_precision import narrow
from phreg_deploy.onnx_graph.session import VERSION, open_session
from phreg_deploy.onnx_graph.split_qkv import split_projections
from phreg_deploy.onnx_graph.wiring import Wiring
from phreg_deploy.progress import Progress
from phreg_deploy.quantisation import Smoothing
from phreg_deploy.runtime.backends.instructions import advice
from phreg_deploy.runtime.feed import InputFeed
from phreg_deploy.runtime.parity import gates_of

# The figures behind this choice are in fp8.py.
FP8_SMOOTHING = Smoothing(norm=0.5, value=None, hidden=None)


@dataclass(frozen=True)
class Choice:
    """What the search decided: the smoothing and the layers that stay in float, with the measurements behind both."""

    smoothing: Smoothing
    trials: list[Trial]
    sensitivities: dict[str, Sensitivity]
    float_layers: list[str]
    steps: list[FallbackStep]


def run_calibration(request: CalibrationRequest, output: Path, force: bool, progress: Progress) -> CalibrationReport:
    """Calibrate; ``phreg_deploy.calibration.calibrate`` describes arguments, result and errors."""
    started = time.perf_counter()
    manifest = open_bundle(request, progress)
    shares = split_images(request.images, manifest, progress.say)
    bundle = Bundle.read(request.bundle)
    search, rounding, unseen = observe(bundle, shares, request, progress)
    choice = choose(search, rounding, shares.tokens, request, progress)
    model, session, islands = write_graph(search, choice, request)
    fidelity = compare(session, unseen, manifest.norm_median).parity()
    report = CalibrationReport(
        output=output,
        mode=request.mode,
        target=request.target,
        smoothing=choice.smoothing,
        candidates=choice.trials,
        images=shares,
        layers=report_layers(search, choice),
        fallback=choice.steps,
        float_layers=choice.float_layers,
        float_macs=sum(n.size for n in search.linears if n.name in choice.float_layers) / search.size,
        islands=islands,
        bar=request.bars,
        fidelity=fidelity,
        gates=gates_of(fidelity, request.mode, request.cosine_p1),
        seconds=time.perf_counter() - started,
        versions={"phreg_deploy": __version__, "onnx": onnx.__version__, "onnxruntime": VERSION},
    )
    if report.missed and not force:
        raise GateFailed(_refusal(report), report.to_json())
    write_bundle(report, model, session, bundle, force)
    return report


def open_bundle(request: CalibrationRequest, progress: Progress) -> Manifest:
    """Verify the bundle's files and its precision, and return its manifest."""
    bundle = Bundle.read(request.bundle)
    bundle.verify()
    precision = bundle.manifest.precision
    if precision != "fp32":
        raise PhregError(f"calibrate: got a bundle in {precision}, expected fp32. Export with --precision fp32 first.")
    note = advice(request.mode) if request.target == "cpu" else None
    if note:
        progress.say(f"{note} The bundle will be as exact here as elsewhere.")
    return bundle.manifest


def observe(
    bundle: Bundle, shares: Shares, request: CalibrationRequest, progress: Progress
) -> tuple[Search, Feeds, EvalSet]:
    """Run the FP32 graph on the images.

    Returns the search, the images on which weights are rounded, and the images of the report with the float answers.
    """
    model, arrays = load_apart(bundle.graph)
    manifest, largest, feed = bundle.manifest, {}, InputFeed(bundle)
    linears, rounding = find_linears(model), list(feeds(feed, shares.calibrate))
    with progress.task("ranges", len(shares.calibrate)) as advance:
        ranges = observe_ranges(model, linears, manifest.model, rounding, advance, arrays)
    if request.target == "trt":
        with progress.task("largest values", len(shares.calibrate)) as advance:
            largest = observe_magnitudes(model, rounding, advance, arrays)
    session = open_session(model, arrays=arrays)
    select = _float_answers(session, feeds(feed, shares.select), progress, "float answers", len(shares.select))
    report = _float_answers(session, feeds(feed, shares.report), progress, "float answers, report", len(shares.report))
    # It holds a copy of all weights.
    del session
    patch = manifest.model.patch
    smallest = min(height * width for height, width in manifest.sizes.sizes)
    tokens = manifest.model.prefix_tokens + smallest // (patch[0] * patch[1])
    wiring, median = Wiring(model, arrays), manifest.norm_median
    search = Search(wiring, linears, ranges, request.target, median, select, request.mode, largest, tokens)
    return search, rounding, report


def _float_answers(
    session: Any, images: Iterable[tuple[dict[str, np.ndarray], int]], progress: Progress, name: str, total: int
) -> EvalSet:
    inputs, answers = [], []
    with progress.task(name, total) as advance:
        for feed, count in images:
            outputs = run_session(session, feed, count)
            if not all(np.isfinite(value).all() for value in outputs.values()):
                raise PhregError("calibrate: the FP32 bundle's features are not finite; its weights are damaged.")
            inputs.append((feed, count))
            answers.append(outputs)
            advance(count)
    return EvalSet(inputs, answers)


def choose(search: Search, rounding: Feeds, tokens: int, request: CalibrationRequest, progress: Progress) -> Choice:
    """Choose the smoothing, round the weights, and choose the layers that stay in float.

    Args:
        tokens: per image.
    """
    smoothing = request.smoothing or (Smoothing() if request.mode == "int8" else FP8_SMOOTHING)
    trials: list[Trial] = []
    if request.smoothing is None and request.mode == "int8":
        with progress.task("smoothing", 1 + len(CANDIDATES)) as advance:
            smoothing, trials = search.choose_smoothing(smoothing, advance)
    with progress.task("rounding", len({n.source for n in search.linears})) as advance:
        search.round_weights(smoothing, tokens, rounding, advance)
    with progress.task("sensitivity", len(search.linears)) as advance:
        sensitivities = search.sensitivities(smoothing, advance)
    bar = request.bars["cosine_p1"]
    with progress.task("layers returned to float", None) as advance:
        layers, steps = search.fallback(smoothing, sensitivities, request.float_macs, bar, advance)
    return Choice(smoothing, trials, sensitivities, layers, steps)


def write_graph(search: Search, choice: Choice, request: CalibrationRequest) -> tuple[ModelProto, Any, list[str]]:
    """Write the chosen graph and open it. For target "cpu", count its integer kernels.

    Returns the graph, a session that computes it, and the nodes that stay in FP32 around its 8 bits.

    Raises:
        PhregError: a layer that should run in 8 bits runs in float.
    """
    for_tensorrt, islands = request.target == "trt", []
    model, arrays = search.graph(choice.smoothing, set(choice.float_layers), share=for_tensorrt)
    if for_tensorrt:
        put_together(model, arrays)
        islands = narrow(split_projections(model), "fp16", search.largest, request.keep).reasons()
        session = open_session(model, literal=True)
    else:
        expected = [n.name for n in search.linears if n.name not in choice.float_layers]
        session, _ = open_counted(model, expected, arrays)
        put_together(model, arrays)
    return model, session, islands


def report_layers(search: Search, choice: Choice) -> list[LayerReport]:
    """Report every linear layer, in the order in which they run."""
    grids, layers = search.equalised(choice.smoothing).grids, []
    for linear in search.linears:
        name, inputs = linear.name, search.ranges[linear.source]["all"]
        gain, grid, precision, reason = choice.sensitivities[name], grids[name], search.mode, None
        if name in choice.float_layers:
            gains = f"{gain.mean:.2g} in mean and {gain.p1:.2g} in 1st-percentile cosine"
            precision, reason = "float", f"alone in float it gains {gains}"
        low, high = float(inputs.low.min()), float(inputs.high.max())
        share = linear.size / search.size
        layers.append(LayerReport(name, linear.kind, share, precision, reason, low, high, grid.step, grid.zero, gain))
    return layers


def _refusal(report: CalibrationReport) -> str:
    layers = "every linear layer in 8 bits"
    if report.float_layers:
        layers = f"{len(report.float_layers)} layers, {100 * report.float_macs:.1f} % of the MACs, were left in float"
    return (
        f"calibrate: {'; '.join(report.missed)} ({layers}). Nothing was written. Allow more float with --float-macs, "
        "give more images or images closer to the deployment's, distil with `phreg-deploy distill --int8-aware`, or "
        f"add {FORCE} to write it anyway, marked as missed."
    )


def write_bundle(report: CalibrationReport, graph: ModelProto, session: Any, bundle: Bundle, force: bool) -> None:
    """Write the graph with a new manifest, new reference answers and ``calibration.json``."""
    reference, feed = {}, InputFeed(bundle)
    manifest = _manifest(bundle.manifest, report, graph)
    write_onnx_metadata(graph, manifest)
    for case, expected in enumerate(bundle.cases()):
        image = expected["image"]
        answers = {"image": image, **run_session(session, feed(image), len(image))}
        reference.update({f"{case}/{name}": value for name, value in answers.items()})
    with atomic_folder(report.output, force) as folder:
        external.write_graph(graph, folder / GRAPH, manifest.weights)
        write_npz(folder / REFERENCE, reference)
        (folder / CALIBRATION).write_text(json.dumps(report.to_json(), indent=1, sort_keys=True) + "\n")
        for name in {*TABLES.values()} & {*bundle.manifest.required()}:
            shutil.copyfile(bundle.folder / name, folder / name)
        write_manifest(folder, manifest)


def _manifest(manifest: Manifest, report: CalibrationReport, graph: ModelProto) -> Manifest:
    """Return the FP32 bundle's manifest with the precision, outputs and evidence of the new graph."""
    stored = report.to_json()
    keys = ("mode", "target", "smoothing", "float_layers", "float_macs", "fidelity", "bar", "missed")
    images = {name: {key: part[key] for key in ("count", "digest")} for name, part in stored["images"].items()}
    attention = ["attention"] if report.mode == "int8" else []
    sensitive = [f"{name} (sensitive)" for name in report.float_layers]
    parts = ["patch projection", "layer norms", *attention, "GELU", "residual stream", *sensitive, *report.islands]
    element_types = {value.name: value.type.tensor_type.elem_type for value in graph.graph.output}
    dtypes = {name: onnx.helper.tensor_dtype_to_np_dtype(kind).name for name, kind in element_types.items()}
    return replace(
        manifest,
        precision=report.mode,
        weights=None if external.fits(graph) else WEIGHTS,
        quantisation={**{key: stored[key] for key in keys}, "images": images},
        float_parts=parts,
        outputs={name: {**output, "dtype": dtypes[name]} for name, output in manifest.outputs.items()},
        source={**manifest.source, "fp32_graph_sha256": manifest.files[GRAPH]},
        versions={**manifest.versions, **report.versions},
    )
