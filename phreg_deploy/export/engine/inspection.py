"""Read from a TensorRT engine which attentions are fused and which linear layers run in 8 bits."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from typing import Any

from phreg_deploy.spec import Stored

ONNX = re.compile(r"\[ONNX Layer: ([^\]\x1e]+)\]")
FP8_TYPE = re.compile(r"fp8|float8|e4m3", re.IGNORECASE)
EIGHT_BIT_TYPE = re.compile(r"int8|fp8|float8|e4m3", re.IGNORECASE)
# A linear layer's node, or a part of one that was split (``attn.qkv.q``).
LINEAR = re.compile(r"^(blocks\.\d+\..+?)(?:\.(?:[qkv]|\d))?/MatMul(?:_\d+)?$")
# A node in the name of a layer without metadata.
NODE = re.compile(r"blocks\.\d+\.[\w.]+/\w+")
ATTENTION = re.compile(r"^(blocks\.\d+\.attn)/MatMul(?:_\d+)?$")
SOFTMAX = re.compile(r"^blocks\.\d+\.attn/Softmax$")
# The name of a fused attention: ``_gemm_mha_v2_myl0_4`` in TensorRT 10 and 11, and in NVIDIA's other kernels. One with
# "attention" alone is of a node, e.g. ``[scaled_dot_product_attention]`` in TensorRT 9.2.
FUSED = re.compile(r"gem[mv]_mha|fmha|flash_?attention", re.IGNORECASE)
# The name of a softmax that is a kernel of its own, also as Myelin spells its steps.
SOFTMAX_KERNEL = re.compile(r"softmax|MaxSubExp|SubExpSumDiv", re.IGNORECASE)
# Layers that move data for a product, and have its nodes in their names.
MOVES = ("NoOp", "Reformat")
# What the compiler adds to the name of a layer.
ADDED = re.compile(r"_myl\d+_\d+\b")
# A part of the graph that the inspector does not open.
REGION = "ForeignNode["


@dataclass(frozen=True)
class Census(Stored):
    """The layers of an engine, counted.

    ``layers``: how many. ``fused_attention``, ``unfused_attention``: blocks whose attention is one kernel, or is seen
    to be several; a block may be in neither. ``fp8_attention``: those of the first that read FP8. ``unnamed_fused``:
    kernels of fused attention that name no block, for each profile; ``unnamed_fp8``: those of them that read FP8.
    ``eight_bit`` and ``float_linear``: linear layers by the type of their inputs. ``unread``: layers that name no ONNX
    node.
    """

    layers: int
    fused_attention: tuple[str, ...]
    unfused_attention: tuple[str, ...]
    fp8_attention: tuple[str, ...]
    unnamed_fused: int
    unnamed_fp8: int
    eight_bit: tuple[str, ...]
    float_linear: tuple[str, ...]
    unread: int


@dataclass(frozen=True)
class _Layer:
    """One layer of an engine. ``nodes``: the ONNX nodes that it was made from. ``types``: of its inputs."""

    name: str
    nodes: list[str]
    kernel: str
    kind: str
    types: list[str]

    @classmethod
    def read(cls, entry: dict[str, Any]) -> _Layer:
        def text(*keys: str) -> str:
            return " ".join(str(entry.get(key, "")) for key in keys)

        inputs = [value for value in entry.get("Inputs", []) if isinstance(value, dict)]
        if REGION in text("Name"):
            # Its first and last node are in the name, and tell nothing of how they are computed.
            return cls(text("Name"), [], "", "", [])
        return cls(
            name=text("Name"),
            nodes=ONNX.findall(text("Metadata")) or NODE.findall(ADDED.sub("", text("Name"))),
            kernel=text("Name", "TacticName", "LayerType", "Kernel"),
            kind=text("LayerType", "TacticName", "ParameterType"),
            types=[str(value.get("Format/Datatype", value.get("Format", ""))) for value in inputs],
        )

    def is_fused_attention(self, products: list[str], softmaxes: set[str]) -> bool:
        """Whether it is one whole attention: by its nodes (both products and the softmax), or by its kernel's name."""
        if len(softmaxes) == 1 and sum(product in softmaxes for product in products) >= 2:
            return True
        return self.is_named_fused() and len({*products, *softmaxes}) == 1

    def is_named_fused(self) -> bool:
        """Whether the kernel's own name says that it is a fused attention."""
        return FUSED.search(self.kernel) is not None

    def reads(self, kind: re.Pattern[str]) -> bool:
        """Whether one of its inputs has such a type."""
        return any(kind.search(name) for name in self.types)

    def multiplies(self) -> bool:
        """Whether it is the matrix product itself, and not an epilogue that the compiler split off."""
        if self.kind.startswith(MOVES):
            return False
        kind = re.search(r"gemm|matmul|matrix|fully|xmma|cutlass|cask", self.kind, re.IGNORECASE)
        return bool(kind or re.search(r"/MatMul|gemm|fc_", self.name, re.IGNORECASE))


