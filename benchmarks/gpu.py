"""Compare our runtime on an NVIDIA GPU with PyTorch, ``torch.compile``, ONNX Runtime on CUDA and trtexec.

    python -m benchmarks.gpu --json OUT [--models vit_small_patch14_reg4_dinov2] [--sizes 224,518] [--batches 1,8,32]
        [--backends tensorrt,onnxruntime-cuda] [--precisions fp16,bf16] [--seconds 2] [--distil]

Random weights, ViT-S/B/L-14 with 4 registers. All configurations of a row are called in turn, so drifting clocks treat
them alike; trtexec, a process of its own, follows on the same engine. Milliseconds are medians of whole calls with
images and features in device memory, synchronised at the end, as docs/embed.md has it: the caller's stream, and
features read by torch through DLPack. "from the host" takes and gives numpy arrays. "bare" is the graph alone, also
from the host; trtexec's figure is without copies. PyTorch runs in bfloat16 on normalised channels-last pixels; ours
normalises itself. The peak is that of PyTorch's own 8192 x 8192 bfloat16 product in the same process. A row whose
backend is missing says why. Needs torch with CUDA and timm; TensorRT's columns need TensorRT, and onnxruntime-cuda
needs onnxruntime-gpu.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import click
import numpy as np
import timm
import torch
from safetensors.torch import save_file

from benchmarks.trtexec import time_engine
from phreg_deploy.errors import PhregError
from phreg_deploy.export.engine.build import BuildRequest, build_engine
from phreg_deploy.export.exporter import ExportRequest, export_bundle
from phreg_deploy.profiling.operations import count_parts
from phreg_deploy.progress import Progress
from phreg_deploy.runtime.features import FeatureExtractor

MODELS = "vit_small_patch14_reg4_dinov2,vit_base_patch14_reg4_dinov2,vit_large_patch14_reg4_dinov2"
WARM = 5

Call = Callable[[], object]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, required=True)
    parser.add_argument("--models", default=MODELS)
    parser.add_argument("--sizes", default="224,518")
    parser.add_argument("--batches", default="1,8,32")
    parser.add_argument("--backends", default="tensorrt,onnxruntime-cuda")
    parser.add_argument("--precisions", default="fp16,bf16")
    parser.add_argument("--seconds", type=float, default=2.0, help="of measuring per row")
    parser.add_argument("--no-compile", action="store_true", help="leave out torch.compile, which takes minutes a row")
    parser.add_argument("--distil", action="store_true", help="distillation throughput as well, ViT-B/14 at 518 px")
    args = parser.parse_args()
    if not torch.cuda.is_available():
        raise SystemExit("benchmarks/gpu.py needs an NVIDIA GPU and a torch that sees it.")
    torch.backends.cuda.matmul.allow_tf32 = False
    report: dict[str, Any] = {
        "gpu": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "peak_bf16_tflops": peak(),
        "rows": [],
    }
    click.echo(f"{report['gpu']}, torch {report['torch']}, bf16 peak {report['peak_bf16_tflops']:.0f} TFLOPS")
    for name in args.models.split(","):
        for size in (int(s) for s in args.sizes.split(",")):
            for batch in (int(b) for b in args.batches.split(",")):
                report["rows"].append(row(name, size, batch, args, report["peak_bf16_tflops"]))
                # Write after every row: an interruption loses one row.
                args.json.write_text(json.dumps(report, indent=1) + "\n")
    if args.distil:
        report["distillation"] = distillation()
    args.json.write_text(json.dumps(report, indent=1) + "\n")


def peak() -> float:
    """TFLOPS of PyTorch's bfloat16 product."""
    a, b = (torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    milliseconds = interleaved({"gemm": lambda: a @ b}, 1.0)["gemm"]
    return 2 * 8192**3 / milliseconds / 1e9


def row(name: str, size: int, batch: int, args: argparse.Namespace, top: float) -> dict[str, Any]:
    """Every configuration of one model, size and batch, in one interleaved run."""
    torch.manual_seed(0)
    images = torch.randint(0, 256, (batch, size, size, 3), dtype=torch.uint8, device="cuda")
    model = timm.create_model(name, img_size=size, num_classes=0).cuda().eval().bfloat16()
    pixels = (images.permute(0, 3, 1, 2).float() / 255).bfloat16()
    calls: dict[str, Call] = {"PyTorch eager bf16": lambda: model.forward_features(pixels)}
    if not args.no_compile:
        compiled = torch.compile(model.forward_features, mode="max-autotune")
        calls["torch.compile bf16"] = lambda: compiled(pixels)
    extractors, missing, plans = [], dict[str, str](), dict[str, Path]()
    with tempfile.TemporaryDirectory() as folder, torch.inference_mode():
        for precision in args.precisions.split(","):
            bundle = Path(folder) / precision
            request = ExportRequest(
                model=name, precision=precision, image_size=str(size), batch=str(batch), random_weights=True
            )
            export_bundle(request, bundle)
            for backend in args.backends.split(","):
                label = f"ours, {backend} {precision}"
                try:
                    if backend == "tensorrt":
                        plans[f"trtexec {precision}"] = build_engine(BuildRequest(bundle)).plan
                    extractor = FeatureExtractor.load(bundle, backend)
                except PhregError as error:
                    missing[label] = str(error)
                    continue
                extractors.append(extractor)
                calls[label] = device_call(extractor, images)
                calls[f"{label}, from the host"] = partial(extractor.run, images.cpu().numpy())
                calls[f"{label}, bare"] = extractor.graph_call(images.cpu().numpy())
        times = interleaved(calls, args.seconds)
        for label, plan in plans.items():
            took, reason = time_engine(plan, args.seconds)
            if took is None:
                missing[label] = reason
            else:
                times[label] = took
        flops = operations(extractors, batch, size) or None
        for extractor in extractors:
            extractor.close()
    results = {
        label: {
            "ms": ms,
            "images_per_second": 1e3 * batch / ms,
            "share_of_peak": None if flops is None else flops / ms / 1e9 / top,
        }
        for label, ms in times.items()
    }
    line = "; ".join(f"{label} {value['ms']:.3f} ms" for label, value in results.items())
    click.echo(f"{name} {size} px, batch {batch}: {line}")
    for label, reason in missing.items():
        click.echo(f"  {label}: {reason}")
    return {"model": name, "size": size, "batch": batch, "results": results, "missing": missing}


def device_call(extractor: FeatureExtractor, images: torch.Tensor) -> Call:
    """A call on the GPU as docs/embed.md has it; ONNX Runtime takes no stream of the caller's."""
    how = {"stream": torch.cuda.current_stream().cuda_stream} if extractor.backend == "tensorrt" else {}
    return lambda: [torch.from_dlpack(value) for value in extractor.run(images, **how).values()]


def operations(extractors: list[FeatureExtractor], batch: int, size: int) -> float:
    if not extractors:
        return 0.0
    return sum(work for work, _ in count_parts(extractors[0].spec, batch=batch, size=(size, size)).values())


def interleaved(calls: dict[str, Call], seconds: float) -> dict[str, float]:
    """Median milliseconds of each call, taken in turn."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    for call in calls.values():
        for _ in range(WARM):
            call()
    torch.cuda.synchronize()
    start = time.perf_counter()
    while time.perf_counter() - start < seconds or len(next(iter(times.values()))) < 10:
        for name, call in calls.items():
            torch.cuda.synchronize()
            before = time.perf_counter()
            call()
            torch.cuda.synchronize()
            times[name].append(1e3 * (time.perf_counter() - before))
    return {name: float(np.median(values)) for name, values in times.items()}


def distillation() -> dict[str, float]:
    """Teacher views and student images per second on scenes drawn by the demo, including the loader."""
    from phreg_deploy.demo.scenes import write_scenes
    from phreg_deploy.distill import distill

    with tempfile.TemporaryDirectory() as folder:
        scenes = Path(folder) / "scenes"
        scenes.mkdir()
        write_scenes(scenes, range(256))
        name, weights = "vit_base_patch14_dinov2", Path(folder) / "random.safetensors"
        save_file(timm.create_model(name, num_classes=0).state_dict(), weights)
        record = distill(
            name,
            scenes,
            Path(folder) / "student",
            checkpoint=weights,
            epochs=2,
            batch=32,
            recipe="ph-reg",
            precision="bf16",
            cache=Path(folder) / "cache",
            progress=Progress(),
        )
    seconds = record.seconds.to_json()
    student = seconds["total"] - seconds["targets"]
    return {
        "teacher_views_per_second": 10 * seconds["targets_computed"] / max(seconds["targets"], 1e-9),
        "student_images_per_second": 2 * record.images.trained / student,
        **{f"seconds_{k}": v for k, v in seconds.items()},
    }


if __name__ == "__main__":
    main()
