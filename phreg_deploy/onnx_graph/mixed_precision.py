"""Write an FP32 graph in FP16 or BF16, with islands that stay in FP32.

TensorRT 11 has no precision flags: a layer runs in the type of its inputs, so the graph itself holds the types.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import ml_dtypes
import numpy as np
from onnx import ModelProto, NodeProto, TensorProto, helper, numpy_helper

from phreg_deploy.arguments import check_pattern
from phreg_deploy.errors import PhregError
from phreg_deploy.layers import kind_of
from phreg_deploy.onnx_graph.wiring import Wiring, replace_nodes

FLOAT = TensorProto.FLOAT
TYPES = {
    "fp16": (TensorProto.FLOAT16, np.dtype(np.float16)),
    "bf16": (TensorProto.BFLOAT16, np.dtype(ml_dtypes.bfloat16)),
}
LIMITS = {"fp16": 65504.0, "bf16": 3.3e38}
# A tensor is too large for the format if this multiple of its largest value on the images is beyond the format's limit.
ROOM = 4.0
# An Identity stands where two outputs are one tensor, such as those of the last layer.
MOVES = {"Identity", "Split", "Reshape", "Transpose", "Slice", "Gather", "Expand", "Concat"}
# The modules that write the outputs: the final norm, and the projection of a CLIP or SigLIP.
LAST = ("norm/", "project/", "project.")
# Begins the names of the nodes of heads (``onnx_graph.heads``).
HEAD = "head."
# The operators that compute ``token_norm``; squares overflow FP16.
NORMS = {"Identity", "Reshape", "Sqrt", "ReduceSum", "Pow", "Mul", "ReduceL2"}


@dataclass(frozen=True)
class Narrowed:
    """A narrowed graph. ``islands``: node -> why it stayed in FP32, without the nodes that always stay."""

    model: ModelProto
    islands: dict[str, str]

    def reasons(self) -> list[str]:
        """List the islands as the manifest does."""
        return [f"{name} ({reason})" for name, reason in sorted(self.islands.items())]


def narrow(
    model: ModelProto, precision: str, largest: Mapping[str, float] | None = None, keep: Iterable[str] = ()
) -> Narrowed:
    """Write a graph's floats in ``precision``, in place.

    These stay in FP32: ``token_norm``; values that follow from sizes alone; with BF16 the final norm and a projection,
    because numpy has no bfloat16; nodes that touch a tensor beyond the format's range; nodes that ``keep`` names. A
    QuantizeLinear has the type of its input and a DequantizeLinear that of its readers, so no Cast stands between Q/DQ
    and a product.

    Args:
        precision: "fp16" or "bf16".
        largest: tensor -> its largest magnitude on the images.
        keep: regular expressions on node names, e.g. ``blocks.11.mlp``.

    Raises:
        PhregError: an unknown precision, or an expression that is invalid or fits no node.
    """
    return _Narrowing(model, precision, largest or {}).run(list(keep))


def float_tensors(model: ModelProto) -> set[str]:
    """Return the names of a graph's float32 tensors, constants and inputs included."""
    return _Narrowing(model, "fp16", {}).floats


def islands(narrowed: Narrowed, precision: str) -> list[str]:
    """List all that stayed in FP32, with the reasons, for the manifest."""
    rules = ["token_norm", *(["final norm"] if precision == "bf16" else [])]
    return rules + narrowed.reasons()


