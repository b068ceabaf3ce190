"""Compare the work of a Vision Transformer with a device's peaks, and group engine layers by part."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Collection, Mapping
from typing import Any

from phreg_deploy.profiling.device.peaks import Peaks
from phreg_deploy.profiling.operations import count_parts
from phreg_deploy.spec import ModelSpec

PARTS = ("patch embed", "norm", "qkv", "attention", "proj", "fc1", "fc2", "other")
# The parts that an 8-bit bundle computes in 8 bits; FP8 has the products of attention too.
EIGHT_BIT_PARTS = {
    "int8": ("qkv", "proj", "fc1", "fc2"),
    "fp8": ("qkv", "proj", "fc1", "fc2", "attention products"),
}
# analytic parts that TensorRT computes in one measured part; residuals are added inside proj and fc2
JOINED = {"attention products": "attention", "softmax": "attention"}


def roofline(
    spec: ModelSpec,
    peaks: Peaks,
    *,
    batch: int,
    size: tuple[int, int],
    measured_ms: float | None = None,
    layers_ms: Mapping[str, float] | None = None,
    eight_bit: Collection[str] = (),
    **how: Any,
) -> dict[str, Any]:
    """Operations, bytes, operations per byte, bound and ideal milliseconds of each part, and of the whole.

    ``bound``: "compute" or "bandwidth", by the intensity at which the two peaks meet; None without peaks.
    ``peaks.flops`` is that of the products; norms and softmax run on slower units, so their ideal is too kind. So is
    that of layers which a calibration left in float. ``share_of_flops``: the time that all operations take at the peak
    of the precision that each runs in, over the measured time.

    Args:
        measured_ms: of the whole inference on the device. layers_ms: part -> milliseconds, of ``group_layers``.
        eight_bit: the parts at ``peaks.flops``, where the others are at ``peaks.around``.
        how: see ``count_parts``.
    """
    counted = count_parts(spec, batch=batch, size=size, **how)
    tops = {name: peaks.flops if name in eight_bit or not eight_bit else peaks.around for name in counted}
    rows = [{"part": name, **_place(*cost, tops[name], peaks.bandwidth)} for name, cost in counted.items()]
    total = [sum(side) for side in zip(*counted.values())]
    ideals = [row["ideal_ms"] for row in rows]
    ideal = None if None in ideals else sum(ideals)
    whole: dict[str, Any] = {"flops": total[0], "bytes": total[1], "ideal_ms": ideal, "measured_ms": measured_ms}
    if measured_ms is not None and measured_ms > 0:
        reached = {"flops": total[0] / measured_ms * 1e3, "bandwidth": total[1] / measured_ms * 1e3}
        whole.update(
            flops_per_second=reached["flops"],
            share_of_flops=_at_peak(counted, tops, 1e-3 * measured_ms),
            share_of_bandwidth=reached["bandwidth"] / peaks.bandwidth if peaks.bandwidth else None,
            share_of_ideal=ideal / measured_ms if ideal is not None else None,
        )
    grouped: dict[str, list[float | None]] = defaultdict(list)
    for row in rows:
        grouped[JOINED.get(row["part"], row["part"])].append(row["ideal_ms"])
    measured = {
        part: {"ideal_ms": (least := None if None in grouped[part] else sum(grouped[part])), "measured_ms": took,  # type: ignore[arg-type]
               "share_of_ideal": least / took if least is not None and took > 0 else None}
        for part, took in (layers_ms or {}).items() if part in grouped
    }  # fmt: skip
    return {
        "batch": batch,
        "size": list(size),
        "peaks": peaks.to_json(),
        "parts": rows,
        "total": whole,
        "measured": measured,
    }


def _at_peak(
    counted: Mapping[str, tuple[float, float]], tops: Mapping[str, float | None], seconds: float
) -> float | None:
    """Share of the time that the operations would take at their peaks; None without a peak."""
    least = 0.0
    for name, (work, _) in counted.items():
        top = tops[name]
        if not top:
            return None
        least += work / top
    return least / seconds


def _place(work: float, moved: float, flops: float | None, bandwidth: float | None) -> dict[str, Any]:
    bound, ideal = None, None
    if flops and bandwidth:
        compute, memory = work / flops, moved / bandwidth
        bound, ideal = ("compute" if compute >= memory else "bandwidth"), 1e3 * max(compute, memory)
    return {
        "flops": work,
        "bytes": moved,
        "intensity": work / moved if moved else None,
        "bound": bound,
        "ideal_ms": ideal,
    }


_ONNX = re.compile(r"\[ONNX Layer: ([^\]\x1e]+)\]")
_BLOCK = re.compile(r"^blocks\.(\d+)\.?(.*)$")
_PRODUCT = re.compile(r"Fc|Gemm|MatMul|Conv|Dot|Bmm")  # in what Myelin spells of a fused kernel's operations
_INSIDE = (
    (r"norm", "norm"),
    (r"attn\.(qkv|[qkv]_proj)", "qkv"),
    (r"attn\.proj", "proj"),
    (r"attn", "attention"),
    (r"mlp\.(fc2|w3)", "fc2"),
    (r"mlp", "fc1"),
)
_PATCHES = {"MatMul", "Conv", "Cast", "Sub", "Transpose", "Add", "Concat", "Expand"}  # of what is outside the blocks


def place_layer(name: str, metadata: str = "") -> tuple[int | None, str]:
    """Block and part (of ``PARTS``) of an engine layer, by its name and the ONNX nodes in its name or ``metadata``.

    A kernel lists also the product whose result it finishes: of one without a product in its own name, the norm or the
    first node decides. What spans several parts is "other".
    """
    if "ForeignNode" in name or name.startswith("Reformat"):
        return None, "other"
    nodes = [
        node.strip() for node in _ONNX.findall(metadata) or _ONNX.findall(name) or re.split(r"[\s+,;(){}\[\]]+", name)
    ]
    found = [(node, *place) for node in nodes if (place := _place_node(node)) is not None]
    if "mha" in name:
        return next((block for _, block, part in found if part == "attention"), None), "attention"
    spelled = name.startswith("__myl_")
    if spelled and not _PRODUCT.search(name):
        norms = [(block, part) for node, block, part in found if "LayerNormalization" in node]
        if norms or ("Mean" in name and "Sqrt" in name):
            return norms[0] if norms else (None, "norm")
        return next(((block, part) for _, block, part in found if part != "other"), (None, "other"))
    products = {(block, part) for node, block, part in found if re.search(r"/(MatMul|Gemm|Conv)", node)}
    places = products or {(block, part) for _, block, part in found[:1]}
    return places.pop() if len(places) == 1 else (None, "other")


def _place_node(node: str) -> tuple[int | None, str] | None:
    """Block and part of an ONNX node by the module in its name, e.g. ``blocks.3.attn.qkv/MatMul``; None without one."""
    module, slash, operator = node.partition("/")
    if not slash or node.endswith(("/QuantizeLinear", "/DequantizeLinear")):
        return None
    inside = _BLOCK.match(module)
    if inside:
        part = next((part for pattern, part in _INSIDE if re.search(pattern, inside[2])), "other")
        return int(inside[1]), part
    kind = re.split(r"_(?:\d|myl)", operator)[0]
    if "norm" in module:
        return None, "norm"
    return None, "patch embed" if module in (
        "dense",
        "patch_embed",
        "patch_embed.proj",
    ) and kind in _PATCHES else "other"


def group_layers(layers: Mapping[str, float], metadata: Mapping[str, str] | None = None) -> dict[str, Any]:
    """Group milliseconds of engine layers by part, and by block and part.

    ``unplaced_ms``: of layers that name no block, without the patch embedding.

    Args:
        layers: name -> milliseconds by TensorRT's profiler.
        metadata: name -> what TensorRT's inspector says of the layer.
    """
    by_part: dict[str, float] = dict.fromkeys(PARTS, 0.0)
    blocks: dict[str, dict[str, float]] = {}
    unplaced = 0.0
    for name, took in layers.items():
        block, part = place_layer(name, (metadata or {}).get(name, ""))
        by_part[part] += took
        if block is not None:
            inside = blocks.setdefault(str(block), {})
            inside[part] = inside.get(part, 0.0) + took
        elif part != "patch embed":
            unplaced += took
    ordered = {block: blocks[block] for block in sorted(blocks, key=int)}
    return {"total_ms": sum(layers.values()), "parts": by_part, "blocks": ordered, "unplaced_ms": unplaced}
