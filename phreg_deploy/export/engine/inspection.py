"""Read from a TensorRT engine which attentions are fused and which linear layers run in 8 bits."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from typing import Any

from phreg_deploy.bundle.manifest import Manifest
from phreg_deploy.errors import PhregError
from phreg_deploy.readout import FINAL
from phreg_deploy.spec import Stored

ONNX = re.compile(r"\[ONNX Layer: ([^\]\x1e]+)\]")
EIGHT_BIT_TYPE = re.compile(r"int8|fp8|float8|e4m3", re.IGNORECASE)
# A linear layer's node, or a part of one that was split (``attn.qkv.q``).
LINEAR = re.compile(r"^(blocks\.\d+\..+?)(?:\.(?:[qkv]|\d))?/MatMul(?:_\d+)?$")
ATTENTION = re.compile(r"^(blocks\.\d+\.attn)/MatMul(?:_\d+)?$")
SOFTMAX = re.compile(r"^blocks\.\d+\.attn/Softmax$")
# Head widths that TensorRT's fused attention takes: above the first, up to the second, in steps of 8.
HEAD_WIDTHS = (8, 256)


@dataclass(frozen=True)
class Census(Stored):
    """The layers of an engine, counted.

    ``layers``: how many. ``fused_attention``: blocks whose attention is one kernel. ``eight_bit`` and ``float_linear``:
    linear layers by the type of their inputs. ``unread``: layers that name no ONNX node.
    """

    layers: int
    fused_attention: tuple[str, ...]
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
        return cls(
            name=text("Name"),
            nodes=ONNX.findall(text("Metadata")) or re.findall(r"blocks\.\d+\.[\w.]+/\w+", text("Name")),
            kernel=text("Name", "TacticName", "LayerType", "Kernel"),
            kind=text("LayerType", "TacticName", "ParameterType"),
            types=[str(value.get("Format/Datatype", value.get("Format", ""))) for value in inputs],
        )

    def is_fused_attention(self, products: list[str], softmaxes: set[str]) -> bool:
        """Whether it is one whole attention: by its nodes (both products and the softmax), or by its kernel's name."""
        if len(softmaxes) == 1 and sum(product in softmaxes for product in products) >= 2:
            return True
        named = re.search("mha|attention", self.kernel, re.IGNORECASE)
        return named is not None and len({*products, *softmaxes}) == 1

    def multiplies(self) -> bool:
        """Whether it is the matrix product itself, and not an epilogue that the compiler split off."""
        kind = re.search(r"gemm|matmul|matrix|fully|xmma|cutlass|cask", self.kind, re.IGNORECASE)
        return bool(kind or re.search(r"/MatMul|gemm|fc_", self.name, re.IGNORECASE))


def read_layers(trt: Any, engine: Any) -> list[dict[str, Any]]:
    """Return the layers that TensorRT's engine inspector lists. Raises ``PhregError`` if it gives no details."""
    inspector = engine.create_engine_inspector()
    text = inspector.get_engine_information(trt.LayerInformationFormat.JSON)
    try:
        # Not strict: the inspector separates names by control characters.
        layers = json.loads(text, strict=False)["Layers"]
    except (ValueError, KeyError, TypeError):
        raise PhregError("engine: TensorRT's inspector lists no layers; build the engine again.") from None
    return [{"Name": layer} if isinstance(layer, str) else layer for layer in layers]


def take_census(layers: list[dict[str, Any]]) -> Census:
    """Count fused attentions, and linear layers in 8 bits and in float.

    An engine with several profiles lists a layer once per profile: one unfused or float layer decides for its block.
    """
    fused: dict[str, None] = {}
    unfused: set[str] = set()
    eight_bit: dict[str, None] = {}
    in_float: dict[str, None] = {}
    unread = 0
    for layer in map(_Layer.read, layers):
        unread += not layer.nodes
        products = [match[1] for node in layer.nodes if (match := ATTENTION.match(node))]
        softmaxes = {node.split("/")[0] for node in layer.nodes if SOFTMAX.match(node)}
        if layer.is_fused_attention(products, softmaxes):
            fused.update(dict.fromkeys(sorted({*products, *softmaxes})))
        elif layer.multiplies() or len(softmaxes) > 1:
            unfused.update(products)
        linears = {match[1] for node in layer.nodes if (match := LINEAR.match(node)) and not ATTENTION.match(node)}
        if linears and layer.multiplies():
            reads_eight_bits = any(EIGHT_BIT_TYPE.search(kind) for kind in layer.types)
            (eight_bit if reads_eight_bits else in_float).update(dict.fromkeys(sorted(linears)))
    return Census(
        layers=len(layers),
        fused_attention=tuple(name for name in fused if name not in unfused),
        eight_bit=tuple(name for name in eight_bit if name not in in_float),
        float_linear=tuple(in_float),
        unread=unread,
    )


def shortfalls(census: Census, manifest: Manifest, eight_bit: list[str]) -> list[str]:
    """Return what the engine lacks of the expected fused attentions and 8-bit layers, as sentences.

    ``eight_bit``: the layers that the bundle wants in 8 bits. TensorRT does not fuse attention in FP32.
    """
    missing = []
    width = manifest.model.width // manifest.model.heads
    fusible = manifest.precision != "fp32" and HEAD_WIDTHS[0] < width <= HEAD_WIDTHS[1] and width % 8 == 0
    in_float = {part.split("/")[0] for part in manifest.float_parts if ".attn/" in part}
    # The last block of a readout has no attention of queries to keys.
    attentions = manifest.model.depth - (manifest.readout.name != FINAL)
    expected = attentions - len(in_float) if fusible else 0
    if len(census.fused_attention) < expected:
        missing.append(f"{len(census.fused_attention)} of {expected} attentions are fused")
    not_eight = [name for name in eight_bit if name not in census.eight_bit]
    if not_eight:
        missing.append(
            f"{len(not_eight)} of {len(eight_bit)} linear layers that were meant to run in 8 bits run in float, "
            f"e.g. {not_eight[0]}"
        )
    return missing
