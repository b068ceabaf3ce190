"""CUDA objects on a fake GPU are freed exactly once, whatever fails, and errors are explained."""

import sys
import types

import numpy as np
import pytest

from phreg_deploy.errors import BackendMissing, PhregError
from phreg_deploy.runtime.gpu.cuda import Cuda, Event, Stream, _load
from phreg_deploy.runtime.gpu.memory import DeviceBuffer, PinnedBuffer
from tests import fake_gpu


@pytest.fixture
def device():
    made = fake_gpu.Device()
    yield made
    assert made.undefined == []


@pytest.fixture
def cuda(device):
    return Cuda(runtime=device.runtime)


def graph(cuda):
    with Stream(cuda) as stream:
        stream.begin()
        return stream.end()


MAKERS = {
    "stream": Stream,
    "event": Event,
    "device buffer": lambda cuda: DeviceBuffer(cuda, 100),
    "pinned buffer": lambda cuda: PinnedBuffer(cuda, 100),
    "graph": graph,
}


@pytest.mark.parametrize("maker", MAKERS.values(), ids=MAKERS)
def test_everything_is_freed_once(cuda, device, maker):
    thing = maker(cuda)
    assert sum(device.live().values()) == 1
    thing.close()
    assert device.live() == {}
    before = len(device.calls)
    thing.close()
    assert len(device.calls) == before
    with maker(cuda):
        assert device.live()
    assert device.live() == {}


@pytest.mark.parametrize("maker", MAKERS.values(), ids=MAKERS)
def test_an_object_that_cannot_be_freed_is_not_freed_again(cuda, device, maker):
    thing = maker(cuda)
    for call in ("cudaFree", "cudaFreeHost", "cudaStreamDestroy", "cudaEventDestroy", "cudaGraphExecDestroy"):
        device.fail_call(call, 1, fake_gpu.cudaError_t.cudaErrorLaunchFailure)
    with pytest.raises(PhregError, match=r"failed with CUDA error 719 \(cudaErrorLaunchFailure\)"):
        thing.close()
    device.failing.clear()
    before = len(device.calls)
    thing.close()
    assert len(device.calls) == before


@pytest.mark.parametrize(
    ("call", "make"),
    [
        ("cudaStreamCreateWithFlags", Stream),
        ("cudaEventCreate", Event),
        ("cudaMalloc", lambda cuda: DeviceBuffer(cuda, 1)),
        ("cudaMallocHost", lambda cuda: PinnedBuffer(cuda, 1)),
    ],
)
def test_out_of_memory_names_what_to_do(cuda, device, call, make):
    device.fail_call(call)
    with pytest.raises(PhregError, match=f"GPU: out of memory in {call}. Use a smaller batch.*--workspace"):
        make(cuda)
    assert device.live() == {}


def test_a_gpu_is_described(device):
    device.name, device.architecture, device.integrated = "Orin", 87, True
    gpu = Cuda(runtime=device.runtime).gpu
    assert (gpu.index, gpu.name, gpu.architecture, gpu.integrated, gpu.driver) == (0, "Orin", 87, True, 13000)
    assert (gpu.memory, gpu.multiprocessors) == (8 << 30, 16)


def test_memory_is_counted(cuda):
    free, total = cuda.free_memory()
    with DeviceBuffer(cuda, 1 << 20):
        assert cuda.free_memory() == (free - (1 << 20), total)


@pytest.mark.parametrize("index", [1, -1])
def test_a_device_that_is_not_there_is_refused(device, index):
    with pytest.raises(BackendMissing, match=f"got device {index}, expected one of 0 to 0"):
        Cuda(index, device.runtime)


@pytest.mark.parametrize("code", ["cudaErrorNoDevice", "cudaErrorInsufficientDriver"])
def test_without_a_driver_that_works_the_doctor_is_named(device, code):
    device.fail_call("cudaGetDeviceCount", 1, fake_gpu.cudaError_t[code])
    with pytest.raises(BackendMissing, match=f"{code}.*no usable NVIDIA driver or GPU here.*phreg-deploy doctor"):
        Cuda(runtime=device.runtime)


def test_a_driver_that_lists_no_gpu_is_reported(device):
    device.runtime.cudaGetDeviceCount = lambda: (fake_gpu.cudaError_t.cudaSuccess, 0)
    with pytest.raises(BackendMissing, match="the driver lists no NVIDIA GPU"):
        Cuda(runtime=device.runtime)


