"""Native TensorRT, which runs an engine of the bundle and never falls back to another backend."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from queue import Empty, SimpleQueue
from typing import Any

from phreg_deploy.bundle.bundle import Bundle
from phreg_deploy.bundle.plans import StoredPlan, find_plan
from phreg_deploy.bundle.profiles import ProfileShapes
from phreg_deploy.errors import PhregError
from phreg_deploy.runtime.backends.options import BackendOptions
from phreg_deploy.runtime.gpu.arrays import DeviceArray
from phreg_deploy.runtime.gpu.closing import Calls, Closing, close_all
from phreg_deploy.runtime.gpu.cuda import Cuda
from phreg_deploy.runtime.gpu.pool import OutputPool
from phreg_deploy.runtime.gpu.trt_library import deserialise, load_tensorrt, make_logger, plan_cuda
from phreg_deploy.runtime.trt.context import Feed, TrtContext
from phreg_deploy.runtime.trt.timing import time_layers, time_parts


class Plan(Closing):
    """A deserialised plan, and one context for each thread that calls it at the same time.

    Args:
        profiles: its optimisation profiles, in the plan's order.
        graphs: replay CUDA graphs; pays where few shapes return often.

    Raises:
        PhregError: TensorRT refuses the plan, or its tensors are not those of the profiles.
    """

    def __init__(
        self,
        trt: Any,
        cuda: Cuda,
        plan: bytes,
        profiles: list[ProfileShapes],
        *,
        graphs: bool = True,
        host_code: bool = False,
    ) -> None:
        self.trt, self.cuda, self.profiles, self.graphs = trt, cuda, profiles, graphs
        self._idle: SimpleQueue[TrtContext] = SimpleQueue()
        self._contexts: list[TrtContext] = []
        self._pool = OutputPool(cuda)
        self._calls = Calls()
        # The engine needs the logger as long as it lives.
        self._logger = make_logger(trt)
        with cuda.selected():
            self._runtime, self.engine = deserialise(trt, plan, self._logger, host_code)
        names = {self.engine.get_tensor_name(i) for i in range(self.engine.num_io_tensors)}
        inputs, count = set(profiles[0].inputs), self.engine.num_optimization_profiles
        if not inputs <= names or count != len(profiles):
            raise PhregError(
                f"engine: got tensors {sorted(names)} and {count} profiles, expected {sorted(inputs)} and "
                f"{len(profiles)}; the plan is not of this bundle."
            )

    def run(self, feed: Feed) -> Feed:
        with self.context() as context:
            return context.run(feed)

    def run_device(
        self, image: DeviceArray, others: Feed, stream: int | None = None, out: Mapping[str, DeviceArray] | None = None
    ) -> dict[str, DeviceArray]:
        """Device memory to device memory, see ``TrtContext.run_device``."""
        with self.context() as context:
            return context.run_device(image, others, stream, out)

    def run_to_host(self, image: DeviceArray, others: Feed) -> Feed:
        """Device memory to host arrays, see ``TrtContext.run_to_host``."""
        with self.context() as context:
            return context.run_to_host(image, others)

    def split(self, feed: Feed, graph: bool = True) -> dict[str, float]:
        """Milliseconds of each part of one inference, see ``time_parts``."""
        with self.context() as context:
            return time_parts(context, feed, graph)

    def layers(self, feed: Feed, rounds: int = 10) -> dict[str, float]:
        """Mean milliseconds of each layer, see ``time_layers``."""
        with self.context() as context:
            return time_layers(context, feed, rounds)

    def reserve(self, contexts: int) -> int:
        """Make execution contexts until there are so many; return how many there are.

        Raises ``PhregError`` if the GPU has too little memory for one of them.
        """
        with contextlib.ExitStack() as held:
            while len(self._contexts) < contexts:
                held.enter_context(self.context())
        return len(self._contexts)

    def device_memory(self) -> dict[str, int]:
        """Bytes of ``activations`` in each context, and the number of ``contexts``."""
        return {"activations": int(self.engine.device_memory_size_v2), "contexts": len(self._contexts)}

    @contextmanager
    def context(self) -> Iterator[TrtContext]:
        """A context that no other thread uses during the block, in which its GPU is selected."""
        with self._calls.one(), self.cuda.selected():
            try:
                context = self._idle.get_nowait()
            except Empty:  # other threads use every context
                context = TrtContext(self.trt, self.cuda, self.engine, self.profiles, self.graphs, self._pool)
                self._contexts.append(context)
            try:
                yield context
            finally:
                self._idle.put(context)

    def close(self) -> None:
        """Wait for the calls of other threads and for all work, then free the contexts, the engine and the runtime."""
        if not self._calls.end():
            return
        contexts, self._contexts, self._idle = self._contexts, [], SimpleQueue()
        with self.cuda.selected():
            try:
                close_all([*contexts, self._pool])
            finally:
                self.engine = None
                self._runtime = None


class TensorRtBackend(Plan):
    """The engine in a bundle's ``engines/`` that was built for this GPU and this TensorRT, or the given one.

    Raises:
        BackendMissing: no TensorRT, no GPU, or no engine for them; the message names the command that builds it.
        PhregError: a damaged plan, or options that TensorRT does not have.
    """

    name = "tensorrt"

    def __init__(self, bundle: Bundle, options: BackendOptions, plan: StoredPlan | None = None) -> None:
        self.compute = bundle.manifest.precision
        if options.compute not in ("auto", self.compute):
            raise PhregError(
                f"compute: got {options.compute}, but an engine computes in what its bundle says: {self.compute}. "
                f"Export it with --precision {options.compute}."
            )
        trt = load_tensorrt(lean=True)
        cuda = Cuda(options.device)
        gpu = cuda.gpu
        platform = plan_cuda(trt, gpu.driver)
        self.plan = plan or find_plan(bundle, gpu.kind, gpu.architecture, trt.__version__, platform)
        portable = self.plan.key.settings.compatibility == "version"
        super().__init__(trt, cuda, self.plan.read(), self.plan.profiles, host_code=portable)
        warnings = self._logger.warnings()
        self.remark = f"TensorRT warns: {warnings[0]}" if warnings else ""
