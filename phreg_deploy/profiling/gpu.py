"""Measure a bundle on a GPU: parts of an inference, throughput over streams, layers, memory, energy, pacing.

The parts are those of NVIDIA's trtexec. Latency is h2d + compute + d2h of one inference alone, by CUDA events; enqueue
is the host's time to submit it. If enqueue takes longer than compute, the device waits during compute, and a CUDA graph
helps.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np

from phreg_deploy.errors import PhregError
from phreg_deploy.profiling.device.peaks import Peaks
from phreg_deploy.profiling.device.telemetry import Telemetry, watched
from phreg_deploy.profiling.load import mark_pareto, pace, sweep
from phreg_deploy.profiling.report import Entry, GpuReport
from phreg_deploy.profiling.roofline import EIGHT_BIT_PARTS, group_layers, roofline
from phreg_deploy.profiling.timing import AGREE, CONFIDENCE, LEAST, RESAMPLES, WINDOWS, measure
from phreg_deploy.progress import Progress
from phreg_deploy.runtime.backends.interface import DeviceBackend, ProfiledBackend
from phreg_deploy.runtime.features import FeatureExtractor

# Rounds of the layer profile.
ROUNDS = 20
# Bytes of one activation and of one weight.
BYTES = {"fp32": (4, 4), "fp16": (2, 2), "bf16": (2, 2), "int8": (2, 1), "fp8": (2, 1)}


@dataclass(frozen=True)
class GpuRequest:
    """What to measure on a GPU.

    ``batches`` and ``size`` (height, width): None for the bundle's best and default. ``seconds``: of measuring per
    configuration if it is stable, three times that at most. ``streams``: numbers of threads that call at once. ``fps``:
    also feed images at this rate. ``idle_seconds``: of measuring idle power first; 0 for none. ``hidden``: width of the
    model's MLP, if it is not 4 times the model's.
    """

    batches: list[int] | None
    size: tuple[int, int] | None
    seconds: float
    streams: list[int]
    fps: float | None = None
    warmup_ms: float = 200
    idle_seconds: float = 2.0
    hidden: int | None = None


def profile_gpu(
    extractor: FeatureExtractor,
    request: GpuRequest,
    *,
    progress: Progress,
    telemetry: Telemetry | None = None,
    peaks: Peaks | None = None,
    metadata: Mapping[str, str] | None = None,
) -> GpuReport:
    """Measure everything that a GPU can show of a bundle.

    Args:
        telemetry: samples power, clocks and throttling during each measurement; the caller closes it.
        peaks: of ``find_peaks``; adds a roofline.
        metadata: layer -> what TensorRT's inspector says of it; without it, fused layers are placed by their kernel's
            name.

    Raises:
        PhregError: a size, batch or number of streams that is not served, or an inference fails.
    """
    manifest, backend = extractor.manifest, extractor.opened
    size, batches = request.size or manifest.sizes.default, request.batches or [manifest.batches.best]
    _check(extractor, request, size, batches)
    profiled = backend if isinstance(backend, ProfiledBackend) else None
    missing = {}
    if profiled is None:
        missing["parts"] = f"{backend.name} does not report the parts of an inference; latency is the host's."
        missing["layers"] = f"{backend.name} has no layer profile."
    used = _used_memory(backend)
    idle_power = telemetry.measure_idle(request.idle_seconds) if telemetry and request.idle_seconds else None
    case = partial(_BatchProfile, extractor, profiled, request, size, progress)
    cases = [case(batch, telemetry, peaks, metadata) for batch in batches]
    streams = [entry for profile in cases for entry in profile.streams]
    mark_pareto(streams)
    results = [entry for profile in cases for entry in profile.results]
    return GpuReport(
        method=_method(request),
        model=_model(extractor),
        memory={
            "before": used,
            "after": _used_memory(backend),
            "device": profiled.device_memory() if profiled else None,
        },
        idle_power=idle_power,
        results=results,
        streams=streams,
        layers=[profile.layers for profile in cases if profile.layers],
        queue=[profile.queue for profile in cases if profile.queue],
        roofline=[profile.roofline for profile in cases if profile.roofline],
        missing=missing,
        watched=[entry for profile in cases for entry in profile.watched],
        stable=all(result["stable"] for result in results),
        peaks=peaks.to_json() if peaks is not None else None,
    )


class _BatchProfile:
    """The measurements at one batch; None where one was not asked for or the backend cannot tell."""

    def __init__(
        self,
        extractor: FeatureExtractor,
        backend: ProfiledBackend | None,
        request: GpuRequest,
        size: tuple[int, int],
        progress: Progress,
        batch: int,
        telemetry: Telemetry | None,
        peaks: Peaks | None,
        metadata: Mapping[str, str] | None,
    ) -> None:
        self._case: Entry = {"batch": batch, "size": list(size)}
        images = np.random.default_rng(batch).integers(0, 256, (batch, *size, 3), dtype=np.uint8)
        feed, run = extractor.feed(images), partial(extractor.run, images)
        calls: dict[bool | None, Callable[[], dict[str, float]]] = {None: partial(_timed, extractor.graph_call(images))}
        if backend is not None:
            calls = {graph: partial(backend.split, feed, graph) for graph in (False, True)}
        contexts = partial(_reserve, backend)
        with watched(telemetry) as watch:
            measured = measure(calls, request.seconds, request.warmup_ms, progress)
            frames = batch * sum(parts["latency"]["calls"] for parts in measured.values())
        self.results = [self._result(graph, parts) for graph, parts in measured.items()]
        self.watched = [{**self._case, "measurement": "latency", **watch.summary(frames)}]
        self.streams = [
            {**self._case, **sweep(run, count, request.seconds, progress, batch, telemetry, contexts(count))}
            for count in request.streams
        ]
        self.watched += [
            {**self._case, "measurement": f"{entry['streams']} threads", "telemetry": entry["telemetry"]}
            for entry in self.streams
        ]
        self.layers: Entry | None = None
        if backend is not None:
            with watched(telemetry) as watch:
                self.layers = {**self._case, **group_layers(backend.layers(feed, ROUNDS), metadata)}
            self.watched.append({**self._case, "measurement": "layers", **watch.summary(batch * ROUNDS)})
        self.queue: Entry | None = None
        if request.fps is not None:
            with watched(telemetry) as watch:
                self.queue = {**self._case, **pace(run, request.fps, request.seconds)}
            summary = watch.summary(batch * self.queue["frames"])
            self.queue.update(summary)
            self.watched.append({**self._case, "measurement": "paced", **summary})
        self.roofline = None if peaks is None else self._roofline(extractor, request, peaks)

    def _result(self, graph: bool | None, parts: Entry) -> Entry:
        rate = 1e3 * self._case["batch"] / parts["latency"]["mean"]
        return {**self._case, "graph": graph, **parts, "images_per_second": rate}

    def _roofline(self, extractor: FeatureExtractor, request: GpuRequest, peaks: Peaks) -> Entry:
        precision = extractor.manifest.precision
        activation, weight = BYTES.get(precision, (4, 4))
        compute = [result["compute"]["p50"] for result in self.results if "compute" in result]
        return roofline(
            extractor.spec,
            peaks,
            batch=self._case["batch"],
            size=tuple(self._case["size"]),
            hidden=request.hidden,
            activation_bytes=activation,
            weight_bytes=weight,
            measured_ms=min(compute, default=None),
            layers_ms=self.layers["parts"] if self.layers else None,
            eight_bit=EIGHT_BIT_PARTS.get(precision, ()),
            readout=extractor.manifest.readout.name,
        )


def pci_of(cuda: Any) -> str:
    """The bus id of a ``Cuda``'s device, e.g. "0000:01:00.0", by which NVML finds the same one."""
    raw = cuda.call("cudaDeviceGetPCIBusId", 32, cuda.index)
    return (raw.decode() if isinstance(raw, bytes) else str(raw)).partition("\x00")[0].strip()


