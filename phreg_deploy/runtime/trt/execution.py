"""TensorRT's own execution context: its profile, shapes, addresses and inferences in one stream."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from phreg_deploy.bundle.profiles import ProfileShapes
from phreg_deploy.errors import PhregError
from phreg_deploy.runtime.gpu.closing import Closing
from phreg_deploy.runtime.gpu.cuda import Stream
from phreg_deploy.runtime.trt.buffers import TensorBuffers

Shapes = dict[str, tuple[int, ...]]


class Execution(Closing):
    """An ``IExecutionContext`` that reads and writes ``buffers``, and queues everything in ``stream``."""

    def __init__(
        self, engine: Any, profiles: list[ProfileShapes], stream: Stream, buffers: TensorBuffers, outputs: list[str]
    ) -> None:
        self.profiles, self.stream, self.buffers, self.outputs = profiles, stream, buffers, outputs
        self._profile = 0
        self._context: Any = engine.create_execution_context()
        if self._context is None:
            raise PhregError(
                "engine: TensorRT made no execution context; the GPU has too little memory for one more thread."
            )

    def profile_of(self, shapes: Shapes) -> int:
        """The number of the profile that serves inputs of these shapes. Raises ``PhregError`` if there is none."""
        index = next((i for i, profile in enumerate(self.profiles) if profile.holds(shapes)), None)
        if index is None:
            raise PhregError(
                f"engine: got inputs of {shapes}, expected {' or '.join(str(p.inputs) for p in self.profiles)}. "
                "Build the bundle again with these sizes."
            )
        return index

    def set_shapes(self, index: int, shapes: Shapes, before_move: Callable[[], None]) -> None:
        """Set the profile, the shapes of the inputs, and every address.

        Args:
            before_move: is called before buffers are replaced by larger ones, to wait for work that uses them.

        Raises:
            PhregError: TensorRT refuses one of them, or memory is short; the shapes are not set then.
        """
        # An error below must leave no shapes that look ready.
        self.buffers.shapes = {}
        context = self._context
        if index != self._profile:
            # The copies that this may queue come before the inference, in the same stream.
            if not context.set_optimization_profile_async(index, self.stream.handle):
                raise PhregError(f"engine: TensorRT refuses the optimization profile {index}.")
            self._profile = index
        for name, shape in shapes.items():
            if not context.set_input_shape(name, tuple(shape)):
                raise PhregError(f"engine: TensorRT refuses {name} of shape {tuple(shape)}.")
        missing = context.infer_shapes()
        if missing:
            raise PhregError(
                f"engine: the shapes of {', '.join(missing)} are not known; the plan is not of this bundle."
            )
        wanted = {name: tuple(shape) for name, shape in shapes.items()}
        wanted.update({name: tuple(context.get_tensor_shape(name)) for name in self.outputs})
        if not self.buffers.fits(wanted):
            before_move()
        try:
            self.buffers.grow(wanted)
            for name in wanted:
                if not context.set_tensor_address(name, self.buffers.address(name)):
                    raise PhregError(f"engine: TensorRT refuses the address of {name}.")
        except BaseException:
            self.buffers.shapes = {}
            raise

    def infer(self) -> None:
        """Queue an inference."""
        if not self._context.execute_async_v3(self.stream.handle):
            raise PhregError("engine: TensorRT could not start the inference; the device may be out of memory.")

    def profile(self, profiler: Any) -> None:
        """Report the times of layers to an ``IProfiler`` from now on; None to stop."""
        self._context.profiler = profiler

    def close(self) -> None:
        """Release the context; nothing of it may be in flight, and its memory and stream must outlive it."""
        self._context = None


def describe_tensors(trt: Any, engine: Any) -> tuple[list[str], dict[str, np.dtype[Any]]]:
    """Return the names of an engine's outputs, and the types of all its tensors."""
    names = [engine.get_tensor_name(i) for i in range(engine.num_io_tensors)]
    outputs = [name for name in names if engine.get_tensor_mode(name) != trt.TensorIOMode.INPUT]
    return outputs, {name: np.dtype(trt.nptype(engine.get_tensor_dtype(name))) for name in names}
