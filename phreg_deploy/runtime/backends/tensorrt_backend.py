"""Native TensorRT behind the backend interface: the bundle's own engine, one lane per thread, never a fallback."""

from __future__ import annotations

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
from phreg_deploy.runtime.gpu.closing import Closing
from phreg_deploy.runtime.gpu.cuda import Cuda
from phreg_deploy.runtime.gpu.trt_context import Feed, TrtContext
from phreg_deploy.runtime.gpu.trt_library import deserialise, load_tensorrt, make_logger


class Plan(Closing):
    """A deserialised plan and the lanes that run it. ``run`` may be called from several threads.

    Args:
        profiles: its optimization profiles, in the plan's order.
        graphs: replay CUDA graphs; right where few shapes come again and again.

    Raises:
        PhregError: the plan is refused, or its tensors are not those of the profiles.
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
        self._lanes: list[TrtContext] = []
        self._closed = False
        self.diary = make_logger(trt)
        cuda.use()
        self._runtime, self.engine = deserialise(trt, plan, self.diary, host_code)
        names = {self.engine.get_tensor_name(i) for i in range(self.engine.num_io_tensors)}
        wanted = set(profiles[0].inputs)
        if not wanted <= names or self.engine.num_optimization_profiles != len(profiles):
            raise PhregError(
                f"engine: got tensors {sorted(names)} and {self.engine.num_optimization_profiles} profiles, expected {sorted(wanted)} and {len(profiles)}; the plan is not of this bundle."
            )

    def run(self, feed: Feed) -> Feed:
        with self._lane() as lane:
            return lane.run(feed)

    def run_device(
        self, image: DeviceArray, others: Feed, stream: int | None = None, out: Mapping[str, DeviceArray] | None = None
    ) -> dict[str, DeviceArray]:
        """Device memory to device memory, see ``TrtContext.run_device``."""
        with self._lane() as lane:
            return lane.run_device(image, others, stream, out)

    def split(self, feed: Feed, graph: bool = True) -> dict[str, float]:
        """One inference taken apart, milliseconds, see ``TrtContext.split``."""
        with self._lane() as lane:
            return lane.split(feed, graph)

    def layers(self, feed: Feed, rounds: int = 10) -> dict[str, float]:
        """Mean milliseconds of each layer, see ``TrtContext.layers``."""
        with self._lane() as lane:
            return lane.layers(feed, rounds)

    def device_memory(self) -> dict[str, int]:
        """Bytes: ``activations`` that each context takes, and how many ``contexts`` there are."""
        return {"activations": int(self.engine.device_memory_size_v2), "contexts": len(self._lanes)}

    @contextmanager
    def _lane(self) -> Iterator[TrtContext]:
        """A lane of the caller's own for as long as the block lasts."""
        if self._closed:
            raise PhregError("engine: it was closed; load the bundle again.")
        try:
            lane = self._idle.get_nowait()
        except Empty:  # every lane is at work in another thread
            self.cuda.use()
            lane = TrtContext(self.trt, self.cuda, self.engine, self.profiles, self.graphs)
            self._lanes.append(lane)
        try:
            yield lane
        finally:
            self._idle.put(lane)

    def close(self) -> None:
        """Free the lanes, then the engine, then the runtime: in that order, also after an error."""
        if self._closed:
            return
        self._closed = True
        failed = None
        for lane in self._lanes:
            try:
                lane.close()
            except PhregError as error:
                failed = failed or error
        self._lanes, self._idle = [], SimpleQueue()
        self.engine = None
        self._runtime = None
        if failed is not None:
            raise failed


class TensorRtBackend(Plan):
    """The engine in a bundle's ``engines/`` that was built for this GPU and this TensorRT, or the one that is given.

    Raises:
        BackendMissing: no TensorRT, no GPU, or no engine for them, with the command that builds it.
        PhregError: a damaged plan, or settings that TensorRT does not have.
    """

    name = "tensorrt"
    remark = ""

    def __init__(
        self, bundle: Bundle, tuning: BackendOptions, device: int = 0, engine: StoredPlan | None = None
    ) -> None:
        manifest = bundle.manifest
        if tuning.compute != "auto" and tuning.compute != manifest.precision:
            raise PhregError(
                f"compute: got {tuning.compute}, but an engine computes in what its bundle says: {manifest.precision}. Export it with --precision {tuning.compute}."
            )
        self.compute = manifest.precision
        trt = load_tensorrt(lean=True)
        cuda = Cuda(device)
        found = engine or find_plan(
            bundle, cuda.gpu.name, cuda.gpu.architecture, trt.__version__, cuda.gpu.driver // 1000
        )
        portable = found.key.settings.compatibility == "version"
        super().__init__(trt, cuda, found.read(), found.profiles, host_code=portable)
        self.found = found