class _Narrowing:
    def __init__(self, model: ModelProto, precision: str, largest: Mapping[str, float]) -> None:
        if precision not in TYPES:
            raise PhregError(f"precision: got {precision!r}, expected {' or '.join(TYPES)}.")
        self.model, self.precision, self.largest = model, precision, largest
        self.narrow_type, self.dtype = TYPES[precision]
        self.wiring = Wiring(model)
        self.constants = self.wiring.constants
        self.types = {v.name: v.type.tensor_type.elem_type for v in model.graph.input}
        self.types.update({name: i.data_type for name, i in self.constants.items()})
        for node in model.graph.node:
            for name in node.output:
                self.types[name] = self._output_type(node)
        self.floats = {name for name, kind in self.types.items() if kind == FLOAT}
        self.wide: dict[str, str] = {}
        self.made: dict[tuple[str, int], str] = {}
        self.nodes: list[NodeProto] = []

    def _output_type(self, node: NodeProto) -> int:
        if node.op_type == "Cast":
            return next(a.i for a in node.attribute if a.name == "to")
        if node.op_type in ("Shape", "ArgMax"):
            return TensorProto.INT64
        if node.op_type == "QuantizeLinear":
            return self.types[node.input[2]]
        return self.types[node.input[1 if node.op_type in ("DequantizeLinear", "Where") else 0]]

    def run(self, keep: list[str]) -> Narrowed:
        self._islands(keep)
        rules = self._rules()
        wide = rules | set(self.wide)
        for node in self.model.graph.node:
            self._retype(node, self._kind(node, wide))
        self._outputs()
        replace_nodes(self.model, self.nodes)
        return Narrowed(self.model, self.wide)

    def _islands(self, keep: list[str]) -> None:
        limit = LIMITS[self.precision] / ROOM
        floats = [n for n in self.model.graph.node if self.floats & {*n.input, *n.output}]
        reaches = self._reaches()
        for node in floats:
            reach = {name: reaches.get(name, 0.0) for name in (*node.input, *node.output)}
            name = max(reach, key=lambda n: reach[n])
            if reach[name] > limit:
                self.wide[node.name] = f"{name} reaches {reach[name]:.3g}"
        for expression in keep:
            fits = [n.name for n in floats if check_pattern(expression).search(n.name)]
            if not fits:
                raise PhregError(f"keep in FP32: {expression!r} fits no node; a name is e.g. blocks.11.mlp.fc2/MatMul.")
            self.wide.update({name: f"asked for by {expression!r}" for name in fits if name not in self.wide})

    def _reaches(self) -> dict[str, float]:
        """Return the largest magnitude of every float tensor; one that was not observed takes its neighbour's."""
        reaches = {
            name: float(np.abs(numpy_helper.to_array(i)).max(initial=0))
            for name, i in self.constants.items()
            if name in self.floats
        }
        reaches.update({name: value for name, value in self.largest.items() if name in self.floats})
        for node in self.model.graph.node:
            if node.op_type in MOVES and node.input[0] in reaches:
                for name in node.output:
                    reaches.setdefault(name, reaches[node.input[0]])
            # torch does not name the product before a bias is added.
            elif node.op_type == "Add" and node.output[0] in reaches:
                for name in node.input:
                    reaches.setdefault(name, reaches[node.output[0]])
        return reaches

    def _rules(self) -> set[str]:
        """Return the nodes that always stay in FP32.

        They are those of ``token_norm`` and of heads, those that compute with sizes, and with BF16 the final norm, a
        projection, and the Cast of the image.
        """
        producer, names = self.wiring.producer, self._of_sizes()
        names |= {node.name for node in self.model.graph.node if node.name.startswith(HEAD)}
        outputs = [value.name for value in self.model.graph.output]
        for output in outputs:
            node = producer.get(output) if kind_of(output) == "token_norm" else None
            while node is not None and node.op_type in NORMS:
                names.add(node.name)
                node = producer.get(node.input[0])
        if self.precision == "bf16":
            # NvInferRuntimeBase.h: "kUINT8 conversions are only supported for {kFLOAT, kHALF}". A second Cast follows.
            bytes_in = {name for name, kind in self.types.items() if kind == TensorProto.UINT8}
            names |= {n.name for n in self.model.graph.node if n.op_type == "Cast" and n.input[0] in bytes_in}
            # An RMS norm is several nodes.
            names |= {n.name for n in self.model.graph.node if n.name.startswith(LAST)}
            for output in outputs:
                node = producer.get(output) if kind_of(output) != "token_norm" else None
                while node is not None and (
                    node.op_type in (MOVES | {"LayerNormalization", "Softmax"}) or node.name.startswith(LAST)
                ):
                    names.add(node.name)
                    node = producer.get(node.input[0])
        return names

    def _of_sizes(self) -> set[str]:
        """Return the nodes whose floats follow from the sizes of the image alone, such as a window over the patches.

        A Range takes no 16-bit floats, and such values are exact in FP32 only.
        """
        sizes, floats, names = set[str](), set[str](), set[str]()
        for node in self.model.graph.node:
            inputs = {name for name in node.input if name and name not in self.constants}
            if node.op_type == "Shape" or (inputs and inputs <= sizes and not self.floats & set(node.output)):
                sizes.update(node.output)
            elif inputs and inputs <= sizes | floats and (node.op_type == "Cast" or inputs & floats):
                floats.update(node.output)
                names.add(node.name)
        return names

    def _kind(self, node: NodeProto, wide: set[str]) -> int:
        if node.op_type == "QuantizeLinear":
            return self.types.get(node.input[0], FLOAT)
        if node.op_type == "DequantizeLinear":
            readers = self.wiring.readers.get(node.output[0], [])
            return FLOAT if any(n.name in wide for n in readers) else self.narrow_type
        return FLOAT if node.name in wide else self.narrow_type

    def _retype(self, node: NodeProto, kind: int) -> None:
        for i, name in enumerate(node.input):
            if name in self.floats:
                node.input[i] = self._as(name, kind)
        if node.op_type == "Cast":
            for attribute in node.attribute:
                if attribute.name == "to" and attribute.i == FLOAT:
                    attribute.i = kind
        for name in node.output:
            if name in self.floats:
                self.types[name] = kind
        self.nodes.append(node)

    def _as(self, name: str, kind: int) -> str:
        """Return the name of a float tensor in the type ``kind``: its own, a new constant's, or a shared Cast's."""
        if name in self.constants:
            return name if kind == FLOAT else self._constant(name)
        if self.types[name] == kind:
            return name
        if (name, kind) not in self.made:
            cast = f"{name}/{TensorProto.DataType.Name(kind).lower()}"
            self.nodes.append(helper.make_node("Cast", [name], [cast], name=f"{cast}/Cast", to=kind))
            self.made[name, kind] = cast
        return self.made[name, kind]

    def _constant(self, name: str) -> str:
        if (name, self.narrow_type) not in self.made:
            value = numpy_helper.to_array(self.constants[name]).astype(self.dtype)
            alone = f"{name}/{self.precision}"
            tensor = TensorProto(name=alone, data_type=self.narrow_type, dims=value.shape, raw_data=value.tobytes())
            self.model.graph.initializer.append(tensor)
            self.made[name, self.narrow_type] = alone
        return self.made[name, self.narrow_type]

    def _outputs(self) -> None:
        """Set the types of the graph's outputs, which keep their names: FP16 or FP32."""
        for value in self.model.graph.output:
            kind = self.types[value.name]
            value.type.tensor_type.elem_type = kind
            if kind == TensorProto.BFLOAT16:
                raise PhregError(f"precision: the output {value.name} would be bfloat16, which numpy has no type for.")
