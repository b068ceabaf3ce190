"""Images -> dense features, without PyTorch. B batch, (Hp, Wp) patch grid, C width."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from phreg_deploy.artifacts import OUTLIER_FACTOR
from phreg_deploy.bundle import Bundle
from phreg_deploy.errors import PhregError
from phreg_deploy.exam import check_shapes
from phreg_deploy.photographs import fit, read_image, to_rgb
from phreg_deploy.runtime.backends import GPU, Backend, open_backend
from phreg_deploy.runtime.closing import Closing
from phreg_deploy.runtime.instructions import advice
from phreg_deploy.runtime.positions import resample
from phreg_deploy.runtime.tuning import Tuning
from phreg_deploy.spec import check_multiple

Picture = Image.Image | np.ndarray | str | Path
GRIDS_KEPT = 16  # resampled position embeddings kept, the least recently used dropped first


@dataclass(frozen=True)
class DenseFeatures:
    """What a bundle says of a batch of images.

    ``features`` float32 ``(B, Hp, Wp, C)`` after the final norm, registers dropped; ``cls`` float32 ``(B, C)`` or None;
    ``token_norm`` float32 ``(B, Hp, Wp)``: L2 norms of the last block's output before the final norm.
    ``norm_median``: the base model's median norm, where the bundle knows it.
    """

    features: np.ndarray
    cls: np.ndarray | None
    token_norm: np.ndarray
    norm_median: float | None = None

    @property
    def artifact_rate(self) -> np.ndarray:
        """Share of high-norm or low-norm patch tokens per image, ``(B,)``, 0-1: watched on every frame at no extra pass.

        Measured against ``norm_median``; in a bundle that does not know it, against each image's own median.
        """
        flat = self.token_norm.reshape(len(self.token_norm), -1)
        median = np.median(flat, axis=1, keepdims=True) if self.norm_median is None else self.norm_median
        return ((flat > OUTLIER_FACTOR * median) | (flat < median / OUTLIER_FACTOR)).mean(axis=1)  # type: ignore[no-any-return]


class FeatureExtractor(Closing):
    """A bundle, loaded. One extractor may be called from several threads.

    Use ``load``; then call it with images, or ``run`` it with arrays that are already resized.
    """

    def __init__(self, bundle: Bundle, backend: Backend) -> None:
        self.bundle, self.manifest, self.spec = bundle, bundle.manifest, bundle.manifest.model
        self._backend: Backend | None = backend
        self._base = bundle.positions() if "pos_embed" in self.manifest.inputs else None
        self._grids: OrderedDict[tuple[int, int], np.ndarray] = OrderedDict()
        self._lock = threading.Lock()
        self.choice = f"{backend.name}: as given"

    @classmethod
    def load(
        cls, path: Path | str, backend: str = "auto", *, threads: int | None = None, compute: str = "auto",
        mode: str = "latency", verify: bool = True, examine: bool = True, device: int = 0,
    ) -> FeatureExtractor:  # fmt: skip
        """Open a bundle.

        Args:
            backend: a key of ``backends.BACKENDS``, or "auto": the fastest of those installed that passes the bundle's own
                exam, which takes a second where there are several.
            device: the GPU, where the backend runs on one.
            threads, compute, mode: see ``tuning.Tuning``.
            examine: with "auto", refuse a bundle that fails its exam on every backend; False for who judges it himself.
            verify: compare every file with its hash in the manifest first.

        Raises:
            PhregError: no bundle, a damaged one, one of a newer format. BackendMissing: the backend is not usable.
        """
        from phreg_deploy.runtime.choice import choose

        tuning, bundle = Tuning(threads, compute, mode), Bundle.read(path)
        if verify:
            bundle.verify()
        if backend == "auto":
            opened, reason = choose(bundle, tuning, examine, device)
        else:
            opened, reason = open_backend(bundle, backend, tuning, device), f"{backend}: as asked"
        extractor = cls(bundle, opened)
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
        """The backend itself, for who measures it."""
        return self._open()

    @property
    def compute(self) -> str:
        """What is not in 8 bits is computed in: "fp32" or "bf16"."""
        return self._open().compute

    @property
    def precision(self) -> str:
        """The precision whose gates hold: the bundle's, or bfloat16 where a float32 bundle is computed in it."""
        return "bf16" if self.manifest.precision == "fp32" and self.compute == "bf16" else self.manifest.precision

    def __call__(self, images: Picture | Sequence[Picture], size: tuple[int, int] | None = None) -> DenseFeatures:
        """Features of one image or a list: paths, PIL images, or uint8 RGB arrays ``(H, W, 3)`` of any size.

        Args:
            size: (height, width) to serve them at; by default the bundle's own, or its preferred one.

        A batch larger than the bundle serves is run in parts.
        """
        pictures = [images] if isinstance(images, (str, Path, Image.Image, np.ndarray)) else list(images)
        if not pictures:
            raise PhregError("extract: got an empty list, expected at least one image.")
        size = size or self.manifest.sizes.default
        return self.dense(np.stack([self.prepare(picture, size) for picture in pictures]))

    def prepare(self, picture: Picture, size: tuple[int, int] | None = None) -> np.ndarray:
        """One image at the input size, by the bundle's own preprocessing: uint8 ``(H, W, 3)``."""
        if isinstance(picture, np.ndarray):
            if picture.dtype != np.uint8 or picture.ndim != 3 or picture.shape[2] != 3:
                raise PhregError(
                    f"image: got an array of {picture.dtype} {picture.shape}, expected uint8 RGB (H, W, 3) with values 0-255."
                )
            picture = Image.fromarray(picture)
        image = to_rgb(picture) if isinstance(picture, Image.Image) else read_image(picture)
        return fit(image, size or self.manifest.sizes.default, self.manifest.preprocess)

    def dense(self, batch: np.ndarray) -> DenseFeatures:
        """Features of uint8 RGB images ``(B, H, W, 3)`` that are already at a size the bundle serves; any B."""
        _check_images(batch)
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
        if isinstance(batch, np.ndarray):
            if out is not None or stream is not None:
                raise PhregError("extract: out and stream are for a batch on the GPU; got one on the host.")
            return self._open().run(self.feed(batch))
        return self._run_device(batch, out or {}, stream)

    def _run_device(self, batch: Any, out: Mapping[str, Any], stream: int | None) -> dict[str, Any]:
        from phreg_deploy.runtime.device_arrays import as_device

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
        size = (image.shape[1], image.shape[2])
        self.manifest.sizes.check(size, self.spec.patch)
        self.manifest.batches.check(image.shape[0])
        others = {} if self._base is None else {"pos_embed": self._positions(size)}
        unknown = set(out) - set(self.manifest.outputs)
        if unknown:
            raise PhregError(f"out: got {', '.join(sorted(unknown))}, expected {', '.join(self.manifest.outputs)}.")
        written = {name: as_device(value, stream) for name, value in out.items()}
        found: dict[str, Any] = backend.run_device(image, others, stream, written)
        return found

    def feed(self, batch: np.ndarray) -> dict[str, np.ndarray]:
        """What the graph is fed for a batch: the images, and their position embedding where the bundle serves several sizes."""
        if batch.dtype != np.uint8 or batch.ndim != 4 or batch.shape[3] != 3:
            _check_images(batch)
        size = (batch.shape[1], batch.shape[2])
        self.manifest.sizes.check(size, self.spec.patch)
        self.manifest.batches.check(len(batch))
        return {"image": batch} if self._base is None else {"image": batch, "pos_embed": self._positions(size)}

    def bare(self, batch: np.ndarray) -> Callable[[], object]:
        """The graph on this batch and nothing around it: what the extractor's own cost is measured against."""
        backend, feed = self._open(), self.feed(batch)
        return lambda: backend.run(feed)

    def close(self) -> None:
        """Free the session and the device. Calling the extractor afterwards is an error."""
        if self._backend is not None:
            self._backend.close()
            self._backend = None

    def _open(self) -> Backend:
        if self._backend is None:
            raise PhregError("extract: this FeatureExtractor was closed; load the bundle again.")
        return self._backend

    def _positions(self, size: tuple[int, int]) -> np.ndarray:
        with self._lock:
            found = self._grids.get(size)
            if found is None:
                check_multiple(size, self.spec.patch)
                found = resample(self._base, (size[0] // self.spec.patch[0], size[1] // self.spec.patch[1]))  # type: ignore[arg-type]
                self._grids[size] = found
                if len(self._grids) > GRIDS_KEPT:
                    self._grids.popitem(last=False)
            else:
                self._grids.move_to_end(size)
            return found


def _check_images(batch: Any) -> None:
    if (
        not isinstance(batch, np.ndarray)
        or batch.dtype != np.uint8
        or batch.ndim != 4
        or batch.shape[3] != 3
        or not len(batch)
    ):
        got = f"{batch.dtype} {batch.shape}" if isinstance(batch, np.ndarray) else type(batch).__name__
        raise PhregError(f"extract: got {got}, expected a uint8 RGB array (B, H, W, 3) with B at least 1.")
