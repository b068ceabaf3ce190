"""Make the graphs of ``export`` and ``calibrate --target trt`` for every family, and build plans of them."""

import functools
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx

from phreg_deploy.bundle.profiles import profiles_of
from phreg_deploy.calibration.calibrator import FP8_SMOOTHING
from phreg_deploy.calibration.fp8 import FUSED_FROM
from phreg_deploy.calibration.ranges import Ranges, observe_magnitudes, observe_ranges
from phreg_deploy.calibration.search import Search
from phreg_deploy.export.dense_vit import DenseViT
from phreg_deploy.export.folding import patch_positions
from phreg_deploy.export.rotary import describe_rotary, rotary_tables
from phreg_deploy.export.trace import trace
from phreg_deploy.models.loading import model_preprocess, model_spec
from phreg_deploy.models.readouts import with_readout
from phreg_deploy.models.registers import add_registers
from phreg_deploy.onnx_graph.external import put_together
from phreg_deploy.onnx_graph.linears import Linear, find_linears
from phreg_deploy.onnx_graph.mixed_precision import narrow
from phreg_deploy.onnx_graph.split_qkv import split_projections
from phreg_deploy.onnx_graph.wiring import Wiring
from phreg_deploy.quantisation import Smoothing
from phreg_deploy.readout import PLAIN, Readout
from phreg_deploy.spec import Batches, Sizes
from tests import nvidia
from tests.cli_helpers import photograph
from tests.small_models import small

DEPTH, WIDTH, HEADS = 2, 96, 3
# Patches per side. A smaller grid has too few tokens for fused attention in FP8.
SIDE = 8
PRECISIONS = ("fp32", "fp16", "bf16", "int8", "fp8")
# Families whose small models are equal.
SAME = {"dino": "augreg"}

BUILD = """
from pathlib import Path
import tensorrt as trt
from phreg_deploy.bundle.plan_keys import BuildSettings
from phreg_deploy.bundle.profiles import ProfileShapes
from phreg_deploy.errors import PhregError
from phreg_deploy.export.engine.builder import build_plan
from tests import nvidia

results = {}
for path, profiles in given.items():
    try:
        built = build_plan(trt, Path(path), [ProfileShapes(inputs) for inputs in profiles], BuildSettings())
    except PhregError as error:
        results[path] = str(error)
    else:
        results[path] = [[step.kind, step.kernel, step.nodes] for step in nvidia.operators(built.plan)]
print(json.dumps(results))
"""


class Graphs:
    """One small model, its FP32 graph, and what calibration observes in it on two photographs.

    ``outputs``: ``layers`` and ``attention`` of ``DenseViT``.
    """

    def __init__(
        self,
        family: str,
        sizes: str,
        width: int,
        heads: int,
        side: int,
        depth: int = DEPTH,
        readout: Readout = PLAIN,
        **outputs: Any,
    ) -> None:
        model = add_registers(small(family, depth=depth, width=width, heads=heads, side=side), 4)
        model = with_readout(model, readout)
        (patch, _), native = model.patch_embed.patch_size, tuple(model.patch_embed.img_size)
        self.patch = patch
        ranging = sizes == "range"
        served = (
            Sizes.parse(f"{(side - 2) * patch}:{side * patch}:{(side + 2) * patch}", (patch, patch))
            if ranging
            else Sizes("fixed", (native,))
        )
        batches = Batches.parse("1:2:8" if ranging else "1")
        lean = DenseViT(model, model_preprocess(model), positions_as_input=ranging, **outputs)
        self.graph: onnx.ModelProto = trace(lean, served, batches).model
        inputs = [value.name for value in self.graph.graph.input]
        spec, rotary = model_spec(model), describe_rotary(model)
        facts = {"model": spec, "inputs": inputs, "rotary": None if rotary is None else rotary[0]}
        self.profiles = profiles_of(SimpleNamespace(batches=batches, sizes=served, **facts))
        positions = {"pos_embed": patch_positions(model).numpy()} if "pos_embed" in inputs else {}
        if "rotary" in inputs:
            positions["rotary"] = rotary_tables(model).numpy()
        pictures = [np.asarray(photograph(i, *native[::-1]))[None] for i in range(2)]
        feeds = [({"image": picture, **positions}, 1) for picture in pictures]
        silent = lambda _count: None  # noqa: E731
        self.linears: list[Linear] = find_linears(self.graph)
        self.ranges: Ranges = observe_ranges(self.graph, self.linears, spec, feeds, silent)
        self.largest = observe_magnitudes(self.graph, feeds, silent)

    def write(self, precision: str, *, split: bool = True, tokens: int = FUSED_FROM) -> onnx.ModelProto:
        """Return the graph as ``export`` or ``calibrate --target trt`` writes it."""
        graph = onnx.ModelProto()
        graph.CopyFrom(self.graph)
        if precision == "fp32":
            return graph
        if precision in ("fp16", "bf16"):
            return narrow(graph, precision, self.largest).model
        search = Search(Wiring(graph), self.linears, self.ranges, "trt", None, None, precision, self.largest, tokens)
        eight = put_together(*search.graph(Smoothing() if precision == "int8" else FP8_SMOOTHING, set(), share=True))
        return narrow(split_projections(eight) if split else eight, "fp16", self.largest).model


@functools.cache
def graphs(
    family: str, sizes: str = "fixed", width: int = WIDTH, heads: int = HEADS, side: int = SIDE, depth: int = DEPTH
) -> Graphs:
    return Graphs(family, sizes, width, heads, side, depth)


def build(written, folder):
    """Build plans of graphs in one process; return key -> the plan's steps, or the error message."""
    given, keys = {}, {}
    for number, (key, (graph, profiles)) in enumerate(written.items()):
        path = folder / f"{number}.onnx"
        path.write_bytes(graph.SerializeToString())
        given[str(path)], keys[str(path)] = [profile.inputs for profile in profiles], key
    results = nvidia.inside(nvidia.NEWEST, BUILD, given, rtx=True)
    return {
        keys[path]: steps if isinstance(steps, str) else [nvidia.Operator(*step) for step in steps]
        for path, steps in results.items()
    }
