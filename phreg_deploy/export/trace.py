"""Trace the module to an ONNX graph, and clean the graph: the same weights always give the same bytes."""

from __future__ import annotations

import ast
import contextlib
import io
import logging
import warnings
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import torch
from onnx import AttributeProto, GraphProto, ModelProto

from phreg_deploy.errors import PhregError
from phreg_deploy.export.dense_vit import DenseViT
from phreg_deploy.layers import kind_of
from phreg_deploy.spec import Batches, Sizes

# The newest opset that both TensorRT 10.0 and INT8 in ONNX Runtime take; it has LayerNormalization and Gelu.
OPSET = 20
# The key under which torch's exporter stores the modules that a node came from.
SCOPES = "pkg.torch.onnx.name_scopes"
# Axes of patches, for a range of sizes.
SMALLEST_SIDE, LARGEST_SIDE = 2, 4096


@dataclass
class Traced:
    """A graph and the torch program that it came from.

    ``model``: inputs ``image`` and, for several sizes, ``pos_embed`` and ``rotary``; outputs ``features``, ``cls`` if
    the model has a class token, ``token_norm``, and those of further layers. ``program``: a
    ``torch.onnx.ONNXProgram``. ``largest``: tensor of the graph -> the largest magnitude observed in it.
    """

    model: ModelProto
    program: Any
    largest: dict[str, float] = field(default_factory=dict)

    @torch.inference_mode()
    def observe(self, *inputs: torch.Tensor) -> None:
        """Run the torch program on one batch and update ``largest``; torch and ONNX name tensors alike."""
        observer = _Observer(self.program.exported_program.module())
        observer.run(*inputs)
        for name, value in observer.largest.items():
            self.largest[name] = max(value, self.largest.get(name, 0.0))


class _Observer(torch.fx.Interpreter):
    """Records the largest magnitude of every float tensor."""

    def __init__(self, module: torch.fx.GraphModule) -> None:
        super().__init__(module)
        self.largest: dict[str, float] = {}

    def run_node(self, n: torch.fx.Node) -> Any:
        result = super().run_node(n)
        if isinstance(result, torch.Tensor) and result.is_floating_point():
            self.largest[n.name] = float(result.abs().max())
        return result


def trace(module: DenseViT, sizes: Sizes, batches: Batches) -> Traced:
    """Trace ``module`` in float32 for the sizes and batches that the bundle serves.

    Raises:
        PhregError: torch returns no program, or is a version that cannot trace a range.
    """
    if torch.__version__.startswith("2.9.") and (sizes.dynamic or batches.dynamic):
        # https://github.com/pytorch/pytorch/issues/172903
        raise PhregError(
            f"export: torch {torch.__version__} cannot trace a range of sizes or of batches. Install another version: "
            'pip install "torch>=2.10", or 2.8.'
        )
    inputs, shapes = _examples(module, sizes, batches)
    with _silence():
        program = torch.onnx.export(
            module.eval(),
            inputs,
            input_names=["image", *module.tables],
            output_names=module.outputs,
            opset_version=OPSET,
            dynamo=True,
            dynamic_shapes=shapes,
            external_data=False,
        )
    if program is None:
        raise PhregError("export: torch returned no ONNX program.")
    return Traced(_clean(program.model_proto, module, sizes, batches), program)


