"""A bundle on a GPU, in the words of trtexec: latency and its parts, throughput over streams, layers, memory, energy, pacing.

Latency is h2d + compute + d2h of one inference alone, by CUDA events; enqueue is the host's time to hand it over. Where enqueue
is longer than compute, the device waits within "compute", and a CUDA graph helps.
"""

from __future__ import annotations

import itertools
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import Any

import numpy as np

from phreg_deploy.errors import PhregError
from phreg_deploy.profiling.roofline import Peaks, group_layers, roofline
from phreg_deploy.profiling.telemetry import Telemetry
from phreg_deploy.progress import Progress
from phreg_deploy.runtime.backends.interface import DeviceBackend, ProfiledBackend
from phreg_deploy.runtime.features import FeatureExtractor

LEAST = 10  # inferences, however slow
WINDOWS, PATIENCE = 3, 9  # windows that must agree; windows at most until they do
AGREE = 0.05  # largest difference of their means
RESAMPLES, CONFIDENCE = 1000, 95
WARM = 2  # calls of each thread; the second records its CUDA graph
ROUNDS = 20  # of the layer profile
BYTES = {"fp32": (4, 4), "fp16": (2, 2), "bf16": (2, 2), "int8": (2, 1), "fp8": (2, 1)}  # of activations, of weights


def profile_gpu(
    extractor: FeatureExtractor, *, batches: list[int] | None, size: tuple[int, int] | None, seconds: float,
    streams: list[int], progress: Progress, warmup_ms: float = 200, telemetry: Telemetry | None = None, fps: float | None = None,
    peaks: Peaks | None = None, hidden: int | None = None, metadata: Mapping[str, str] | None = None, idle_seconds: float = 2.0,
) -> dict[str, Any]:  # fmt: skip
    """Everything that is measured of a bundle on a GPU, as one JSON document.

    Args:
        batches, size: as served; by default the bundle's preferred ones.
        seconds: of measuring per configuration when it is stable, three times that at most.
        streams: numbers of threads that call the extractor at once, e.g. [1, 2, 4].
        telemetry: samples power and clocks; closed by who made it. idle_seconds: of measuring idle power first; 0 for none.
        fps: also feed images at this rate and report jitter and deadline misses.
        peaks: of ``measure_peaks``; adds a roofline. hidden: width of the model's MLP, where it is not 4 times the model's.
        metadata: layer -> what TensorRT's inspector says of it; without, fused layers are placed by their kernel's name.

    Returns:
        ``results`` (per batch and graph), ``streams`` (per batch and number of threads), ``layers``, ``queue`` and ``roofline``
        (per batch), ``method``, ``model``, ``memory`` (bytes), ``idle_power`` (W), and ``missing`` (figure -> why not).

    Raises:
        PhregError: a size, batch or number of streams that cannot be, or whatever an inference raises.
    """
    manifest, spec, backend = extractor.manifest, extractor.spec, extractor.opened
    size, batches = size or manifest.sizes.default, batches or [manifest.batches.best]
    manifest.sizes.check(size, spec.patch)
    for number, name in ((fps, "fps"), (seconds, "seconds"), *((count, "streams") for count in streams)):
        if number is not None and number <= 0:
            raise PhregError(f"{name}: got {number}, expected more than 0.")
    for batch in batches:
        manifest.batches.check(batch)
    report: dict[str, Any] = {
        "method": {
            "seconds": seconds, "warmup_ms": warmup_ms, "least": LEAST, "stable": f"means of {WINDOWS} windows within {100 * AGREE:g} %",
            "confidence": f"bootstrap, {RESAMPLES} resamples, {CONFIDENCE} % of the median", "order": "graph off and on in turn, A B B A",
        },
        "model": {"architecture": spec.architecture, "registers": spec.registers, "width": spec.width, "depth": spec.depth, "precision": manifest.precision},
        "memory": {"before": _used(backend)}, "results": [], "streams": [], "layers": [], "queue": [], "roofline": [], "missing": {},
    }  # fmt: skip
    missing, rng = report["missing"], np.random.default_rng(0)
    report["idle_power"] = telemetry.measure_idle(idle_seconds) if telemetry and idle_seconds else None
    profiled = backend if isinstance(backend, ProfiledBackend) else None
    if profiled is None:
        missing["parts"] = f"{backend.name} does not tell the parts of an inference; latency is the host's."
        missing["layers"] = f"{backend.name} has no layer profile."
    for batch in batches:
        images = rng.integers(0, 256, (batch, *size, 3), dtype=np.uint8)
        feed, about = extractor.feed(images), {"batch": batch, "size": list(size)}
        calls: dict[bool | None, Callable[[], dict[str, float]]] = {None: partial(_timed, extractor.graph_call(images))}
        if profiled is not None:
            calls = {graph: partial(profiled.split, feed, graph) for graph in (False, True)}
        for graph, found in measure(calls, seconds, warmup_ms, progress).items():
            rate = 1e3 * batch / found["latency"]["mean"]
            report["results"].append({**about, "graph": graph, **found, "images_per_second": rate})
        for count in streams:
            found = sweep(partial(extractor.run, images), count, seconds, progress, batch, telemetry)
            report["streams"].append({**about, **found})
        grouped = group_layers(profiled.layers(feed, ROUNDS), metadata) if profiled else None
        if grouped is not None:
            report["layers"].append({**about, **grouped})
        if fps is not None:
            report["queue"].append({**about, **pace(partial(extractor.run, images), fps, seconds)})
        if peaks is not None:
            told = [r["compute"]["p50"] for r in report["results"] if r["batch"] == batch and "compute" in r]
            activation, weight = BYTES.get(manifest.precision, (4, 4))
            report["roofline"].append(roofline(
                spec, peaks, batch=batch, size=size, hidden=hidden, activation_bytes=activation, weight_bytes=weight,
                measured_ms=min(told, default=None), layers_ms=grouped["parts"] if grouped else None,
            ))  # fmt: skip
    mark_pareto(report["streams"])
    device = profiled.device_memory() if profiled else None
    report["memory"].update(after=_used(backend), device=device)
    report["stable"] = all(result["stable"] for result in report["results"])
    return report


