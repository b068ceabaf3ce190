"""Run a TensorRT engine from one thread: a context, a stream of its own, buffers and CUDA graphs."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np

from phreg_deploy.bundle.profiles import ProfileShapes
from phreg_deploy.errors import PhregError
from phreg_deploy.runtime.gpu.arrays import DeviceArray, stream_number
from phreg_deploy.runtime.gpu.closing import C, Closing, close_all
from phreg_deploy.runtime.gpu.cuda import Cuda, Event, Stream
from phreg_deploy.runtime.gpu.pool import OutputPool
from phreg_deploy.runtime.trt.buffers import TensorBuffers
from phreg_deploy.runtime.trt.execution import Execution, describe_tensors
from phreg_deploy.runtime.trt.recordings import Recordings

Feed = dict[str, np.ndarray]
# Kinds of recordings: the inference with the copies from and to the host, and alone.
WITH_COPIES, ALONE = "with copies", "alone"


class TrtContext(Closing):
    """An execution context with its stream, buffers and graphs, for one thread at a time, as TensorRT requires.

    The caller selects the GPU (``Cuda.selected``) around everything that it calls.

    All work is queued in the context's own stream, also that on a caller's arrays: ``enqueueV3`` on the default stream
    "may lead to performance issues due to additional cudaDeviceSynchronize() calls" (NvInferRuntime.h). Events put a
    caller's stream in order before and after it. The engine reads and writes the context's own buffers only, so its
    addresses change only with larger shapes, and the graphs stay valid for arrays at any address.

    ``how``: how the latest inference was queued, see ``Recordings``.
    """

    def __init__(
        self, trt: Any, cuda: Cuda, engine: Any, profiles: list[ProfileShapes], graphs: bool, pool: OutputPool
    ) -> None:
        self.trt, self.cuda, self.pool = trt, cuda, pool
        self.how = ""
        # Whether the stream may have work that the host has not waited for.
        self._busy = False
        # Inputs that the device holds already, e.g. a position embedding.
        self._held: dict[str, np.ndarray] = {}
        self._things: list[Closing] = []
        try:
            self.stream = self._own(Stream(cuda))
            self.outputs, self.dtypes = describe_tensors(trt, engine)
            self._buffers = self._own(TensorBuffers(cuda, self.stream, self.dtypes))
            # Before and after a call on the caller's stream.
            self._before, self._after = (self._own(Event(cuda, timing=False)) for _ in range(2))
            self._execution = self._own(Execution(engine, profiles, self.stream, self._buffers, self.outputs))
            self._recordings = self._own(Recordings(self.stream, graphs))
        except BaseException:
            self.close()
            raise

    def _own(self, thing: C) -> C:
        self._things.append(thing)
        return thing

    def run(self, feed: Feed) -> Feed:
        """Run on host arrays, and return host arrays."""
        self.prepare(feed)
        with self._settled_after_errors():
            self.how = self._recordings.queue(WITH_COPIES, self._infer_with_copies)
        self.wait()
        return {name: self._buffers.view(name).copy() for name in self.outputs}

    def run_device(
        self, image: DeviceArray, others: Feed, stream: int | None, out: Mapping[str, DeviceArray] | None
    ) -> dict[str, DeviceArray]:
        """Run on device memory at any address; with a ``stream`` of the caller, return before the work is done."""
        self._set_shapes({"image": image.shape, **{name: value.shape for name, value in others.items()}})
        self._load(others)
        given = dict(out or {})
        waited = {a.stream for a in (image, *given.values())} | {stream}
        # 0 and 1 are both the default stream.
        before = {stream_number(handle) for handle in waited if handle is not None}
        outputs = {name: self._output(name, given.get(name), before) for name in self.outputs}
        with self._settled_after_errors():
            for handle in before:
                self._before.order(handle, self.stream.handle)
            self._buffers.fetch("image", image.pointer)
            self.queue_inference()
            for name, array in outputs.items():
                self._buffers.hand_over(name, array.pointer)
            if stream is not None:
                self._after.order(self.stream.handle, stream)
        if stream is None:
            self.wait()
        else:
            image.read_on(stream)
        for name, array in outputs.items():
            array.filled_on(stream, name in given)
        return outputs

    def run_to_host(self, image: DeviceArray, others: Feed) -> Feed:
        """Run on device memory at any address, and return host arrays."""
        self._set_shapes({"image": image.shape, **{name: value.shape for name, value in others.items()}})
        self._buffers.pin(self.outputs)
        self._load(others)
        with self._settled_after_errors():
            if image.stream is not None:
                self._before.order(image.stream, self.stream.handle)
            self._buffers.fetch("image", image.pointer)
            self.queue_inference()
            self.download()
        self.wait()
        return {name: self._buffers.view(name).copy() for name in self.outputs}

    def prepare(self, feed: Feed) -> None:
        """Set the shapes of the inputs, and put the image where ``upload`` finds it."""
        self._set_shapes({name: value.shape for name, value in feed.items()})
        self._buffers.pin(("image", *self.outputs))
        self._load({name: value for name, value in feed.items() if name != "image"})
        self._buffers.write("image", feed["image"])

    def upload(self) -> None:
        """Queue the copy of the image to the device."""
        self._busy = True
        self._buffers.upload("image")

    def download(self) -> None:
        """Queue the copy of every output to the host."""
        for name in self.outputs:
            self._buffers.download(name)

    def infer(self) -> None:
        """Queue an inference without a graph."""
        self._busy = True
        self._execution.infer()

    def queue_inference(self) -> None:
        """Queue an inference, by a graph from the second one with the same shapes on."""
        self._busy = True
        self.how = self._recordings.queue(ALONE, self.infer)

    def warm_up(self) -> None:
        """Infer until the next ``queue_inference`` replays a graph, if the context records any."""
        while self._recordings.wanted and not self._recordings.holds(ALONE):
            self.queue_inference()
            self.wait()

    def wait(self) -> None:
        """Wait for all work of this context."""
        self.stream.wait()
        self._busy = False

    @contextmanager
    def profiled(self, profiler: Any) -> Iterator[None]:
        """Report the times of layers to ``profiler`` in the block; graphs do not survive it."""
        self._execution.profile(profiler)
        try:
            yield
        finally:
            self._execution.profile(None)
            self._forget()

    def _infer_with_copies(self) -> None:
        self.upload()
        self.infer()
        self.download()

    @contextmanager
    def _settled_after_errors(self) -> Iterator[None]:
        """After an error in the block, wait, so that nothing reads the caller's memory behind its back."""
        try:
            yield
        except BaseException:
            with contextlib.suppress(PhregError):
                self.wait()
            raise

    def _settle(self) -> None:
        if self._busy:
            self.wait()

    def _output(self, name: str, given: DeviceArray | None, before: set[int]) -> DeviceArray:
        """The caller's array for an output after a check, or one from the pool."""
        shape, dtype = self._buffers.shapes[name], self.dtypes[name]
        if given is None:
            return self.pool.array(shape, dtype, before)
        if given.shape != shape or given.dtype != dtype:
            raise PhregError(f"out: got {name} as {given.dtype} {given.shape}, expected {dtype} {shape}.")
        return given

    def _set_shapes(self, shapes: dict[str, tuple[int, ...]]) -> None:
        """Set the profile, shapes and addresses for inputs of these shapes; nothing is done if they are set."""
        known = self._buffers.shapes
        if known and all(known.get(name) == tuple(shape) for name, shape in shapes.items()):
            return
        index = self._execution.profile_of(shapes)
        self._forget()
        self._execution.set_shapes(index, shapes, self._before_buffers_move)

    def _before_buffers_move(self) -> None:
        self._settle()
        self._held.clear()

    def _load(self, others: Feed) -> None:
        """Upload inputs other than the image, if they changed."""
        for name, value in others.items():
            if self._held.get(name) is not value:
                self._held.pop(name, None)
                # An earlier upload may still read the page-locked memory.
                self._settle()
                self._buffers.pin([name])
                self._buffers.write(name, value)
                self._busy = True
                self._buffers.upload(name)
                self._held[name] = value

    def _forget(self) -> None:
        """Drop the graphs, because the context changes."""
        if self._recordings:
            self._settle()
        self._recordings.forget()

    def close(self) -> None:
        """Wait, free everything, then raise the first error."""
        things, self._things = [*reversed(self._things)], []
        if things:
            try:
                self.stream.wait()
            finally:
                close_all(things)
