"""Images -> dense features, without PyTorch. B batch, (Hp, Wp) patch grid, C width."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from phreg_deploy.bundle.bundle import Bundle
from phreg_deploy.bundle.exam import check_shapes
from phreg_deploy.errors import PhregError
from phreg_deploy.images.intake import check_color, on_gpu, rgb, single_pictures
from phreg_deploy.images.photographs import fit
from phreg_deploy.runtime.auto import choose
from phreg_deploy.runtime.backends.instructions import advice
from phreg_deploy.runtime.backends.interface import Backend
from phreg_deploy.runtime.backends.options import BackendOptions
from phreg_deploy.runtime.backends.registry import GPU, open_backend
from phreg_deploy.runtime.dense_features import DenseFeatures
from phreg_deploy.runtime.feed import InputFeed, check_batch
from phreg_deploy.runtime.forking import ForkSafeBackend
from phreg_deploy.runtime.parity import gate_precision


class FeatureExtractor(AbstractContextManager["FeatureExtractor"]):
    """A bundle, loaded. One extractor may be called from several threads.

    Use ``load``; then call it with images, or ``run`` it with arrays that are already resized. A pickled extractor is
    loaded again from its path, by the backend that it had. In a forked child the backend is opened again on first use.
    """

    def __init__(self, bundle: Bundle, backend: Backend) -> None:
        self.bundle, self.manifest, self.spec = bundle, bundle.manifest, bundle.manifest.model
        self.preprocess, self.color = self.manifest.preprocess, "rgb"
        self._held = ForkSafeBackend(backend)
        self._asked: dict[str, Any] | None = None  # what ``load`` was called with
        self.feed = InputFeed(bundle)
        self.choice = f"{backend.name}: as given"

    @classmethod
    def load(
        cls, path: Path | str, backend: str = "auto", *, threads: int | None = None, compute: str = "auto",
        mode: str = "latency", verify: bool = True, examine: bool = True, device: int = 0,
        color: str = "rgb", exif: bool | None = None, fast: bool | None = None,
    ) -> FeatureExtractor:  # fmt: skip
        """Open a bundle.

        Args:
            backend: a key of ``backends.BACKENDS``, or "auto": the fastest of those installed that passes the bundle's own
                exam, which takes a second where there are several.
            device: the GPU, where the backend runs on one.
            threads, compute, mode: see ``tuning.BackendOptions``.
            examine: with "auto", refuse a bundle that fails its exam on every backend; False for callers that missed_gates it.
            verify: compare every file with its hash in the manifest first.
            color: "rgb" or "bgr" (OpenCV's order): the channels of arrays that are called with or prepared. Files and PIL
                images know their own; ``dense`` and ``run`` always take RGB.
            exif: turn files and PIL images upright by their EXIF orientation; by default as the manifest says.
            fast: resize large images by ``resampling.shrink``, else by Pillow; by default as the manifest says.

        Raises:
            PhregError: no bundle, a damaged one, one of a newer format. BackendMissing: the backend is not usable.
        """
        check_color(color)
        tuning, bundle = BackendOptions(threads, compute, mode), Bundle.read(path)
        if verify:
            bundle.verify()
        if backend == "auto":
            opened, reason = choose(bundle, tuning, examine, device)
        else:
            opened, reason = open_backend(bundle, backend, tuning, device), f"{backend}: as asked"
        extractor = cls(bundle, opened)
        extractor.color = color
        steps = extractor.preprocess
        extractor.preprocess = replace(
            steps, exif=steps.exif if exif is None else exif, fast=steps.fast if fast is None else fast
        )
        if opened.name not in GPU:
            extractor._held.again = lambda: open_backend(bundle, opened.name, tuning)
        extractor._asked = {
            "path": Path(path).absolute(), "backend": opened.name, "threads": threads, "compute": compute, "mode": mode,
            "verify": verify, "examine": examine, "device": device, "color": color, "exif": exif, "fast": fast,
        }  # fmt: skip
        extractor.choice = "; ".join(
            part for part in (reason, opened.remark, advice(bundle.manifest.precision)) if part
        )
        if device and opened.name not in GPU:
            extractor.close()
            raise PhregError(
                f"device: got GPU {device}, but {opened.name} runs on the processor. Leave it out, or choose a backend on a GPU."
            )
        return extractor

    @property
    def backend(self) -> str:
        """The backend that runs, also where "auto" chose it."""
        return self._open().name

    @property
    def opened(self) -> Any:
        """The backend itself, for measurements of it."""
        return self._open()

    @property
    def compute(self) -> str:
        """What is not in 8 bits is computed in: "fp32" or "bf16"."""
        return self._open().compute

    @property
    def precision(self) -> str:
        """The precision whose gates hold, see ``parity.gate_precision``."""
        return gate_precision(self.manifest, self.compute)

    def __call__(
        self, images: Any, size: tuple[int, int] | None = None, *, color: str | None = None, exif: bool | None = None
    ) -> DenseFeatures:
        """Features of one image, of an array of several, or of a list of these.

        Args:
            images: paths, encoded bytes, binary files, PIL images, or uint8 arrays ``(H, W, 3)``, ``(H, W)`` (grey) or
                ``(B, H, W, 3)`` of any size: numpy's, PyTorch's CPU tensors, and others that numpy can read.
            size: (height, width) to serve them at; by default the bundle's own, or its preferred one.
            color, exif: as in ``load``, for this call.

        A batch larger than the bundle serves is run in parts.

        Raises:
            PhregError: something that is no image, an array without pixels or of another type, a file that cannot be read.
        """
        size = size or self.manifest.sizes.default
        pictures = single_pictures(images)
        return self.dense(np.stack([self._fitted(picture, size, color, exif) for picture in pictures]))

    def prepare(
        self,
        picture: Any,
        size: tuple[int, int] | None = None,
        *,
        color: str | None = None,
        exif: bool | None = None,
    ) -> np.ndarray:
        """One image at the input size, by the bundle's own preprocessing: uint8 RGB ``(H, W, 3)``; arguments as of a call."""
        pictures = single_pictures(picture)
        if len(pictures) != 1:
            raise PhregError(f"prepare: got {len(pictures)} images, expected one. Call the extractor with several.")
        return self._fitted(pictures[0], size or self.manifest.sizes.default, color, exif)

    def _fitted(self, picture: Any, size: tuple[int, int], color: str | None, exif: bool | None) -> np.ndarray:
        order = self.color if color is None else check_color(color)
        image = rgb(picture, self.preprocess.exif if exif is None else exif)
        array = fit(image, size, self.preprocess)
        if order == "bgr" and isinstance(
            image, np.ndarray
        ):  # every channel is resized alike: turned where they are few
            return np.ascontiguousarray(array[..., ::-1])
        return array

    def dense(self, batch: Any) -> DenseFeatures:
        """Features of uint8 RGB images ``(B, H, W, 3)`` that are already at a size the bundle serves; any B."""
        batch = check_batch(batch)
        lowest, highest = self.manifest.batches.lowest, self.manifest.batches.highest
        parts = []
        for start in range(0, len(batch), highest):
            part = batch[start : start + highest]
            missing = max(0, lowest - len(part))
            padded = np.concatenate([part, np.repeat(part[-1:], missing, axis=0)]) if missing else part
            answers = self.run(padded)
            check_shapes(self.manifest, answers, padded.shape)
            parts.append({name: value[: len(part)] for name, value in answers.items()})
        whole = {
            name: np.concatenate([p[name] for p in parts]) if len(parts) > 1 else parts[0][name] for name in parts[0]
        }
        found = {name: value.astype(np.float32, copy=False) for name, value in whole.items()}
        return DenseFeatures(found["features"], found.get("cls"), found["token_norm"], self.manifest.norm_median)

    def run(self, batch: Any, *, out: Mapping[str, Any] | None = None, stream: int | None = None) -> dict[str, Any]:
        """Array to array: uint8 ``(B, H, W, 3)`` at a served size and batch -> the graph's outputs by name, as they come.

        An array on a GPU (``__cuda_array_interface__`` or DLPack: torch, CuPy, numba, ...) is read where it lies, and the
        outputs stay there: ``DeviceArray``, which the same libraries read.

        Args:
            out: arrays on the GPU to write into, by output name; for a batch on the GPU only.
            stream: a ``cudaStream_t`` of yours to run on; then nothing is waited for. For a batch on the GPU only.

        Raises:
            PhregError: a size or batch that is not served, another type, or a backend that does not run on a GPU.
        """
        if isinstance(batch, np.ndarray) or not on_gpu(batch):
            if out is not None or stream is not None:
                raise PhregError("extract: out and stream are for a batch on the GPU; got one on the host.")
            return self._open().run(self.feed(batch))
        return self._run_device(batch, out or {}, stream)

    def _run_device(self, batch: Any, out: Mapping[str, Any], stream: int | None) -> dict[str, Any]:
        from phreg_deploy.runtime.gpu.arrays import as_device

        backend = self._open()
        if not hasattr(backend, "run_device"):
            raise PhregError(
                f"extract: {backend.name} reads host memory only; got {type(batch).__name__}. Use --backend tensorrt or onnxruntime-cuda."
            )
        image = as_device(batch, stream)
        if image.dtype != np.uint8 or len(image.shape) != 4 or image.shape[3] != 3:
            raise PhregError(f"extract: got {image.dtype} {image.shape} on the GPU, expected uint8 RGB (B, H, W, 3).")
        cuda = getattr(backend, "cuda", None)
        if cuda is not None and hasattr(batch, "__dlpack_device__") and image.device[1] != cuda.index:
            raise PhregError(
                f"extract: got an array on GPU {image.device[1]}, but the extractor runs on GPU {cuda.index}. Load it with device={image.device[1]}."
            )
        self.feed.check(image.shape)
        others = self.feed.others((image.shape[1], image.shape[2]))
        unknown = set(out) - set(self.manifest.outputs)
        if unknown:
            raise PhregError(f"out: got {', '.join(sorted(unknown))}, expected {', '.join(self.manifest.outputs)}.")
        written = {name: as_device(value, stream) for name, value in out.items()}
        found: dict[str, Any] = backend.run_device(image, others, stream, written)
        return found

    def graph_call(self, batch: Any) -> Callable[[], object]:
        """The graph on this batch and nothing around it: what the extractor's own cost is measured against."""
        backend, feed = self._open(), self.feed(batch)
        return lambda: backend.run(feed)

    def close(self) -> None:
        """Free the session and the device. Calling the extractor afterwards is an error."""
        self._held.close()

    def __exit__(self, *_error: object) -> None:
        self.close()

    def __reduce__(self) -> tuple[Any, ...]:
        if self._asked is None:
            raise PhregError("extract: only a FeatureExtractor from FeatureExtractor.load can be pickled.")
        self._open()
        return _load, (self._asked,)

    def _open(self) -> Backend:
        return self._held.backend or self._held.reopened()


def _load(asked: dict[str, Any]) -> FeatureExtractor:
    return FeatureExtractor.load(**asked)