def measure(calls: Mapping[Any, Callable[[], dict[str, float]]], seconds: float, warmup_ms: float, progress: Progress) -> dict[Any, dict[str, Any]]:  # fmt: skip
    """Time inferences that tell their own parts, in turn A B B A, until the last three windows agree.

    Args:
        calls: name -> an inference that returns milliseconds by part, "latency" among them.
        seconds: of three windows together; at least ``LEAST`` inferences of each call, and at most ``PATIENCE`` windows.

    Name -> part -> ``describe``'s figures over the last three windows, and ``stable``, ``windows``.
    """
    names = list(calls)
    for call in calls.values():
        until = time.perf_counter() + 1e-3 * warmup_ms
        while call() and time.perf_counter() < until:  # once at least
            pass
    windows: list[dict[Any, list[dict[str, float]]]] = []
    agree = dict.fromkeys(names, False)
    with progress.task("measuring", PATIENCE) as advance:
        while len(windows) < PATIENCE and not all(agree.values()):
            window: dict[Any, list[dict[str, float]]] = {name: [] for name in names}
            until = time.perf_counter() + seconds / WINDOWS
            for turn in itertools.count():
                for name in names if turn % 2 == 0 else reversed(names):
                    window[name].append(calls[name]())
                if time.perf_counter() >= until and WINDOWS * (turn + 1) >= LEAST:
                    break
            windows.append(window)
            advance()
            means = {n: [float(np.mean([t["latency"] for t in w[n]])) for w in windows] for n in names}
            agree = {name: is_stable(means[name]) for name in names}
    last = {name: [times for window in windows[-WINDOWS:] for times in window[name]] for name in names}
    return {
        name: {part: describe([times[part] for times in last[name]]) for part in last[name][0]}
        | {"stable": agree[name], "windows": len(windows)}
        for name in names
    }


def is_stable(means: list[float]) -> bool:
    """Whether the last three windows' means differ by less than ``AGREE``; never with fewer windows."""
    last = means[-WINDOWS:]
    return len(last) == WINDOWS and max(last) < (1 + AGREE) * min(last)


def describe(values: Iterable[float]) -> dict[str, Any]:
    """Percentiles and spread of times in their own unit, and the median's confidence interval."""
    times = np.asarray(list(values), dtype=np.float64)
    quantiles = dict(zip(("p50", "p90", "p95", "p99", "p99.9"), np.percentile(times, (50, 90, 95, 99, 99.9)).tolist()))
    return {
        "rounds": len(times), "min": float(times.min()), "mean": float(times.mean()), **quantiles, "max": float(times.max()),
        "std": float(times.std()), "p50_interval": bootstrap(times),
    }  # fmt: skip


def bootstrap(times: np.ndarray) -> list[float]:
    """Lower and upper end of the median's ``CONFIDENCE`` % interval by resampling ``(N,)`` times, the same at every call.

    Of a resample only the rank of its median is drawn, which is beta distributed: exact, and quick however long the run was.
    """
    rng, ordered, count = np.random.default_rng(0), np.sort(times), len(times)
    rank = (count + 1) // 2
    low = rng.beta(rank, count + 1 - rank, RESAMPLES)
    high = low if count % 2 else low + (1 - low) * rng.beta(1, count - rank, RESAMPLES)
    picked = [ordered[np.minimum((count * side).astype(int), count - 1)] for side in (low, high)]
    rest = (100 - CONFIDENCE) / 2
    return np.percentile(np.mean(picked, axis=0), (rest, 100 - rest)).tolist()  # type: ignore[no-any-return]


