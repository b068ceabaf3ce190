"""Measure the time of each kind of operator, beside the time that its products take at the machine's peak rate.

    python benchmarks/operators.py BUNDLE... --json OUT

Reads OpenVINO's own counters on each bundle, in float32 and bfloat16, grouped by kind. The peak is the rate of one
large matrix product (2048 x 2048 x 2048), measured in the same process.
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

MOVES = ("Split", "Transpose", "Reorder", "Concatenation", "Concat", "Slice")
KINDS = {
    "FullyConnected": "linear layers",
    "FullyConnectedQuantizedLegacy": "linear layers",
    "MVN": "layer norms",
    **dict.fromkeys(MOVES, "data movement"),
}
SIDE = 2048


def compiled(model: Any, precision: str, threads: int, counted: bool) -> Any:
    options = {
        "INFERENCE_PRECISION_HINT": precision,
        "INFERENCE_NUM_THREADS": threads,
        "PERFORMANCE_HINT": "LATENCY",
        "PERF_COUNT": counted,
    }
    return openvino.Core().compile_model(model, "CPU", options).create_infer_request()


def counters(request: Any, feed: dict[Any, np.ndarray], rounds: int = 10) -> dict[str, list[float]]:
    """Milliseconds of every executed node, one value for each round."""
    for _ in range(5):
        request.infer(feed)
    times: dict[str, list[float]] = collections.defaultdict(list)
    for _ in range(rounds):
        request.infer(feed)
        for node in request.profiling_info:
            if node.status == node.Status.EXECUTED:
                name = f"{node.node_type}|{node.exec_type}|{node.node_name}"
                times[name].append(node.real_time.total_seconds() * 1e3)
    return times


def product(kind: str) -> Any:
    """A model of one large matrix product, in the form of the linear layers."""
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
    """Multiply-accumulates per millisecond of the product alone, without the preparation of its input."""
    request = compiled(product(kind), "bf16" if kind == "bf16" else "f32", threads, True)
    feed = {0: np.random.default_rng(1).standard_normal((1, SIDE, SIDE)).astype(np.float32)}
    times = counters(request, feed)
    products = [values for name, values in times.items() if name.startswith("FullyConnected")]
    return SIDE**3 / float(np.median(np.sum(products, axis=0)))


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
    args = parser.parse_args()
    rates = {kind: rate(kind, args.threads) for kind in ("f32", "bf16", "int8")}
    report: dict[str, Any] = {
        "processor": processor(),
        "threads": args.threads,
        "openvino": openvino.__version__,
        "macs_per_ms": rates,
        "bundles": {},
    }
    click.echo("  ".join(f"{kind} {value / 1e6:.0f} GMAC/s" for kind, value in rates.items()))
    for name in args.bundles:
        bundle = Bundle.read(name)
        feed = {
            "image": np.random.default_rng(0).integers(0, 256, (1, *bundle.manifest.sizes.default, 3), dtype=np.uint8)
        }
        for precision in ("f32", "bf16"):
            times = counters(compiled(str(bundle.graph), precision, args.threads, True), feed)
            groups: dict[str, float] = collections.defaultdict(float)
            for node, values in times.items():
                groups[KINDS.get(node.split("|")[0], "attention and elementwise")] += float(np.median(values))
            need = macs(bundle)
            linear = "int8" if bundle.manifest.precision == "int8" else precision
            limit = {
                "linear layers": need["linear layers"] / rates[linear],
                "attention and elementwise": need["attention"] / rates[precision],
            }
            report["bundles"][f"{name} {precision}"] = {"ms": groups, "limit_ms": limit, "macs": need}
            total, least = sum(groups.values()), sum(limit.values())
            click.echo(f"{name}, {bundle.manifest.precision} with {precision}: {total:.1f} ms, limit {least:.1f} ms")
            for kind, value in sorted(groups.items(), key=lambda pair: -pair[1]):
                bound = f"   limit {limit[kind]:.2f} ms" if kind in limit else ""
                click.echo(f"    {kind:28s}{value:8.2f} ms{bound}")
    if args.json:
        args.json.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
