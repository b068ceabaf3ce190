r"""Measure memory and time of a distillation step of a large model on few blocks, and reading its targets.

    python -m benchmarks.distill_size --json OUT [--model vit_large_patch14_dinov2] [--image-size 518] [--rounds 3]

Weights are random, batch 1, FP32, one thread. Peak memory is that of a process of its own which takes two steps, since
AdamW's moments exist from the second one on. Steps with and without recomputed blocks are timed in turn in one process,
in processor seconds, which other work on the machine stretches little. Each block adds the same to both, so the whole
model's figures follow from one and two blocks.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import click
import numpy as np
import timm
import torch
from safetensors.numpy import save

from phreg_deploy.distill.objective import TargetScale, objective
from phreg_deploy.distill.recipes import RECIPES
from phreg_deploy.distill.teacher import ARRAYS, TargetCache, _checksum
from phreg_deploy.distill.training_batches import Batch, read_batches, split_batch
from phreg_deploy.models import hooks
from phreg_deploy.models.registers import add_registers
from phreg_deploy.models.weights import unlock_weights
from phreg_deploy.profiling.latency import processor

RECIPE = RECIPES["transplant"]
DEPTHS = (1, 2)
WORKERS = (1, 2, 4)


class Step:
    """One training step of a student of ``depth`` blocks on one image."""

    def __init__(self, model: str, side: int, depth: int) -> None:
        torch.set_num_threads(1)
        torch.manual_seed(0)
        base = timm.create_model(model, depth=depth, img_size=side, num_classes=0)
        self.student = add_registers(base, RECIPE.registers, 0).train()
        weights = unlock_weights(self.student, RECIPE.unlock)
        self.optimizer = torch.optim.AdamW(weights, lr=1e-6)
        patches, width = base.patch_embed.num_patches, base.embed_dim
        images = torch.randint(0, 256, (1, side, side, 3), dtype=torch.uint8)
        batch = Batch(
            images, torch.randn(1, patches, width).half(), torch.randn(1, width).half(), torch.rand(1, patches), 1
        )
        self.part = split_batch(batch, RECIPE, None, 1)[0].to("cpu")

    def take(self, checkpointing: bool) -> float:
        """Take a step; returns its processor seconds."""
        self.student.set_grad_checkpointing(checkpointing)
        started = time.process_time()
        self.optimizer.zero_grad(set_to_none=True)
        features = hooks.forward(self.student, hooks.normalise(self.part.images, (0.5,) * 3, (0.5,) * 3))
        objective(features, self.part, RECIPE, TargetScale()).backward()
        self.optimizer.step()
        return time.process_time() - started


def peak_megabytes(model: str, side: int, depth: int, checkpointing: bool) -> float:
    """Peak memory of a process of its own that takes two steps."""
    words = ["--model", model, "--image-size", str(side), "--peak", str(depth), str(int(checkpointing))]
    command = [sys.executable, "-m", "benchmarks.distill_size", *words]
    return float(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def measure_steps(model: str, side: int, rounds: int) -> dict[str, Any]:
    """Peak memory and processor seconds per image of one and two blocks; and of the whole model, by arithmetic."""
    peaks: dict[bool, list[float]] = {on: [peak_megabytes(model, side, d, on) for d in DEPTHS] for on in (False, True)}
    seconds: dict[bool, list[float]] = {False: [], True: []}
    for depth in DEPTHS:
        step = Step(model, side, depth)
        step.take(False)
        times = [{on: step.take(on) for on in (False, True)} for _ in range(rounds)]
        for on, found in seconds.items():
            found.append(statistics.median(row[on] for row in times))
    whole = len(timm.create_model(model, img_size=side, num_classes=0).blocks)
    document: dict[str, Any] = {"blocks_of_the_model": whole}
    for on, name in ((False, "kept"), (True, "recomputed")):
        document[name] = {
            "blocks": list(DEPTHS),
            "peak_megabytes": peaks[on],
            "seconds_per_image": seconds[on],
            "whole_model": {
                "peak_megabytes": _extrapolate(peaks[on], whole),
                "seconds_per_image": _extrapolate(seconds[on], whole),
            },
        }
    kept, recomputed = (document[name]["whole_model"] for name in ("kept", "recomputed"))
    document["recomputed_over_kept"] = {key: recomputed[key] / kept[key] for key in kept}
    return document


def _extrapolate(values: list[float], depth: int) -> float:
    """Continue a line through the values of one and two blocks."""
    return values[0] + (depth - 1) * (values[1] - values[0])


def measure_reading(side: int, patch: int, width: int, images: int, rounds: int) -> dict[str, Any]:
    """Images per second of ``read_batches`` alone, and its processor milliseconds per image, by number of threads."""
    grid, rng = side // patch, np.random.default_rng(0)
    with tempfile.TemporaryDirectory() as folder:
        cache = TargetCache(SimpleNamespace(digest="0" * 64, grid=(grid, grid)), Path(folder))  # type: ignore[arg-type]
        cache.folder.mkdir()
        digests = [f"{i:032d}" for i in range(images)]
        for digest in digests:
            item = {
                "image": rng.integers(0, 256, (side, side, 3), dtype=np.uint8),
                "patches": rng.standard_normal((grid * grid, width)).astype(np.float16),
                "cls": rng.standard_normal((2, width)).astype(np.float16),
                "norms": rng.random(grid * grid).astype(np.float32),
                "drift": rng.random(grid * grid).astype(np.float16),
            }
            item = {name: item[name] for name in ARRAYS}
            cache.path(digest).write_bytes(save({**item, "crc32": _checksum(item)}))
        found: dict[int, list[tuple[float, float]]] = {workers: [] for workers in WORKERS}
        for epoch in range(rounds):
            for workers, rows in found.items():
                wall, own = time.perf_counter(), time.process_time()
                count = sum(
                    len(batch.images) for batch in read_batches(cache, digests, RECIPE, 0, epoch, workers=workers)
                )
                rows.append((count / (time.perf_counter() - wall), 1e3 * (time.process_time() - own) / count))
    return {
        str(workers): {
            "images_per_second": statistics.median(rate for rate, _ in rows),
            "most_images_per_second": max(rate for rate, _ in rows),
            "processor_milliseconds": statistics.median(cost for _, cost in rows),
        }
        for workers, rows in found.items()
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--model", default="vit_large_patch14_dinov2")
    parser.add_argument("--image-size", type=int, default=518)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--peak", type=int, nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.peak:
        depth, checkpointing = args.peak
        step = Step(args.model, args.image_size, depth)
        for _ in range(2):
            step.take(bool(checkpointing))
        click.echo(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e6)
        return
    before = os.getloadavg()[0]
    document = {
        "conditions": {
            "model": args.model,
            "image_size": args.image_size,
            "batch": 1,
            "weights": "random",
            "precision": "fp32",
            "threads": 1,
            "processor": processor(),
            "torch": torch.__version__,
        },
        "step": measure_steps(args.model, args.image_size, args.rounds),
        "reading": {
            "vit_large_patch14 at 518": measure_reading(518, 14, 1024, 96, args.rounds),
            "vit_tiny_patch16 at 224": measure_reading(224, 16, 192, 192, args.rounds),
        },
    }
    document["conditions"]["load"] = [before, os.getloadavg()[0]]
    text = json.dumps(document, indent=1)
    if args.json:
        args.json.write_text(text + "\n")
    click.echo(text)


if __name__ == "__main__":
    main()
