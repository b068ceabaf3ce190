"""Measure what a label map costs: beside the features and alone, and enlarged by a learned upsampler (JAFAR).

    python -m benchmarks.upsamplers STUDENT --json benchmarks/upsamplers.json

JAFAR (arXiv 2506.11136) attends from queries of the image to all patches. Its time alone is measured, with random
weights. Since a head is linear and attention averages, it enlarges the scores of 12 classes, which costs less than
enlarging the features. The answer has a stride of 4, as that of the joint bilateral filter.

Times are CPU times of the one thread that computes, in interleaved rounds, so that other work disturbs them little.
"""

from __future__ import annotations

import json
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import numpy as np
import onnxruntime
import torch
from torch import nn

from phreg_deploy.bundle.manifest import Manifest
from phreg_deploy.export import export
from phreg_deploy.heads import Head, attach
from phreg_deploy.profiling.latency import processor
from phreg_deploy.runtime import FeatureExtractor

CLASSES, STRIDE, HEADS, GROUPS = 12, 4, 4, 8
SIZES = ("224", "352x480")
# Channels of queries and keys, and the stride of the pixels that are read: as published, and smaller.
JAFAR = {
    "JAFAR": (128, 1),
    "JAFAR on pixels of stride 4": (128, STRIDE),
    "JAFAR on pixels of stride 4, 32 channels": (32, STRIDE),
}


class Residual(nn.Module):
    def __init__(self, dim: int) -> None:
        super().__init__()
        layers = ([nn.GroupNorm(GROUPS, dim), nn.SiLU(), nn.Conv2d(dim, dim, 1, bias=False)] for _ in range(2))
        self.layers = nn.Sequential(*(layer for part in layers for layer in part))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.layers(x)


def encoder(channels: int, dim: int) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(channels, dim, 1, bias=False), Residual(dim), Residual(dim))


