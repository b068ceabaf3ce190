"""An ONNX file -> a TensorRT plan: strongly typed, on the API that 10.3 and 11.x have in common. Needs no torch."""

from __future__ import annotations

import contextlib
import signal
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from phreg_deploy.bundle.plans import BuildSettings
from phreg_deploy.bundle.profiles import ProfileShapes
from phreg_deploy.errors import BackendMissing, PhregError
from phreg_deploy.progress import SILENT, Progress
from phreg_deploy.runtime.gpu.trt_library import make_logger

MIB = 2**20


@dataclass
class Built:
    """``plan`` serialised; ``timing_cache`` to build the next one faster; ``warnings`` of TensorRT, in its words."""

    plan: bytes
    timing_cache: bytes
    seconds: float
    warnings: list[str] = field(default_factory=list)


def build_plan(
    trt: Any, graph: Path, profiles: list[ProfileShapes], settings: BuildSettings, *, workspace: int | None = None,
    timing_cache: bytes = b"", strict_cache: bool = True, progress: Progress = SILENT,
) -> Built:  # fmt: skip
    """Build an engine from an ONNX file as it stands: every type is the graph's own.

    Args:
        profiles: one or several optimization profiles; a graph with fixed shapes takes one that says the same.
        workspace: MiB of device memory at most that tactics may use; None for TensorRT's own limit, the whole device.
        timing_cache: of an earlier build with this GPU and TensorRT. strict_cache: refuse one that is not, instead of
            beginning a new one.

    Raises:
        BackendMissing: TensorRT cannot build here. PhregError: the parser refuses a node, which is named, or the
            builder finds no implementation.
    """
    started, diary = time.perf_counter(), make_logger(trt)
    try:
        builder = trt.Builder(diary)
    except (TypeError, RuntimeError) as error:  # the bindings get a null pointer where CUDA does not start
        raise BackendMissing(
            f"TensorRT: {trt.__version__} cannot build here: {error}; {diary.reason()}. A GPU and its driver are needed."
        ) from None
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser = trt.OnnxParser(network, diary)
    if not parser.parse_from_file(str(graph)):
        refusal = _refusal(parser)
        hint = (
            " The bundle is of an older version, which gave uint8 to more than a Cast: export it again."
            if "UInt8" in refusal
            else ""
        )
        raise PhregError(f"TensorRT: {trt.__version__} refuses {graph}: {refusal}.{hint}")
    config = _config(trt, builder, settings, workspace)
    for shapes in profiles:
        profile = builder.create_optimization_profile()
        for i in range(network.num_inputs):
            tensor = network.get_input(i)
            low, best, high = (tuple(shape) for shape in shapes.inputs[tensor.name])
            profile.set_shape(tensor.name, low, best, high)
        if config.add_optimization_profile(profile) < 0:
            raise PhregError(f"TensorRT: it refuses the optimization profile {shapes.inputs}: {diary.reason()}.")
    cache = config.create_timing_cache(timing_cache)
    if timing_cache and (cache is None or not config.set_timing_cache(cache, ignore_mismatch=False)):
        if strict_cache:
            raise PhregError(
                "timing cache: the given file is damaged, or of another GPU or TensorRT. Give another with --timing-cache."
            )
        cache = config.create_timing_cache(b"")
    if cache is not None:
        config.set_timing_cache(cache, ignore_mismatch=False)
    with progress.task("build engine", None) as advance:
        monitor = _make_monitor(trt, advance)
        config.progress_monitor = monitor
        with _stoppable(monitor):
            plan = builder.build_serialized_network(network, config)
    if monitor.interrupted is not None:
        raise monitor.interrupted
    if plan is None:
        reason = diary.reason()
        hint = " Use --workspace, or a smaller batch." if "memory" in reason.lower() else ""
        raise PhregError(f"TensorRT: {trt.__version__} builds no engine from {graph}: {reason}.{hint}")
    kept = config.get_timing_cache()
    return Built(
        bytes(plan),
        bytes(kept.serialize()) if kept is not None else b"",
        time.perf_counter() - started,
        diary.warnings(),
    )


def _config(trt: Any, builder: Any, settings: BuildSettings, workspace: int | None) -> Any:
    config = builder.create_builder_config()
    if not settings.tf32:
        config.clear_flag(trt.BuilderFlag.TF32)
    if workspace is not None:
        config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, workspace * MIB)
    config.builder_optimization_level = settings.effort
    config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED  # or the inspector cannot say what was fused
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


def _refusal(parser: Any) -> str:
    """The parser's reasons in words, each with its node."""
    found = []
    for i in range(parser.num_errors):
        error = parser.get_error(i)
        lines = [
            line
            for line in str(error.desc()).splitlines()
            if line and "Begin node" not in line and not line.startswith("Invalid Node")
        ]
        node = (
            f"node {error.node_name() or error.node()} ({error.node_operator()})" if error.node() >= 0 else "the file"
        )
        text = f"{node}: {lines[0] if lines else error.code()}"
        if text not in found:
            found.append(text)
    return "; ".join(found[:3]) + (f"; and {len(found) - 3} more" if len(found) > 3 else "") or "no reason given"


@contextlib.contextmanager
def _stoppable(monitor: Any) -> Iterator[None]:
    """Ctrl-C stops the build. Raised in a callback, which is where Python would raise it, TensorRT swallows it."""

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
    """TensorRT's progress as a bar. What the bar raises meanwhile stops the build and is raised after it."""

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
            except BaseException as error:  # it must not travel through TensorRT's frames
                self.interrupted = error

    return Monitor()
