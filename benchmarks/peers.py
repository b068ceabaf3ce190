"""Speed and INT8 fidelity beside the peers that a user would try: one run, every configuration in turn.

    python benchmarks/peers.py --photographs DIR --base NAME --checkpoint FILE --student FOLDER --json OUT [--seconds 1.5]

Fidelity: base model and student, 256 photographs for ranges (ours chooses on 32 more), all of which the student was trained
on, and at most 96 to score that its record names as held out: 1 - cosine of patch tokens with the model's own FP32 in PyTorch. Speed: batch 1, milliseconds, medians of interleaved rounds with a pause
before each call, since the threads of one runtime spin for a while and would slow the next one down. Peers get normalised
pixels, ours normalises. Needs the extras ``bench``, ``export``, ``calibration``, ``openvino``.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import numpy as np
import onnx
import onnxruntime
import openvino
import torch
from subjects import held_out

from phreg_deploy.bundle.bundle import Bundle
from phreg_deploy.calibration import calibrate
from phreg_deploy.calibration.qdq import write_int8
from phreg_deploy.calibration.ranges import observe_ranges
from phreg_deploy.calibration.smoothing import equalise
from phreg_deploy.export.exporter import ExportRequest, export_bundle
from phreg_deploy.images.photographs import read_photographs
from phreg_deploy.models import hooks
from phreg_deploy.models.batches import spread
from phreg_deploy.models.loading import load_model, model_preprocess
from phreg_deploy.onnx_graph.linears import find_linears
from phreg_deploy.onnx_graph.wiring import Wiring
from phreg_deploy.profiling.latency import processor
from phreg_deploy.quantisation import Smoothing
from phreg_deploy.runtime.features import FeatureExtractor
from phreg_deploy.runtime.parity import ParityAccumulator

Run = Callable[[np.ndarray], np.ndarray]  # uint8 (1, H, W, 3) -> patch tokens (1, N, C)
SPEED = (
    ("vit_small_patch14_reg4_dinov2", 224),
    ("vit_base_patch14_reg4_dinov2", 224),
    ("vit_small_patch14_reg4_dinov2", 518),
)
ALPHAS = (0.8, 0.65, 0.5)  # NNCF's own default is 0.95
POOL, SCORED = 352, 96  # photographs to calibrate and choose on, and others to score
PAUSE, WARM, ROUNDS = 0.1, 3, 7


class Stock(torch.nn.Module):
    """What a user would export: timm's own forward on normalised pixels, patch tokens out."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        return self.model.forward_features(image)[:, self.model.num_prefix_tokens :]


