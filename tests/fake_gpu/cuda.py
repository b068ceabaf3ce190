"""The fake ``cuda.bindings.runtime``: every call that the project makes, on a ``Device``."""

import ctypes
import functools
import threading
import types

from tests.fake_gpu import kernels
from tests.fake_gpu.cuda_types import Event, Refused, Stream, Work, cudaError_t, cudaMemcpyKind, cudaStreamCaptureMode


def _call(function):
    """Record a call of the runtime, fail it if a test asked for that, and answer as cuda-python does."""

    @functools.wraps(function)
    def call(self, *arguments):
        device = self._device
        with device.lock:
            device.calls.append((function.__name__, arguments))
            failing = device.failing.get(function.__name__)
            try:
                if device.fault is not None:
                    raise Refused(device.fault)
                if failing is not None:
                    failing[0] -= 1
                    if failing[0] == 0:
                        del device.failing[function.__name__]
                        if function.__name__ == "cudaStreamEndCapture":
                            # The recording is over even if the call fails.
                            device.stream_of(arguments[0]).recording = None
                        raise Refused(failing[1])
                result = function(device, *arguments)
            except Refused as refused:
                return (refused.code, None)
            return (cudaError_t.cudaSuccess,) if result is None else (cudaError_t.cudaSuccess, *result)

    return call


