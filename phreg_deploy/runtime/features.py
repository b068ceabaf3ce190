"""``FeatureExtractor``: images -> dense features, without PyTorch. B batch, (Hp, Wp) patch grid, C width."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any, overload

import numpy as np

from phreg_deploy.bundle.bundle import Bundle
from phreg_deploy.errors import PhregError
from phreg_deploy.images.fitting import Fitted, check_fit, fit_as
from phreg_deploy.images.intake import check_color, on_gpu, rgb, single_picture, single_pictures
from phreg_deploy.runtime.auto import choose
from phreg_deploy.runtime.backends.instructions import advice
from phreg_deploy.runtime.backends.interface import Backend
from phreg_deploy.runtime.backends.options import BackendOptions
from phreg_deploy.runtime.backends.registry import GPU, open_backend
from phreg_deploy.runtime.dense_features import DenseFeatures
from phreg_deploy.runtime.device_runs import DeviceRuns, Steps
from phreg_deploy.runtime.feed import InputFeed, check_batch, pad_batch
from phreg_deploy.runtime.forking import ForkSafeBackend
from phreg_deploy.runtime.gpu_images.fitter import FittedFrames
from phreg_deploy.runtime.parity import gate_precision
from phreg_deploy.runtime.parts import dense_in_parts
from phreg_deploy.runtime.tiling import Report, TiledFeatures, tile, window_sizes
from phreg_deploy.signing import read_signed


class FeatureExtractor(AbstractContextManager["FeatureExtractor"]):
    """A loaded bundle. Several threads may call one extractor.

    Open a bundle with ``load``; then call the extractor with images, or ``run`` it on arrays that are already resized.
    A pickled extractor is loaded again from its path by the same backend. In a forked child the backend is opened again
    on first use.
    """

    def __init__(self, bundle: Bundle, backend: Backend) -> None:
        self.bundle, self.manifest, self.spec = bundle, bundle.manifest, bundle.manifest.model
        self.preprocess, self.color = self.manifest.preprocess, "rgb"
        self.public_key: Path | None = None
        self._fork_safe = ForkSafeBackend(backend)
        # The arguments of ``load``, for pickle.
        self._arguments: dict[str, Any] | None = None
        self.feed = InputFeed(bundle)
        self._device = DeviceRuns(self.manifest, self.feed)
        self.choice = f"{backend.name}: as given"

    @classmethod
    def load(
        cls,
        path: Path | str,
        backend: str = "auto",
        *,
        threads: int | None = None,
        compute: str = "auto",
        mode: str = "latency",
        verify: bool = True,
        examine: bool = True,
        device: int = 0,
        color: str = "rgb",
        exif: bool | None = None,
        fast: bool | None = None,
        public_key: Path | str | None = None,
    ) -> FeatureExtractor:
        """Open a bundle.

        Args:
            backend: a key of ``registry.BACKENDS``, or "auto": the fastest installed one that passes the bundle's own
                exam, which takes a second where several are installed.
            threads, compute, mode, device: see ``BackendOptions``.
            verify: first compare every file with its hash in the manifest.
            examine: with "auto", refuse a bundle that fails its exam on every backend. Pass False to check the gates
                yourself.
            color: "rgb" or "bgr" (OpenCV's order): the channel order of arrays in a call or in ``prepare``. Files and
                PIL images know their own; ``dense`` and ``run`` always take RGB.
            exif: turn files and PIL images upright by their EXIF orientation; None takes the manifest's value.
            fast: resize large images by ``resampling.shrink``, not by Pillow; None takes the manifest's value.
            public_key: refuse what its private key has not signed, see ``signing.verify_signature``; extra ``sign``.

        Raises:
            PhregError: no bundle, or a damaged, newer or unsigned one. BackendMissing: the backend is not usable.
        """
        check_color(color)
        options, bundle = BackendOptions(threads, compute, mode, device), read_signed(path, public_key, verify)
        if backend == "auto":
            opened, reason = choose(bundle, options, examine)
        else:
            opened, reason = open_backend(bundle, backend, options), f"{backend}: as asked"
        extractor = cls(bundle, opened)
        if opened.name not in GPU:
            if device:
                extractor.close()
                raise PhregError(
                    f"device: got GPU {device}, but {opened.name} runs on the processor. Leave it out, or choose a "
                    "backend on a GPU."
                )
            extractor._fork_safe.open_again = lambda: open_backend(bundle, opened.name, options)
        extractor.color = color
        steps = extractor.preprocess
        turned, shrunk = steps.exif if exif is None else exif, steps.fast if fast is None else fast
        extractor.preprocess = replace(steps, exif=turned, fast=shrunk)
        remarks = (reason, opened.remark, advice(bundle.manifest.precision))
        extractor.choice = "; ".join(remark for remark in remarks if remark)
        extractor._arguments = {"path": bundle.folder.absolute(), "backend": opened.name, **asdict(options)}
        extractor._arguments |= {"verify": verify, "examine": examine, "color": color, "exif": exif, "fast": fast}
        key = None if public_key is None else Path(public_key).absolute()
        extractor.public_key = extractor._arguments["public_key"] = key
        return extractor

    @property
    def backend(self) -> str:
        """The name of the backend that runs."""
        return self.opened.name

    @property
    def opened(self) -> Any:
        """The backend itself; in a forked child it is opened again first."""
        return self._fork_safe.backend or self._fork_safe.reopened()

    @property
    def compute(self) -> str:
        """The precision of all layers that are not in 8 bits: "fp32", "fp16" or "bf16"."""
        return self.opened.compute

    @property
    def precision(self) -> str:
        """The precision whose gates apply, see ``parity.gate_precision``."""
        return gate_precision(self.manifest, self.compute)

    def __call__(
        self,
        images: Any,
        size: tuple[int, int] | None = None,
        *,
        color: str | None = None,
        exif: bool | None = None,
        fit: str | None = None,
    ) -> DenseFeatures:
        """Features of one image, of an array of several, or of a list of these; a large batch is run in parts.

        Args:
            images: paths, encoded bytes, binary files, PIL images, or uint8 arrays ``(H, W, 3)``, ``(H, W)`` (grey) or
                ``(B, H, W, 3)`` of any size: from numpy, PyTorch's CPU, or another library that numpy can read.
            size: (height, width) of the model's input; None takes the bundle's own or preferred size.
            color, exif: as in ``load``, for this call.
            fit: "pad" keeps each image's aspect and fills the rest, which ``mask`` of the result marks; "crop" keeps
                the aspect and cuts out the centre; "squash" resizes the whole image; None does as the bundle says.

        Raises:
            PhregError: an input that is no image, an array without pixels or of another type, or an unreadable file.
        """
        pictures = single_pictures(images)
        if any(map(on_gpu, pictures)):
            return self._device.dense(self.opened, pictures, self._steps(size, color, fit))
        fitted = [self._fit(picture, size, color, exif, fit) for picture in pictures]
        masks = [one.mask for one in fitted if one.mask is not None]
        return self.dense(np.stack([one.image for one in fitted])).masked(np.stack(masks) if masks else None)

    def prepare(
        self,
        picture: Any,
        size: tuple[int, int] | None = None,
        *,
        color: str | None = None,
        exif: bool | None = None,
        fit: str | None = None,
    ) -> np.ndarray:
        """Preprocess one image as the bundle says: uint8 RGB ``(H, W, 3)`` at the input size; arguments of a call."""
        return self.fitted(picture, size, color=color, exif=exif, fit=fit).image

    def fitted(
        self,
        picture: Any,
        size: tuple[int, int] | None = None,
        *,
        color: str | None = None,
        exif: bool | None = None,
        fit: str | None = None,
    ) -> Fitted:
        """``prepare`` with the mask of the patches that are image; arguments of a call."""
        return self._fit(single_picture(picture, "prepare"), size, color, exif, fit)

    def tiled(
        self,
        image: Any,
        window: int | tuple[int, int] | None = None,
        stride: int | tuple[int, int] | None = None,
        *,
        color: str | None = None,
        exif: bool | None = None,
        report: Report | None = None,
    ) -> TiledFeatures:
        """Features of one image of any size, at its own resolution, from overlapping windows that are blended.

        Args:
            image: one image, as a call takes it. It is not resized.
            window: a size that the bundle serves, in pixels, or (height, width); None takes its own or preferred size.
            stride: the largest step between windows; steps are whole patches and even. None takes half the window.
            color, exif: as in ``load``, for this call.
            report: is called after each batch with the number of windows that are done, and of all.

        Raises:
            PhregError: as a call; several images; a window that is not served; a stride outside a patch to a window.
        """
        sizes = window_sizes(self.manifest, window, stride)
        order = self.color if color is None else check_color(color)
        array = rgb(single_picture(image, "tiled"), self.preprocess.exif if exif is None else exif, whole=True)
        bgr = order == "bgr" and isinstance(array, np.ndarray)
        return tile(array, self.dense, self.manifest, self.preprocess, *sizes, bgr=bgr, report=report)

    def fitted_on_gpu(
        self,
        frames: Any,
        size: tuple[int, int] | None = None,
        *,
        color: str | None = None,
        fit: str | None = None,
        stream: int | None = None,
    ) -> FittedFrames:
        """Preprocess frames on the GPU, and leave them there, for ``run``; arguments of a call.

        Args:
            stream: your ``cudaStream_t``: the call comes after the work in it and before what you queue next, and does
                not wait.

        Raises:
            PhregError: as a call; frames on the host, or a backend on the processor. BackendMissing: no NVRTC.
        """
        return self._device.fit(self.opened, single_pictures(frames), self._steps(size, color, fit), stream)

    def _steps(self, size: tuple[int, int] | None, color: str | None, fit: str | None) -> Steps:
        order = self.color if color is None else check_color(color)
        return size or self.manifest.sizes.default, self.preprocess, check_fit(fit), order == "bgr"

    def _fit(
        self, picture: Any, size: tuple[int, int] | None, color: str | None, exif: bool | None, fit: str | None
    ) -> Fitted:
        shape, preprocess, fit, bgr = steps = self._steps(size, color, fit)
        if on_gpu(picture):
            return self._device.fit(self.opened, [picture], steps).on_host()
        image = rgb(picture, self.preprocess.exif if exif is None else exif)
        return fit_as(image, shape, preprocess, self.spec.patch, fit, bgr and isinstance(image, np.ndarray))

    def dense(self, batch: Any) -> DenseFeatures:
        """Features of uint8 RGB images ``(B, H, W, 3)`` at a size that the bundle serves, for any B."""
        batch, lowest = check_batch(batch), self.manifest.batches.lowest
        return dense_in_parts(self.manifest, batch, batch.shape[1:3], lambda part: self.run(pad_batch(part, lowest)))

    @overload
    def run(self, batch: np.ndarray, *, out: None = None, stream: None = None) -> dict[str, np.ndarray]: ...

    @overload
    def run(self, batch: Any, *, out: Mapping[str, Any] | None = None, stream: int | None = None) -> dict[str, Any]: ...

    def run(self, batch: Any, *, out: Mapping[str, Any] | None = None, stream: int | None = None) -> dict[str, Any]:
        """Run the graph: uint8 ``(B, H, W, 3)`` at a served size and batch -> its outputs by name, in its own types.

        An array on a GPU (``__cuda_array_interface__`` or DLPack: torch, CuPy, numba, ...) may lie at any address and
        does not leave the GPU. The outputs stay there as ``DeviceArray``, which the same libraries read.

        Args:
            out: arrays on the GPU to write into, by output name; for a batch on the GPU only.
            stream: your ``cudaStream_t``: the call comes after the work in it and before what you queue next, and does
                not wait for the result; for a batch on the GPU only.

        Raises:
            PhregError: a size or batch that is not served, another type, or a backend that does not run on a GPU.
        """
        if not isinstance(batch, np.ndarray) and on_gpu(batch):
            return self._device.run(self.opened, batch, out or {}, stream)
        if out is not None or stream is not None:
            raise PhregError("extract: out and stream are for a batch on the GPU; got one on the host.")
        return self.opened.run(self.feed(batch))

    def graph_call(self, batch: Any) -> Callable[[], object]:
        """A function that runs the graph alone on this batch, to measure the extractor's own cost against it."""
        backend, feed = self.opened, self.feed(batch)
        return lambda: backend.run(feed)

    def close(self) -> None:
        """Free the session and the device. A later call raises an error."""
        try:
            self._device.close()
        finally:
            self._fork_safe.close()

    def __exit__(self, *_error: object) -> None:
        self.close()

    def __reduce__(self) -> tuple[Any, ...]:
        if self._arguments is None:
            raise PhregError("extract: only a FeatureExtractor from FeatureExtractor.load can be pickled.")
        # A closed extractor raises here.
        self.opened  # noqa: B018
        return partial(FeatureExtractor.load, **self._arguments), ()