class Jafar(nn.Module):
    """Image ``(1, 3, H, W)``, features ``(1, C, Hp, Wp)``, scores ``(1, K, Hp, Wp)`` -> scores ``(1, K, H/4, W/4)``."""

    def __init__(self, dim: int, stride: int, size: tuple[int, int], width: int, patch: int) -> None:
        super().__init__()
        self.dim, self.stride, self.patch = dim, stride, patch
        self.image, self.query, self.key = encoder(3, dim), encoder(dim, dim), encoder(dim, dim)
        self.feature, self.norm = encoder(width, dim), nn.GroupNorm(GROUPS, dim, affine=False)
        self.gamma, self.beta = (nn.Conv2d(dim, dim, 1, bias=False) for _ in range(2))
        self.mix = nn.Conv2d(dim, dim, 3, padding=1, bias=False)
        self.norms = nn.ModuleList(nn.RMSNorm(dim) for _ in range(2))
        self.to_query, self.to_key = nn.Linear(dim, dim), nn.Linear(dim, dim)
        rows, columns = (torch.linspace(0, 1, side // stride) for side in size)
        places = torch.stack(torch.meshgrid(rows, columns, indexing="ij"), -1)
        angle = places @ torch.randn(2, dim)
        self.register_buffer("sine", angle.sin().permute(2, 0, 1))
        self.register_buffer("cosine", angle.cos().permute(2, 0, 1))

    def forward(self, image: torch.Tensor, features: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        x = self.image(nn.functional.avg_pool2d(image, self.stride) if self.stride > 1 else image)
        first, second = x.chunk(2, 1)
        x = x * self.cosine + torch.cat((-second, first), 1) * self.sine
        pool = STRIDE // self.stride
        queries, keys = self.query(x), nn.functional.avg_pool2d(self.key(x), self.patch // self.stride)
        queries = self.mix(self.norm(nn.functional.avg_pool2d(queries, pool) if pool > 1 else queries))
        modulation = self.feature(nn.functional.normalize(features, dim=1))
        keys = self.gamma(modulation) * self.norm(keys) + self.beta(modulation)
        pair = zip((queries, keys), self.norms, (self.to_query, self.to_key))
        q, k = (project(norm(x.flatten(2).mT)).unflatten(-1, (HEADS, -1)).transpose(1, 2) for x, norm, project in pair)
        shares = (q @ k.mT * (self.dim // HEADS) ** -0.5).softmax(-1).mean(1)
        return (shares @ scores.flatten(2).mT).mT.unflatten(-1, queries.shape[2:])


def learned(name: str, manifest: Manifest, folder: Path) -> Callable[[], object]:
    """A function that enlarges the scores of one image by JAFAR in ONNX Runtime, with random weights."""
    (height, width), patch, channels = manifest.sizes.default, manifest.model.patch[0], manifest.model.width
    torch.manual_seed(0)
    grid = (height // patch, width // patch)
    shapes = {"image": (1, 3, height, width), "features": (1, channels, *grid), "scores": (1, CLASSES, *grid)}
    given = {key: torch.rand(shape) for key, shape in shapes.items()}
    model = Jafar(*JAFAR[name], (height, width), channels, patch).eval()
    path = folder / f"{name}-{height}.onnx"
    torch.onnx.export(model, tuple(given.values()), path, input_names=list(given), opset_version=20, dynamo=True)
    (options := onnxruntime.SessionOptions()).intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    feed = {key: value.numpy() for key, value in given.items()}
    expected = model(*given.values()).detach().numpy()
    np.testing.assert_allclose(session.run(None, feed)[0], expected, rtol=1e-3, atol=1e-4)
    return lambda: session.run(None, feed)


def measure(student: str, size: str, folder: Path, rounds: int) -> dict[str, Any]:
    plain = export(student, output=folder / size, image_size=size)
    weight = np.random.default_rng(0).standard_normal((CLASSES, plain.manifest.model.width)).astype(np.float32)
    head = Head(weight, np.zeros(CLASSES, np.float32), classes=tuple(f"class {k}" for k in range(CLASSES)))
    bundles = {"features": plain}
    for name, alone in (("labels beside features", False), ("labels alone", True)):
        how: dict[str, Any] = {"upsample": "joint-bilateral", "stride": STRIDE, "labels": True, "only_head": alone}
        bundles[name] = attach(plain.folder, {"": head}, folder / f"{size}-{name}", **how)
    image = np.random.default_rng(0).integers(0, 256, (1, *plain.manifest.sizes.default, 3), dtype=np.uint8)
    loaded = {k: FeatureExtractor.load(b.folder, "onnxruntime-cpu", threads=1) for k, b in bundles.items()}
    copied = {name: sum(value.nbytes for value in one.run(image).values()) for name, one in loaded.items()}
    calls: dict[str, Callable[[], object]] = {k: (lambda e=e: e.run(image)) for k, e in loaded.items()}  # type: ignore[misc]
    calls |= {name: learned(name, plain.manifest, folder) for name in JAFAR}
    times = {name: np.zeros(rounds) for name in calls}
    for i in range(-2, rounds):
        for name, call in calls.items():
            began = time.thread_time()
            call()
            if i >= 0:
                times[name][i] = 1e3 * (time.thread_time() - began)
    unit = times["features"]
    added = {name: own if name in JAFAR else own - unit for name, own in times.items() if name != "features"}
    shares = {name: np.quantile(own / unit, (0.25, 0.5, 0.75)).tolist() for name, own in added.items()}
    saved = np.quantile(1 - times["labels alone"] / times["labels beside features"], (0.25, 0.5, 0.75)).tolist()
    added_ms = {name: float(np.median(own)) for name, own in added.items()}
    facts = {"backbone_ms": float(np.median(unit)), "added_ms": added_ms, "share": shares, "bytes": copied}
    return {**facts, "saved_by_labels_alone": saved}


@click.command()
@click.argument("student")
@click.option("--rounds", type=int, default=40)
@click.option("--json", "output", type=click.Path(path_type=Path), required=True)
def main(student: str, rounds: int, output: Path) -> None:
    with tempfile.TemporaryDirectory() as folder:
        sizes = {size: measure(student, size, Path(folder), rounds) for size in SIZES}
    report = {"processor": processor(), "threads": 1, "rounds": rounds, "sizes": sizes}
    output.write_text(json.dumps(report, indent=1) + "\n")
    click.echo(json.dumps(report, indent=1))


if __name__ == "__main__":
    main()
