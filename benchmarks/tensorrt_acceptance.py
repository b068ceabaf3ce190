"""List which graphs NVIDIA's parser and builder take and what they fuse, by family, precision and sizes; without a GPU.

    python -m tests.nvidia_wheels                        # the wheels, once
    python -m benchmarks.tensorrt_acceptance --json OUT [--depth 12] [--width 384] [--heads 6] [--side 16]

Full depth and the width of a ViT-S, 4 registers, random weights; ranges from two photographs. Fixed: one size, batch
1. Range: two patches a side below to two above, batch 1 to 8. A cell is fused attentions / linear layers in 8 bits
(FP8: also the number of attentions in FP8). Run on TensorRT for RTX, as the tests do; this covers neither speed nor
numbers.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from pathlib import Path
from typing import Any

import click
import onnx

from phreg_deploy.errors import PhregError
from tests import nvidia
from tests.small_models import FAMILIES, VARIANTS
from tests.trt_graphs import PRECISIONS, SAME, build, graphs


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, required=True)
    for name, value in (("depth", 12), ("width", 384), ("heads", 6), ("side", 16)):
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--only", nargs="+", help="families; the other rows of the file are kept")
    args = parser.parse_args()
    settings = {name: value for name, value in vars(args).items() if name not in ("json", "only")}
    cells: dict[str, dict[str, Any]] = {}
    if args.only:
        earlier = json.loads(args.json.read_text())
        if earlier["settings"] != settings:
            parser.error(f"--only: {args.json} was written with {earlier['settings']}")
        cells = earlier["cells"]
    for family in args.only or [name for name in (*FAMILIES, *VARIANTS) if name not in SAME]:
        for sizes in ("fixed", "range"):
            cells[f"{family}, {sizes}"] = row(family, sizes, args)
            texts = [str(cells[f"{family}, {sizes}"][precision]["said"]) for precision in PRECISIONS]
            click.echo(f"| {family} | {sizes} | {' | '.join(texts)} |")
            args.json.write_text(json.dumps({"settings": settings, "cells": cells}, indent=1) + "\n")


def row(family: str, sizes: str, args: argparse.Namespace) -> dict[str, Any]:
    """One family at one kind of size in every precision."""
    here = graphs(family, sizes, args.width, args.heads, args.side, args.depth)
    written, cells = {}, {}
    for precision in PRECISIONS:
        try:
            graph = here.write(precision)
            onnx.checker.check_model(graph)
            written[precision] = (graph, here.profiles)
        except PhregError as error:
            cells[precision] = {"said": f"not written: {error}"}
    started = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        for precision, steps in build(written, Path(folder)).items():
            if isinstance(steps, str):
                cells[precision] = {"said": f"refused: {steps}"}
                continue
            # A plan holds every kernel once for each profile.
            census, times = nvidia.census(steps), len(here.profiles)
            fused, fused_in_fp8 = census.fused_attention // times, census.eight_bit_attention // times
            layers = f" / {len(census.eight_bit)}" if precision in ("int8", "fp8") else ""
            in_fp8 = f" ({fused_in_fp8} in FP8)" if precision == "fp8" else ""
            cells[precision] = {
                "said": f"{fused}{layers}{in_fp8}",
                "fused_attention": fused,
                "attention_in_8_bits": fused_in_fp8,
                "eight_bit": len(census.eight_bit),
                "float_linears": sorted(census.floats),
            }
    graphs.cache_clear()
    return cells | {"seconds": time.perf_counter() - started}


if __name__ == "__main__":
    main()
