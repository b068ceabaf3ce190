"""``calibrate``: ranges, smoothing, sensitivity, what stays in float, and the bundle that says all of it."""

from __future__ import annotations

import json
import shutil
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx

from phreg_deploy import __version__
from phreg_deploy.arguments import check_cosine, check_pattern
from phreg_deploy.bundle.bundle import Bundle
from phreg_deploy.bundle.gates import GATES
from phreg_deploy.bundle.manifest import CALIBRATION, GRAPH, POSITIONS, REFERENCE
from phreg_deploy.bundle.writing import write_manifest, write_npz, write_onnx_metadata
from phreg_deploy.calibration.images import feeds, split_images
from phreg_deploy.calibration.kernels import open_counted
from phreg_deploy.calibration.qdq import TARGETS
from phreg_deploy.calibration.ranges import observe, watch
from phreg_deploy.calibration.search import CANDIDATES, MARGIN, EvalSet, Search, answer, compare
from phreg_deploy.errors import GateFailed, PhregError
from phreg_deploy.files.atomic import atomic_folder, check_target
from phreg_deploy.onnx_graph.linears import Linear, Wiring, find_linears
from phreg_deploy.onnx_graph.mixed_precision import narrow
from phreg_deploy.onnx_graph.session import VERSION, open_session
from phreg_deploy.onnx_graph.split_qkv import split_projections
from phreg_deploy.progress import SILENT, Progress
from phreg_deploy.quantisation import Smoothing
from phreg_deploy.runtime.backends.instructions import advice
from phreg_deploy.runtime.features import FeatureExtractor
from phreg_deploy.runtime.parity import Parity, gates_of, missed_gates

FP8_SMOOTHING = Smoothing(norm=0.5, value=None, hidden=None)  # see float8.py


@dataclass(frozen=True)
class CalibrationRequest:
    """What to calibrate.

    ``bundle``: in FP32. ``float_macs``: share of the linear layers' multiply-accumulates that may stay in float until the
    bar is passed; 0 for none. ``smoothing``: a setting to take as it is; None to choose on images. ``cosine_p1``: the
    bar on the 1st-percentile patch cosine; None for the precision's own. ``keep``: regular expressions on nodes that stay
    in FP32 around the 8 bits; with the target "trt", where everything else is FP16.
    """

    bundle: Path
    images: Path
    mode: str = "int8"
    target: str = "cpu"
    float_macs: float = 0.1
    cosine_p1: float | None = None
    smoothing: Smoothing | None = None
    keep: tuple[str, ...] = ()