class Peers:
    """Every configuration of one model. ``make`` builds them; one that cannot be built is named with the reason."""

    def __init__(self, model: Any, bundle: Path, images: list[np.ndarray], threads: int, folder: Path) -> None:
        self.model, self.bundle, self.threads, self.folder = model.eval(), bundle, threads, folder
        self.preprocess = model_preprocess(model)
        self.images = images
        self.pixels = [self.normalise(image) for image in images]
        self.ready = {
            id(image): pixels for image, pixels in zip(images, self.pixels)
        }  # peers are not timed on normalising
        self.runs: dict[str, Run] = {}
        self.failed: dict[str, str] = {}

    def normalise(self, image: np.ndarray) -> np.ndarray:
        if id(image) in getattr(self, "ready", {}):
            return self.ready[id(image)]
        return hooks.normalise(image, self.preprocess.mean, self.preprocess.std).numpy()

    def add(self, name: str, make: Callable[[], Run]) -> None:
        started = time.perf_counter()
        try:
            run = make()
            run(self.images[0])
            self.runs[name] = run
        except Exception as error:  # a peer that fails is a row of the table, not the end of the run
            self.failed[name] = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"[:200]
        click.echo(f"  {name}: {self.failed.get(name, 'ready')} ({time.perf_counter() - started:.0f} s)")

    # PyTorch ---------------------------------------------------------------------------------------------------------

    def torch(self, compiled: bool, half: bool) -> Run:
        stock: Any = Stock(self.model)
        if compiled:
            torch._dynamo.reset()
            stock = torch.compile(stock)

        def run(image: np.ndarray) -> np.ndarray:
            with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16, enabled=half):
                return stock(torch.from_numpy(self.normalise(image))).float().numpy()

        return run

    # sessions --------------------------------------------------------------------------------------------------------

    def ort(self, path: Path, ours: bool = False) -> Run:
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads, options.log_severity_level = self.threads, 3
        options.add_session_config_entry(
            "session.force_spinning_stop", "1"
        )  # or the next one in turn is up to 1.5 times slower
        session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        name = session.get_inputs()[0].name
        return lambda image: session.run(None, {name: image if ours else self.normalise(image)})[0].reshape(
            1, -1, self.model.embed_dim
        )

    def openvino(self, model: Any, precision: str, ours: bool = False) -> Run:
        core = openvino.Core()
        model = core.read_model(model) if isinstance(model, Path) else model
        options = {
            "INFERENCE_PRECISION_HINT": precision,
            "INFERENCE_NUM_THREADS": self.threads,
            "PERFORMANCE_HINT": "LATENCY",
        }
        request = core.compile_model(model, "CPU", options).create_infer_request()

        def run(image: np.ndarray) -> np.ndarray:
            return request.infer([image if ours else self.normalise(image)])[0].reshape(1, -1, self.model.embed_dim)

        return run

    # peers' quantization ---------------------------------------------------------------------------------------------

    def stock_graph(self) -> Path:
        path = self.folder / "stock.onnx"
        torch.onnx.export(
            Stock(self.model), (torch.from_numpy(self.pixels[0]),), path, input_names=["image"], dynamo=True, external_data=False, verbose=False
        )  # fmt: skip
        return path

    def static(self, stock: Path, matmul_only: bool) -> Path:
        from onnxruntime.quantization import CalibrationDataReader, quantize_static
        from onnxruntime.quantization.shape_inference import quant_pre_process

        class Reader(CalibrationDataReader):
            def __init__(self, pixels: list[np.ndarray]) -> None:
                self.left = iter(pixels)

            def get_next(self) -> Any:
                return next(({"image": p} for p in self.left), None)

        ready, path = self.folder / "ready.onnx", self.folder / f"static{int(matmul_only)}.onnx"
        quant_pre_process(str(stock), str(ready))
        more = {"op_types_to_quantize": ["MatMul"], "per_channel": True} if matmul_only else {}
        quantize_static(str(ready), str(path), Reader(self.pixels), **more)
        return path

    def dynamic(self, stock: Path) -> Path:
        from onnxruntime.quantization import quantize_dynamic

        path = self.folder / "dynamic.onnx"
        quantize_dynamic(str(stock), str(path), per_channel=True)
        return path

    def nncf(self, model: Any, alpha: float) -> Any:
        import nncf

        logging.getLogger("nncf").setLevel(logging.ERROR)
        smooth = nncf.AdvancedSmoothQuantParameters(matmul=alpha)
        return nncf.quantize(
            model, nncf.Dataset(self.pixels, lambda pixels: {"image": pixels}), model_type=nncf.ModelType.TRANSFORMER,
            preset=nncf.QuantizationPreset.MIXED, subset_size=len(self.pixels),
            advanced_parameters=nncf.AdvancedQuantizationParameters(smooth_quant_alphas=smooth),
        )  # fmt: skip

    def nncf_onnx(self, stock: Path) -> Path:
        path = self.folder / "nncf.onnx"
        onnx.save(self.nncf(onnx.load(stock), 0.95), path)
        return path

    # everything ------------------------------------------------------------------------------------------------------

    def make(self, eight: dict[str, Path], speed: bool, alphas: tuple[float, ...]) -> None:
        self.add("PyTorch eager FP32", lambda: self.torch(False, False))
        if speed:
            self.add("PyTorch eager bf16", lambda: self.torch(False, True))
            self.add("torch.compile FP32", lambda: self.torch(True, False))
            self.add("torch.compile bf16", lambda: self.torch(True, True))
        stock = self.stock_graph()
        if speed:
            self.add("ORT FP32, stock export", lambda: self.ort(stock))
            self.add("OpenVINO FP32, stock export", lambda: self.openvino(stock, "f32"))
            self.add("OpenVINO bf16, stock export", lambda: self.openvino(stock, "bf16"))
            graph = Bundle.read(self.bundle).graph
            self.add("ours ORT FP32", lambda: self.ort(graph, True))
            self.add("ours OpenVINO FP32", lambda: self.openvino(graph, "f32", True))
            self.add("ours OpenVINO bf16", lambda: self.openvino(graph, "bf16", True))
        self.add("ORT quantize_static, defaults", lambda: self.ort(self.static(stock, False)))
        self.add("ORT quantize_static, MatMul only, per channel", lambda: self.ort(self.static(stock, True)))
        self.add("ORT quantize_dynamic", lambda: self.ort(self.dynamic(stock)))
        self.add("NNCF on ONNX, ORT", lambda: self.ort(self.nncf_onnx(stock)))
        for alpha in (0.95, *alphas):
            name = "NNCF on OpenVINO" + (", default" if alpha == 0.95 else f", alpha {alpha}")
            self.add(
                name, lambda alpha=alpha: self.openvino(self.nncf(openvino.Core().read_model(stock), alpha), "f32")
            )
        if speed:
            self.add(
                "NNCF on OpenVINO, default, bf16 rest",
                lambda: self.openvino(self.nncf(openvino.Core().read_model(stock), 0.95), "bf16"),
            )
        for name, path in eight.items():
            self.add(f"ours ORT INT8, {name}", lambda path=path: self.ort(path, True))
            self.add(f"ours OpenVINO INT8, {name}", lambda path=path: self.openvino(path, "f32", True))
            self.add(f"ours OpenVINO INT8, {name}, bf16 rest", lambda path=path: self.openvino(path, "bf16", True))

    def timed(self, seconds: float) -> dict[str, float]:
        times: dict[str, list[float]] = {name: [] for name in self.runs}
        for run in self.runs.values():
            for _ in range(WARM):
                run(self.images[0])
        started = time.perf_counter()
        while time.perf_counter() - started < seconds * len(times) or len(next(iter(times.values()))) < ROUNDS:
            for name, run in self.runs.items():
                time.sleep(PAUSE)
                before = time.perf_counter()
                run(self.images[0])
                times[name].append(1e3 * (time.perf_counter() - before))
        return {name: float(np.median(values)) for name, values in times.items()}

    def scored(self, images: list[np.ndarray]) -> dict[str, dict[str, float]]:
        reference = self.runs["PyTorch eager FP32"]
        expected = [reference(image) for image in images]
        found = {}
        for name, run in self.runs.items():
            tally = ParityAccumulator()
            for image, want in zip(images, expected):
                got = run(image)
                tally.add(*({"features": v[:, None], "token_norm": np.linalg.norm(v, axis=-1)} for v in (got, want)))
            parity = tally.parity()
            found[name] = {"mean": 1 - parity.cosine_mean, "p1": 1 - parity.cosine_p1, "neighbours": parity.neighbours}
        return found


