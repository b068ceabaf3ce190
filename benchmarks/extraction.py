r"""Measure what a second worker gives to ``extract``: two processes of ``--shard``, and two actors of ``--ray``.

    python -m benchmarks.extraction BUNDLE --images DIR --json OUT [--times 3] [--rounds 3]

Every worker has one thread (``--threads 1``). A round extracts the same images with one and with two workers, by each
of the two ways; with ``--times 3``, each image three times. ``seconds``: of the whole command, with Python, the graph
and the cluster started. ``rate``: images per second between the first file and the last one that was written, so
without the start. Ratios are within a round.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import click

from phreg_deploy.images.photographs import list_images
from phreg_deploy.profiling.latency import processor

WORKERS = (1, 2)


def commands(way: str, workers: int, words: list[str]) -> list[list[str]]:
    """The commands of ``workers`` workers: one process for each shard, or one that starts the actors."""
    if way == "ray":
        return [[*words, "--ray", str(workers)]]
    return [[*words, "--shard", f"{n}/{workers}"] for n in range(1, workers + 1)]


def measure(way: str, workers: int, bundle: str, images: str) -> dict[str, float]:
    """Extract all images into a new folder; ``seconds``, ``images`` and ``rate``."""
    with tempfile.TemporaryDirectory() as folder:
        program = [sys.executable, "-m", "phreg_deploy", "extract", bundle, images]
        words = [*program, "-o", folder + "/features", "--backend", "onnxruntime-cpu", "--threads", "1", "--quiet"]
        started = time.perf_counter()
        running = [subprocess.Popen(command, stdout=subprocess.DEVNULL) for command in commands(way, workers, words)]
        codes = [process.wait() for process in running]
        seconds = time.perf_counter() - started
        if any(codes):
            raise SystemExit(f"extraction: {way} with {workers} workers ended with exit codes {codes}.")
        written = sorted(path.stat().st_mtime for path in Path(folder, "features").rglob("*.npy"))
    return {
        "seconds": seconds,
        "images": len(written),
        "rate": (len(written) - 1) / (written[-1] - written[0]),
    }


def links(images: Path, times: int, folder: Path) -> int:
    """Link every image ``times`` times below ``folder``; the number of images."""
    found = list_images(images)
    for n in range(times):
        (folder / f"{n}").mkdir()
        for path in found:
            (folder / f"{n}" / path.name).symlink_to(path.resolve())
    return len(found)


def measure_rounds(bundle: str, images: str, rounds: int) -> dict[str, Any]:
    """The measurements of both ways, and the medians of the gains of the second worker."""
    rows: dict[str, Any] = {way: {f"{workers}": [] for workers in WORKERS} for way in ("shards", "ray")}
    for _ in range(rounds):
        for way, row in rows.items():
            for workers in WORKERS:
                row[f"{workers}"].append(measure(way, workers, bundle, images))
                click.echo(f"{way}, {workers}: {row[f'{workers}'][-1]}", err=True)
    for row in rows.values():
        one, two = row["1"], row["2"]
        row["gain"] = {
            "seconds": statistics.median(a["seconds"] / b["seconds"] for a, b in zip(one, two, strict=True)),
            "rate": statistics.median(b["rate"] / a["rate"] for a, b in zip(one, two, strict=True)),
        }
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle")
    parser.add_argument("--images", required=True)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", required=True)
    parser.add_argument("--times", type=int, default=3)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        found = links(Path(arguments.images), arguments.times, Path(folder))
        rows = measure_rounds(arguments.bundle, folder, arguments.rounds)
    conditions = {
        "bundle": Path(arguments.bundle).name,
        "images": found * arguments.times,
        "rounds": arguments.rounds,
        "backend": "onnxruntime-cpu",
        "threads_each": 1,
        "processor": processor(),
        "cores": os.cpu_count(),
        "load_at_end": os.getloadavg()[0],
    }
    text = json.dumps({"conditions": conditions, "rows": rows}, indent=1)
    Path(arguments.json).write_text(text + "\n")
    click.echo(text)


if __name__ == "__main__":
    main()