def _check(extractor: FeatureExtractor, request: GpuRequest, size: tuple[int, int], batches: list[int]) -> None:
    extractor.manifest.sizes.check(size, extractor.spec.patch)
    numbers = (("fps", request.fps), ("seconds", request.seconds), *(("streams", count) for count in request.streams))
    for name, number in numbers:
        if number is not None and number <= 0:
            raise PhregError(f"{name}: got {number}, expected more than 0.")
    for batch in batches:
        extractor.manifest.batches.check(batch)


def _method(request: GpuRequest) -> Entry:
    return {
        "seconds": request.seconds,
        "warmup_ms": request.warmup_ms,
        "least": LEAST,
        "stable": f"means of {WINDOWS} windows within {100 * AGREE:g} %",
        "confidence": f"bootstrap, {RESAMPLES} resamples, {CONFIDENCE} % of the median",
        "order": "graph off and on in turn, A B B A",
    }


def _model(extractor: FeatureExtractor) -> Entry:
    spec = extractor.spec
    return {
        "architecture": spec.architecture,
        "registers": spec.registers,
        "width": spec.width,
        "depth": spec.depth,
        "precision": extractor.manifest.precision,
    }


def _reserve(backend: ProfiledBackend | None, threads: int) -> int:
    """Make a context for each thread before it is measured; return how many there are, at least one."""
    return 1 if backend is None else backend.reserve(threads)


def _used_memory(backend: Any) -> int | None:
    """Bytes of device memory that all processes use."""
    if not isinstance(backend, DeviceBackend):
        return None
    free, total = backend.cuda.free_memory()
    return int(total - free)


def _timed(call: Callable[[], object]) -> dict[str, float]:
    before = time.perf_counter()
    call()
    return {"latency": 1e3 * (time.perf_counter() - before)}
