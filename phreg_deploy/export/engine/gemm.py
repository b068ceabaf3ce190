"""Measure how fast this GPU multiplies matrices in TensorRT: the roof of the roofline of an engine."""

from __future__ import annotations

from typing import Any

from phreg_deploy.errors import PhregError
from phreg_deploy.runtime.gpu.cuda import Cuda, Event, Stream
from phreg_deploy.runtime.gpu.memory import DeviceBuffer
from phreg_deploy.runtime.gpu.trt_library import deserialise, make_logger

SIDE, ROUNDS = 8192, 10


def measure_product(trt: Any, cuda: Cuda, side: int = SIDE, rounds: int = ROUNDS) -> float:
    """Return the operations per second of an FP16 product ``(side, side) x (side, side)``, the best of ``rounds``.

    Raises ``BackendMissing`` or ``PhregError`` as ``build_plan``, or if three matrices do not fit in the GPU's memory.
    """
    logger = make_logger(trt)
    builder = trt.Builder(logger)
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    operands = [network.add_input(name, trt.DataType.HALF, (side, side)) for name in ("a", "b")]
    plain = trt.MatrixOperation.NONE
    product = network.add_matrix_multiply(operands[0], plain, operands[1], plain).get_output(0)
    product.name = "product"
    network.mark_output(product)
    plan = builder.build_serialized_network(network, builder.create_builder_config())
    if plan is None:
        raise PhregError(f"TensorRT: it builds no product of {side} x {side}: {logger.reason()}.")
    runtime, engine = deserialise(trt, bytes(plan), logger)
    context = engine.create_execution_context()
    if context is None:
        raise PhregError("TensorRT: it made no execution context for the product; the GPU has too little memory.")
    cuda.use()
    size, times = 2 * side * side, []
    with Stream(cuda) as stream, Event(cuda) as start, Event(cuda) as end:
        with DeviceBuffer(cuda, size) as a, DeviceBuffer(cuda, size) as b, DeviceBuffer(cuda, size) as c:
            for name, buffer in (("a", a), ("b", b), ("product", c)):
                context.set_tensor_address(name, buffer.pointer)
            # The first round warms up.
            for _ in range(rounds + 1):
                start.record(stream.handle)
                if not context.execute_async_v3(stream.handle):
                    raise PhregError("TensorRT: it could not start the product.")
                end.record(stream.handle)
                end.wait()
                times.append(end.since(start))
    del context, engine, runtime
    return 2 * side**3 / (min(times[1:]) * 1e-3)
