"""Run a TensorRT engine from one thread: a context, a stream, pinned staging, and a CUDA graph per shape."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Mapping
from typing import Any

import numpy as np

from phreg_deploy.bundle.profiles import ProfileShapes
from phreg_deploy.errors import PhregError
from phreg_deploy.runtime.gpu.arrays import DeviceArray
from phreg_deploy.runtime.gpu.closing import Closing
from phreg_deploy.runtime.gpu.cuda import Cuda, DeviceBuffer, Event, Graph, PinnedBuffer, Stream

Feed = dict[str, np.ndarray]


class TrtContext(Closing):
    """An execution context with its stream and buffers, for one thread at a time, as TensorRT requires.

    Buffers only grow. A graph holds the upload, the inference and the download for one set of shapes. It is recorded on
    the second call in a row with these shapes, because TensorRT allocates memory in the first. It is dropped when the
    context gets other shapes or addresses: NVIDIA calls its replay undefined from then on.
    """

    def __init__(self, trt: Any, cuda: Cuda, engine: Any, profiles: list[ProfileShapes], graphs: bool) -> None:
        self.trt, self.cuda, self.engine, self.profiles, self.graphs = trt, cuda, engine, profiles, graphs
        self._owned: list[Closing] = []
        self._host: dict[str, PinnedBuffer] = {}
        self._device: dict[str, DeviceBuffer] = {}
        self._recorded: dict[tuple[Any, ...], Graph] = {}
        self._context: Any = None
        try:
            self.stream = self._own(Stream(cuda))
            self._context = engine.create_execution_context()
            if self._context is None:
                raise PhregError(
                    "engine: TensorRT made no execution context; the GPU has too little memory for one more thread."
                )
            self._done: Event = self._own(Event(cuda))
        except BaseException:
            self.close()
            raise
        names = [engine.get_tensor_name(i) for i in range(engine.num_io_tensors)]
        inputs = {name for name in names if engine.get_tensor_mode(name) == trt.TensorIOMode.INPUT}
        self.inputs, self.outputs = [n for n in names if n in inputs], [n for n in names if n not in inputs]
        self.dtypes = {name: np.dtype(trt.nptype(engine.get_tensor_dtype(name))) for name in names}
        self._shapes: dict[str, tuple[int, ...]] = {}
        self._profile = 0
        self._warm_keys: set[tuple[Any, ...]] = set()
        # Whether work of this context is queued on a caller's stream.
        self._pending = False
        # Inputs that the device holds already, e.g. a position embedding.
        self._last: dict[str, np.ndarray] = {}

    def run(self, feed: Feed) -> Feed:
        """Run on host arrays, and return host arrays."""
        key = self._ready({name: value.shape for name, value in feed.items()})
        self._stage(feed)
        graph = self._recorded.get(key)
        if graph is not None:
            graph.launch(self.stream.handle)
        elif self.graphs and key in self._warm_keys:
            self._recorded[key] = self._capture(image=True)
            self._recorded[key].launch(self.stream.handle)
        else:
            self._upload("image")
            self._enqueue(self.stream.handle)
            self._download()
            self._warm_keys.add(key)
        self.stream.wait()
        return {name: self._host[name].view(self._shapes[name], self.dtypes[name]).copy() for name in self.outputs}

    def run_device(
        self, image: DeviceArray, others: Feed, stream: int | None, out: Mapping[str, DeviceArray] | None
    ) -> dict[str, DeviceArray]:
        """Run on device memory without a copy; with a ``stream`` of the caller, return before the work is done."""
        shapes = {"image": image.shape, **{name: value.shape for name, value in others.items()}}
        self._ready(shapes)
        self._stage(others)
        wanted = self._shapes
        outputs = dict(out) if out else {}
        handle = self.stream.handle if stream is None else stream
        # Earlier work of this context, and the work that fills the arrays, must come first.
        before = {self.stream.handle, *(a.stream for a in (image, *outputs.values()) if a.stream is not None)}
        for other in before - {handle}:
            self._done.order(other, handle)
        # The next call must set all addresses again.
        self._shapes = {}
        self._address("image", image.pointer)
        for name in self.outputs:
            shape, dtype = wanted[name], self.dtypes[name]
            if name not in outputs:
                outputs[name] = DeviceArray.allocate(self.cuda, shape, dtype)
            elif outputs[name].shape != shape or outputs[name].dtype != dtype:
                raise PhregError(
                    f"out: got {name} as {outputs[name].dtype} {outputs[name].shape}, expected {dtype} {shape}."
                )
            self._address(name, outputs[name].pointer)
        self._enqueue(handle)
        self._done.record(handle)
        self._pending = stream is not None
        for array in outputs.values():
            array.stream = stream
        if stream is None:
            self.stream.wait()
        return outputs

    def split(self, feed: Feed, graph: bool) -> dict[str, float]:
        """Milliseconds of each part of one inference: ``enqueue`` on the host, the others on the device."""
        key = self._ready({name: value.shape for name, value in feed.items()})
        self._stage(feed)
        marks = [Event(self.cuda) for _ in range(4)]
        try:
            marks[0].record(self.stream.handle)
            self._upload("image")
            marks[1].record(self.stream.handle)
            started = time.perf_counter()
            if graph:
                self._compute_graph(key).launch(self.stream.handle)
            else:
                self._enqueue(self.stream.handle)
            enqueue = 1e3 * (time.perf_counter() - started)
            marks[2].record(self.stream.handle)
            self._download()
            marks[3].record(self.stream.handle)
            marks[3].wait()
            parts = {name: marks[i + 1].since(marks[i]) for i, name in enumerate(("h2d", "compute", "d2h"))}
            return {**parts, "enqueue": enqueue, "latency": sum(parts.values())}
        finally:
            for mark in marks:
                mark.close()

    def layers(self, feed: Feed, rounds: int) -> dict[str, float]:
        """Mean milliseconds of each layer by TensorRT's profiler, which slows the run down."""
        trt, times = self.trt, dict[str, float]()

        class Profiler(trt.IProfiler):  # type: ignore[misc,name-defined]
            def __init__(self) -> None:
                trt.IProfiler.__init__(self)

            def report_layer_time(self, layer_name: str, ms: float) -> None:
                times[layer_name] = times.get(layer_name, 0.0) + ms

        self._ready({name: value.shape for name, value in feed.items()})
        self._stage(feed)
        self._upload("image")
        context = self._context
        # The first run, which may allocate memory, does not count.
        self._enqueue(self.stream.handle)
        self.stream.wait()
        context.profiler = Profiler()
        try:
            for _ in range(rounds):
                self._enqueue(self.stream.handle)
                self.stream.wait()
        finally:
            context.profiler = None
            self._forget()
        return {name: value / rounds for name, value in times.items()}

    def _ready(self, shapes: dict[str, tuple[int, ...]]) -> tuple[Any, ...]:
        """Set the profile, shapes, buffers and addresses for inputs of these shapes; return the key of their graph."""
        self.cuda.use()
        if self._pending:
            self.cuda.call("cudaStreamWaitEvent", self.stream.handle, self._done.handle, 0)
            self._pending = False
        key = tuple(sorted(shapes.items()))
        if all(self._shapes.get(name) == tuple(shape) for name, shape in shapes.items()):
            return key
        index = next((i for i, profile in enumerate(self.profiles) if profile.holds(shapes)), None)
        if index is None:
            raise PhregError(
                f"engine: got inputs of {shapes}, expected {' or '.join(str(p.inputs) for p in self.profiles)}. "
                "Build the bundle again with these sizes."
            )
        self._forget()
        # An error below must leave no shapes that look ready.
        self._shapes = {}
        context = self._context
        if index != self._profile:
            if not context.set_optimization_profile_async(index, self.stream.handle):
                raise PhregError(f"engine: TensorRT refuses the optimization profile {index}.")
            self.stream.wait()
            self._profile = index
        for name, shape in shapes.items():
            if not context.set_input_shape(name, tuple(shape)):
                raise PhregError(f"engine: TensorRT refuses {name} of shape {tuple(shape)}.")
        missing = context.infer_shapes()
        if missing:
            raise PhregError(
                f"engine: the shapes of {', '.join(missing)} are not known; the plan is not of this bundle."
            )
        known = {name: tuple(shape) for name, shape in shapes.items()}
        known.update({name: tuple(context.get_tensor_shape(name)) for name in self.outputs})
        for name, shape in known.items():
            self._grow(name, int(np.prod(shape)) * self.dtypes[name].itemsize)
            self._address(name, self._device[name].pointer)
        self._shapes = known
        return key

    def _grow(self, name: str, size: int) -> None:
        if name in self._device and self._device[name].size >= size:
            return
        self._last.pop(name, None)
        for buffers in (self._device, self._host):
            if name in buffers:
                buffers.pop(name).close()
        device = DeviceBuffer(self.cuda, size)
        try:
            self._host[name] = PinnedBuffer(self.cuda, size)
        except BaseException:
            device.close()
            raise
        self._device[name] = device

    def _forget(self) -> None:
        """Drop the graphs, because the context changes."""
        while self._recorded:
            self._recorded.popitem()[1].close()
        self._warm_keys.clear()

    def _address(self, name: str, pointer: int) -> None:
        if not self._context.set_tensor_address(name, pointer):
            raise PhregError(f"engine: TensorRT refuses the address of {name}.")

    def _stage(self, feed: Feed) -> None:
        """Copy to pinned memory; upload inputs other than the image, if they changed."""
        for name, value in feed.items():
            if self.dtypes[name] != value.dtype:
                raise PhregError(f"engine: got {name} in {value.dtype}, expected {self.dtypes[name]}.")
            if name == "image":
                np.copyto(self._host[name].view(value.shape, value.dtype), value)
            elif self._last.get(name) is not value:
                np.copyto(self._host[name].view(value.shape, value.dtype), value)
                self._upload(name)
                self.stream.wait()
                self._last[name] = value

    def _upload(self, name: str) -> None:
        size = int(np.prod(self._shapes[name])) * self.dtypes[name].itemsize
        self.cuda.copy(self._device[name].pointer, self._host[name].pointer, size, "HostToDevice", self.stream.handle)

    def _download(self) -> None:
        for name in self.outputs:
            size = int(np.prod(self._shapes[name])) * self.dtypes[name].itemsize
            self.cuda.copy(
                self._host[name].pointer, self._device[name].pointer, size, "DeviceToHost", self.stream.handle
            )

    def _enqueue(self, stream: int) -> None:
        if not self._context.execute_async_v3(stream):
            raise PhregError("engine: TensorRT could not start the inference; the device may be out of memory.")

    def _compute_graph(self, key: tuple[Any, ...]) -> Graph:
        """The graph of the inference without upload and download."""
        compute_key = ("compute", *key)
        if compute_key not in self._recorded:
            self._enqueue(self.stream.handle)
            self.stream.wait()
            self._recorded[compute_key] = self._capture(image=False)
        return self._recorded[compute_key]

    def _capture(self, image: bool) -> Graph:
        """Record the inference as a graph, and with ``image`` also the upload and the download."""
        self.stream.begin()
        try:
            if image:
                self._upload("image")
            self._enqueue(self.stream.handle)
            if image:
                self._download()
        except BaseException:
            # End the recording, or the stream could neither be used nor freed.
            with contextlib.suppress(PhregError):
                self.stream.end().close()
            raise
        return self.stream.end()

    def _own(self, thing: Any) -> Any:
        self._owned.append(thing)
        return thing

    def close(self) -> None:
        """Free everything, then raise the first error."""
        # The context must go before its memory and stream.
        self._context = None
        things = [*self._recorded.values(), *self._device.values(), *self._host.values(), *reversed(self._owned)]
        failed = None
        for thing in things:
            try:
                thing.close()
            except PhregError as error:
                failed = failed or error
        self._owned = []
        if failed is not None:
            raise failed
