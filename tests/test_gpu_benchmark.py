"""``benchmarks/gpu.py`` from end to end on the fake GPU: no error of its own waits for the first machine that has one.

PyTorch here has no CUDA. The benchmark gets a stand-in for ``torch`` whose tensors on "cuda" lie in the memory of
the fake GPU; everything else is PyTorch's own. The figures mean nothing.
"""

import inspect
import json
import sys
from types import SimpleNamespace

import numpy as np
import pytest

from phreg_deploy.runtime.gpu.arrays import GPU, DeviceArray
from tests import fake_gpu
from tests.frames import create_stream

pytest.importorskip("torch")
SIZE = 32


class OnFakeGpu:
    """A batch of images on the fake GPU, with what the benchmark calls of a tensor."""

    def __init__(self, device, images):
        self.images, self.array = images, fake_gpu.Array(device, images.numpy())

    def permute(self, *order):
        return self.images.permute(*order)

    def cpu(self):
        return self.images

    def __dlpack_device__(self):
        return GPU, 0

    def __dlpack__(self, *, stream):
        assert stream not in (None, 0)
        return DeviceArray(self.array.pointer, self.array.shape, self.array.dtype, self.array).__dlpack__(stream=-1)


class Torch:
    """PyTorch, whose CUDA is the fake GPU."""

    def __init__(self, torch, device, available=True):
        self._torch, self._device, self.compiled, self.read = torch, device, [], []
        self._stream = create_stream(device)
        self.cuda = SimpleNamespace(
            is_available=lambda: available,
            get_device_name=lambda: device.name,
            synchronize=lambda: device.runtime.cudaDeviceSynchronize(),
            current_stream=lambda: SimpleNamespace(cuda_stream=self._stream),
        )

    def __getattr__(self, name):
        return getattr(self._torch, name)

    def randint(self, low, high, shape, *, dtype, device):
        assert (device, dtype) == ("cuda", self._torch.uint8)
        return OnFakeGpu(self._device, self._torch.randint(low, high, shape, dtype=dtype))

    def randn(self, *shape, device, dtype):
        assert device == "cuda"
        assert min(shape) >= 4096, "the product must be large enough to reach the peak"
        return self._torch.randn(8, 8, dtype=dtype)

    def compile(self, function, *, mode):
        self.compiled.append(mode)
        return function

    def from_dlpack(self, array):
        """Read an output as PyTorch does: in the current stream."""
        array.__dlpack__(stream=self._stream)
        self.read.append(array.shape)
        return array


@pytest.fixture
def gpu_benchmark(device, tensorrt, onnxruntime_gpu, torch, monkeypatch, tmp_path):
    """``gpu_benchmark(*words)`` runs the benchmark; returns its report and the stand-in for PyTorch."""
    import timm

    import benchmarks.gpu as module

    def create_model(*words, **options):
        model = timm.create_model(*words, **options)
        model.cuda = lambda: model
        return model

    monkeypatch.setattr(module, "WARM", 4)
    monkeypatch.setattr(module, "timm", SimpleNamespace(create_model=create_model))
    monkeypatch.setenv("PATH", "/bin:/usr/bin")

    def run(*words, available=True):
        stand_in, report = Torch(torch, device, available), tmp_path / "gpu.json"
        monkeypatch.setattr(module, "torch", stand_in)
        monkeypatch.setattr(sys, "argv", ["gpu", "--json", str(report), *map(str, words)])
        module.main()
        return json.loads(report.read_text()), stand_in

    return run


def test_a_row_holds_every_configuration_or_says_why_not(gpu_benchmark, device, capsys):
    words = ("--models", "vit_tiny_patch16_224", "--sizes", SIZE, "--batches", "1,2", "--precisions", "fp16")
    report, torch = gpu_benchmark(*words, "--seconds", "0.1")
    assert torch.compiled == ["max-autotune"] * 2
    for batch, row in zip((1, 2), report["rows"], strict=True):
        ours = [f"ours, {backend} fp16" for backend in ("tensorrt", "onnxruntime-cuda")]
        each = [label + ending for label in ours for ending in ("", ", from the host", ", bare")]
        assert list(row["results"]) == ["PyTorch eager bf16", "torch.compile bf16", *each]
        for figures in row["results"].values():
            assert figures["images_per_second"] == pytest.approx(1e3 * batch / figures["ms"])
            assert figures["share_of_peak"] > 0
        assert list(row["missing"]) == ["trtexec fp16"]
        assert "trtexec is not installed" in row["missing"]["trtexec fp16"]
    assert {shape[0] for shape in torch.read} == {1, 2}, "features of our calls were read by PyTorch"
    assert "batch 2: PyTorch eager bf16" in capsys.readouterr().out
    assert device.live()["allocations"] == 2, "the two batches of images alone"


def test_a_backend_that_cannot_serve_a_row_is_named(gpu_benchmark, device):
    device.architecture = 75
    words = ("--models", "vit_tiny_patch16_224", "--sizes", SIZE, "--batches", "1", "--precisions", "bf16")
    report, _ = gpu_benchmark(*words, "--seconds", "0.1", "--no-compile", "--backends", "tensorrt")
    (row,) = report["rows"]
    assert list(row["results"]) == ["PyTorch eager bf16"]
    assert row["results"]["PyTorch eager bf16"]["share_of_peak"] is None
    assert "is in bf16, which NVIDIA Fake (SM 7.5) lacks" in row["missing"]["ours, tensorrt bf16"]


def test_distillation_is_called_as_it_is_defined_and_its_record_is_read(gpu_benchmark, distilled, monkeypatch):
    import phreg_deploy.distill as package

    (_, record), asked = distilled, []

    def distill(*words, **options):
        bound = inspect.signature(real).bind(*words, **options)
        assert len(list(bound.arguments["images"].iterdir())) == 256
        assert bound.arguments["checkpoint"].stat().st_size > 0
        asked.append(bound.arguments)
        return record

    real = package.distill
    monkeypatch.setattr(package, "distill", distill)
    import timm

    import benchmarks.gpu as module

    small = SimpleNamespace(create_model=lambda name, **_: timm.create_model("vit_tiny_patch16_224", num_classes=0))
    monkeypatch.setattr(module, "timm", small)
    figures = module.distillation()
    assert asked[0]["model"] == "vit_base_patch14_dinov2"
    assert {"teacher_views_per_second", "student_images_per_second", "seconds_total"} <= set(figures)
    assert all(np.isfinite(value) for value in figures.values())


def test_without_a_gpu_it_says_so(gpu_benchmark):
    with pytest.raises(SystemExit, match="needs an NVIDIA GPU and a torch that sees it"):
        gpu_benchmark(available=False)
