"""Compare ways to resize frames on a GPU with Pillow: in grey levels, and in the features of real models.

    python -m benchmarks.gpu_images --images DIR --model vit_tiny_patch16_224=WEIGHTS --json OUT

No GPU has run it: the kernel is the CUDA source of ``runtime/gpu_images``, built by a C++ compiler for the processor,
and ONNX Resize is ONNX Runtime's on the processor. ``parsed``: whether NVIDIA's parser (TensorRT for RTX) takes the
graph, and what it says. Frames are the photographs, enlarged to 1080p. The reference is Pillow's input of the model;
for NV12 it is Pillow's input of the same frame in RGB, so that row holds what half the chroma costs.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import click
import cv2
import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper, numpy_helper
from PIL import Image

from benchmarks.subjects import Subject
from phreg_deploy.artifacts.measures import cosine
from phreg_deploy.images.fitting import fit_as
from phreg_deploy.images.nv12 import Nv12Frame
from phreg_deploy.images.photographs import fit, list_images, placement
from phreg_deploy.models.loading import load_model, model_preprocess
from phreg_deploy.runtime.gpu.cuda import Cuda
from phreg_deploy.runtime.gpu_images.fitter import GpuFitter
from phreg_deploy.spec import Preprocess
from tests import fake_gpu, nvidia

FRAME, SIZE, PATCH = (1080, 1920), (224, 224), (16, 16)
PARSE = """
import tensorrt as trt
builder = trt.Builder(trt.Logger(trt.Logger.INTERNAL_ERROR))
network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
parser = trt.OnnxParser(network, trt.Logger(trt.Logger.INTERNAL_ERROR))
done = parser.parse_from_file(given)
print(json.dumps([done, "; ".join(parser.get_error(i).desc() for i in range(parser.num_errors))]))
"""
Resize = Callable[[np.ndarray, Preprocess], np.ndarray]
GRAPHS = {
    "ONNX Resize, cubic, antialias": {"mode": "cubic", "antialias": 1},
    "ONNX Resize, cubic": {"mode": "cubic", "antialias": 0},
    "ONNX Resize, linear": {"mode": "linear", "antialias": 0},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=Path, required=True)
    parser.add_argument("--model", action="append", required=True, help="NAME=WEIGHTS")
    parser.add_argument("--count", type=int, default=101)
    parser.add_argument("--json", type=Path, required=True)
    args = parser.parse_args()
    paths = list_images(args.images, args.count, spread=True)
    document: dict[str, Any] = {"frames": len(paths), "frame": FRAME, "size": SIZE, "ran": "on the CPU", "models": {}}
    with pytest.MonkeyPatch.context() as patch, tempfile.TemporaryDirectory() as folder:
        device = fake_gpu.Device()
        fake_gpu.install(patch, device)
        graphs = {name: Path(folder) / f"{i}.onnx" for i, name in enumerate(GRAPHS)}
        for model in args.model:
            name, _, weights = model.partition("=")
            loaded = model_preprocess(load_model(name, checkpoint=Path(weights), image_size=SIZE))
            steps = replace(loaded, fast=False)
            answer = Subject(name, name, Path(weights)).at(SIZE)
            ways: dict[str, Resize] = {
                "our kernel": kernel(device),
                "our kernel, from NV12": kernel(device, nv12=True),
                "the host's fast resize": lambda frame, steps: fit(frame, SIZE, replace(steps, fast=True)),
            }
            for way, path in graphs.items():
                onnx.save(graph(steps, **GRAPHS[way]), path)
                ways[way] = session(path)
            rows: dict[str, list[list[np.ndarray]]] = {way: [] for way in ways}
            for path in paths:
                frame = np.asarray(Image.open(path).convert("RGB").resize(FRAME[::-1], Image.Resampling.BICUBIC))
                images = {way: resize(frame, steps) for way, resize in ways.items()}
                wanted = fit_as(frame, SIZE, steps, PATCH).image
                answers = answer(np.stack([wanted, *images.values()]))["patches"]
                for i, (way, image) in enumerate(images.items()):
                    levels = np.abs(image.astype(int) - wanted)
                    rows[way].append([levels.ravel(), cosine(answers[i + 1], answers[0]).ravel()])
            document["models"][name] = {way: figures(columns) for way, columns in rows.items()}
            click.echo(json.dumps(document["models"][name], indent=1))
        document["parsed"] = {way: nvidia.inside(nvidia.NEWEST, PARSE, str(p), rtx=True) for way, p in graphs.items()}
        assert device.undefined == []
    args.json.write_text(json.dumps(document, indent=1) + "\n")


def figures(columns: list[list[np.ndarray]]) -> dict[str, float]:
    """Grey levels to Pillow over all values, and the cosine of features over all patches."""
    levels, cosines = (np.concatenate(parts) for parts in zip(*columns))
    return {
        "levels_max": int(levels.max()),
        "levels_mean": float(levels.mean()),
        "cosine_p1": float(np.quantile(cosines, 0.01)),
        "cosine_mean": float(cosines.mean()),
    }


def kernel(device: fake_gpu.Device, nv12: bool = False) -> Resize:
    fitter = GpuFitter(Cuda(0), PATCH)

    def resize(frame: np.ndarray, steps: Preprocess) -> np.ndarray:
        arrays = [fake_gpu.Array(device, plane) for plane in (to_nv12(frame) if nv12 else [frame])]
        value = Nv12Frame(*arrays, matrix="bt601") if nv12 else arrays[0]
        image = fitter.fit(fitter.read([value]), SIZE, steps).images.numpy()[0]
        for array in arrays:
            array.free()
        return image

    return resize


def to_nv12(frame: np.ndarray) -> list[np.ndarray]:
    """OpenCV's planes of a frame: BT.601, limited range."""
    height, width = frame.shape[:2]
    planar = cv2.cvtColor(frame, cv2.COLOR_RGB2YUV_I420)
    chroma = planar[height:].reshape(2, height // 2, width // 2)
    return [planar[:height].copy(), np.ascontiguousarray(chroma.transpose(1, 2, 0))]


def graph(steps: Preprocess, mode: str, antialias: int) -> onnx.ModelProto:
    """A graph from a frame, uint8 ``(1, H, W, 3)``, to the whole image at the size of before the crop, uint8."""
    (width, height), _ = placement(FRAME[::-1], SIZE, steps)
    cubic = {"cubic_coeff_a": -0.5, "exclude_outside": 1} if mode == "cubic" else {}
    nodes = [
        helper.make_node("Cast", ["frame"], ["whole"], to=TensorProto.FLOAT),
        helper.make_node("Transpose", ["whole"], ["planes"], perm=[0, 3, 1, 2]),
        helper.make_node("Resize", ["planes", "", "", "sizes"], ["resized"], mode=mode, antialias=antialias, **cubic),
        helper.make_node("Round", ["resized"], ["rounded"]),
        helper.make_node("Clip", ["rounded", "low", "high"], ["clipped"]),
        helper.make_node("Transpose", ["clipped"], ["image"], perm=[0, 2, 3, 1]),
    ]
    constants = {"sizes": np.array([1, 3, height, width]), "low": np.float32(0), "high": np.float32(255)}
    built = helper.make_graph(
        nodes,
        "resize",
        [helper.make_tensor_value_info("frame", TensorProto.UINT8, [1, *FRAME, 3])],
        [helper.make_tensor_value_info("image", TensorProto.FLOAT, [1, height, width, 3])],
        [numpy_helper.from_array(np.asarray(value), name) for name, value in constants.items()],
    )
    return helper.make_model(built, opset_imports=[helper.make_opsetid("", 19)], ir_version=9)


def session(path: Path) -> Resize:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    # Else ONNX Runtime turns the axes around the Resize, and refuses what it made.
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    opened = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])

    def resize(frame: np.ndarray, steps: Preprocess) -> np.ndarray:
        (whole,) = opened.run(None, {"frame": frame[None]})
        left, top, right, bottom = placement(FRAME[::-1], SIZE, steps)[1]
        return whole[0, top:bottom, left:right].astype(np.uint8)

    return resize


if __name__ == "__main__":
    main()
