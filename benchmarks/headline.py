r"""Compare a base model in PyTorch with the INT8 bundle that three commands make of it: the headline of README.

    phreg-deploy distill   NAME --checkpoint FILE --images DIR/distil_imagenet1000 -o student
    phreg-deploy export    student -o student.bundle --image-size 224,352x480
    phreg-deploy calibrate student.bundle --images DIR/distil_imagenet1000 -o student-int8.bundle
    python benchmarks/headline.py --data DIR --base NAME --checkpoint FILE --student student \
        --bundle student-int8.bundle --json OUT

Quality is measured as in quality.py, on the photographs that the student's record names as held out and that
``calibrate`` did not draw. Milliseconds are medians of interleaved calls with one image at 224 px, on the backend that
"auto" chose.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from quality import NATIVE, Comparison
from segmentation import intervals
from subjects import Subject

from phreg_deploy.models.hooks import normalise
from phreg_deploy.models.loading import load_model, model_preprocess
from phreg_deploy.profiling.latency import processor
from phreg_deploy.runtime.backends.instructions import eight_bits
from phreg_deploy.runtime.features import FeatureExtractor

ROUNDS = 60
PAUSE = 0.1  # seconds before each call: the threads of one runtime spin after a call and slow the next one down


def timed(base: Subject, bundle: Path, threads: int) -> tuple[dict[str, float], FeatureExtractor]:
    """Median milliseconds of the base model in PyTorch eager FP32 and of the bundle, called in turn with one image."""
    torch.set_num_threads(threads)
    model = load_model(base.place, checkpoint=base.checkpoint).eval()
    steps, image = model_preprocess(model), np.random.default_rng(0).integers(0, 256, (1, *NATIVE, 3), dtype=np.uint8)
    pixels, extractor = normalise(image, steps.mean, steps.std), FeatureExtractor.load(bundle, threads=threads)

    def eager() -> None:
        with torch.inference_mode():
            model.forward_features(pixels)

    calls = {"base": eager, "served": lambda: extractor.dense(image)}
    times: dict[str, list[float]] = {name: [] for name in calls}
    for i in range(ROUNDS):
        for name, call in calls.items():
            time.sleep(PAUSE)
            before = time.perf_counter()
            call()
            if i > 2:
                times[name].append(1e3 * (time.perf_counter() - before))
    return {name: float(np.median(values)) for name, values in times.items()}, extractor


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for option in ("--data", "--checkpoint", "--bundle"):
        parser.add_argument(option, type=Path, required=True)
    for option in ("--base", "--student"):
        parser.add_argument(option, required=True)
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    base = Subject("base", args.base, args.checkpoint)
    milliseconds, extractor = timed(base, args.bundle, args.threads)
    drawn = json.loads((args.bundle / "calibration.json").read_text())["images"]
    calibrated = {digest for part in drawn.values() for digest in part["sha256"]}
    compared = Comparison(base, args.data, args.student, without=calibrated)
    report: dict[str, Any] = {
        "model": args.base,
        "processor": processor(),
        "eight_bit_instructions": eight_bits().names,
        "threads": args.threads,
        "backend": f"{extractor.backend}, {extractor.compute} around 8 bits",
        "choice": extractor.choice,
        "photographs": len(compared.photographs),
        "torch": torch.__version__,
    }
    subjects = {"base": base, "served": Subject("served", str(args.bundle), backend=extractor.backend)}
    measured = {name: compared.row(subject, base=name == "base") for name, subject in subjects.items()}
    parameters = sum(p.numel() for p in load_model(args.base, checkpoint=args.checkpoint).parameters())
    sizes = {"base": 4 * parameters, "served": (args.bundle / "model.onnx").stat().st_size}  # bytes
    for name, (row, parts) in measured.items():
        report[name] = {
            "ms": milliseconds[name],
            "megabytes": sizes[name] / 1e6,
            **row,
            **intervals([parts], measured["base"][1]),
        }
    print(json.dumps(report, indent=1))  # noqa: T201
    if args.json:
        args.json.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