def calibrate(
    request: CalibrationRequest, output: Path, *, force: bool = False, progress: Progress = SILENT
) -> dict[str, Any]:
    """Write an INT8 bundle of an FP32 one to ``output``.

    Args:
        force: replace an output that exists, and write also a bundle that misses the bar, marked so for ever.

    Returns:
        What ``calibration.json`` holds: ranges, sensitivities, what stayed in float and why, and the fidelity on images
        that took part in none of the choices.

    Raises:
        PhregError: bad input, or an INT8 layer that would run in float. GateFailed: the bar is missed, and not
            ``force``; nothing is written.
    """
    started = time.perf_counter()
    check_request(request)
    check_target(output, force, [request.bundle, request.images])
    bundle = Bundle.read(request.bundle)
    bundle.verify()
    manifest = bundle.manifest
    if manifest.precision != "fp32":
        raise PhregError(
            f"calibrate: got a bundle in {manifest.precision}, expected fp32. Export it with --precision fp32 first."
        )
    note = advice(request.mode) if request.target == "cpu" else None
    if note:
        progress.say(f"{note} The bundle will be as exact here as elsewhere.")
    shares = split_images(request.images, manifest, progress.say)
    with FeatureExtractor.load(request.bundle, backend="onnxruntime-cpu", verify=False) as extractor:
        model = onnx.load(bundle.graph)
        linears = find_linears(model)
        with progress.task("ranges", len(shares.calibrate)) as advance:
            ranges = observe(model, linears, manifest.model, feeds(extractor, shares.calibrate), advance)
        largest: dict[str, float] = {}
        if request.target == "trt":
            with progress.task("largest values", len(shares.calibrate)) as advance:
                largest = watch(model, feeds(extractor, shares.calibrate), advance)
        rounded_on = list(feeds(extractor, shares.calibrate))
        chosen_on, reported_on = (
            _scene(extractor, part, progress, name)
            for part, name in ((shares.select, "float answers"), (shares.report, "float answers, report"))
        )
    search = Search(
        Wiring(model),
        linears,
        ranges,
        request.target,
        manifest.norm_median,
        chosen_on,
        request.mode,
        largest,
        manifest.model.prefix_tokens
        + min(h * w for h, w in manifest.sizes.sizes) // (manifest.model.patch[0] * manifest.model.patch[1]),
    )
    passes = lambda parity: not _missed(parity, request, MARGIN)  # noqa: E731
    smoothing = request.smoothing or (Smoothing() if request.mode == "int8" else FP8_SMOOTHING)
    tried: list[dict[str, Any]] = []
    if request.smoothing is None and request.mode == "int8":
        with progress.task("smoothing", 1 + len(CANDIDATES)) as advance:
            smoothing, tried = search.smoothing(smoothing, advance)
    with progress.task("rounding", len({n.source for n in linears})) as advance:
        search.round(smoothing, shares.tokens, rounded_on, advance)
    with progress.task("sensitivity", len(linears)) as advance:
        gains = search.sensitivities(smoothing, advance)
    with progress.task("fallback", None) as advance:
        keep, steps = search.fallback(smoothing, gains, request.float_macs, passes, advance)
    graph = search.graph(smoothing, set(keep), share=request.target == "trt")
    eight = [n.name for n in linears if n.name not in keep]
    islands: list[str] = []
    if request.target == "trt":
        kept = narrow(split_projections(graph), "fp16", largest, request.keep)
        islands = kept.reasons()
        session = open_session(graph, literal=True)
    else:
        session, _ = open_counted(graph, eight)
    onnx.checker.check_model(graph)
    fidelity = compare(session, reported_on, manifest.norm_median)
    gates = gates_of(fidelity, request.mode, request.cosine_p1)
    missed = [str(gate) for gate in gates if not gate.passed]
    share = sum(n.size for n in linears if n.name in keep) / sum(n.size for n in linears)
    report = {
        "format": 1, "mode": request.mode, "target": request.target, "smoothing": smoothing.to_json(), "candidates": tried,
        "images": shares.to_json(), "layers": _layers(search, smoothing, gains, keep, ranges), "fallback": steps,
        "float_layers": keep, "float_macs": share, "integer_layers": len(eight), "islands": islands, "bar": _bar(request),
        "fidelity": fidelity.to_json(), "gates": [gate.to_json() for gate in gates], "missed": missed, "passed": not missed, "seconds": time.perf_counter() - started,
        "versions": {"phreg_deploy": __version__, "onnx": onnx.__version__, "onnxruntime": VERSION},
    }  # fmt: skip
    if missed and not force:
        raise GateFailed(
            f"calibrate: {'; '.join(missed)} ({_tried(keep, share)}). Nothing was written. Allow more float with --float-macs, give more or "
            "fitting images, distil with `phreg-deploy distill --int8-aware`, or add --force to write it anyway, marked as missed.",
            report,
        )
    _write(output, force, extractor, graph, report, session)
    return report


def check_request(request: CalibrationRequest) -> None:
    """Raise ``PhregError`` for a setting that no bundle and no image can make good."""
    if request.mode not in ("int8", "fp8"):
        raise PhregError(f"mode: got {request.mode!r}, expected int8 or fp8.")
    if request.target not in TARGETS:
        raise PhregError(f"target: got {request.target!r}, expected {' or '.join(TARGETS)}.")
    if request.mode == "fp8" and request.target != "trt":
        raise PhregError("target: got cpu, but no processor computes in FP8; use --target trt, or --mode int8.")
    for expression in request.keep:
        check_pattern(expression)
    if request.keep and request.target != "trt":
        raise PhregError("keep in FP32: with --target cpu everything around the 8 bits is FP32 already.")
    if not 0 <= request.float_macs <= 1:
        raise PhregError(f"float MACs: got {request.float_macs}, expected a share from 0 to 1, e.g. 0.1.")
    check_cosine(request.cosine_p1)


def _missed(parity: Parity, request: CalibrationRequest, margin: float) -> list[str]:
    """The gates that are missed when the 1st-percentile bar is tighter by ``margin``."""
    return missed_gates(parity, request.mode, 1 - margin * (1 - _bar(request)["cosine_p1"]))


