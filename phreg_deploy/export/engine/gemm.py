"""Measure how fast this GPU multiplies matrices in TensorRT: the roof of the roofline of an engine."""

from __future__ import annotations

import contextlib
from typing import Any

from phreg_deploy.bundle.plan_keys import BuildSettings
from phreg_deploy.bundle.profiles import ProfileShapes
from phreg_deploy.errors import PhregError
from phreg_deploy.export.engine.builder import build_plan
from phreg_deploy.export.engine.product_graph import bytes_of, product_graph
from phreg_deploy.files.temporary import scratch_folder
from phreg_deploy.runtime.gpu.cuda import Cuda, Event, Stream
from phreg_deploy.runtime.gpu.memory import DeviceBuffer
from phreg_deploy.runtime.gpu.trt_library import deserialise, make_logger

ROUNDS = 10
# Rows and columns of the matrices. On a GPU that shares the processor's memory, 4096 reaches the peak and takes an
# eighth of the time.
SIDE, INTEGRATED_SIDE = 8192, 4096


def side_of(cuda: Cuda) -> int:
    """Rows and columns of the matrices that ``measure_product`` takes on a GPU."""
    return INTEGRATED_SIDE if cuda.gpu.integrated else SIDE


def measure_product(
    trt: Any, cuda: Cuda, precision: str = "fp16", side: int | None = None, rounds: int = ROUNDS
) -> float:
    """Return the operations per second of a product ``(side, side) x (side, side)``, the best of ``rounds``.

    Args:
        precision: of both operands; those in 8 bits have an FP16 product, and FP32 is not TensorFloat-32.
        side: None for ``side_of``.

    Raises:
        BackendMissing: TensorRT cannot build here.
        PhregError: TensorRT has no such product, or three matrices do not fit in the GPU's memory.
    """
    side = side or side_of(cuda)
    with cuda.selected():
        plan = build_product(trt, precision, side)
        logger = make_logger(trt)
        runtime, engine = deserialise(trt, plan, logger)
        context = engine.create_execution_context()
        if context is None:
            raise PhregError("TensorRT: it made no execution context for the product; the GPU has too little memory.")
        try:
            return 2 * side**3 / (1e-3 * min(_milliseconds(cuda, engine, context, precision, side, rounds)))
        finally:
            del context, engine, runtime


def build_product(trt: Any, precision: str, side: int) -> bytes:
    """Build the plan of ``product_graph``; raises as ``build_plan``."""
    shapes = ProfileShapes({name: [[side, side]] * 3 for name in ("a", "b")})
    with scratch_folder("phreg-product") as folder:
        path = folder / f"product-{precision}.onnx"
        path.write_bytes(product_graph(precision, side))
        return build_plan(trt, path, [shapes], BuildSettings()).plan


def _milliseconds(cuda: Cuda, engine: Any, context: Any, precision: str, side: int, rounds: int) -> list[float]:
    """Times of ``rounds`` products after one that warms up; the matrices hold whatever is in memory."""
    times = []
    with contextlib.ExitStack() as owned:
        buffers = {
            name: owned.enter_context(DeviceBuffer(cuda, bytes_of(name, precision, side)))
            for name in (engine.get_tensor_name(i) for i in range(engine.num_io_tensors))
        }
        stream = owned.enter_context(Stream(cuda))
        start, end = (owned.enter_context(Event(cuda)) for _ in range(2))
        for name, buffer in buffers.items():
            if not context.set_tensor_address(name, buffer.pointer):
                raise PhregError(f"TensorRT: it refuses the address of {name} in the product.")
        for name in ("a", "b"):
            context.set_input_shape(name, (side, side))
        for _ in range(rounds + 1):
            start.record(stream.handle)
            if not context.execute_async_v3(stream.handle):
                raise PhregError("TensorRT: it could not start the product.")
            end.record(stream.handle)
            end.wait()
            times.append(end.since(start))
    return times[1:]
