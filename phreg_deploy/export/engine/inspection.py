"""What TensorRT made of a graph, read back from the plan itself: which attentions are fused, which layers run in 8 bits."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from typing import Any

from phreg_deploy.bundle.manifest import Manifest
from phreg_deploy.errors import PhregError
from phreg_deploy.spec import Stored

ONNX = re.compile(r"\[ONNX Layer: ([^\]\x1e]+)\]")
EIGHT = re.compile(r"int8|fp8|float8|e4m3", re.IGNORECASE)
LINEAR = re.compile(r"^(blocks\.\d+\..+?)(?:\.(?:[qkv]|\d))?/MatMul(?:_\d+)?$")  # and the parts of a parted one
ATTENTION = re.compile(r"^(blocks\.\d+\.attn)/MatMul(?:_\d+)?$")
HEADS = (8, 256)  # width of a head that fused attention takes: above and up to, in steps of 8


@dataclass(frozen=True)
class Census(Stored):
    """``layers``: of the engine. ``fused_attention``: blocks whose attention is one kernel. ``eight_bit`` and ``float_linear``:
    linear layers by the type of their inputs. ``unread``: engine layers that say nothing of where they come from.
    """

    layers: int
    fused_attention: tuple[str, ...]
    eight_bit: tuple[str, ...]
    float_linear: tuple[str, ...]
    unread: int


def read_layers(trt: Any, engine: Any) -> list[dict[str, Any]]:
    """The engine inspector's account, one dictionary a layer.

    Raises:
        PhregError: the inspector gives no details.
    """
    inspector = engine.create_engine_inspector()
    text = inspector.get_engine_information(trt.LayerInformationFormat.JSON)
    try:
        layers = json.loads(text, strict=False)["Layers"]  # its separators are control characters
    except (ValueError, KeyError, TypeError):
        raise PhregError(
            "engine: TensorRT's inspector gave no account of the layers; build the engine again."
        ) from None
    return [{"Name": layer} if isinstance(layer, str) else layer for layer in layers]


def take_census(layers: list[dict[str, Any]]) -> Census:
    """Count what was fused and what runs in 8 bits."""
    fused: dict[str, None] = {}
    loose: set[str] = set()  # attentions one of whose products is a layer of its own, in this profile or another
    eight: dict[str, None] = {}
    floats: dict[str, None] = {}
    unread = 0
    for layer in layers:
        name = str(layer.get("Name", ""))
        nodes = ONNX.findall(str(layer.get("Metadata", ""))) or re.findall(r"blocks\.\d+\.[\w.]+/\w+", name)
        unread += not nodes
        products = [m[1] for node in nodes if (m := ATTENTION.match(node))]
        softmaxes = {node.split("/")[0] for node in nodes if node.endswith("/Softmax")}
        kernel = " ".join(str(layer.get(key, "")) for key in ("Name", "TacticName", "LayerType", "Kernel"))
        whole = (
            len(softmaxes) == 1 and sum(p in softmaxes for p in products) >= 2
        )  # both products and the softmax, whatever its name
        if whole or (re.search("mha|attention", kernel, re.IGNORECASE) and len({*products, *softmaxes}) == 1):
            fused.update(dict.fromkeys(sorted({*products, *softmaxes})))
        elif _computes(layer) or len(softmaxes) > 1:
            loose.update(products)
        linears = {m[1] for node in nodes if (m := LINEAR.match(node)) and not ATTENTION.match(node)}
        if linears and _computes(layer):
            types = [
                str(t.get("Format/Datatype", t.get("Format", "")))
                for t in layer.get("Inputs", [])
                if isinstance(t, dict)
            ]
            (eight if any(EIGHT.search(t) for t in types) else floats).update(dict.fromkeys(sorted(linears)))
    together = tuple(name for name in fused if name not in loose)
    return Census(len(layers), together, tuple(name for name in eight if name not in floats), tuple(floats), unread)


def _computes(layer: dict[str, Any]) -> bool:
    """Whether a layer is the product itself, and not an epilogue that the compiler cut off it."""
    kind = " ".join(str(layer.get(key, "")) for key in ("LayerType", "TacticName", "ParameterType"))
    name = str(layer.get("Name", ""))
    return bool(
        re.search(r"gemm|matmul|matrix|fully|xmma|cutlass|cask", kind, re.IGNORECASE)
        or re.search(r"/MatMul|gemm|fc_", name, re.IGNORECASE)
    )


def shortfalls(census: Census, manifest: Manifest, eight_bit: list[str]) -> list[str]:
    """What was expected of an engine and is not in it, in words; empty where all is well.

    FP32 attention is not fused by TensorRT and not expected to be.

    Args:
        eight_bit: linear layers that the bundle wants in 8 bits.
    """
    found = []
    width = manifest.model.width // manifest.model.heads
    fusible = manifest.precision != "fp32" and HEADS[0] < width <= HEADS[1] and width % 8 == 0
    kept = {part.split("/")[0] for part in manifest.float_parts if ".attn/" in part}
    wanted = manifest.model.depth - len(kept) if fusible else 0
    if len(census.fused_attention) < wanted:
        found.append(f"{len(census.fused_attention)} of {wanted} attentions are fused")
    missing = [name for name in eight_bit if name not in census.eight_bit]
    if missing:
        found.append(
            f"{len(missing)} of {len(eight_bit)} linear layers that were meant to run in 8 bits run in float, e.g. {missing[0]}"
        )
    return found