def _bar(request: CalibrationRequest) -> dict[str, float]:
    own = {} if request.cosine_p1 is None else {"cosine_p1": request.cosine_p1}
    return {**GATES[request.mode], **own}


def _tried(keep: list[str], share: float) -> str:
    return (
        f"{len(keep)} layers, {100 * share:.1f} % of the MACs, were left in float"
        if keep
        else "every linear layer in 8 bits"
    )


def _scene(extractor: FeatureExtractor, photographs: Any, progress: Progress, name: str) -> EvalSet:
    pairs = []
    with progress.task(name, len(photographs)) as advance:
        for feed, count in feeds(extractor, photographs):
            outputs = extractor.run(feed["image"])
            if not all(np.isfinite(value).all() for value in outputs.values()):
                raise PhregError(
                    "calibrate: the FP32 bundle's own features are not finite; the bundle's weights are damaged."
                )
            pairs.append(((feed, count), {key: value[:count] for key, value in outputs.items()}))
            advance(count)
    return EvalSet([pair[0] for pair in pairs], [pair[1] for pair in pairs])


def _layers(
    search: Search, smoothing: Smoothing, gains: dict[str, Any], keep: list[str], ranges: Any
) -> list[dict[str, Any]]:
    total = sum(n.size for n in search.linears)
    grids = search.equalised(smoothing).grids

    def entry(n: Linear) -> dict[str, Any]:
        found = ranges[n.source]["all"]
        reason = (
            f"alone in float it gains {gains[n.name]['mean']:.2g} in mean and {gains[n.name]['p1']:.2g} in 1st-percentile cosine"
            if n.name in keep
            else None
        )
        return {
            "name": n.name, "input": n.kind, "macs": n.size / total, "precision": "float" if n.name in keep else search.mode, "reason": reason,
            "low": float(found.low.min()), "high": float(found.high.max()), "step": grids[n.name].step, "zero": grids[n.name].zero, "sensitivity": gains[n.name],
        }  # fmt: skip

    return [entry(n) for n in search.linears]


def _outputs(outputs: dict[str, dict[str, Any]], graph: Any) -> dict[str, dict[str, Any]]:
    """The manifest's outputs with the types that the graph has now."""
    kinds = {
        v.name: onnx.helper.tensor_dtype_to_np_dtype(v.type.tensor_type.elem_type).name for v in graph.graph.output
    }
    return {name: {**facts, "dtype": kinds[name]} for name, facts in outputs.items()}


def _write(
    output: Path, force: bool, extractor: FeatureExtractor, graph: Any, report: dict[str, Any], session: Any
) -> None:
    bundle, manifest = extractor.bundle, extractor.manifest
    kept = [*(f"{name} (sensitive)" for name in report["float_layers"]), *report["islands"]]
    summary = {
        k: report[k] for k in ("mode", "target", "smoothing", "float_layers", "float_macs", "fidelity", "bar", "missed")
    }
    summary["images"] = {name: {k: part[k] for k in ("count", "digest")} for name, part in report["images"].items()}
    new = replace(
        manifest, precision=report["mode"], quantisation=summary,
        float_parts=["patch projection", "layer norms", *(["attention"] if report["mode"] == "int8" else []), "GELU", "residual stream", *kept],
        outputs=_outputs(manifest.outputs, graph),
        source={**manifest.source, "fp32_graph_sha256": manifest.files[GRAPH]}, versions={**manifest.versions, **report["versions"]},
    )  # fmt: skip
    write_onnx_metadata(graph, new)
    exam = {}
    for case, expected in enumerate(bundle.cases()):
        image = expected["image"]
        answers = {"image": image, **answer(session, extractor.feed(image), len(image))}
        exam.update({f"{case}/{name}": value for name, value in answers.items()})
    with atomic_folder(output, force) as folder:
        (folder / GRAPH).write_bytes(graph.SerializeToString(deterministic=True))
        write_npz(folder / REFERENCE, exam)
        (folder / CALIBRATION).write_text(json.dumps(report, indent=1, sort_keys=True) + "\n")
        if (bundle.folder / POSITIONS).is_file():
            shutil.copyfile(bundle.folder / POSITIONS, folder / POSITIONS)
        write_manifest(folder, new)
