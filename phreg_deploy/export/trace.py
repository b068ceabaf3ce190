"""A lean module -> an ONNX graph: traced by ``torch.onnx.export``, then stripped until the same weights give the same bytes."""

from __future__ import annotations

import ast
import contextlib
import io
import logging
import warnings
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import onnx
import torch
from onnx import AttributeProto, GraphProto, ModelProto

from phreg_deploy.errors import PhregError
from phreg_deploy.export.dense_vit import DenseViT
from phreg_deploy.spec import Batches, Sizes

OPSET = 20  # native LayerNormalization and Gelu; the newest that TensorRT 10.0 parses and INT8 in ONNX Runtime takes
SCOPES = "pkg.torch.onnx.name_scopes"  # where torch's exporter writes the modules that a node came from
LARGEST = 2**31 - 2**20  # a protobuf file ends at 2 GB


@dataclass
class Traced:
    """``model``: inputs ``image`` (and ``pos_embed`` where several sizes are served), outputs ``features``, ``cls`` where there
    is a class token, ``token_norm``. ``largest``: tensor of the graph -> the largest magnitude that was seen in it.
    """

    model: ModelProto
    program: Any
    largest: dict[str, float] = field(default_factory=dict)

    @torch.inference_mode()
    def observe(self, *inputs: torch.Tensor) -> None:
        """Run the traced program on one batch and widen ``largest`` by what its tensors hold; torch and ONNX share their names."""
        watcher = _Watcher(self.program.exported_program.module())
        watcher.run(*inputs)
        for name, value in watcher.largest.items():
            self.largest[name] = max(value, self.largest.get(name, 0.0))


class _Watcher(torch.fx.Interpreter):
    def __init__(self, module: torch.fx.GraphModule) -> None:
        super().__init__(module)
        self.largest: dict[str, float] = {}

    def run_node(self, n: torch.fx.Node) -> Any:
        result = super().run_node(n)
        if isinstance(result, torch.Tensor) and result.is_floating_point():
            self.largest[n.name] = float(result.abs().max())
        return result


def trace(module: DenseViT, sizes: Sizes, batches: Batches) -> Traced:
    """Trace ``module`` for one size or a range, one batch or a range, in float32."""
    height, width = sizes.default
    hp, wp = height // module.patch[0], width // module.patch[1]
    batch = 2 if batches.dynamic else batches.best  # torch.export takes 1 for a constant
    if sizes.dynamic and hp == wp:
        wp += 1  # a square example would tie height to width
    arguments: tuple[torch.Tensor, ...] = (
        torch.zeros(batch, hp * module.patch[0], wp * module.patch[1], 3, dtype=torch.uint8),
    )
    shapes: list[dict[int, Any]] = [{}]
    if batches.dynamic:
        shapes[0][0] = torch.export.Dim("batch", min=1, max=max(2, batches.highest))
    if sizes.dynamic:
        for axis, name in ((1, "Hp"), (2, "Wp")):
            shapes[0][axis] = module.patch[axis - 1] * torch.export.Dim(name, min=2, max=4096)
        arguments += (torch.zeros(1, hp * wp, module.projection.shape[1]),)
        shapes.append({1: torch.export.Dim.AUTO})
    outputs = ["features", *(["cls"] if module.class_token else []), "token_norm"]
    with _silence():
        program = torch.onnx.export(
            module.eval(), arguments, input_names=["image", "pos_embed"][: len(arguments)], output_names=outputs,
            opset_version=OPSET, dynamo=True, dynamic_shapes=tuple(shapes), external_data=False,
        )  # fmt: skip
    if program is None:
        raise PhregError("export: torch returned no ONNX program.")
    return Traced(tidy(program.model_proto, module, sizes, batches), program)


def tidy(model: ModelProto, module: DenseViT, sizes: Sizes, batches: Batches) -> ModelProto:
    """Strip what names a machine or a run (stack traces, paths, versions), and name the axes."""
    model.producer_name, model.producer_version, model.doc_string = "phreg-deploy", "", ""
    del model.metadata_props[:]
    _name(model.graph)
    _strip(model.graph)
    del model.graph.value_info[:]
    grid: list[Any] = ["Hp", "Wp"] if sizes.dynamic else [s // p for s, p in zip(sizes.default, module.patch)]
    pixels: list[Any] = ["H", "W"] if sizes.dynamic else list(sizes.default)
    batch: Any = "B" if batches.dynamic else batches.best
    width = module.projection.shape[1]
    named = {
        "image": [batch, *pixels, 3], "pos_embed": [1, "N", width], "features": [batch, *grid, width],
        "cls": [batch, width], "token_norm": [batch, *grid],
    }  # fmt: skip
    for value in (*model.graph.input, *model.graph.output):
        shape = value.type.tensor_type.shape
        del shape.dim[:]
        for side in named[value.name]:
            dim = shape.dim.add()
            if isinstance(side, int):
                dim.dim_value = side
            else:
                dim.dim_param = side
    return model


def check_size(model: ModelProto) -> None:
    """Raise ``PhregError`` where the graph does not fit into one ONNX file, and onnx's own error where it is malformed."""
    total = sum(len(i.raw_data) for i in model.graph.initializer)
    if total > LARGEST:
        raise PhregError(
            f"export: the weights take {total / 2**30:.1f} GB, and one ONNX file ends at 2 GB. Use --precision fp16, or a smaller model."
        )
    onnx.checker.check_model(model)


def _name(graph: GraphProto) -> None:
    """Name nodes after the module they came from, ``blocks.0.attn.qkv/MatMul``, and each linear layer's weight after it."""
    weights = {i.name: i for i in graph.initializer}
    uses = Counter(name for node in graph.node for name in node.input)
    seen: Counter[str] = Counter()
    path = ""
    for node in graph.node:
        scopes = next((p.value for p in node.metadata_props if p.key == SCOPES), None)
        path = ast.literal_eval(scopes)[-2] if scopes else path  # the last is the call, the one before it the module
        name = f"{path or 'dense'}/{node.op_type}"
        seen[name] += 1
        node.name = name if seen[name] == 1 else f"{name}_{seen[name]}"
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
    """torch's exporter prints and warns on success; what fails raises."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)
