"""Measure the parts and the layers of an inference on one execution context."""

from __future__ import annotations

import time

from phreg_deploy.runtime.gpu.cuda import Event
from phreg_deploy.runtime.trt.context import Feed, TrtContext


def time_parts(context: TrtContext, feed: Feed, graph: bool) -> dict[str, float]:
    """Milliseconds of each part of one inference: ``enqueue`` on the host, the others on the device.

    ``graph``: replay the inference as a CUDA graph, without the copies from and to the host.
    """
    handle, marks = context.stream.handle, list[Event]()
    context.prepare(feed)
    if graph:
        context.warm_up()
    try:
        for _ in range(4):
            marks.append(Event(context.cuda))
        marks[0].record(handle)
        context.upload()
        marks[1].record(handle)
        started = time.perf_counter()
        if graph:
            context.queue_inference()
        else:
            context.infer()
        enqueue = 1e3 * (time.perf_counter() - started)
        marks[2].record(handle)
        context.download()
        marks[3].record(handle)
        marks[3].wait()
        parts = {name: marks[i + 1].since(marks[i]) for i, name in enumerate(("h2d", "compute", "d2h"))}
        return {**parts, "enqueue": enqueue, "latency": sum(parts.values())}
    finally:
        for mark in marks:
            mark.close()


def time_layers(context: TrtContext, feed: Feed, rounds: int) -> dict[str, float]:
    """Mean milliseconds of each layer by TensorRT's profiler, which slows the run down."""
    trt, times = context.trt, dict[str, float]()

    class Profiler(trt.IProfiler):  # type: ignore[misc,name-defined]
        def __init__(self) -> None:
            trt.IProfiler.__init__(self)

        def report_layer_time(self, layer_name: str, ms: float) -> None:
            times[layer_name] = times.get(layer_name, 0.0) + ms

    context.prepare(feed)
    context.upload()
    # The first run, which may allocate memory, does not count.
    context.infer()
    context.stream.wait()
    with context.profiled(Profiler()):
        for _ in range(rounds):
            context.infer()
            context.stream.wait()
    return {name: value / rounds for name, value in times.items()}
