"""Measure the worst parity of sound bundles by precision, which the bars of ``bundle/gates.py`` leave a margin to.

    python benchmarks/gates.py --data DIR --bundles DIR --json OUT

``--bundles`` holds MODEL.bundle (fp32), MODEL-fp16, -bf16, -518 (480x640) and -def8.bundle (``calibrate``, defaults)
of real models. Each is compared with its own exam and, on photographs, with the FP32 bundle, on every backend that
loads it.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import click
import numpy as np

from phreg_deploy.bundle.gates import AT_LEAST, GATES, exam_bars
from phreg_deploy.errors import PhregError
from phreg_deploy.images.photographs import read_photographs
from phreg_deploy.profiling.latency import processor
from phreg_deploy.runtime.features import FeatureExtractor
from phreg_deploy.runtime.parity import Parity, ParityAccumulator, run_exam, worst, writes_exams

OPENED = (("onnxruntime-cpu", "auto"), ("openvino", "fp32"), ("openvino", "bf16"))
COUNTS = {"camvid_train": 48, "distil_imagenet1000": 64}


def on_photographs(extractor: FeatureExtractor, full: FeatureExtractor, data: Path) -> Parity:
    """Compare a bundle with the FP32 bundle ``full`` on photographs of both data sets."""
    parity, size = ParityAccumulator(), full.manifest.sizes.default
    for name, count in COUNTS.items():
        photographs = read_photographs(data / name, size, full.manifest.preprocess, count, spread=True)
        for i in range(len(photographs)):
            image = photographs.batch(i, i + 1)
            outputs = {key: value.astype(np.float32) for key, value in extractor.run(image).items()}
            parity.add(outputs, full.run(image))
    return parity.parity()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for option in ("--data", "--bundles"):
        parser.add_argument(option, type=Path, required=True)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    rows: list[dict[str, Any]] = []
    for path in sorted(args.bundles.glob("*-*.bundle")) + sorted(args.bundles.glob("*[!8].bundle")):
        for backend, compute in OPENED:
            try:
                extractor = FeatureExtractor.load(path, backend, compute=compute, threads=2)
            except PhregError as error:
                click.echo(f"{path.name} {backend} {compute}: {error}")
                continue
            full = path.parent / f"{path.stem.split('-')[0]}.bundle"
            with extractor, FeatureExtractor.load(full, "onnxruntime-cpu", threads=2) as other:
                exam = worst([case.parity for case in run_exam(extractor.bundle, extractor.run)])
                by_kind = {"exam, own runtime" if writes_exams(extractor.manifest, extractor.backend) else "exam": exam}
                if extractor.manifest.sizes == other.manifest.sizes and path != full:
                    by_kind["photographs"] = on_photographs(extractor, other, args.data)
                for kind, parity in by_kind.items():
                    row = {
                        "bundle": path.name,
                        "backend": backend,
                        "compute": compute,
                        "precision": extractor.precision,
                        "on": kind,
                    }
                    rows.append({**row, **parity.to_json()})
                    click.echo(json.dumps(rows[-1]))
    worst_of: dict[str, dict[str, dict[str, float]]] = {}
    bars: dict[str, dict[str, dict[str, float]]] = {}
    for row in rows:
        precision, kind = row["precision"], row["on"]
        own = GATES[precision] if kind == "photographs" else exam_bars(precision, kind.endswith("runtime"))
        bars.setdefault(precision, {})[kind] = own
        figures = worst_of.setdefault(precision, {}).setdefault(kind, {})
        for name in own:
            pick = min if name in AT_LEAST else max
            figures[name] = pick(figures.get(name, row[name]), row[name])
    if args.json:
        document = {"processor": processor(), "photographs": COUNTS, "worst": worst_of, "bars": bars, "rows": rows}
        args.json.write_text(json.dumps(document, indent=1) + "\n")


if __name__ == "__main__":
    main()
