"""Build the graphs and calls that peers.py compares: PyTorch, ONNX Runtime, OpenVINO, NNCF and ours, of one model."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import numpy as np
import onnx
import onnxruntime
import openvino
import torch

from phreg_deploy.bundle.bundle import Bundle
from phreg_deploy.calibration.qdq import write_int8
from phreg_deploy.calibration.ranges import observe_ranges
from phreg_deploy.calibration.smoothing import equalise
from phreg_deploy.models import hooks
from phreg_deploy.models.loading import model_preprocess
from phreg_deploy.onnx_graph.linears import find_linears
from phreg_deploy.onnx_graph.wiring import Wiring
from phreg_deploy.quantisation import Smoothing
from phreg_deploy.runtime.features import FeatureExtractor

Run = Callable[[np.ndarray], np.ndarray]  # uint8 (1, H, W, 3) -> patch tokens (1, N, C)
NNCF_ALPHA = 0.95  # NNCF's own default of SmoothQuant


class Stock(torch.nn.Module):
    """The graph that a user would export: timm's own forward from normalised pixels to patch tokens."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        return self.model.forward_features(image)[:, self.model.num_prefix_tokens :]


class Peers:
    """Every configuration of one model, as calls by name in ``runs``; ``failed`` has the errors of the others."""

    def __init__(self, model: Any, bundle: Path, images: list[np.ndarray], threads: int, folder: Path) -> None:
        self.model, self.bundle, self.threads, self.folder = model.eval(), bundle, threads, folder
        self.preprocess = model_preprocess(model)
        self.images, self.ready = images, {}
        self.pixels = [self.normalise(image) for image in images]
        # Peers are not timed on normalising: the pixels of these images are ready.
        self.ready = {id(image): pixels for image, pixels in zip(images, self.pixels)}
        self.runs: dict[str, Run] = {}
        self.failed: dict[str, str] = {}

    def normalise(self, image: np.ndarray) -> np.ndarray:
        if id(image) in self.ready:
            return self.ready[id(image)]
        return hooks.normalise(image, self.preprocess.mean, self.preprocess.std).numpy()

    def add(self, name: str, make: Callable[[], Run]) -> None:
        started = time.perf_counter()
        try:
            run = make()
            run(self.images[0])
            self.runs[name] = run
        except Exception as error:
            # A peer that fails is a row of the table, not the end of the run.
            first_line = (str(error).splitlines() or [""])[0]
            self.failed[name] = f"{type(error).__name__}: {first_line}"[:200]
        click.echo(f"  {name}: {self.failed.get(name, 'ready')} ({time.perf_counter() - started:.0f} s)")

    def torch(self, compiled: bool, half: bool) -> Run:
        stock: Any = Stock(self.model)
        if compiled:
            torch._dynamo.reset()
            stock = torch.compile(stock)

        def run(image: np.ndarray) -> np.ndarray:
            with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16, enabled=half):
                return stock(torch.from_numpy(self.normalise(image))).float().numpy()

        return run

    def ort(self, path: Path, ours: bool = False) -> Run:
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads, options.log_severity_level = self.threads, 3
        # Spinning threads make the next runtime up to 1.5 times slower.
        options.add_session_config_entry("session.force_spinning_stop", "1")
        session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        name = session.get_inputs()[0].name

        def run(image: np.ndarray) -> np.ndarray:
            tokens = session.run(None, {name: image if ours else self.normalise(image)})[0]
            return tokens.reshape(1, -1, self.model.embed_dim)

        return run

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

    def stock_graph(self) -> Path:
        path = self.folder / "stock.onnx"
        torch.onnx.export(
            Stock(self.model),
            (torch.from_numpy(self.pixels[0]),),
            path,
            input_names=["image"],
            dynamo=True,
            external_data=False,
            verbose=False,
        )
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
            model,
            nncf.Dataset(self.pixels, lambda pixels: {"image": pixels}),
            model_type=nncf.ModelType.TRANSFORMER,
            preset=nncf.QuantizationPreset.MIXED,
            subset_size=len(self.pixels),
            advanced_parameters=nncf.AdvancedQuantizationParameters(smooth_quant_alphas=smooth),
        )

    def nncf_onnx(self, stock: Path) -> Path:
        path = self.folder / "nncf.onnx"
        onnx.save(self.nncf(onnx.load(stock), NNCF_ALPHA), path)
        return path

    def nncf_openvino(self, stock: Path, alpha: float) -> Any:
        return self.nncf(openvino.Core().read_model(stock), alpha)

    def build(self, int8: dict[str, Path], speed: bool, alphas: tuple[float, ...]) -> None:
        """Build every configuration; with ``speed`` also those in FP32 and bfloat16. ``int8``: our graphs by name."""
        self.add("PyTorch eager FP32", lambda: self.torch(False, False))
        if speed:
            self.add("PyTorch eager bf16", lambda: self.torch(False, True))
            self.add("torch.compile FP32", lambda: self.torch(True, False))
            self.add("torch.compile bf16", lambda: self.torch(True, True))
        stock = self.stock_graph()
        if speed:
            self.build_floats(stock)
        self.build_quantised(stock, speed, alphas)
        for name, path in int8.items():
            self.add(f"ours ORT INT8, {name}", lambda path=path: self.ort(path, True))
            self.add(f"ours OpenVINO INT8, {name}", lambda path=path: self.openvino(path, "f32", True))
            self.add(f"ours OpenVINO INT8, {name}, bf16 rest", lambda path=path: self.openvino(path, "bf16", True))

    def build_floats(self, stock: Path) -> None:
        self.add("ORT FP32, stock export", lambda: self.ort(stock))
        self.add("OpenVINO FP32, stock export", lambda: self.openvino(stock, "f32"))
        self.add("OpenVINO bf16, stock export", lambda: self.openvino(stock, "bf16"))
        graph = Bundle.read(self.bundle).graph
        self.add("ours ORT FP32", lambda: self.ort(graph, True))
        self.add("ours OpenVINO FP32", lambda: self.openvino(graph, "f32", True))
        self.add("ours OpenVINO bf16", lambda: self.openvino(graph, "bf16", True))

    def build_quantised(self, stock: Path, speed: bool, alphas: tuple[float, ...]) -> None:
        self.add("ORT quantize_static, defaults", lambda: self.ort(self.static(stock, False)))
        self.add("ORT quantize_static, MatMul only, per channel", lambda: self.ort(self.static(stock, True)))
        self.add("ORT quantize_dynamic", lambda: self.ort(self.dynamic(stock)))
        self.add("NNCF on ONNX, ORT", lambda: self.ort(self.nncf_onnx(stock)))
        for alpha in (NNCF_ALPHA, *alphas):
            name = "NNCF on OpenVINO" + (", default" if alpha == NNCF_ALPHA else f", alpha {alpha}")
            self.add(name, lambda alpha=alpha: self.openvino(self.nncf_openvino(stock, alpha), "f32"))
        if speed:
            name = "NNCF on OpenVINO, default, bf16 rest"
            self.add(name, lambda: self.openvino(self.nncf_openvino(stock, NNCF_ALPHA), "bf16"))


def quick_int8(bundle: Path, images: list[np.ndarray], folder: Path) -> Path:
    """An INT8 graph without search over smoothing and layers, for timing."""
    with FeatureExtractor.load(bundle, "onnxruntime-cpu") as extractor:
        model = onnx.load(extractor.bundle.graph)
        linears = find_linears(model)
        ranges = observe_ranges(
            model, linears, extractor.spec, [(extractor.feed(i), 1) for i in images], lambda _n: None
        )
    path = folder / "int8.onnx"
    onnx.save(write_int8(model, linears, equalise(Wiring(model), linears, ranges, Smoothing()), set(), "cpu"), path)
    return path