class Runtime:
    """``cuda.bindings.runtime``: every call returns ``(status, *results)``."""

    cudaError_t, cudaMemcpyKind, cudaStreamCaptureMode = cudaError_t, cudaMemcpyKind, cudaStreamCaptureMode
    cudaStreamNonBlocking, cudaEventDisableTiming = 1, 2

    def __init__(self, device):
        self._device = device

    @_call
    def cudaGetDeviceCount(device):
        if not device.installed:
            raise Refused(cudaError_t.cudaErrorNoDevice)
        return (device.installed,)

    @_call
    def cudaSetDevice(device, index):
        if not 0 <= index < device.installed:
            raise Refused(cudaError_t.cudaErrorInvalidDevice)
        device.chosen.index = index
        device.started.add(index)

    @_call
    def cudaGetDevice(device):
        return (device.index,)

    @_call
    def cudaDeviceSynchronize(device):
        device.synchronise()

    @_call
    def cudaGetDeviceProperties(device, index):
        if not 0 <= index < device.installed:
            raise Refused(cudaError_t.cudaErrorInvalidDevice)
        return (
            types.SimpleNamespace(
                name=device.name.encode().ljust(256, b"\0"),
                major=device.architecture // 10,
                minor=device.architecture % 10,
                totalGlobalMem=device.memory.size,
                multiProcessorCount=device.multiprocessors,
                integrated=int(device.integrated),
            ),
        )

    @_call
    def cudaDriverGetVersion(device):
        return (device.driver,)

    @_call
    def cudaMemGetInfo(device):
        return device.memory.size - device.memory.used, device.memory.size

    @_call
    def cudaMalloc(device, size):
        device.waits.append("cudaMalloc")
        return (device.allocate(size),)

    @_call
    def cudaFree(device, pointer):
        device.waits.append("cudaFree")
        device.free(pointer)

    @_call
    def cudaMallocHost(device, size):
        device.waits.append("cudaMallocHost")
        return (device.allocate(size, pinned=True),)

    @_call
    def cudaFreeHost(device, pointer):
        device.waits.append("cudaFreeHost")
        device.free(pointer, pinned=True)

    @_call
    def cudaMemcpyAsync(device, target, source, size, kind, handle):
        stream, kind = device.stream_of(handle), cudaMemcpyKind(kind)
        ends = {
            "target": (target, kind.name.endswith("ToDevice")),
            "source": (source, kind.name.startswith("cudaMemcpyDevice")),
        }
        pageable = any(not on and device.span(at, size, pinned=True) is None for at, on in ends.values())
        if any(on and device.span(at, size) is None for at, on in ends.values()):
            raise Refused(cudaError_t.cudaErrorInvalidValue)
        if pageable:
            # Pageable memory is copied before the call returns, which is impossible while a stream records.
            if stream.recording is not None:
                stream.broken = True
                raise Refused(cudaError_t.cudaErrorStreamCaptureUnsupported)
            device.waits.append("cudaMemcpyAsync")
            device.drain(stream)
            ctypes.memmove(target, source, size)
            return

        def copy():
            if all(device.span(at, size, pinned=not on) is not None for at, on in ends.values()):
                ctypes.memmove(target, source, size)
            else:
                device.crash(f"a copy of {size} bytes reached memory that was freed")

        device.queue(stream, Work(copy, touches=((target, size), (source, size))))

    @_call
    def cudaStreamCreateWithFlags(device, flags):
        if flags not in (0, 1):
            raise Refused(cudaError_t.cudaErrorInvalidValue)
        return (device.add(device.streams, Stream(device.index, blocking=flags == 0)),)

    @_call
    def cudaStreamDestroy(device, handle):
        stream = device.stream_of(handle)
        if int(handle) not in device.streams or stream.recording is not None:
            raise Refused(cudaError_t.cudaErrorInvalidResourceHandle)
        device.drain(stream)
        del device.streams[int(handle)]

    @_call
    def cudaStreamSynchronize(device, handle):
        stream = device.stream_of(handle)
        if stream.recording is not None:
            stream.broken = True
            raise Refused(cudaError_t.cudaErrorStreamCaptureUnsupported)
        if device.is_default(stream):
            device.follow_default(stream)
        device.waits.append("cudaStreamSynchronize")
        device.drain(stream)

    @_call
    def cudaStreamWaitEvent(device, handle, event, flags):
        stream, event = device.stream_of(handle), device.look_up(device.events, event)
        if stream.recording is not None:
            stream.broken = True
            raise Refused(cudaError_t.cudaErrorStreamCaptureIsolation)
        if event.captured:
            raise Refused(cudaError_t.cudaErrorStreamCaptureUnmatched)
        mark = event.mark
        if mark is not None:
            device.queue(stream, lambda: device.finish(mark))

    @_call
    def cudaStreamBeginCapture(device, handle, mode):
        stream = device.stream_of(handle)
        if device.is_default(stream):
            raise Refused(cudaError_t.cudaErrorStreamCaptureUnsupported)
        if stream.recording is not None:
            raise Refused(cudaError_t.cudaErrorInvalidValue)
        assert mode == cudaStreamCaptureMode.cudaStreamCaptureModeThreadLocal, "other modes would affect other threads"
        stream.recording, stream.thread, stream.broken = [], threading.get_ident(), False

    @_call
    def cudaStreamEndCapture(device, handle):
        stream = device.stream_of(handle)
        if stream.recording is None:
            raise Refused(cudaError_t.cudaErrorInvalidValue)
        if stream.thread != threading.get_ident():
            raise Refused(cudaError_t.cudaErrorStreamCaptureWrongThread)
        recorded, stream.recording = stream.recording, None
        if stream.broken:
            raise Refused(cudaError_t.cudaErrorStreamCaptureInvalidated)
        return (device.add(device.graphs, recorded),)

    @_call
    def cudaGraphInstantiate(device, graph, flags):
        return (device.add(device.programs, list(device.look_up(device.graphs, graph))),)

    @_call
    def cudaGraphDestroy(device, graph):
        device.look_up(device.graphs, graph)
        del device.graphs[int(graph)]

    @_call
    def cudaGraphLaunch(device, program, handle):
        stream = device.stream_of(handle)
        if stream.recording is not None:
            # CUDA records it as a child graph, which this project does not use.
            stream.broken = True
            raise Refused(cudaError_t.cudaErrorStreamCaptureUnsupported)
        if stream.index != device.index:
            raise Refused(cudaError_t.cudaErrorInvalidResourceHandle)
        for work in device.look_up(device.programs, program):
            device.queue(stream, work)

    @_call
    def cudaGraphExecDestroy(device, program):
        device.look_up(device.programs, program)
        del device.programs[int(program)]

    @_call
    def cudaEventCreate(device):
        return (device.add(device.events, Event(device.index)),)

    @_call
    def cudaEventCreateWithFlags(device, flags):
        if flags not in (0, 2):
            raise Refused(cudaError_t.cudaErrorInvalidValue)
        return (device.add(device.events, Event(device.index, timing=flags == 0)),)

    @_call
    def cudaEventRecord(device, event, handle):
        stream, event = device.stream_of(handle), device.look_up(device.events, event)
        if stream.index != event.index:
            # "event and stream must be on the same CUDA context"
            raise Refused(cudaError_t.cudaErrorInvalidResourceHandle)
        event.captured = stream.recording is not None
        event.mark = device.mark(stream)

    @_call
    def cudaEventSynchronize(device, event):
        event = device.look_up(device.events, event)
        if event.captured:
            raise Refused(cudaError_t.cudaErrorCapturedEvent)
        device.waits.append("cudaEventSynchronize")
        if event.mark is not None:
            device.finish(event.mark)

    @_call
    def cudaEventElapsedTime(device, start, end):
        events = [device.look_up(device.events, event) for event in (start, end)]
        if any(event.mark is None or not event.timing for event in events):
            raise Refused(cudaError_t.cudaErrorInvalidResourceHandle)
        if any(event.mark.time is None for event in events):
            raise Refused(cudaError_t.cudaErrorNotReady)
        return (1e3 * (events[1].mark.time - events[0].mark.time),)

    @_call
    def cudaEventDestroy(device, event):
        device.look_up(device.events, event)
        del device.events[int(event)]


