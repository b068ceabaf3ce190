"""Compare two calibrations of one bundle on the same photographs, on two kinds of processor.

phreg-deploy export phreg_deploy/demo/model -o demo.bundle
phreg-deploy calibrate demo.bundle --images DIR -o here.bundle
qemu-x86_64 -cpu Haswell .venv/bin/python -m phreg_deploy calibrate demo.bundle --images DIR -o haswell.bundle
python benchmarks/int8_choices.py here.bundle haswell.bundle --json benchmarks/int8_choices.json
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import numpy as np
import onnx

FIGURES = ("cosine_mean", "cosine_p1", "cosine_min", "relative_l2")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundles", nargs=2, type=Path)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    reports = [json.loads((folder / "calibration.json").read_text()) for folder in args.bundles]
    weights = [
        {i.name: onnx.numpy_helper.to_array(i) for i in onnx.load(folder / "model.onnx").graph.initializer}
        for folder in args.bundles
    ]
    names = [name for name in weights[0] if name.endswith(".int8")]
    differ = [weights[0][name].astype(int) - weights[1][name] for name in names]
    steps = [[layer["step"] for layer in report["layers"]] for report in reports]
    document = {
        "images": {name: part["count"] for name, part in reports[0]["images"].items()},
        "smoothing": [report["smoothing"] for report in reports],
        "float_layers": [report["float_layers"] for report in reports],
        "fidelity": {name: [report["fidelity"][name] for report in reports] for name in FIGURES},
        "weights": int(sum(d.size for d in differ)),
        "weights_that_differ": int(sum((d != 0).sum() for d in differ)),
        "largest_weight_difference": int(max(np.abs(d).max() for d in differ)),
        "largest_step_difference": float(max(abs(a / b - 1) for a, b in zip(*steps))),
    }
    text = json.dumps(document, indent=1)
    print(text)  # noqa: T201
    if args.json:
        args.json.write_text(text + "\n")


if __name__ == "__main__":
    main()
