"""The fake TensorRT's execution context. It computes with ONNX Runtime on the processor when its work is waited for.

Every precondition of NvInferRuntime.h (``IExecutionContext``) for the calls that this project makes is checked.
"""

import functools
import threading
import time

import numpy as np

from tests.fake_gpu.cuda_types import Refused, Work
from tests.fake_gpu.memory import ALIGNMENT
from tests.fake_gpu.tensorrt_types import ILogger, IProfiler, check_initialised


def one_thread_at_a_time(method):
    """Report undefined behaviour if a second thread calls a method of a context while one is inside."""

    @functools.wraps(method)
    def held(self, *arguments):
        if not self._held.acquire(blocking=False):
            self._tensorrt.device.undefined.append(f"two threads were in {method.__name__} of one context")
            return False
        try:
            if self._tensorrt.delay:
                time.sleep(self._tensorrt.delay)
            return method(self, *arguments)
        finally:
            self._held.release()

    return held


class State:
    """What queued inferences need of their context, without keeping it alive.

    ``changes``: a recorded graph is valid only while this number stays the same. ``released``: the context is gone.
    """

    def __init__(self):
        self.changes = self.queued = self.done = 0
        self.released = False

    def next_number(self):
        self.queued += 1
        return self.queued


class IExecutionContext:
    def __init__(self, engine):
        self._tensorrt = engine._tensorrt
        self._engine, self._profile, self._shapes, self._addresses = engine, 0, {}, {}
        self._profiler, self._held, self._profile_set = None, threading.Lock(), None
        self._state = State()
        # Shapes of the latest inference that was not recorded.
        self._enqueued = None
        self._check_gpu("created")

    def __del__(self):
        device, state = self._tensorrt.device, self._state
        if device.in_flight(lambda work: work.owner is state):
            device.undefined.append("a context was released with work in flight")
        self._check_gpu("released")
        state.released = True

    def _check_gpu(self, what):
        """TensorRT's developer guide: the engine's GPU must be the thread's for every call on its contexts."""
        there, here = self._engine._index, self._tensorrt.device.index
        if there != here:
            self._tensorrt.device.undefined.append(f"a context of GPU {there} was {what} while GPU {here} was set")

    def _change(self):
        self._state.changes += 1

    def _refuse(self, why):
        self._engine._runtime._logger.log(ILogger.Severity.ERROR, why)
        return False

    @property
    def profiler(self):
        return self._profiler

    @profiler.setter
    def profiler(self, value):
        if value is not None:
            check_initialised(value, IProfiler)
        self._profiler = value
        self._change()

    @one_thread_at_a_time
    def set_optimization_profile_async(self, profile_index, stream_handle):
        self._check_gpu("used")
        if not 0 <= profile_index < self._engine.num_optimization_profiles:
            return self._refuse(f"there is no profile {profile_index}")
        stream = self._tensorrt.device.stream_of(stream_handle)
        if stream.recording is not None:
            return self._refuse("a profile cannot be set while its stream records")
        if profile_index != self._profile:
            self._profile, self._shapes, self._enqueued = profile_index, {}, None
            self._change()
            self._profile_set = self._tensorrt.device.mark(stream)
        return True

    @one_thread_at_a_time
    def set_input_shape(self, name, shape):
        low, _, high = self._engine._facts["profiles"][self._profile][name]
        if len(shape) != len(low) or not all(a <= side <= b for a, side, b in zip(low, shape, high)):
            return self._refuse(f"{name}: {tuple(shape)} is outside profile {self._profile}")
        if self._shapes.get(name) != tuple(shape):
            self._shapes[name] = tuple(shape)
            self._change()
        return True

    @one_thread_at_a_time
    def infer_shapes(self):
        return [name for name in self._engine._inputs if name not in self._shapes]

    def get_tensor_shape(self, name):
        if name in self._engine._inputs:
            return self._shapes.get(name, self._engine._tensors[name].shape)
        if self.infer_shapes():
            return tuple(side if isinstance(side, int) else -1 for side in self._engine._tensors[name].shape)
        return self._engine._output_shapes(self._shapes)[name]

    @one_thread_at_a_time
    def set_tensor_address(self, name, memory):
        if name not in self._engine._tensors:
            return self._refuse(f"there is no tensor {name}")
        if memory % ALIGNMENT:
            # setTensorAddress: "The pointer must have at least 256-byte alignment."
            return self._refuse(f"{name}: address {memory:#x} is not aligned to {ALIGNMENT} bytes")
        if self._addresses.get(name) != memory:
            self._addresses[name] = memory
            self._change()
        return True

    @one_thread_at_a_time
    def execute_async_v3(self, stream_handle):
        self._check_gpu("used")
        device = self._tensorrt.device
        with device.lock:
            stream, default = device.stream_of(stream_handle), False
            try:
                default = device.is_default(stream)
                if default:
                    # enqueueV3: "Using default stream may lead to performance issues due to additional
                    # cudaDeviceSynchronize() calls by TensorRT to ensure correct synchronizations."
                    device.synchronise()
                return self._execute(stream)
            except Refused as refused:
                return self._refuse(f"enqueueV3: {refused}")
            finally:
                if default:
                    device.waits.append("cudaDeviceSynchronize")

    def _execute(self, stream):
        engine, device = self._engine, self._tensorrt.device
        missing = [name for name in engine._tensors if name not in self._addresses]
        missing += [name for name in engine._inputs if name not in self._shapes]
        if missing:
            return self._refuse(f"address or shape of {missing} is not set")
        if stream.index != engine._index:
            return self._refuse(f"the stream is of GPU {stream.index}, the engine of GPU {engine._index}")
        mark = self._profile_set
        if mark is not None and mark.time is None and mark.stream is not stream:
            # setOptimizationProfileAsync: the application orders the profile's stream and that of enqueueV3.
            device.undefined.append("an inference was queued before its profile was set")
        if self._tensorrt.enqueue_fails():
            stream.broken = True
            return self._refuse("enqueueV3: the test made it fail")
        recorded, key = stream.recording is not None, (self._profile, *sorted(self._shapes.items()))
        if recorded and self._enqueued != key:
            # "CUDA Graphs" in TensorRT's developer guide: call enqueueV3 once after a change of shapes.
            stream.broken = True
            return self._refuse("enqueueV3: deferred updates of the shapes cannot be recorded")
        self._enqueued = key
        device.queue(stream, self._inference(recorded))
        return True

    def _inference(self, recorded):
        """The work of one inference with the present shapes and addresses."""
        device, engine, state, profiler = self._tensorrt.device, self._engine, self._state, self._profiler
        shapes, addresses, changes, profile = dict(self._shapes), dict(self._addresses), state.changes, self._profile
        sizes = {**shapes, **engine._output_shapes(shapes)}
        touches = tuple(
            (addresses[name], int(np.prod(shape)) * engine._dtype(name).itemsize) for name, shape in sizes.items()
        )

        def compute(number):
            if state.released:
                device.undefined.append("a graph was replayed after its context was released")
            if recorded and state.changes != changes:
                device.undefined.append("a graph was replayed after its context was changed")
            if number != state.done + 1:
                device.undefined.append("two inferences of one context ran without an order between them")
            state.done = max(state.done, number)
            engine._compute(shapes, addresses, profile, "replayed" if recorded else "plain", profiler)

        return Work(compute, touches, state)
