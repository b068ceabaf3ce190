"""The fake GPU and the fake TensorRT have only names that NVIDIA's libraries have, and refuse what CUDA refuses."""

import ctypes
import threading

import pytest

from tests import fake_gpu, nvidia
from tests.fake_gpu.kernels import FakeNvrtc, nvrtcResult

PROBE = """
import tensorrt
lacking = [name for name in given[""] if not hasattr(tensorrt, name)]
lacking += [f"{kind}.{name}" for kind, names in given.items() if kind and kind not in lacking
            for name in names if not hasattr(getattr(tensorrt, kind), name)]
print(json.dumps(lacking))
"""


@pytest.mark.parametrize("version", nvidia.VERSIONS)
def test_the_fake_has_no_name_that_tensorrt_does_not_have(version):
    nvidia.bindings(version)
    names = fake_gpu.public_names(fake_gpu.FakeTensorRT(fake_gpu.Device(), version).module)
    assert len(names[""]) > 20
    assert nvidia.inside(version, PROBE, names) == []


def test_the_fake_has_no_name_that_cuda_does_not_have():
    runtime = pytest.importorskip("cuda.bindings.runtime")
    for name in (n for n in vars(fake_gpu.Runtime) if not n.startswith("_")):
        real, ours = getattr(runtime, name), getattr(fake_gpu.Runtime, name)
        if isinstance(ours, type):
            assert {m: int(v) for m, v in ours.__members__.items()} == {
                m: int(getattr(real, m)) for m in ours.__members__
            }
        elif isinstance(ours, int):
            assert ours == real


def test_the_fake_driver_answers_as_the_real_one():
    driver = pytest.importorskip("cuda.bindings.driver")
    results = {
        "cuDevicePrimaryCtxGetState": ("CUresult", "flags", "active"),
        "cuModuleLoadData": ("CUresult", "module"),
        "cuModuleGetFunction": ("CUresult", "hfunc"),
        "cuModuleUnload": ("CUresult",),
        "cuLaunchKernel": ("CUresult",),
    }
    assert [name for name in vars(fake_gpu.Driver) if not name.startswith("_")] == list(results)
    for name, words in results.items():
        said = getattr(driver, name).__doc__.partition("Returns\n")[2].partition("See Also")[0]
        assert [line.split()[0] for line in said.splitlines() if line and line[0] not in " :-"] == list(words), said


def test_the_fake_compiler_has_no_name_that_nvrtc_does_not_have():
    nvrtc = pytest.importorskip("cuda.bindings.nvrtc")
    for name in (n for n in vars(FakeNvrtc) if not n.startswith("_")):
        assert callable(getattr(nvrtc, name))
    assert {m: int(getattr(nvrtc.nvrtcResult, m)) for m in nvrtcResult.__members__} == {
        m: int(v) for m, v in nvrtcResult.__members__.items()
    }


def test_the_fake_refuses_what_cuda_refuses():
    cuda, errors = (device := fake_gpu.Device()).runtime, fake_gpu.cudaError_t
    pointer = cuda.cudaMalloc(8)[1]
    assert cuda.cudaFree(pointer) == (errors.cudaSuccess,)
    assert cuda.cudaFree(pointer)[0] == errors.cudaErrorInvalidValue
    stream = int(cuda.cudaStreamCreateWithFlags(1)[1])
    assert cuda.cudaMemcpyAsync(pointer, 0, 8, 1, stream)[0] == errors.cudaErrorInvalidValue
    mode = fake_gpu.cudaStreamCaptureMode.cudaStreamCaptureModeThreadLocal
    assert cuda.cudaStreamBeginCapture(stream, mode) == (errors.cudaSuccess,)
    assert cuda.cudaStreamBeginCapture(stream, mode)[0] == errors.cudaErrorInvalidValue
    assert cuda.cudaStreamSynchronize(stream)[0] == errors.cudaErrorStreamCaptureUnsupported
    assert cuda.cudaStreamEndCapture(stream)[0] == errors.cudaErrorStreamCaptureInvalidated
    assert cuda.cudaStreamEndCapture(stream)[0] == errors.cudaErrorInvalidValue
    assert cuda.cudaMalloc(1 << 50)[0] == errors.cudaErrorMemoryAllocation
    event = cuda.cudaEventCreate()[1]
    assert cuda.cudaEventElapsedTime(event, event)[0] == errors.cudaErrorInvalidResourceHandle
    assert device.live() == {"streams": 1, "events": 1}


