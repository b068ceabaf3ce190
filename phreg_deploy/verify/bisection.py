"""Where a bundle's answers leave the path: every half-block on the backend against the same graph in FP32 on the processor."""

from __future__ import annotations

import re
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from phreg_deploy.artifacts.measures import cosine
from phreg_deploy.bundle.bundle import Bundle
from phreg_deploy.bundle.gates import exam_bars
from phreg_deploy.bundle.manifest import GRAPH
from phreg_deploy.bundle.plans import BuildSettings, profiles_of
from phreg_deploy.errors import PhregError
from phreg_deploy.runtime.backends.options import BackendOptions
from phreg_deploy.runtime.backends.registry import open_backend
from phreg_deploy.runtime.feed import InputFeed

HALF = re.compile(r"^blocks\.(\d+)/Add(_2)?$")
JUMP = 10.0  # an error that grows so much from one half-block to the next is the place, even where the gate is far
LEAST = 1e-4  # and is at least this

Run = Callable[[dict[str, np.ndarray]], dict[str, np.ndarray]]


@dataclass(frozen=True)
class Step:
    """After one half of a block: 1st-percentile cosine and relative L2 of all tokens, values that are not finite, and the
    largest magnitude in FP32.
    """

    place: str  # "blocks.3.attn" or "blocks.3.mlp"
    cosine_p1: float
    relative_l2: float
    bad_values: int
    largest: float


def bisect(
    bundle: Bundle,
    backend: str,
    tuning: BackendOptions,
    *,
    device: int = 0,
    settings: BuildSettings | None = None,
    workspace: int | None = None,
) -> dict[str, Any]:
    """Compare every half-block on ``backend`` with FP32 on the bundle's exam; of several sizes the worst figures count.

    Args:
        settings, workspace: of the engine that is built for it, where the backend is "tensorrt".

    Returns:
        ``steps``; ``first``: the first place that diverges, or None; ``proposal``: an option for ``export`` or
        ``calibrate`` that keeps it in FP32.

    Raises:
        BackendMissing: onnx or onnxruntime, or the backend, is not there. PhregError: a graph without named blocks.
    """
    from phreg_deploy.onnx_graph.session import open_session

    feed = InputFeed(bundle)
    feeds = [feed(case["image"]) for case in bundle.cases()]
    marked, places = _marked(bundle)
    wide = open_session(_widened(marked), literal=True)
    with tempfile.TemporaryDirectory() as folder:
        graph = Path(folder) / GRAPH
        graph.write_bytes(marked.SerializeToString())
        copy = Bundle(Path(folder), replace(bundle.manifest, files={}))
        found: dict[str, list[Step]] = {place: [] for place in places}
        with _opened(copy, backend, tuning, device, settings or BuildSettings(), workspace) as run:
            for inputs in feeds:
                got, expected = run(inputs), wide.run([f"probe/{p}" for p in places], inputs)
                for place, wanted in zip(places, expected):
                    found[place].append(_step(place, got[f"probe/{place}"], wanted))
    steps = [_worst(several) for several in found.values()]
    first = _first(steps, bundle.manifest.precision)
    proposal = None if first is None else f"--keep-fp32 '^{re.escape(first.place)}'"
    return {
        "backend": backend,
        "steps": [asdict(s) for s in steps],
        "first": None if first is None else first.place,
        "proposal": proposal,
    }


def _worst(steps: list[Step]) -> Step:
    return Step(
        steps[0].place, float(np.min([s.cosine_p1 for s in steps])), float(np.max([s.relative_l2 for s in steps])),
        sum(s.bad_values for s in steps), max(s.largest for s in steps),
    )  # fmt: skip


def _first(steps: list[Step], precision: str) -> Step | None:
    allowed, before = 1 - exam_bars(precision)["cosine_p1"], 0.0
    for step in steps:
        error = 1 - step.cosine_p1
        if step.bad_values or not error <= allowed or (before > 0 and error > max(JUMP * before, LEAST)):
            return step
        before = max(error, 1e-9)
    return None


def _step(place: str, got: np.ndarray, expected: np.ndarray) -> Step:
    a, b = got.astype(np.float64), expected.astype(np.float64)
    bad = int((~np.isfinite(a)).sum())
    if bad:
        return Step(place, float("nan"), float("nan"), bad, float(np.abs(b).max()))
    close = float(np.percentile(cosine(a, b), 1))
    return Step(place, close, float(np.linalg.norm(a - b) / max(np.linalg.norm(b), 1e-12)), 0, float(np.abs(b).max()))


def _marked(bundle: Bundle) -> tuple[Any, list[str]]:
    """The bundle's graph with the residual stream after every half-block as further outputs, in float32."""
    import onnx
    from onnx import TensorProto, helper

    model = onnx.load(bundle.graph)
    places = []
    for node in list(model.graph.node):
        found = HALF.match(node.name)
        if found:
            place = f"blocks.{found[1]}.{'mlp' if found[2] else 'attn'}"
            places.append(place)
            model.graph.node.append(
                helper.make_node(
                    "Cast", [node.output[0]], [f"probe/{place}"], name=f"probe/{place}", to=TensorProto.FLOAT
                )
            )
            model.graph.output.append(helper.make_tensor_value_info(f"probe/{place}", TensorProto.FLOAT, None))
    if not places:
        raise PhregError(
            "bisect: the bundle's graph names no blocks; it was written by an older version. Export it again."
        )
    return model, places


def _widened(model: Any) -> Any:
    """A copy in which every FP16 and BF16 tensor is FP32; the weights keep the values that narrowing gave them."""
    import onnx
    from onnx import TensorProto, numpy_helper

    narrow = (TensorProto.FLOAT16, TensorProto.BFLOAT16)
    wide = onnx.ModelProto()
    wide.CopyFrom(model)
    for tensor in wide.graph.initializer:
        if tensor.data_type in narrow:
            tensor.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(tensor).astype(np.float32), tensor.name))
    for node in wide.graph.node:
        for attribute in node.attribute:
            if node.op_type == "Cast" and attribute.name == "to" and attribute.i in narrow:
                attribute.i = TensorProto.FLOAT
    for value in (*wide.graph.input, *wide.graph.output):
        if value.type.tensor_type.elem_type in narrow:
            value.type.tensor_type.elem_type = TensorProto.FLOAT
    return wide


@contextmanager
def _opened(
    copy: Bundle, backend: str, tuning: BackendOptions, device: int, settings: BuildSettings, workspace: int | None
) -> Iterator[Run]:
    if backend != "tensorrt":
        opened = open_backend(copy, backend, replace(tuning, device=device))
        try:
            yield opened.run
        finally:
            opened.close()
        return
    from phreg_deploy.export.engine.builder import build_plan
    from phreg_deploy.runtime.backends.tensorrt_backend import Plan
    from phreg_deploy.runtime.gpu.cuda import Cuda
    from phreg_deploy.runtime.gpu.trt_library import load_tensorrt

    trt, cuda, profiles = load_tensorrt(), Cuda(device), profiles_of(copy.manifest)
    built = build_plan(trt, copy.graph, profiles, settings, workspace=workspace)
    with Plan(trt, cuda, built.plan, profiles, graphs=False) as plan:
        yield plan.run
