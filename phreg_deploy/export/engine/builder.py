"""Build a TensorRT plan from an ONNX file, with the API that TensorRT 10.3 to 11.x share. Needs no torch."""

from __future__ import annotations

import contextlib
import signal
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from phreg_deploy.bundle.plan_keys import BuildSettings
from phreg_deploy.bundle.profiles import ProfileShapes
from phreg_deploy.errors import BackendMissing, PhregError
from phreg_deploy.progress import SILENT, Progress
from phreg_deploy.runtime.gpu.trt_library import make_logger

MIB = 2**20


@dataclass(frozen=True)
class SerializedPlan:
    """``plan``: the serialised engine. ``timing_cache``: for the next build. ``warnings``: TensorRT's own text."""

    plan: bytes
    timing_cache: bytes
    seconds: float
    warnings: list[str] = field(default_factory=list)


def build_plan(
    trt: Any,
    graph: Path,
    profiles: list[ProfileShapes],
    settings: BuildSettings,
    *,
    workspace: int | None = None,
    timing_cache: bytes = b"",
    strict_cache: bool = True,
    progress: Progress = SILENT,
) -> SerializedPlan:
    """Build a plan from an ONNX file. The network is strongly typed: TensorRT computes in the types of the graph.

    Args:
        profiles: one or several optimization profiles; a graph with fixed shapes takes one with these shapes.
        workspace: MiB of device memory that tactics may use at most; None for TensorRT's own limit, the whole device.
        timing_cache: of an earlier build with this GPU and TensorRT.
        strict_cache: refuse a timing cache of another GPU or TensorRT, instead of starting a new one.

    Raises:
        BackendMissing: TensorRT cannot build here. PhregError: the parser refuses a node, which the message names, or
            the builder finds no implementation.
    """
    started, logger = time.perf_counter(), make_logger(trt)
    builder = _open_builder(trt, logger)
    network = _parse(trt, builder, graph, logger)
    config = _config(trt, builder, settings, workspace)
    for shapes in profiles:
        _add_profile(builder, network, config, shapes, logger)
    _set_timing_cache(config, timing_cache, strict_cache)
    plan = _serialize(trt, builder, network, config, progress)
    if plan is None:
        reason = logger.reason()
        hint = " Use --workspace, or a smaller batch." if "memory" in reason.lower() else ""
        raise PhregError(f"TensorRT: {trt.__version__} builds no engine from {graph}: {reason}.{hint}")
    cache = config.get_timing_cache()
    return SerializedPlan(
        plan=bytes(plan),
        timing_cache=b"" if cache is None else bytes(cache.serialize()),
        seconds=time.perf_counter() - started,
        warnings=logger.warnings(),
    )


def _open_builder(trt: Any, logger: Any) -> Any:
    try:
        return trt.Builder(logger)
    # The bindings get a null pointer if CUDA does not start.
    except (TypeError, RuntimeError) as error:
        reason = f"{error}; {logger.reason()}"
        raise BackendMissing(
            f"TensorRT: {trt.__version__} cannot build here: {reason}. A GPU and its driver are needed."
        ) from None


def _parse(trt: Any, builder: Any, graph: Path, logger: Any) -> Any:
    """Read the ONNX file into a strongly typed network."""
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser = trt.OnnxParser(network, logger)
    if parser.parse_from_file(str(graph)):
        return network
    reasons = _parser_errors(parser)
    hint = ""
    if "UInt8" in reasons:
        hint = " The bundle is of an older version, which gave uint8 to more than a Cast: export it again."
    raise PhregError(f"TensorRT: {trt.__version__} refuses {graph}: {reasons}.{hint}")


def _add_profile(builder: Any, network: Any, config: Any, shapes: ProfileShapes, logger: Any) -> None:
    profile = builder.create_optimization_profile()
    for i in range(network.num_inputs):
        tensor = network.get_input(i)
        low, best, high = (tuple(shape) for shape in shapes.inputs[tensor.name])
        profile.set_shape(tensor.name, low, best, high)
    if config.add_optimization_profile(profile) < 0:
        raise PhregError(f"TensorRT: it refuses the optimization profile {shapes.inputs}: {logger.reason()}.")


