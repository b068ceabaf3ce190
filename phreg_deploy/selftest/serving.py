"""Serve frames from several threads, and for long: answers stay the same, and memory stays flat."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from phreg_deploy.bundle.bundle import Bundle
from phreg_deploy.errors import PhregError
from phreg_deploy.progress import Progress
from phreg_deploy.runtime.backends.interface import DeviceBackend
from phreg_deploy.runtime.features import FeatureExtractor
from phreg_deploy.runtime.parity import agreement, judge_exam
from phreg_deploy.selftest.checks import Failed, Skipped

# Frames of each thread, and fresh extractors: every one records its CUDA graphs beside the synchronising thread.
ROUNDS, AGAIN = 50, 3
# Largest relative difference between answers to one frame, alone and beside other threads.
DIFFERENCE = 1e-2
# Frames before the memory counts: the first ones make contexts, graphs and the pools of the driver.
WARM = 50
# Calls with one shape: plain, recorded as a CUDA graph, replayed.
CALLS = 3
# Bytes by which memory may change: the driver and, on a Jetson, all other programs use it too.
OWN, SHARED = 8 << 20, 64 << 20
# Gives the memory of this process, in pages.
STATM = Path("/proc/self/statm")
# Seconds between two synchronisations of the GPU.
PAUSE = 1e-3

Load = Callable[[], FeatureExtractor]
Answer = dict[str, np.ndarray]


def frames(extractor: FeatureExtractor, count: int) -> list[np.ndarray]:
    """``count`` different batches, uint8 ``(B, H, W, 3)``, of the least batch at the default size."""
    manifest = extractor.manifest
    shape = (manifest.batches.lowest, *manifest.sizes.default, 3)
    return [np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8) for seed in range(count)]


def repeat_exam(bundle: Bundle, extractor: FeatureExtractor) -> str:
    """Answer the exam ``CALLS`` times, and return the agreement of the last. Raises ``Failed`` for a missed gate."""
    for call in range(CALLS):
        parity, gates = judge_exam(bundle, extractor.run, extractor.backend, extractor.compute)
        missed = [str(gate) for gate in gates if not gate.passed]
        if missed:
            raise Failed(f"call {call + 1}: {'; '.join(missed)}")
    return agreement(parity.to_json())


def check_threads(load: Load) -> str:
    """Serve two threads at once, on a GPU beside a third that synchronises it, and compare every answer.

    On a GPU the first thread hands over frames of the host, and the second frames in the GPU's memory.

    Args:
        load: opens the bundle; it is called several times.
    """
    with load() as extractor:
        work = frames(extractor, 2)
        expected = [extractor.run(batch) for batch in work]
        on_gpu = isinstance(extractor.opened, DeviceBackend)
    errors, refused = list[str](), 0
    for _ in range(AGAIN):
        with load() as extractor:
            refused += _serve_two(extractor, work, expected, errors)
    total = 2 * AGAIN * ROUNDS
    if errors:
        raise Failed(f"{len(errors)} of {total} answers were wrong, first: {errors[0]}")
    beside = ", beside a thread that synchronises the GPU" if on_gpu else ""
    note = f"; {refused} synchronisations met a recording" if refused else ""
    return f"{total} answers of two threads as alone{beside}{note}"


def _serve_two(extractor: FeatureExtractor, work: list[np.ndarray], expected: list[Answer], errors: list[str]) -> int:
    """Serve one batch in each of two threads; return how many synchronisations of the GPU CUDA refused."""
    calls = [lambda: extractor.run(work[0]), lambda: extractor.run(work[1])]
    if isinstance(extractor.opened, DeviceBackend):
        calls[1] = lambda: _run_on_device(extractor, work[1])
    threads = [
        threading.Thread(target=_serve, args=(call, wanted, errors), name="selftest")
        for call, wanted in zip(calls, expected)
    ]
    with _synchronising(extractor.opened) as counts:
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    return counts["refused"]


def _serve(call: Callable[[], Answer], wanted: Answer, errors: list[str]) -> None:
    for number in range(ROUNDS):
        try:
            difference = differs(call(), wanted)
            if difference:
                errors.append(f"frame {number}: {difference}")
        except Exception as error:
            errors.append(f"frame {number}: {error}")


def differs(got: Answer, wanted: Answer) -> str:
    """Name the first output that differs from ``wanted`` by more than ``DIFFERENCE`` in norm; "" if none does."""
    for name, value in wanted.items():
        a, b = np.asarray(got[name], np.float64), np.asarray(value, np.float64)
        share = float(np.linalg.norm(a - b) / max(float(np.linalg.norm(b)), 1e-12))
        # NaN differs too.
        if not share <= DIFFERENCE:
            return f"{name} differs by {100 * share:.1f} %"
    return ""


def _run_on_device(extractor: FeatureExtractor, batch: np.ndarray) -> Answer:
    from phreg_deploy.export.engine.exam import uploaded

    with uploaded(extractor.opened.cuda, batch, 0) as array:
        return {name: value.numpy() for name, value in extractor.run(array).items()}


@contextmanager
def _synchronising(backend: Any) -> Iterator[dict[str, int]]:
    """Synchronise the whole GPU again and again in a thread during the block; nothing on the processor.

    CUDA refuses that while another thread records a graph, and ends the recording: the runtime must then do without.
    """
    counts, over = {"refused": 0}, threading.Event()
    if not isinstance(backend, DeviceBackend):
        yield counts
        return

    def work() -> None:
        with backend.cuda.selected():
            while not over.wait(PAUSE):
                try:
                    backend.cuda.call("cudaDeviceSynchronize")
                except PhregError:
                    counts["refused"] += 1

    thread = threading.Thread(target=work, name="synchronises")
    thread.start()
    try:
        yield counts
    finally:
        over.set()
        thread.join()


def check_memory(load: Load, count: int, progress: Progress) -> str:
    """Serve ``count`` frames and compare the memory of the GPU and of this process before and after."""
    with load() as extractor, progress.task("frames", count) as advance:
        cuda = extractor.opened.cuda if isinstance(extractor.opened, DeviceBackend) else None
        (batch,) = frames(extractor, 1)
        for _ in range(WARM):
            extractor.run(batch)
        before, started = used_memory(cuda), time.perf_counter()
        for _ in range(count):
            extractor.run(batch)
            advance()
        seconds, after = time.perf_counter() - started, used_memory(cuda)
    grown = {name: after[name] - before[name] for name in before}
    said = ", ".join(f"{name} {grown[name] / 2**20:+.1f} MiB" for name in grown)
    most = SHARED if cuda is not None and cuda.gpu.integrated else OWN
    allowed = {"GPU": most, "process": SHARED}
    if any(grown[name] > allowed[name] for name in grown):
        limits = ", ".join(f"{name} {allowed[name] >> 20} MiB" for name in grown)
        raise Failed(f"memory grew over {count} frames: {said}; expected at most {limits}.")
    return f"{count} frames in {seconds:.1f} s, memory {said}"


def used_memory(cuda: Any) -> dict[str, int]:
    """Bytes in use: "GPU" by all programs, "process" resident; a figure that the system does not give is left out.

    Raises ``Skipped`` where it gives none.
    """
    used = {}
    if cuda is not None:
        with cuda.selected():
            free, total = cuda.free_memory()
        used["GPU"] = total - free
    try:
        used["process"] = int(STATM.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except (OSError, ValueError, IndexError):
        if cuda is None:
            raise Skipped(f"this system has no {STATM}, which gives the memory of a process.") from None
    return used
