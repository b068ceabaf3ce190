r"""Compare speed and INT8 fidelity with the tools that a user would try, all in one run.

    python benchmarks/peers.py --photographs DIR --base NAME --checkpoint FILE --student FOLDER \
        --json OUT [--seconds 1.5]

Fidelity is 1 - cosine of patch tokens with the model's own FP32 in PyTorch, of the base model and the student. 256
photographs give the ranges (ours chooses on 32 more); the student was trained on all of them. At most 96 are scored:
those that its record names as held out. Speed is milliseconds at batch 1, medians of interleaved rounds. A pause
stands before each call, because the threads of one runtime spin for a while and slow the next one down. Peers get
normalised pixels; ours normalises. Needs the extras ``bench``, ``export``, ``calibration`` and ``openvino``.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import time
import warnings
from pathlib import Path
from typing import Any

import click
import numpy as np
import onnxruntime
import openvino
import torch
from peer_models import Peers, Run, quick_int8
from subjects import held_out

from phreg_deploy.calibration import calibrate
from phreg_deploy.export.exporter import ExportRequest, export_bundle
from phreg_deploy.images.photographs import Photographs, read_photographs
from phreg_deploy.models.batches import spread
from phreg_deploy.models.loading import load_model, model_preprocess
from phreg_deploy.profiling.latency import processor
from phreg_deploy.progress import Progress
from phreg_deploy.runtime.parity import ParityAccumulator

SPEED = (
    ("vit_small_patch14_reg4_dinov2", 224),
    ("vit_base_patch14_reg4_dinov2", 224),
    ("vit_small_patch14_reg4_dinov2", 518),
)
ALPHAS = (0.8, 0.65, 0.5)  # of NNCF's SmoothQuant, beside its default
FLOAT_SHARES = (("every linear layer", 0.0), ("1 % float", 0.01), ("10 % float", 0.1))
RANGED, POOL, SCORED = 256, 352, 96  # photographs for ranges; to calibrate and choose on; to score
PAUSE, WARM, ROUNDS = 0.1, 3, 7  # seconds before a call; calls before timing; least rounds


def time_calls(runs: dict[str, Run], image: np.ndarray, seconds: float) -> dict[str, float]:
    """Median milliseconds of each call, taken in turn; ``seconds`` of timing for each."""
    times: dict[str, list[float]] = {name: [] for name in runs}
    for run in runs.values():
        for _ in range(WARM):
            run(image)
    started = time.perf_counter()
    while time.perf_counter() - started < seconds * len(times) or len(next(iter(times.values()))) < ROUNDS:
        for name, run in runs.items():
            time.sleep(PAUSE)
            before = time.perf_counter()
            run(image)
            times[name].append(1e3 * (time.perf_counter() - before))
    return {name: float(np.median(values)) for name, values in times.items()}


def score_calls(runs: dict[str, Run], images: list[np.ndarray]) -> dict[str, dict[str, float]]:
    """Parity of each call with PyTorch eager FP32: 1 - mean and 1 - 1st percentile of the cosine, neighbours."""
    expected = [runs["PyTorch eager FP32"](image) for image in images]
    scores = {}
    for name, run in runs.items():
        accumulator = ParityAccumulator()
        for image, reference in zip(images, expected):
            accumulator.add(as_outputs(run(image)), as_outputs(reference))
        parity = accumulator.parity()
        scores[name] = {"mean": 1 - parity.cosine_mean, "p1": 1 - parity.cosine_p1, "neighbours": parity.neighbours}
    return scores


def as_outputs(tokens: np.ndarray) -> dict[str, np.ndarray]:
    """Patch tokens ``(1, N, C)`` under the names of a bundle's outputs."""
    return {"features": tokens[:, None], "token_norm": np.linalg.norm(tokens, axis=-1)}


def show(title: str, speed: dict[str, float], fidelity: dict[str, dict[str, float]], failed: dict[str, str]) -> None:
    eager = speed.get("PyTorch eager FP32")
    click.echo(f"\n{title}\n{'':52s}{'ms':>9s}{'x eager':>9s}{'1-mean':>10s}{'1-p1':>10s}{'neighb.':>9s}")
    for name in dict.fromkeys([*speed, *fidelity]):
        own, ms = fidelity.get(name), speed.get(name)
        figures = "".join(f"{own[k]:10.5f}" for k in ("mean", "p1")) + f"{own['neighbours']:9.3f}" if own else ""
        click.echo(f"{name:52s}" + (f"{ms:9.1f}{eager / ms:9.2f}" if ms and eager else " " * 18) + figures)
    for name, reason in failed.items():
        click.echo(f"{name:52s} failed: {reason}")