def test_a_missing_driver_library_is_reported():
    def fail():
        raise RuntimeError("Failed to dlopen libcuda.so.1")

    with pytest.raises(
        BackendMissing, match=r"libcuda\.so\.1; install the NVIDIA driver, and start a container with --gpus all"
    ):
        Cuda(runtime=types.SimpleNamespace(cudaGetDeviceCount=fail))


def test_the_real_bindings_without_a_driver_are_a_missing_backend():
    pytest.importorskip("cuda.bindings.runtime")
    from phreg_deploy.runtime.gpu.driver import driver_present

    if driver_present():
        pytest.skip("there is a driver here")
    with pytest.raises(BackendMissing, match="GPU"):
        Cuda()


def test_without_cuda_python_the_extra_is_named(monkeypatch):
    import importlib.util

    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *_: None)
    with pytest.raises(BackendMissing, match=r'cuda-python is not installed. Run: pip install "phreg-deploy\[cuda\]"'):
        _load()


def test_a_broken_cuda_python_is_reported(monkeypatch):
    pytest.importorskip("cuda.bindings")
    monkeypatch.setitem(sys.modules, "cuda.bindings.runtime", None)
    monkeypatch.delattr("cuda.bindings.runtime", raising=False)
    with pytest.raises(BackendMissing, match=r"cuda-python cannot be imported.*--force-reinstall cuda-python"):
        _load()


def test_bytes_go_up_and_come_back(cuda):
    value = np.arange(50, dtype=np.float32).reshape(5, 10)
    with (
        Stream(cuda) as stream,
        DeviceBuffer(cuda, 200) as far,
        PinnedBuffer(cuda, 200) as up,
        PinnedBuffer(cuda, 200) as down,
    ):
        np.copyto(up.view(value.shape, value.dtype), value)
        cuda.copy(far.pointer, up.pointer, 200, "HostToDevice", stream.handle)
        cuda.copy(down.pointer, far.pointer, 200, "DeviceToHost", stream.handle)
        assert not np.array_equal(down.view(value.shape, value.dtype), value), "no wait has happened yet"
        stream.wait()
        np.testing.assert_array_equal(down.view(value.shape, value.dtype), value)
        np.testing.assert_array_equal(down.view((20,), np.dtype(np.float32)), value.reshape(-1)[:20])


def test_a_copy_to_address_0_is_refused(cuda):
    with Stream(cuda) as stream, pytest.raises(PhregError, match=r"cudaMemcpyAsync failed with CUDA error 1"):
        cuda.copy(1, 2, 3, "DeviceToDevice", stream.handle)


def test_recorded_work_runs_when_the_graph_is_launched(cuda):
    with Stream(cuda) as stream, DeviceBuffer(cuda, 8) as far, PinnedBuffer(cuda, 8) as near:
        near.view((8,), np.dtype(np.uint8))[:] = 1
        stream.begin()
        cuda.copy(far.pointer, near.pointer, 8, "HostToDevice", stream.handle)
        with stream.end() as recorded:
            near.view((8,), np.dtype(np.uint8))[:] = 2
            recorded.launch(stream.handle)
            stream.wait()
        near.view((8,), np.dtype(np.uint8))[:] = 0
        cuda.copy(near.pointer, far.pointer, 8, "DeviceToHost", stream.handle)
        stream.wait()
        assert near.view((8,), np.dtype(np.uint8)).tolist() == [2] * 8


def test_a_graph_that_cannot_be_made_leaves_nothing(cuda, device):
    with Stream(cuda) as stream:
        stream.begin()
        device.fail_call("cudaGraphInstantiate")
        with pytest.raises(PhregError, match="out of memory"):
            stream.end()
    assert device.live() == {}


def test_the_time_between_two_events_is_measured(cuda):
    with Stream(cuda) as stream, Event(cuda) as first, Event(cuda) as second:
        first.record(stream.handle)
        second.record(stream.handle)
        with pytest.raises(PhregError, match="cudaErrorNotReady"):
            second.since(first)
        second.wait()
        assert 0 <= second.since(first) < 1000


def test_the_device_is_set_in_each_thread(cuda, device):
    device.chosen.index = None
    cuda.use()
    assert device.chosen.index == 0


def test_one_stream_waits_for_another_and_the_host_does_not_wait(cuda, device):
    done = []
    with Stream(cuda) as first, Stream(cuda) as second, Event(cuda) as event:
        device.queue(device.streams[first.handle], lambda: done.append("first"))
        event.order(first.handle, second.handle)
        device.queue(device.streams[second.handle], lambda: done.append("second"))
        assert done == []
        second.wait()
        assert done == ["first", "second"]