class Driver:
    """``cuda.bindings.driver``. Its modules are those of ``FakeNvrtc``."""

    def __init__(self, device):
        self._device = device

    def cuDevicePrimaryCtxGetState(self, index):
        return cudaError_t.cudaSuccess, 0, int(index in self._device.started)

    def cuModuleLoadData(self, image):
        return self._answer("cuModuleLoadData", image)

    def cuModuleGetFunction(self, module, name):
        return self._answer("cuModuleGetFunction", module, name)

    def cuModuleUnload(self, module):
        return self._answer("cuModuleUnload", module)

    def cuLaunchKernel(self, *arguments):
        return self._answer("cuLaunchKernel", *arguments)

    def _answer(self, name, *arguments):
        return _call(getattr(_Modules, name))(types.SimpleNamespace(_device=self._device), *arguments)


class _Modules:
    """Modules and launches of kernels, on a device."""

    def cuModuleLoadData(device, image):
        architecture, source = kernels.read_code(image)
        if architecture != device.architecture:
            raise Refused(cudaError_t.cudaErrorNoKernelImageForDevice)
        return (device.add(device.modules, kernels.compiled(source)),)

    def cuModuleGetFunction(device, module, name):
        function = kernels.find(device.look_up(device.modules, module), name.decode())
        if function is None:
            raise Refused(cudaError_t.cudaErrorSymbolNotFound)
        return (device.add(device.functions, (device.index, function)),)

    def cuModuleUnload(device, module):
        if device.in_flight(lambda work: work.owner is None and getattr(work.run, "is_kernel", False)):
            device.undefined.append("a module was unloaded while queued work uses it")
        device.look_up(device.modules, module)
        del device.modules[int(module)]

    def cuLaunchKernel(device, function, gx, gy, gz, bx, by, bz, shared, handle, addresses, extra):
        stream = device.stream_of(handle)
        index, kernel = device.look_up(device.functions, function)
        # "the number of threads per block" and the grid are bounded: "Technical Specifications per Compute Capability".
        if index != device.index or not (0 < bx * by * bz <= 1024 and 0 < gx < 1 << 31 and 0 < gy < 1 << 16):
            raise Refused(cudaError_t.cudaErrorInvalidValue)
        # The arguments are copied before the call returns.
        launch = kernels.Launch(device, kernel, addresses, (gx, gy), (bx, by))
        device.queue(stream, Work(launch, touches=launch.touches()))
