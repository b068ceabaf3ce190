"""Run an extractor's bundle on arrays that lie on its GPU, at the input size or at any other."""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from phreg_deploy.bundle.manifest import Manifest
from phreg_deploy.errors import PhregError
from phreg_deploy.images.intake import on_gpu
from phreg_deploy.runtime.backends.interface import Backend, DeviceBackend
from phreg_deploy.runtime.dense_features import DenseFeatures
from phreg_deploy.runtime.feed import InputFeed
from phreg_deploy.runtime.gpu.arrays import as_device
from phreg_deploy.runtime.gpu.closing import Calls, Closing
from phreg_deploy.runtime.gpu_images.fitter import FittedFrames, GpuFitter
from phreg_deploy.runtime.gpu_images.frames import DeviceFrame
from phreg_deploy.runtime.parts import dense_in_parts
from phreg_deploy.spec import Preprocess

# Fits frames to the input size: size, steps, "pad" and so on, BGR.
Steps = tuple[tuple[int, int], Preprocess, "str | None", bool]


class DeviceRuns(Closing):
    """What an extractor does on its GPU; every method raises ``PhregError`` for a backend on the processor."""

    def __init__(self, manifest: Manifest, feed: InputFeed) -> None:
        self.manifest, self.feed = manifest, feed
        self._calls, self._lock = Calls(), threading.Lock()
        self._fitter: GpuFitter | None = None

    def run(self, backend: Backend, batch: Any, out: Mapping[str, Any], stream: int | None) -> dict[str, Any]:
        """Outputs on the GPU for a batch at a served size; see ``FeatureExtractor.run``."""
        gpu = _on_gpu(backend, type(batch).__name__)
        image = as_device(batch, stream)
        if image.dtype != np.uint8 or len(image.shape) != 4 or image.shape[3] != 3:
            raise PhregError(f"extract: got {image.dtype} {image.shape} on the GPU, expected uint8 RGB (B, H, W, 3).")
        number, own = image.device[1], gpu.cuda.index
        if hasattr(batch, "__dlpack_device__") and number != own:
            raise PhregError(
                f"extract: got an array on GPU {number}, but the extractor runs on GPU {own}. "
                f"Load it with device={number}."
            )
        self.feed.check(image.shape)
        unknown = set(out) - set(self.manifest.outputs)
        if unknown:
            raise PhregError(f"out: got {', '.join(sorted(unknown))}, expected {', '.join(self.manifest.outputs)}.")
        others = self.feed.others((image.shape[1], image.shape[2]))
        written = {name: as_device(value, stream) for name, value in out.items()}
        return dict(gpu.run_device(image, others, stream, written))

    def fit(self, backend: Backend, frames: Sequence[Any], steps: Steps, stream: int | None = None) -> FittedFrames:
        """Frames on the GPU at the input size; without a stream the frames were read when this returns."""
        with self._calls.one():
            fitter, read = self._read(backend, frames, steps[0], stream)
            fitted = fitter.fit(read, *steps, stream)
            if stream is None:
                fitter.wait()
                fitted.images.filled_on(None)
            return fitted

    def dense(self, backend: Backend, frames: Sequence[Any], steps: Steps) -> DenseFeatures:
        """Features on the host of frames on the GPU, of any number and sizes."""
        lowest, masks = self.manifest.batches.lowest, list[np.ndarray]()

        def run(part: list[DeviceFrame]) -> dict[str, np.ndarray]:
            fitted = fitter.fit(part + part[-1:] * (lowest - len(part)), *steps)
            if fitted.mask is not None:
                masks.append(fitted.mask[: len(part)])
            return gpu.run_to_host(fitted.images, self.feed.others(steps[0]))

        with self._calls.one():
            fitter, read = self._read(backend, frames, steps[0], None)
            gpu = _on_gpu(backend, "frames")
            dense = dense_in_parts(self.manifest, read, steps[0], run)
        return dense.masked(np.concatenate(masks) if masks else None)

    def _read(
        self, backend: Backend, frames: Sequence[Any], size: tuple[int, int], stream: int | None
    ) -> tuple[GpuFitter, list[DeviceFrame]]:
        strangers = [frame for frame in frames if not on_gpu(frame)]
        if strangers:
            raise PhregError(
                f"extract: got {len(frames) - len(strangers)} images on a GPU and {len(strangers)} on the host "
                f"({type(strangers[0]).__name__}), expected all on the GPU. Call the extractor for each kind."
            )
        gpu = _on_gpu(backend, type(frames[0]).__name__ if frames else "no frame")
        self.manifest.sizes.check(size, self.manifest.model.patch)
        with self._lock:
            if self._fitter is None:
                self._fitter = GpuFitter(gpu.cuda, self.manifest.model.patch)
            fitter = self._fitter
        return fitter, fitter.read(frames, stream)

    def close(self) -> None:
        """Wait for the calls of other threads, then free the kernel and its memory."""
        if not self._calls.end():
            return
        fitter, self._fitter = self._fitter, None
        if fitter is not None:
            fitter.close()


def _on_gpu(backend: Any, got: str) -> DeviceBackend:
    if not isinstance(backend, DeviceBackend):
        raise PhregError(
            f"extract: {backend.name} reads host memory only; got {got} on a GPU. "
            "Use --backend tensorrt or onnxruntime-cuda."
        )
    return backend