@pytest.fixture
def device():
    return fake_gpu.Device(installed=2)


def stream_of(cuda, flags=1):
    return int(cuda.cudaStreamCreateWithFlags(flags)[1])


def begin(cuda, stream):
    cuda.cudaStreamBeginCapture(stream, fake_gpu.cudaStreamCaptureMode.cudaStreamCaptureModeThreadLocal)


def test_the_default_stream_and_blocking_streams_wait_for_each_other(device):
    done, cuda = [], device.runtime
    apart, blocking = stream_of(cuda), stream_of(cuda, flags=0)
    for name, stream in (("blocking", blocking), ("apart", apart), ("default", 0), ("after", blocking)):
        device.queue(device.stream_of(stream), lambda name=name: done.append(name))
    cuda.cudaStreamSynchronize(blocking)
    assert done == ["blocking", "default", "after"]
    cuda.cudaDeviceSynchronize()
    assert done[3:] == ["apart"]


@pytest.mark.parametrize("call", [lambda cuda: cuda.cudaDeviceSynchronize(), lambda cuda: cuda.cudaEventRecord(1, 0)])
def test_what_waits_for_a_recording_of_another_thread_ends_it(device, call):
    cuda, errors, seen = device.runtime, fake_gpu.cudaError_t, []
    stream = stream_of(cuda, flags=0)
    device.events[1] = fake_gpu.Event(0)
    begin(cuda, stream)
    other = threading.Thread(target=lambda: seen.append(call(cuda)[0]))
    other.start()
    other.join()
    assert seen[0] in (errors.cudaErrorStreamCaptureUnsupported, errors.cudaErrorStreamCaptureImplicit)
    assert cuda.cudaStreamEndCapture(stream)[0] == errors.cudaErrorStreamCaptureInvalidated


def test_freeing_memory_that_queued_work_uses_is_undefined(device):
    cuda, stream = device.runtime, stream_of(device.runtime)
    far, near = cuda.cudaMalloc(8)[1], cuda.cudaMallocHost(8)[1]
    cuda.cudaMemcpyAsync(far, near, 8, 1, stream)
    cuda.cudaFree(far)
    assert device.undefined == ["memory was freed while queued work uses it"]


def test_an_event_and_its_stream_are_of_one_gpu(device):
    cuda, errors = device.runtime, fake_gpu.cudaError_t
    stream = stream_of(cuda)
    cuda.cudaSetDevice(1)
    event = cuda.cudaEventCreateWithFlags(2)[1]
    assert cuda.cudaEventRecord(event, stream)[0] == errors.cudaErrorInvalidResourceHandle
    assert cuda.cudaSetDevice(2)[0] == errors.cudaErrorInvalidDevice


def test_host_and_device_share_the_memory_of_an_integrated_gpu():
    for integrated in (False, True):
        cuda = fake_gpu.Device(integrated=integrated).runtime
        free = cuda.cudaMemGetInfo()[1]
        cuda.cudaMallocHost(1 << 20)
        assert free - cuda.cudaMemGetInfo()[1] == (1 << 20) * integrated


def test_allocations_and_copies_of_pageable_memory_count_as_waits(device):
    cuda = device.runtime
    far = cuda.cudaMalloc(8)[1]
    value = (ctypes.c_uint8 * 8)()
    cuda.cudaMemcpyAsync(far, ctypes.addressof(value), 8, 1, 0)
    cuda.cudaFree(far)
    assert device.waits == ["cudaMalloc", "cudaMemcpyAsync", "cudaFree"]