def quick_int8(bundle: Path, images: list[np.ndarray], folder: Path) -> Path:
    """An INT8 graph without any search: what it runs at is what matters."""
    with FeatureExtractor.load(bundle, "onnxruntime-cpu") as extractor:
        model = onnx.load(extractor.bundle.graph)
        linears = find_linears(model)
        ranges = observe_ranges(
            model, linears, extractor.spec, [(extractor.feed(i), 1) for i in images], lambda _n: None
        )
    path = folder / "int8.onnx"
    onnx.save(write_int8(model, linears, equalise(Wiring(model), linears, ranges, Smoothing()), set(), "cpu"), path)
    return path


def show(title: str, speed: dict[str, float], fidelity: dict[str, dict[str, float]], failed: dict[str, str]) -> None:
    eager = speed.get("PyTorch eager FP32")
    click.echo(f"\n{title}\n{'':52s}{'ms':>9s}{'x eager':>9s}{'1-mean':>10s}{'1-p1':>10s}{'neighb.':>9s}")
    for name in dict.fromkeys([*speed, *fidelity]):
        own, ms = fidelity.get(name), speed.get(name)
        figures = "".join(f"{own[k]:10.5f}" for k in ("mean", "p1")) + f"{own['neighbours']:9.3f}" if own else ""
        click.echo(f"{name:52s}" + (f"{ms:9.1f}{eager / ms:9.2f}" if ms and eager else " " * 18) + figures)
    for name, reason in failed.items():
        click.echo(f"{name:52s} failed: {reason}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for option in ("--photographs", "--base", "--checkpoint", "--student"):
        parser.add_argument(option, required=True)
    parser.add_argument("--int8-aware", help="Folder of a student that was distilled with --int8-aware.")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--seconds", type=float, default=1.5, help="Of timing, per configuration and model.")
    parser.add_argument("--only", choices=["fidelity", "speed"])
    parser.add_argument("--json", type=Path)
    asked = parser.parse_args()
    torch.set_num_threads(asked.threads)
    warnings.simplefilter("ignore")
    report: dict[str, Any] = {
        "conditions": {"processor": processor(), "threads": asked.threads, "torch": torch.__version__, "onnxruntime": onnxruntime.__version__, "openvino": openvino.__version__},
        "models": {},
    }  # fmt: skip
    real = {"base": (asked.base, Path(asked.checkpoint)), "student": (asked.student, None)}
    if asked.int8_aware:
        real["int8-aware student"] = (asked.int8_aware, None)
    for title, (name, checkpoint) in real.items() if asked.only != "speed" else ():
        with tempfile.TemporaryDirectory() as scratch:
            folder, model = Path(scratch), load_model(name, checkpoint=checkpoint)
            bundle = folder / "fp32.bundle"
            export_bundle(ExportRequest(model=name, checkpoint=checkpoint), bundle)
            size = tuple(model.patch_embed.img_size)
            seen, unseen = held_out(Path(asked.photographs), size, model_preprocess(model), asked.student)
            drawn = spread(seen, POOL)
            scored = [unseen.array(i)[None] for i in range(min(SCORED, len(unseen)))]
            ranged = [drawn.array(int(i))[None] for i in np.random.default_rng(0).permutation(len(drawn))[:256]]
            pool = folder / "photographs"  # ours shares these out itself; the images that are scored are not among them
            pool.mkdir()
            for name_of in drawn.names:
                (pool / Path(name_of).name).symlink_to(Path(asked.photographs, name_of).resolve())
            eight = {}
            for kind, share in (("every linear layer", 0.0), ("1 % float", 0.01), ("10 % float", 0.1)):
                target = folder / f"int8-{share}.bundle"
                calibrate(bundle, pool, target, float_macs=share, force=True)
                eight[kind] = target / "model.onnx"
            click.echo(title)
            peers = Peers(model, bundle, ranged, asked.threads, folder)
            peers.make(eight, speed=False, alphas=ALPHAS)
            fidelity, speed = peers.scored(scored), peers.timed(asked.seconds)
            report["models"][title] = {"ms": speed, "fidelity": fidelity, "failed": peers.failed}
            show(title, speed, fidelity, peers.failed)
    for name, side in SPEED if asked.only != "fidelity" else ():
        with tempfile.TemporaryDirectory() as scratch:
            folder, title = Path(scratch), f"{name} {side}"
            click.echo(title)
            model = load_model(name, random_weights=True, image_size=(side, side))
            bundle = folder / "fp32.bundle"
            export_bundle(ExportRequest(model=name, image_size=str(side), random_weights=True), bundle)
            images = [
                read_photographs(asked.photographs, (side, side), model_preprocess(model), 4).array(i)[None]
                for i in range(4)
            ]
            peers = Peers(model, bundle, images, asked.threads, folder)
            peers.make({"every linear layer": quick_int8(bundle, images, folder)}, speed=True, alphas=())
            speed = peers.timed(asked.seconds)
            report["models"][title] = {"ms": speed, "failed": peers.failed}
            show(title, speed, {}, peers.failed)
    if asked.json:
        asked.json.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