def inspect(trt: Any, engine: Any) -> str:
    """Return the JSON text of TensorRT's engine inspector."""
    inspector = engine.create_engine_inspector()
    return str(inspector.get_engine_information(trt.LayerInformationFormat.JSON))


def parse_layers(text: str) -> list[dict[str, Any]]:
    """Return the layers in the inspector's text; none if it cannot be read."""
    try:
        # Not strict: the inspector separates names by control characters.
        layers = json.loads(text, strict=False)["Layers"]
        return [{"Name": layer} if isinstance(layer, str) else dict(layer) for layer in layers]
    except (ValueError, KeyError, TypeError):
        return []


def take_census(layers: list[dict[str, Any]], profiles: int = 1) -> Census:
    """Count fused attentions, and linear layers in 8 bits and in float.

    An engine with several profiles lists a layer once per profile: one unfused or float layer decides for its block.
    """
    fused: dict[str, bool] = {}
    unfused: dict[str, None] = {}
    eight_bit: dict[str, None] = {}
    in_float: dict[str, None] = {}
    unnamed = [0, 0]
    unread = 0
    for layer in map(_Layer.read, layers):
        unread += not layer.nodes
        products = [match[1] for node in layer.nodes if (match := ATTENTION.match(node))]
        softmaxes = {node.split("/")[0] for node in layer.nodes if SOFTMAX.match(node)}
        if layer.is_fused_attention(products, softmaxes):
            for name in sorted({*products, *softmaxes}):
                fused[name] = fused.get(name, True) and layer.reads(FP8_TYPE)
        elif products and layer.multiplies():
            unfused.update(dict.fromkeys(products))
        elif softmaxes and not products and SOFTMAX_KERNEL.search(layer.kernel):
            unfused.update(dict.fromkeys(sorted(softmaxes)))
        elif not layer.nodes and layer.is_named_fused():
            unnamed = [unnamed[0] + 1, unnamed[1] + layer.reads(FP8_TYPE)]
        linears = {match[1] for node in layer.nodes if (match := LINEAR.match(node)) and not ATTENTION.match(node)}
        if linears and layer.multiplies():
            (eight_bit if layer.reads(EIGHT_BIT_TYPE) else in_float).update(dict.fromkeys(sorted(linears)))
    return Census(
        layers=len(layers),
        fused_attention=tuple(name for name in fused if name not in unfused),
        unfused_attention=tuple(unfused),
        fp8_attention=tuple(name for name, fp8 in fused.items() if fp8 and name not in unfused),
        unnamed_fused=unnamed[0] // profiles,
        unnamed_fp8=unnamed[1] // profiles,
        eight_bit=tuple(name for name in eight_bit if name not in in_float),
        float_linear=tuple(in_float),
        unread=unread,
    )
