r"""Time what further layers and the class token's attention add to a bundle, with random weights.

    python -m benchmarks.further_outputs --json OUT [--model vit_small_patch14_dinov2] [--image-size 224] [--seconds 20]

One process serves all bundles on a backend; each round calls every bundle once in a new order, so that whatever else
the machine does falls on all of them. ``added`` is the median over rounds of a bundle's time minus the plain bundle's
in the same round, with the quartiles of that difference.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import time
from pathlib import Path
from typing import Any

import click
import numpy as np

from phreg_deploy.export import export
from phreg_deploy.profiling.latency import processor
from phreg_deploy.runtime import FeatureExtractor

LAYERS = "1/4,1/2,3/4,1"
BUNDLES: dict[str, dict[str, Any]] = {
    "plain": {},
    "attention": {"attention": True},
    "layers": {"layers": LAYERS},
    "layers, no norm": {"layers": LAYERS, "layer_norm": False},
    "layers and attention": {"layers": LAYERS, "attention": True},
}
PAUSE = 0.02


def measure(folders: dict[str, Path], backend: str, threads: int, seconds: float) -> dict[str, Any]:
    """Median milliseconds of each bundle on one backend, and what it adds to the plain one in the same round."""
    extractors = {
        name: FeatureExtractor.load(folder, backend, threads=threads, compute="fp32")
        for name, folder in folders.items()
    }
    height, width = extractors["plain"].manifest.sizes.default
    rng = np.random.default_rng(0)
    image = rng.integers(0, 256, (1, height, width, 3), dtype=np.uint8)
    calls = {name: extractor.graph_call(image) for name, extractor in extractors.items()}
    for call in calls.values():
        call()
    rounds: list[dict[str, float]] = []
    started = time.perf_counter()
    while time.perf_counter() - started < seconds or len(rounds) < 10:
        times = {}
        for name in rng.permutation(list(calls)):
            time.sleep(PAUSE)
            before = time.perf_counter()
            calls[name]()
            times[str(name)] = 1e3 * (time.perf_counter() - before)
        rounds.append(times)
    for extractor in extractors.values():
        extractor.close()
    figures: dict[str, Any] = {"rounds": len(rounds)}
    for name in calls:
        added = [times[name] - times["plain"] for times in rounds]
        low, middle, high = (float(np.quantile(added, q)) for q in (0.25, 0.5, 0.75))
        figures[name] = {
            "milliseconds": float(np.median([times[name] for times in rounds])),
            "added": middle,
            "added_quartiles": [low, high],
        }
    return figures


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, required=True)
    parser.add_argument("--model", default="vit_small_patch14_dinov2")
    parser.add_argument("--image-size", default="224")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seconds", type=float, default=20)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as work:
        folders = {}
        for i, (name, outputs) in enumerate(BUNDLES.items()):
            folder = Path(work) / str(i)
            export(arguments.model, folder, image_size=arguments.image_size, random_weights=True, **outputs)
            folders[name] = folder
        backends = {
            backend: measure(folders, backend, arguments.threads, arguments.seconds)
            for backend in ("onnxruntime-cpu", "openvino")
        }
    load = os.getloadavg()[0]
    conditions = {"model": arguments.model, "image_size": arguments.image_size, "batch": 1, "weights": "random"}
    conditions |= {"threads": arguments.threads, "layers": LAYERS, "processor": processor(), "load_at_end": load}
    text = json.dumps({"conditions": conditions, "backends": backends}, indent=1)
    arguments.json.write_text(text + "\n")
    click.echo(text)


if __name__ == "__main__":
    main()
