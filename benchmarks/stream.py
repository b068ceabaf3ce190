r"""Measure a stream of the demo's model: a 1080p video at 30 frames a second, and 10,000 frames from an iterator.

    python -m benchmarks.stream --images DIR --json OUT [--frames 10000] [--seconds 10]

The video is made of photographs, enlarged, with a new one each half second. ``rss``: resident memory in MiB after 1,000
results and at the end. ``balance``: received = served + dropped + pending, looked at after every result.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import click
import cv2
import numpy as np

from phreg_deploy.export import export
from phreg_deploy.images.photographs import list_images
from phreg_deploy.profiling.latency import processor
from phreg_deploy.runtime import FeatureExtractor
from phreg_deploy.stream import Stream

MODEL = Path(__file__).resolve().parent.parent / "phreg_deploy" / "demo" / "model"
SIZE, FPS = (1080, 1920), 30.0


def resident() -> float:
    """Resident memory of this process in MiB."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**20


def write_video(path: Path, photographs: list[np.ndarray], seconds: float) -> None:
    writer = cv2.VideoWriter(str(path), cv2.VideoWriter.fourcc(*"mp4v"), FPS, SIZE[::-1])
    large = [cv2.resize(photograph, SIZE[::-1]) for photograph in photographs]
    for i in range(round(seconds * FPS)):
        writer.write(np.roll(large[i // 15 % len(large)], 4 * i, axis=1))
    writer.release()


def measure(extractor: FeatureExtractor, source: Any, every: int, **options: Any) -> dict[str, Any]:
    """Serve a source to its end; look at the counts after each result, and at the memory after each ``every``."""
    memory, unbalanced, started = [], 0, time.monotonic()
    with Stream(extractor, source, **options) as stream:
        for served, _ in enumerate(stream, 1):
            now = stream.figures()["camera"]
            unbalanced += now.received != now.served + now.dropped + now.pending
            if served % every == 0:
                memory.append(resident())
        seconds = time.monotonic() - started
    memory.append(resident())
    figures = stream.figures()["camera"].to_json()
    left = [thread.name for thread in threading.enumerate() if thread.name.startswith("phreg-stream")]
    rss = {"first": memory[0], "end": memory[-1], "largest": max(memory)}
    return {"seconds": seconds, **figures, "unbalanced": unbalanced, "threads_left": len(left), "rss": rss}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=Path, required=True)
    parser.add_argument("--json", type=Path, required=True)
    parser.add_argument("--frames", type=int, default=10_000)
    parser.add_argument("--seconds", type=float, default=10)
    parser.add_argument("--backend", default="onnxruntime-cpu")
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args()
    photographs = [cv2.imread(str(path)) for path in list_images(arguments.images, 8, spread=True)]
    rows: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as work:
        export(str(MODEL), Path(work) / "b")
        write_video(Path(work) / "drive.mp4", photographs, arguments.seconds)
        with FeatureExtractor.load(Path(work) / "b", arguments.backend, threads=arguments.threads) as extractor:
            size = extractor.manifest.sizes.default
            frames = itertools.islice(itertools.cycle(photographs), arguments.frames)
            rows["1080p video, 30 a second"] = measure(extractor, Path(work) / "drive.mp4", 100)
            rows["iterator, every frame"] = measure(extractor, frames, 1000, every_frame=True)
            frames = itertools.islice(itertools.cycle(photographs), arguments.frames)
            rows["iterator, newest wins"] = measure(extractor, frames, 1000, fps=1000)
    conditions = {"model": "demo", "size": size, "backend": arguments.backend, "threads": arguments.threads}
    conditions |= {"processor": processor(), "load_at_end": os.getloadavg()[0]}
    text = json.dumps({"conditions": conditions, "rows": rows}, indent=1)
    arguments.json.write_text(text + "\n")
    click.echo(text)


if __name__ == "__main__":
    main()
