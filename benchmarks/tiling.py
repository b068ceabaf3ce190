r"""Measure the seams and the speed of ``FeatureExtractor.tiled`` on street scenes of 1024 x 2048 pixels.

    python -m benchmarks.tiling vit_tiny_patch16_224 --checkpoint WEIGHTS --images DIR --json OUT

Errors are means of 1 - cosine per patch, over features from which the scene's mean feature is subtracted:

- ``shift``: between the scene and itself moved by half a patch, down and right. This is the scale of what a user of
  dense features has to live with on any model.
- ``placement``: between the scene and itself moved by whole patches, about half a step, down and right, with the
  features moved back: only the windows lie elsewhere. ``near``: over patches beside a border of a window;
  ``elsewhere``: over all others. ``near / shift`` is what the bar, 2, is for.
- ``whole``: at half the size, to the features of the scene in one piece, near borders and elsewhere.

Times are of interleaved rounds; a ratio is the median over rounds of the ratio within a round.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click
import numpy as np
from PIL import Image

from phreg_deploy.artifacts.measures import cosine
from phreg_deploy.export import export
from phreg_deploy.images.photographs import list_images
from phreg_deploy.profiling.latency import processor
from phreg_deploy.runtime import FeatureExtractor, TiledFeatures

SIZE = (1024, 2048)
STRIDES = {"half a window": 2, "none: windows apart": 1}
BAR = 2.0


def scenes(folder: Path, count: int) -> Iterator[np.ndarray]:
    """Street scenes: the middle of each photograph in 2:1, enlarged, with a margin to move it: uint8 RGB."""
    for path in list_images(folder, count, spread=True):
        with Image.open(path) as photograph:
            picture = photograph.convert("RGB")
        height = picture.width * SIZE[0] // SIZE[1]
        top = (picture.height - height) // 2
        box = (0, top, picture.width, top + height)
        margin = 128
        yield np.asarray(picture.resize((SIZE[1] + margin, SIZE[0] + margin), Image.Resampling.BICUBIC, box))


def view(scene: np.ndarray, move: int, size: tuple[int, int] = SIZE) -> np.ndarray:
    """The part of ``size`` whose first pixel is ``move`` pixels down and right."""
    return np.ascontiguousarray(scene[move : move + size[0], move : move + size[1]])


def error(a: np.ndarray, b: np.ndarray, centre: np.ndarray) -> np.ndarray:
    return 1 - cosine(a - centre, b - centre)


def near_borders(tiled: TiledFeatures) -> np.ndarray:
    """Mark the patches beside a border of a window, bool ``(Hp, Wp)``; borders of the image are none."""
    windows = tiled.windows
    near = np.zeros(windows.grid, bool)
    for axis, starts in enumerate((windows.rows, windows.columns)):
        end, size = windows.grid[axis], windows.shape[axis]
        borders = {start for start in starts if start} | {start + size for start in starts if start + size < end}
        lines = [line for border in borders for line in (border - 1, border)]
        near[lines if axis == 0 else (slice(None), lines)] = True
    return near


def seams(extractor: FeatureExtractor, scene: np.ndarray, window: int, stride: int) -> dict[str, float]:
    """The errors of one scene, see the module."""
    patch = extractor.spec.patch[0]
    plain = extractor.tiled(view(scene, 0), window, stride)
    features = plain.features[0]
    centre = features.mean((0, 1))
    shifted = extractor.tiled(view(scene, patch // 2), window, stride).features[0]
    by = max(1, stride // patch // 2)
    moved = extractor.tiled(view(scene, by * patch), window, stride).features[0]
    placement, near = error(features[by:, by:], moved[:-by, :-by], centre), near_borders(plain)[by:, by:]
    half = np.asarray(Image.fromarray(view(scene, 0)).resize((SIZE[1] // 2, SIZE[0] // 2), Image.Resampling.BOX))
    small = extractor.tiled(half, window, stride)
    whole, beside = extractor.dense(half[None]).features[0], near_borders(small)
    apart = error(small.features[0], whole, whole.mean((0, 1)))
    return {
        "shift": float(error(features, shifted, centre).mean()),
        "placement_near": float(placement[near].mean()),
        "placement_elsewhere": float(placement[~near].mean()) if not near.all() else float("nan"),
        "whole_near": float(apart[beside].mean()),
        "whole_elsewhere": float(apart[~beside].mean()),
        "artifact_rate": float(plain.artifact_rate[0]),
        "window_artifact_rate": float(plain.window_artifact_rate.mean()),
        "windows": len(plain.windows),
    }


def speed(extractor: FeatureExtractor, scene: np.ndarray, window: int, rounds: int) -> dict[str, Any]:
    """Milliseconds per megapixel of the tiled call by stride; of the graph alone, per window of a full batch; and what
    the tiled call takes over the graph on as many windows, in the same round."""
    image = view(scene, 0)
    batch = np.repeat(image[None, :window, :window], extractor.manifest.batches.highest, 0)
    calls = {name: lambda s=window // part: extractor.tiled(image, window, s) for name, part in STRIDES.items()}
    calls["graph alone, a window"] = extractor.graph_call(batch)
    times: dict[str, list[float]] = {name: [] for name in calls}
    for name in [*calls, *(name for _ in range(rounds) for name in calls)]:
        before = time.perf_counter()
        calls[name]()
        times[name].append(1e3 * (time.perf_counter() - before))
    megapixels = image.shape[0] * image.shape[1] / 1e6
    figures: dict[str, Any] = {
        name: float(np.median(values[1:])) / (len(batch) if "graph" in name else megapixels)
        for name, values in times.items()
    }
    windows = len(extractor.tiled(image, window, window // 2).windows)
    graph = np.array(times["graph alone, a window"][1:]) * windows / len(batch)
    figures["tiled over graph alone"] = float(np.median(np.array(times["half a window"][1:]) / graph))
    return figures


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--checkpoint", type=Path)
    parser.add_argument("--images", type=Path, required=True)
    parser.add_argument("--json", type=Path, required=True)
    parser.add_argument("--scenes", type=int, default=2)
    parser.add_argument("--window", type=int, default=224)
    parser.add_argument("--backend", default="openvino")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    window, pictures = arguments.window, list(scenes(arguments.images, arguments.scenes))
    with tempfile.TemporaryDirectory() as work:
        sizes = f"{window}:{window}:{SIZE[0] // 2}x{SIZE[1] // 2}"
        export(arguments.model, Path(work) / "b", checkpoint=arguments.checkpoint, image_size=sizes, batch="1:4:8")
        options = {"threads": arguments.threads, "compute": "fp32"}
        with FeatureExtractor.load(Path(work) / "b", arguments.backend, **options) as extractor:
            rows: dict[str, Any] = {}
            for name, part in STRIDES.items():
                found = [seams(extractor, scene, window, window // part) for scene in pictures]
                click.echo(f"{name}: {json.dumps(found)}", err=True)
                rows[name] = {key: float(np.mean([one[key] for one in found])) for key in found[0]}
            timed = speed(extractor, pictures[0], window, arguments.rounds)
    for row in rows.values():
        row["near_over_shift"] = row["placement_near"] / row["shift"]
        row["whole_near_over_elsewhere"] = row["whole_near"] / row["whole_elsewhere"]
    passed = rows["half a window"]["near_over_shift"] <= BAR
    conditions = {"model": Path(arguments.model).name, "scenes": len(pictures), "size": SIZE, "window": window}
    conditions |= {"backend": arguments.backend, "threads": arguments.threads, "batch": 8, "rounds": arguments.rounds}
    conditions |= {"processor": processor(), "load_at_end": os.getloadavg()[0]}
    document = {"conditions": conditions, "bar": BAR, "passed": passed, "seams": rows, "milliseconds": timed}
    text = json.dumps(document, indent=1)
    arguments.json.write_text(text + "\n")
    click.echo(text)


if __name__ == "__main__":
    main()
