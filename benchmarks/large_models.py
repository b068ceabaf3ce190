r"""Measure what calibration to INT8 takes on a large model with random weights: CPU seconds and peak memory by stage.

    python -m benchmarks.large_models --images DIR --json OUT [--model vit_large_patch14_dinov2] [--image-size 518]
        [--few 8] [--probes 4] [--bundle FOLDER]

All stages of ``calibrate`` run, on few images, with one smoothing, and with the first ``--probes`` sensitivities, which
are the most expensive because they run from the first block on. ``full_seconds`` is the sum for the images, smoothings
and probes of a whole calibration; half of it estimates the time on two free cores. Memory is that of the process.
"""

from __future__ import annotations

import argparse
import json
import resource
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from phreg_deploy.bundle.bundle import Bundle
from phreg_deploy.calibration import gptq
from phreg_deploy.calibration.calibrator import Choice, observe, write_graph
from phreg_deploy.calibration.images import CALIBRATE, REPORT, SELECT, Shares, split_images
from phreg_deploy.calibration.request import CalibrationRequest
from phreg_deploy.calibration.search import CANDIDATES, EvalSet, compare
from phreg_deploy.export import export
from phreg_deploy.onnx_graph.external import write_graph as write_onnx
from phreg_deploy.profiling.latency import processor
from phreg_deploy.progress import Advance, Progress
from phreg_deploy.quantisation import Smoothing


class Enough(Exception):
    """As many probes were measured as were asked for."""


class Stages(Progress):
    """Record CPU seconds, wall seconds and the peak memory so far of every stage. ``path``: written after each."""

    def __init__(self, path: Path) -> None:
        super().__init__(quiet=True)
        self.path, self.record = path, dict[str, dict[str, float]]()

    @contextmanager
    def task(self, name: str, total: int | None) -> Iterator[Advance]:
        done = [0]

        def advance(count: int = 1, note: str | None = None) -> None:
            done[0] += count

        before, started = _cpu(), time.perf_counter()
        yield advance
        self.record[name] = {
            "count": done[0],
            "cpu_seconds": round(_cpu() - before, 1),
            "wall_seconds": round(time.perf_counter() - started, 1),
            "peak_gb": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20, 2),
        }
        self.path.write_text(json.dumps(self.record, indent=1) + "\n")


def _cpu() -> float:
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_utime + usage.ru_stime


def _timed_rounding() -> list[float]:
    """Return a list that the CPU seconds of every layer's rounding will be added to."""
    seconds: list[float] = []
    plain = gptq.round_weight

    def timed(*arguments: Any) -> Any:
        before = _cpu()
        result = plain(*arguments)
        seconds.append(_cpu() - before)
        return result

    gptq.round_weight = timed
    return seconds


def _first(images: Any, count: int) -> Any:
    return images.subset(list(range(min(count, len(images)))))


def measure(bundle: Bundle, images: Path, few: int, probes: int, stages: Stages) -> None:
    """Run every stage of a calibration on ``few`` images for ranges and rounding, and two for choices and report."""
    request, smoothing = CalibrationRequest(bundle.folder, images), Smoothing()
    shares = split_images(images, bundle.manifest, stages.say)
    shares = Shares(_first(shares.calibrate, few), _first(shares.select, 2), _first(shares.report, 2), shares.tokens)
    search, rounding, report = observe(bundle, shares, request, stages)
    with stages.task("score", None) as advance:
        search.score(smoothing, set())
        advance(len(search.images))
    with stages.task("moments and rounding", None) as advance:
        seconds = _timed_rounding()
        search.round_weights(smoothing, shares.tokens, rounding, lambda *_: None)
        advance(len(shares.calibrate))
    stages.record["rounding alone"] = {"count": len(seconds), "cpu_seconds": round(sum(seconds), 1)}
    with stages.task("probes", None) as advance:
        # The graph of all layers in 8 bits is scored first.
        advance(1)
        left = [probes]

        def stop(count: int = 1) -> None:
            advance(count)
            left[0] -= 1
            if not left[0]:
                raise Enough

        with suppress(Enough):
            search.sensitivities(smoothing, stop)
    with stages.task("written graph", None) as advance, tempfile.TemporaryDirectory() as folder:
        model, session, _ = write_graph(search, Choice(smoothing, [], {}, [], []), request)
        compare(session, EvalSet(report.feeds[:1], report.answers[:1]), None)
        write_onnx(model, Path(folder) / "model.onnx", None)
        advance(1)


def full_seconds(stages: dict[str, dict[str, float]], grid: int, layers: int) -> dict[str, float]:
    """CPU seconds of each stage with all images, smoothings and layers that ``calibrate`` takes."""
    calibrate, select, report = (min(m, max(least, n // grid)) for n, least, m in (CALIBRATE, SELECT, REPORT))
    each = {name: stage["cpu_seconds"] / stage["count"] for name, stage in stages.items()}
    alone, together = stages["rounding alone"]["cpu_seconds"], stages["moments and rounding"]
    moments = (together["cpu_seconds"] - alone) / together["count"]
    return {
        "ranges": each["ranges"] * calibrate,
        "float answers": each["float answers"] * (select + report),
        "smoothing": each["score"] * select * (1 + len(CANDIDATES)),
        "rounding": moments * min(calibrate, -(-gptq.ROWS // grid)) + alone,
        # A probe runs half of the blocks in the mean.
        "sensitivity": each["probes"] * (1 + layers / 2),
        "fallback, first score": each["score"] * select,
        "report": each["score"] * report,
    }


def main() -> None:
    """Write the figures of one model as JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=Path, required=True)
    parser.add_argument("--json", type=Path, required=True)
    parser.add_argument("--model", default="vit_large_patch14_dinov2")
    parser.add_argument("--image-size", default="518")
    parser.add_argument("--few", type=int, default=8)
    parser.add_argument("--probes", type=int, default=4)
    parser.add_argument("--bundle", type=Path, help="a bundle of the model that was exported before")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        source = args.bundle or Path(folder) / "bundle"
        if args.bundle is None:
            export(args.model, source, image_size=args.image_size, random_weights=True)
        bundle, stages = Bundle.read(source), Stages(args.json)
        measure(bundle, args.images, args.few, args.probes, stages)
    height, width = bundle.manifest.sizes.default
    patch = bundle.manifest.model.patch
    grid = (height // patch[0]) * (width // patch[1])
    full = full_seconds(stages.record, grid, 4 * bundle.manifest.model.depth)
    result = {
        "model": args.model,
        "image_size": args.image_size,
        "processor": processor(),
        "images_of_ranges": args.few,
        "stages": stages.record,
        "peak_gb": max(stage["peak_gb"] for stage in stages.record.values()),
        "full_cpu_seconds": {name: round(value) for name, value in full.items()},
        "minutes_on_two_free_cores": round(sum(full.values()) / 2 / 60, 1),
    }
    args.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
