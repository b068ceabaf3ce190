"""Find the half-block after which a backend's answers leave those of the same graph in FP32 on the processor."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np

from phreg_deploy.artifacts.measures import cosine
from phreg_deploy.bundle.bundle import Bundle
from phreg_deploy.bundle.gates import exam_bars
from phreg_deploy.bundle.manifest import GRAPH, WEIGHTS
from phreg_deploy.bundle.plan_keys import BuildSettings
from phreg_deploy.bundle.profiles import profiles_of
from phreg_deploy.errors import PhregError
from phreg_deploy.files.temporary import scratch_folder
from phreg_deploy.runtime.backends.options import BackendOptions
from phreg_deploy.runtime.backends.registry import open_backend
from phreg_deploy.runtime.feed import InputFeed

HALF_BLOCK = re.compile(r"^blocks\.(\d+)/Add(_2)?$")
# A half-block diverges, even within the gate, if the error grows by this factor and is then at least SMALLEST_JUMP.
JUMP = 10.0
SMALLEST_JUMP = 1e-4

Run = Callable[[dict[str, np.ndarray]], dict[str, np.ndarray]]


@dataclass(frozen=True)
class Step:
    """The residual stream after one half-block against FP32, over all tokens.

    ``place``: e.g. "blocks.3.attn" or "blocks.3.mlp". ``cosine_p1``: 1st percentile of the cosine per token.
    ``bad_values``: how many are NaN or infinite. ``largest``: the largest magnitude in FP32.
    """

    place: str
    cosine_p1: float
    relative_l2: float
    bad_values: int
    largest: float


@dataclass(frozen=True)
class BisectionReport:
    """``first``: the first half-block that diverges, or None. ``proposal``: the option that keeps it in FP32."""

    backend: str
    steps: tuple[Step, ...]
    first: str | None

    @property
    def proposal(self) -> str | None:
        """An option for ``export`` or ``calibrate``."""
        return None if self.first is None else f"--keep-fp32 '^{re.escape(self.first)}'"

    def to_json(self) -> dict[str, Any]:
        steps = [asdict(step) for step in self.steps]
        return {"backend": self.backend, "steps": steps, "first": self.first, "proposal": self.proposal}


def bisect(
    bundle: Bundle,
    backend: str,
    options: BackendOptions,
    *,
    settings: BuildSettings | None = None,
    workspace: int | None = None,
) -> BisectionReport:
    """Compare every half-block on ``backend`` with FP32 on the bundle's exam; of several sizes, keep the worst figures.

    Args:
        settings, workspace: how to build the TensorRT plan, for the backend "tensorrt".

    Raises:
        BackendMissing: onnx, onnxruntime or the backend is not installed.
        PhregError: the graph does not name its blocks.
    """
    from phreg_deploy.onnx_graph.external import fits, write_graph
    from phreg_deploy.onnx_graph.session import open_session

    feed = InputFeed(bundle)
    model, places = _probed(bundle)
    outputs = [f"probe/{place}" for place in places]
    fp32 = open_session(_widened(model), literal=True)
    steps: dict[str, list[Step]] = {place: [] for place in places}
    with scratch_folder("phreg-bisection") as folder:
        weights = None if fits(model) else WEIGHTS
        write_graph(model, folder / GRAPH, weights, check=False)
        copy = Bundle(folder, replace(bundle.manifest, files={}, weights=weights))
        with _opened(copy, backend, options, settings or BuildSettings(), workspace) as run:
            for case in bundle.cases():
                inputs = feed(case["image"])
                answers, expected = run(inputs), fp32.run(outputs, inputs)
                for place, output, reference in zip(places, outputs, expected):
                    steps[place].append(_compare(place, answers[output], reference))
    worst = tuple(_worst(of_all_cases) for of_all_cases in steps.values())
    return BisectionReport(backend, worst, _first(worst, bundle.manifest.precision))


def _worst(steps: list[Step]) -> Step:
    """The worst figures of one place over several cases; NaN counts as the worst."""
    return Step(
        steps[0].place,
        cosine_p1=float(np.min([step.cosine_p1 for step in steps])),
        relative_l2=float(np.max([step.relative_l2 for step in steps])),
        bad_values=sum(step.bad_values for step in steps),
        largest=max(step.largest for step in steps),
    )


def _first(steps: tuple[Step, ...], precision: str) -> str | None:
    """The first place with values that are not finite, an error beyond the gate, or a jump of the error."""
    allowed, before = 1 - exam_bars(precision)["cosine_p1"], 0.0
    for step in steps:
        error = 1 - step.cosine_p1
        jumps = before > 0 and error > max(JUMP * before, SMALLEST_JUMP)
        if step.bad_values or not error <= allowed or jumps:
            return step.place
        before = max(error, 1e-9)
    return None


def _compare(place: str, answer: np.ndarray, reference: np.ndarray) -> Step:
    a, b = answer.astype(np.float64), reference.astype(np.float64)
    largest = float(np.abs(b).max())
    bad = int((~np.isfinite(a)).sum())
    if bad:
        return Step(place, float("nan"), float("nan"), bad, largest)
    relative_l2 = float(np.linalg.norm(a - b) / max(np.linalg.norm(b), 1e-12))
    return Step(place, float(np.percentile(cosine(a, b), 1)), relative_l2, 0, largest)


def _probed(bundle: Bundle) -> tuple[Any, list[str]]:
    """The bundle's graph with the residual stream after each half-block as a float32 output, and the half-blocks."""
    import onnx
    from onnx import TensorProto, helper

    model = onnx.load(bundle.graph)
    places = []
    for node in list(model.graph.node):
        match = HALF_BLOCK.match(node.name)
        if match:
            place = f"blocks.{match[1]}.{'mlp' if match[2] else 'attn'}"
            output = f"probe/{place}"
            places.append(place)
            cast = helper.make_node("Cast", [node.output[0]], [output], name=output, to=TensorProto.FLOAT)
            model.graph.node.append(cast)
            model.graph.output.append(helper.make_tensor_value_info(output, TensorProto.FLOAT, None))
    if not places:
        raise PhregError(
            "bisect: the bundle's graph names no blocks; it was written by an older version. Export it again."
        )
    return model, places


def _widened(model: Any) -> Any:
    """A copy with every FP16 and BF16 tensor in FP32; the weights keep their rounded values."""
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
    copy: Bundle, backend: str, options: BackendOptions, settings: BuildSettings, workspace: int | None
) -> Iterator[Run]:
    """Run ``copy`` on a backend; a TensorRT plan is built in memory and not stored."""
    if backend != "tensorrt":
        opened = open_backend(copy, backend, options)
        try:
            yield opened.run
        finally:
            opened.close()
        return
    from phreg_deploy.export.engine.builder import build_plan
    from phreg_deploy.runtime.backends.tensorrt_backend import Plan
    from phreg_deploy.runtime.gpu.cuda import Cuda
    from phreg_deploy.runtime.gpu.trt_library import load_tensorrt

    trt, cuda, profiles = load_tensorrt(), Cuda(options.device), profiles_of(copy.manifest)
    built = build_plan(trt, copy.graph, profiles, settings, workspace=workspace)
    with Plan(trt, cuda, built.plan, profiles, graphs=False) as plan:
        yield plan.run