def link_photographs(photographs: Photographs, source: Path, folder: Path) -> Path:
    """A folder of links to the photographs to calibrate on, which our ``calibrate`` splits itself."""
    folder.mkdir()
    for name in photographs.names:
        (folder / Path(name).name).symlink_to((source / name).resolve())
    return folder


def measure_fidelity(title: str, name: str, checkpoint: Path | None, args: argparse.Namespace) -> dict[str, Any]:
    """Fidelity and milliseconds of every INT8 configuration of a real model."""
    source = Path(args.photographs)
    with tempfile.TemporaryDirectory() as scratch:
        folder, model = Path(scratch), load_model(name, checkpoint=checkpoint)
        bundle = folder / "fp32.bundle"
        export_bundle(ExportRequest(model=name, checkpoint=checkpoint), bundle)
        size = tuple(model.patch_embed.img_size)
        trained, unseen = held_out(source, size, model_preprocess(model), args.student)
        pool = spread(trained, POOL)
        images = [unseen.array(i)[None] for i in range(min(SCORED, len(unseen)))]
        ranged = [pool.array(int(i))[None] for i in np.random.default_rng(0).permutation(len(pool))[:RANGED]]
        photographs, graphs = link_photographs(pool, source, folder / "photographs"), {}
        for kind, share in FLOAT_SHARES:
            output = folder / f"int8-{share}.bundle"
            calibrate(bundle, photographs, output, float_macs=share, force=True, progress=Progress(quiet=True))
            graphs[kind] = output / "model.onnx"
        click.echo(title)
        peers = Peers(model, bundle, ranged, args.threads, folder)
        peers.build(graphs, speed=False, alphas=ALPHAS)
        fidelity = score_calls(peers.runs, images)
        speed = time_calls(peers.runs, peers.images[0], args.seconds)
    show(title, speed, fidelity, peers.failed)
    return {"ms": speed, "fidelity": fidelity, "failed": peers.failed}


def measure_speed(title: str, name: str, side: int, args: argparse.Namespace) -> dict[str, Any]:
    """Milliseconds of every configuration of a model with random weights."""
    with tempfile.TemporaryDirectory() as scratch:
        folder, size = Path(scratch), (side, side)
        click.echo(title)
        model = load_model(name, random_weights=True, image_size=size)
        bundle = folder / "fp32.bundle"
        export_bundle(ExportRequest(model=name, image_size=str(side), random_weights=True), bundle)
        photographs = read_photographs(args.photographs, size, model_preprocess(model), 4)
        images = [photographs.array(i)[None] for i in range(4)]
        peers = Peers(model, bundle, images, args.threads, folder)
        peers.build({"every linear layer": quick_int8(bundle, images, folder)}, speed=True, alphas=())
        speed = time_calls(peers.runs, images[0], args.seconds)
    show(title, speed, {}, peers.failed)
    return {"ms": speed, "failed": peers.failed}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for option in ("--photographs", "--base", "--checkpoint", "--student"):
        parser.add_argument(option, required=True)
    parser.add_argument("--int8-aware", help="Folder of a student that was distilled with --int8-aware.")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--seconds", type=float, default=1.5, help="Of timing, per configuration and model.")
    parser.add_argument("--only", choices=["fidelity", "speed"])
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    warnings.simplefilter("ignore")
    real = {"base": (args.base, Path(args.checkpoint)), "student": (args.student, None)}
    if args.int8_aware:
        real["int8-aware student"] = (args.int8_aware, None)
    models: dict[str, Any] = {}
    if args.only != "speed":
        models |= {title: measure_fidelity(title, *model, args) for title, model in real.items()}
    if args.only != "fidelity":
        models |= {f"{name} {side}": measure_speed(f"{name} {side}", name, side, args) for name, side in SPEED}
    conditions = {
        "processor": processor(),
        "threads": args.threads,
        "torch": torch.__version__,
        "onnxruntime": onnxruntime.__version__,
        "openvino": openvino.__version__,
    }
    if args.json:
        args.json.write_text(json.dumps({"conditions": conditions, "models": models}, indent=1) + "\n")


if __name__ == "__main__":
    main()