def _set_timing_cache(config: Any, data: bytes, strict: bool) -> None:
    """Give the builder the timings of earlier builds, or an empty cache."""
    cache = config.create_timing_cache(data)
    if data and (cache is None or not config.set_timing_cache(cache, ignore_mismatch=False)):
        if strict:
            raise PhregError(
                "timing cache: the file is damaged, or of another GPU or TensorRT. Give another with --timing-cache."
            )
        cache = config.create_timing_cache(b"")
    if cache is not None:
        config.set_timing_cache(cache, ignore_mismatch=False)


def _serialize(trt: Any, builder: Any, network: Any, config: Any, progress: Progress) -> Any:
    """Build with a progress bar; None if TensorRT finds no implementation. Ctrl-C stops the build."""
    with progress.task("build engine", None) as advance:
        monitor = _make_monitor(trt, advance)
        config.progress_monitor = monitor
        with _stoppable(monitor):
            plan = builder.build_serialized_network(network, config)
    if monitor.interrupted is not None:
        raise monitor.interrupted
    return plan


def _config(trt: Any, builder: Any, settings: BuildSettings, workspace: int | None) -> Any:
    config = builder.create_builder_config()
    if not settings.tf32:
        config.clear_flag(trt.BuilderFlag.TF32)
    if workspace is not None:
        config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, workspace * MIB)
    config.builder_optimization_level = settings.effort
    # The inspector reports fused layers only with detailed verbosity.
    config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED
    if settings.compatibility == "version":
        config.set_flag(trt.BuilderFlag.VERSION_COMPATIBLE)
    elif settings.compatibility == "ampere+":
        config.hardware_compatibility_level = trt.HardwareCompatibilityLevel.AMPERE_PLUS
    elif settings.compatibility == "same-cc":
        level = getattr(trt.HardwareCompatibilityLevel, "SAME_COMPUTE_CAPABILITY", None)
        if level is None:
            raise PhregError(
                f"compatibility: got same-cc, which TensorRT {trt.__version__} does not have; use none or ampere+."
            )
        config.hardware_compatibility_level = level
    return config


def _parser_errors(parser: Any) -> str:
    """Describe the parser's errors, each with its node; at most three."""
    texts = list(dict.fromkeys(_describe(parser.get_error(i)) for i in range(parser.num_errors)))
    more = f"; and {len(texts) - 3} more" if len(texts) > 3 else ""
    return "; ".join(texts[:3]) + more or "no reason given"


def _describe(error: Any) -> str:
    node = "the file"
    if error.node() >= 0:
        node = f"node {error.node_name() or error.node()} ({error.node_operator()})"
    for line in str(error.desc()).splitlines():
        if line and "Begin node" not in line and not line.startswith("Invalid Node"):
            return f"{node}: {line}"
    return f"{node}: {error.code()}"


@contextlib.contextmanager
def _stoppable(monitor: Any) -> Iterator[None]:
    """Make Ctrl-C stop the build. TensorRT would swallow a ``KeyboardInterrupt`` raised in its callback."""

    def note(_number: int, _frame: Any) -> None:
        monitor.interrupted = monitor.interrupted or KeyboardInterrupt()

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGINT, note)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, signal.SIG_DFL if before is None else before)


def _make_monitor(trt: Any, advance: Callable[..., None]) -> Any:
    """Show TensorRT's progress as a bar. An exception of the bar stops the build and is raised after it."""

    class Monitor(trt.IProgressMonitor):  # type: ignore[misc]
        def __init__(self) -> None:
            trt.IProgressMonitor.__init__(self)
            self.interrupted: BaseException | None = None

        def phase_start(self, phase_name: str, parent_phase: str | None, num_steps: int) -> None:
            self._quietly(0, phase_name)

        def step_complete(self, phase_name: str, step: int) -> bool:
            self._quietly(1, phase_name)
            return self.interrupted is None

        def phase_finish(self, phase_name: str) -> None:
            self._quietly(0, phase_name)

        def _quietly(self, count: int, note: str) -> None:
            try:
                advance(count, note=note[:60])
            # C++ frames cannot pass an exception on.
            except BaseException as error:
                self.interrupted = error

    return Monitor()