def _examples(module: DenseViT, sizes: Sizes, batches: Batches) -> tuple[tuple[torch.Tensor, ...], tuple[Any, ...]]:
    """Example inputs, and the axes that vary: of the image, and of each further input."""
    height, width = sizes.default
    hp, wp = height // module.patch[0], width // module.patch[1]
    # torch.export treats a side of 1 as a constant, and two equal sides as one.
    batch = 2 if batches.dynamic else batches.best
    if sizes.dynamic and hp == wp:
        wp += 1
    image = torch.zeros(batch, hp * module.patch[0], wp * module.patch[1], 3, dtype=torch.uint8)
    axes: dict[int, Any] = {}
    if batches.dynamic:
        axes[0] = torch.export.Dim("batch", min=1, max=max(2, batches.highest))
    if not sizes.dynamic:
        return (image,), (axes,)
    for axis, name in ((1, "Hp"), (2, "Wp")):
        axes[axis] = module.patch[axis - 1] * torch.export.Dim(name, min=SMALLEST_SIDE, max=LARGEST_SIDE)
    # The axis of patches is the last but one.
    examples = [table.new_zeros(*table.shape[:-2], hp * wp, table.shape[-1]) for table in module.tables.values()]
    others = tuple({table.ndim - 2: torch.export.Dim.AUTO} for table in examples)
    return (image, *examples), (axes, others) if others else (axes,)


def _clean(model: ModelProto, module: DenseViT, sizes: Sizes, batches: Batches) -> ModelProto:
    """Remove whatever depends on the machine or the run (stack traces, paths, versions), and name the axes."""
    model.producer_name, model.producer_version, model.doc_string = "phreg-deploy", "", ""
    del model.metadata_props[:]
    _name_nodes(model.graph)
    _strip(model.graph)
    del model.graph.value_info[:]
    grid: list[Any] = ["Hp", "Wp"] if sizes.dynamic else [s // p for s, p in zip(sizes.default, module.patch)]
    pixels: list[Any] = ["H", "W"] if sizes.dynamic else list(sizes.default)
    batch: Any = "B" if batches.dynamic else batches.best
    width, layer_width = module.channels, module.projection.shape[1]
    shapes = {
        "image": [batch, *pixels, 3],
        **{name: [*table.shape[:-2], "N", table.shape[-1]] for name, table in module.tables.items()},
        "features": [batch, *grid, width],
        "cls": [batch, width],
        "token_norm": [batch, *grid],
        "attention": [batch, module.heads, *grid],
    }
    for value in (*model.graph.input, *model.graph.output):
        shape = value.type.tensor_type.shape
        del shape.dim[:]
        kind = kind_of(value.name)
        sides = shapes[kind]
        if kind != value.name and kind != "token_norm":
            # A further layer is not projected.
            sides = [*sides[:-1], layer_width]
        for side in sides:
            dim = shape.dim.add()
            if isinstance(side, int):
                dim.dim_value = side
            else:
                dim.dim_param = side
    return model


def _name_nodes(graph: GraphProto) -> None:
    """Name each node after its module, ``blocks.0.attn.qkv/MatMul``, and each linear layer's weight after the layer."""
    weights = {i.name: i for i in graph.initializer}
    uses = Counter(name for node in graph.node for name in node.input)
    counts: Counter[str] = Counter()
    path = ""
    for node in graph.node:
        scopes = next((p.value for p in node.metadata_props if p.key == SCOPES), None)
        # The last scope is the call, the one before it the module.
        path = ast.literal_eval(scopes)[-2] if scopes else path
        name = f"{path or 'dense'}/{node.op_type}"
        counts[name] += 1
        node.name = name if counts[name] == 1 else f"{name}_{counts[name]}"
        if node.op_type == "MatMul" and path and node.input[1] in weights and uses[node.input[1]] == 1:
            weights[node.input[1]].name = f"{path}.weight"
            node.input[1] = f"{path}.weight"


def _strip(graph: GraphProto) -> None:
    graph.doc_string, graph.name = "", "dense_vit"
    for holder in (graph, *graph.node, *graph.initializer, *graph.input, *graph.output):
        holder.doc_string = ""
        if hasattr(holder, "metadata_props"):
            del holder.metadata_props[:]
    for node in graph.node:
        for attribute in node.attribute:
            if attribute.type == AttributeProto.GRAPH:
                _strip(attribute.g)


@contextlib.contextmanager
def _silence() -> Any:
    """Hide what torch's exporter prints and warns of when it succeeds; failures still raise."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)
