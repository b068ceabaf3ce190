r"""Compare INT8 with FP32 on a processor without 8-bit dot products, emulated or forced.

    python benchmarks/int8_without_vnni.py --data DIR --student FOLDER \
        --model NAME=FP32-BUNDLE=INT8-BUNDLE ... --json OUT

ONNX Runtime runs on QEMU's model of a Haswell (AVX2, no VNNI; Debian's package qemu-user), where times mean nothing.
OpenVINO runs on this processor with ONEDNN_MAX_CPU_ISA=AVX2, where times are those of its AVX2 kernels. The
photographs are the first 24 that the student's record names as held out. ZEN3 holds rows measured on a real processor
of this kind.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import click
import numpy as np
from subjects import held_out

from phreg_deploy.artifacts.measures import cosine
from phreg_deploy.bundle.bundle import Bundle
from phreg_deploy.profiling.latency import processor

COUNT = 24
# 2 cores of an AMD Zen 3 (AVX2, no VNNI), onnxruntime 1.32.0, openvino 2026.4.1, ViT-Tiny base model, every linear
# layer in 8 bits, 50 photographs: figures of the report that named the defect.
ZEN3 = [
    ("ONNX Runtime, default kernels", 0.9877, 0.9494, 27.7),
    ("ONNX Runtime, session.x64quantprecision (ours)", 0.9938, 0.9703, 28.9),
    ("OpenVINO, default kernels", 0.9876, 0.9487, 42.2),
    ("ONNX Runtime, FP32", None, None, 30.0),
    ("OpenVINO, FP32", None, None, 33.7),
]
RUN = """
import sys, time, numpy as np
kind, bundle, images, out = sys.argv[1:5]
images = np.load(images)
if kind.startswith("ort"):
    import onnxruntime
    options = onnxruntime.SessionOptions()
    options.log_severity_level, options.intra_op_num_threads = 3, 2
    if kind == "ort-exact":
        options.add_session_config_entry("session.x64quantprecision", "1")
    session = onnxruntime.InferenceSession(bundle + "/model.onnx", options, providers=["CPUExecutionProvider"])
    run = lambda image: session.run(["features"], {"image": image})[0]
else:
    import openvino
    from phreg_deploy.runtime.backends.openvino_exact import fold_weights
    core = openvino.Core()
    model = core.read_model(bundle + "/model.onnx")
    if kind == "openvino-exact":
        fold_weights(model)
    compiled = core.compile_model(model, "CPU", {"INFERENCE_PRECISION_HINT": "f32", "INFERENCE_NUM_THREADS": 2})
    index = next(i for i, output in enumerate(compiled.outputs) if "features" in output.get_names())
    run = lambda image: compiled({"image": image})[index]
features, times = [], []
for image in images:
    before = time.perf_counter()
    features.append(np.array(run(image[None]))[0])
    times.append(time.perf_counter() - before)
np.save(out, np.stack(features))
print(1e3 * float(np.median(times[2:])))
"""


def run(kind: str, bundle: str, images: Path, prefix: tuple[str, ...] = (), **more: str) -> tuple[np.ndarray, float]:
    """Features of a bundle and median milliseconds, from a process behind ``prefix`` with ``more`` environment."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "features.npy"
        command = [*prefix, sys.executable, "-c", RUN, kind, bundle, str(images), str(out)]
        done = subprocess.run(command, env={**os.environ, **more}, capture_output=True, text=True, check=True)
        return np.load(out), float(done.stdout.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--student", required=True)
    parser.add_argument("--model", action="append", required=True, metavar="NAME=FP32-BUNDLE=INT8-BUNDLE")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    haswell, forced = ("qemu-x86_64", "-cpu", "Haswell"), {"ONEDNN_MAX_CPU_ISA": "AVX2"}
    emulated, here = "QEMU's Haswell", f"{processor()}, oneDNN held to AVX2"
    rows: list[dict[str, Any]] = [
        {"what": what, "model": "ViT-Tiny, base", "mean": mean, "p1": p1, "ms": ms, "where": "AMD Zen 3, 2 cores"}
        for what, mean, p1, ms in ZEN3
    ]
    for entry in args.model:
        name, full, eight = entry.split("=")
        manifest = Bundle.read(full).manifest
        _, unseen = held_out(
            args.data / "distil_imagenet1000", manifest.sizes.default, manifest.preprocess, args.student
        )
        with tempfile.TemporaryDirectory() as folder:
            images = Path(folder) / "images.npy"
            np.save(images, unseen.batch(0, COUNT))
            expected, _ = run("ort", full, images)
            for what, kind, bundle, prefix, more, where in (
                ("ONNX Runtime, this processor's own kernels", "ort-exact", eight, (), {}, processor()),
                ("ONNX Runtime, default kernels", "ort", eight, haswell, {}, emulated),
                ("ONNX Runtime, session.x64quantprecision (ours)", "ort-exact", eight, haswell, {}, emulated),
                ("OpenVINO, default kernels", "openvino", eight, (), forced, here),
                ("OpenVINO, weights folded into float32 (ours)", "openvino-exact", eight, (), forced, here),
                ("OpenVINO, FP32", "openvino", full, (), forced, here),
            ):
                features, ms = run(kind, bundle, images, prefix, **more)
                values = cosine(features, expected)
                row = {
                    "what": what,
                    "model": name,
                    "mean": float(values.mean()),
                    "p1": float(np.quantile(values, 0.01)),
                }
                rows.append({**row, "ms": None if prefix else ms, "where": where, "photographs": COUNT})
                click.echo(json.dumps(rows[-1]))
    if args.json:
        args.json.write_text(json.dumps({"rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
