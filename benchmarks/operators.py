"""Where the time goes, operator by operator, and how far that is from what the machine can multiply.

    python benchmarks/operators.py BUNDLE... --json OUT

OpenVINO's own counters on each bundle, float32 and bfloat16, grouped by kind; beside them the time that the same
multiply-accumulates take at the rate of one large matrix product (2048 x 2048 x 2048) measured on the spot.
"""

from __future__ import annotations

import argparse
import collections
import json
import os
from pathlib import Path
from typing import Any

import click
import numpy as np
import openvino
from openvino import opset13 as op

from phreg_deploy.bundle.bundle import Bundle
from phreg_deploy.profiling.latency import processor

KINDS = {
    "FullyConnected": "linear layers", "FullyConnectedQuantizedLegacy": "linear layers", "MVN": "layer norms", "Split": "data movement",
    "Transpose": "data movement", "Reorder": "data movement", "Concatenation": "data movement", "Concat": "data movement", "Slice": "data movement",
}  # fmt: skip
SIDE = 2048


def compiled(model: Any, precision: str, threads: int, counted: bool) -> Any:
    options = {
        "INFERENCE_PRECISION_HINT": precision,
        "INFERENCE_NUM_THREADS": threads,
        "PERFORMANCE_HINT": "LATENCY",
        "PERF_COUNT": counted,
    }
    return openvino.Core().compile_model(model, "CPU", options).create_infer_request()


def counters(request: Any, feed: dict[str, np.ndarray], rounds: int = 10) -> dict[str, list[float]]:
    """Milliseconds of every executed node, round by round."""
    for _ in range(5):
        request.infer(feed)
    found: dict[str, list[float]] = collections.defaultdict(list)
    for _ in range(rounds):
        request.infer(feed)
        for node in request.profiling_info:
            if node.status == node.Status.EXECUTED:
                found[f"{node.node_type}|{node.exec_type}|{node.node_name}"].append(
                    node.real_time.total_seconds() * 1e3
                )
    return found


def product(kind: str) -> Any:
    """One large matrix product, as the linear layers are."""
    rng = np.random.default_rng(0)
    x = op.parameter([1, SIDE, SIDE], np.float32)
    weight = rng.standard_normal((SIDE, SIDE)).astype(np.float32)
    if kind != "int8":
        return openvino.Model([op.matmul(x, op.constant(weight), False, True)], [x])
    low, high = op.constant(np.float32(-4)), op.constant(np.float32(4 * 127 / 128))
    quantised = op.fake_quantize(x, low, high, low, high, 256)
    steps = (np.abs(weight).max(1, keepdims=True) / 127).astype(np.float32)
    values = op.convert(op.constant(np.round(weight / steps).astype(np.int8)), np.float32)
    return openvino.Model([op.matmul(quantised, op.multiply(values, op.constant(steps)), False, True)], [x])


def rate(kind: str, threads: int) -> float:
    """Multiply-accumulates per millisecond of the product alone, without what prepares its input."""
    request = compiled(product(kind), "bf16" if kind == "bf16" else "f32", threads, True)
    found = counters(request, {0: np.random.default_rng(1).standard_normal((1, SIDE, SIDE)).astype(np.float32)})  # type: ignore[dict-item]
    return SIDE**3 / float(np.median(np.sum([v for k, v in found.items() if k.startswith("FullyConnected")], axis=0)))


def macs(bundle: Bundle) -> dict[str, float]:
    spec, (height, width) = bundle.manifest.model, bundle.manifest.sizes.default
    tokens = spec.prefix_tokens + (height // spec.patch[0]) * (width // spec.patch[1])
    return {
        "linear layers": 12.0 * tokens * spec.width**2 * spec.depth,
        "attention": 2.0 * tokens**2 * spec.width * spec.depth,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundles", nargs="+")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--json", type=Path)
    asked = parser.parse_args()
    rates = {kind: rate(kind, asked.threads) for kind in ("f32", "bf16", "int8")}
    report: dict[str, Any] = {
        "processor": processor(),
        "threads": asked.threads,
        "openvino": openvino.__version__,
        "macs_per_ms": rates,
        "bundles": {},
    }
    click.echo("  ".join(f"{kind} {value / 1e6:.0f} GMAC/s" for kind, value in rates.items()))
    for name in asked.bundles:
        bundle = Bundle.read(name)
        feed = {
            "image": np.random.default_rng(0).integers(0, 256, (1, *bundle.manifest.sizes.default, 3), dtype=np.uint8)
        }
        for precision in ("f32", "bf16"):
            found = counters(compiled(str(bundle.graph), precision, asked.threads, True), feed)
            groups: dict[str, float] = collections.defaultdict(float)
            for node, values in found.items():
                groups[KINDS.get(node.split("|")[0], "attention and elementwise")] += float(np.median(values))
            need = macs(bundle)
            linear = "int8" if bundle.manifest.precision == "int8" else precision
            limit = {
                "linear layers": need["linear layers"] / rates[linear],
                "attention and elementwise": need["attention"] / rates[precision],
            }
            report["bundles"][f"{name} {precision}"] = {"ms": groups, "limit_ms": limit, "macs": need}
            click.echo(
                f"{name}, {bundle.manifest.precision} with {precision}: {sum(groups.values()):.1f} ms, limit {sum(limit.values()):.1f} ms"
            )
            for kind, value in sorted(groups.items(), key=lambda pair: -pair[1]):
                click.echo(
                    f"    {kind:28s}{value:8.2f} ms" + (f"   limit {limit[kind]:.2f} ms" if kind in limit else "")
                )
    if asked.json:
        asked.json.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