def sweep(
    call: Callable[[], object], streams: int, seconds: float, progress: Progress, batch: int = 1, telemetry: Telemetry | None = None
) -> dict[str, Any]:  # fmt: skip
    """Throughput with ``streams`` threads calling at once, back to back, once all are warm.

    ``calls`` ended while all threads ran, which is what ``images_per_second`` and ``latency`` (milliseconds, as a thread sees
    it) are of; ``telemetry`` is of all calls. Raises the first error of any thread, once all have ended.
    """
    ended: list[list[tuple[float, float]]] = [[] for _ in range(streams)]
    errors: list[BaseException] = []
    begun = 0.0

    def begin() -> None:  # by one thread, while the others wait
        nonlocal begun
        if telemetry is not None:
            telemetry.start()
        begun = time.perf_counter()

    ready = threading.Barrier(streams, begin)

    def work(times: list[tuple[float, float]]) -> None:
        try:
            for _ in range(WARM):
                call()
            ready.wait()
            now = begun
            while (now - begun < seconds or len(times) < LEAST) and not errors:
                before = time.perf_counter()
                call()
                now = time.perf_counter()
                times.append((before, now))
        except threading.BrokenBarrierError:  # another thread failed, and says why
            return
        except BaseException as error:
            errors.append(error)
            ready.abort()

    threads = [threading.Thread(target=work, args=(times,), name="stream") for times in ended]
    with progress.task(f"{streams} streams", None):
        try:
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
        except BaseException as error:  # Ctrl-C: nobody may still be at work when the device is freed
            errors.append(error)
            ready.abort()
            for thread in filter(threading.Thread.is_alive, threads):
                thread.join()
        finally:
            if telemetry is not None:
                telemetry.stop()
    if errors:
        raise errors[0]
    # up to the first thread's end: what runs alone afterwards would make many streams look better or worse than they are
    span = min(times[-1][1] for times in ended) - begun
    inside = [(before, now) for times in ended for before, now in times if now <= begun + span]
    return {
        "streams": streams, "calls": len(inside), "seconds": span, "images_per_second": batch * len(inside) / span,
        "latency": describe([1e3 * (now - before) for before, now in inside]),
        "telemetry": telemetry.summary(batch * sum(len(times) for times in ended)) if telemetry is not None else None,
    }  # fmt: skip


def pace(call: Callable[[], object], fps: float, seconds: float, clock: Any = time) -> dict[str, Any]:
    """Frames that come at ``fps``, as from a camera, none dropped; a late one keeps the next waiting.

    Milliseconds: ``response`` from a frame's due time to its features, ``wait`` to its start, ``jitter`` (standard deviation of
    the response). ``misses``: share of responses longer than a period. ``kept_up``: all were served in about ``seconds``.
    """
    period, frames = 1 / fps, max(LEAST, int(fps * seconds))
    responses, waits = [], []
    start = clock.perf_counter()
    for index in range(frames):
        due = start + index * period
        if (ahead := due - clock.perf_counter()) > 0:
            clock.sleep(ahead)
        began = clock.perf_counter()
        if began - start > seconds + LEAST * period and index >= LEAST:
            break
        call()
        responses.append(1e3 * (clock.perf_counter() - due))
        waits.append(1e3 * (began - due))
    late = sum(response > 1e3 * period for response in responses)
    return {
        "fps": fps, "frames": len(responses), "expected": frames, "kept_up": len(responses) == frames, "misses": late / len(responses),
        "response": describe(responses), "wait": {"mean": float(np.mean(waits)), "max": max(waits)}, "jitter": float(np.std(responses)),
    }  # fmt: skip


def mark_pareto(entries: list[dict[str, Any]]) -> None:
    """Set ``pareto`` on each: no other has both more images per second and a shorter median latency."""
    sides = [(entry["images_per_second"], -entry["latency"]["p50"]) for entry in entries]
    for entry, (rate, quick) in zip(entries, sides):
        entry["pareto"] = not any(r >= rate and q >= quick and (r, q) != (rate, quick) for r, q in sides)


def _used(backend: Any) -> int | None:
    """Bytes of device memory that are taken, by everybody."""
    if not isinstance(backend, DeviceBackend):
        return None
    free, total = backend.cuda.free_memory()
    return int(total - free)


def _timed(call: Callable[[], object]) -> dict[str, float]:
    before = time.perf_counter()
    call()
    return {"latency": 1e3 * (time.perf_counter() - before)}


def pci_of(cuda: Any) -> str:
    """The bus id of a ``Cuda``'s device, e.g. "0000:01:00.0", by which NVML finds the same one."""
    raw = cuda.call("cudaDeviceGetPCIBusId", 32, cuda.index)
    return (raw.decode() if isinstance(raw, bytes) else str(raw)).partition("\x00")[0].strip()
