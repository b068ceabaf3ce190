"""Arrays that are lent to numpy and torch without a copy, and memory on the GPU that lives as long as its readers."""

import ctypes
import gc

import numpy as np
import pytest

from phreg_deploy.errors import PhregError
from phreg_deploy.runtime.gpu.arrays import CPU, GPU, DeviceArray, from_capsule
from phreg_deploy.runtime.gpu.cuda import Cuda
from tests import fake_gpu
from tests.lent_arrays import HOST, consecutive, every_dtype, every_shape, is_freed, lend


@every_dtype
@every_shape
def test_numpy_reads_lent_arrays(dtype, shape):
    array = consecutive(shape, dtype)
    seen = np.from_dlpack(lend(array)[0])
    assert (seen.dtype, seen.shape) == (array.dtype, array.shape)
    np.testing.assert_array_equal(seen, array)
    assert not array.size or seen.ctypes.data == array.ctypes.data


@every_dtype
@every_shape
def test_torch_reads_and_writes_lent_arrays(torch, dtype, shape):
    array = consecutive(shape, dtype)
    seen = torch.from_dlpack(lend(array)[0])
    np.testing.assert_array_equal(seen.numpy(), array)
    seen.fill_(7)
    assert (array == 7).all(), "both have the same memory"


def test_lent_memory_lives_as_long_as_its_reader():
    array, owner = lend(consecutive())
    seen = np.from_dlpack(array)
    del array
    assert not is_freed(owner)
    part = seen[0]
    del seen
    assert not is_freed(owner)
    del part
    assert is_freed(owner)


def test_torch_gives_lent_memory_back(torch):
    array, owner = lend(consecutive())
    seen = torch.from_dlpack(array)
    del array
    assert not is_freed(owner)
    del seen
    assert is_freed(owner)


def test_a_capsule_that_nobody_takes_holds_nothing():
    array, owner = lend(consecutive())
    capsule = array.__dlpack__()
    del array
    assert not is_freed(owner)
    del capsule
    assert is_freed(owner)


@pytest.mark.parametrize("reader", [int, np.zeros(3).__getitem__, ctypes.c_int, from_capsule])
def test_a_reader_that_refuses_a_capsule_says_so_and_holds_nothing(reader):
    array, owner = lend(consecutive(), (GPU, 0) if reader is not from_capsule else (10, 0))
    with pytest.raises((TypeError, IndexError, PhregError)) as caught:
        reader(array.__dlpack__())
    del array, caught
    assert is_freed(owner)


def test_numpy_refuses_memory_on_a_gpu():
    array, owner = lend(consecutive(), (GPU, 0))
    with pytest.raises((BufferError, RuntimeError), match=r"[Dd]evice"):  # the class depends on numpy's version
        np.from_dlpack(array)
    del array
    assert is_freed(owner)


def test_a_thousand_capsules_leave_nothing():
    array, _ = lend(consecutive())
    owners = []
    for i in range(1000):
        array, owner = lend(consecutive())
        owners.append(owner)
        if i % 2:
            np.from_dlpack(array)
        else:
            array.__dlpack__()
    del array
    gc.collect()
    assert sum(owner() is not None for owner in owners) == 0


def test_an_error_is_not_lost_when_readers_are_freed_while_it_is_raised(torch):
    def fail():
        kept = (
            np.from_dlpack(lend(consecutive())[0]),
            torch.from_dlpack(lend(consecutive())[0]),
            lend(consecutive())[0].__dlpack__(),
        )
        return kept[9]

    with pytest.raises(IndexError):
        fail()


@pytest.mark.parametrize("where", [(GPU, 0), (GPU, 3), HOST])
def test_a_capsule_says_where_its_memory_is(where):
    array, _ = lend(consecutive(), where)
    assert array.__dlpack_device__() == where
    assert from_capsule(array.__dlpack__(), expected=(CPU, GPU)).device == where


def test_the_array_interface_describes_the_array(device):
    array, _ = lend(consecutive((2, 3), "float16"), (GPU, 0))
    facts = array.__cuda_array_interface__
    assert facts == {
        "shape": (2, 3),
        "typestr": "<f2",
        "data": (array.pointer, False),
        "strides": None,
        "version": 3,
        "stream": None,
    }
    for stream, said in ((0, 1), (5, 5)):  # 0 is forbidden because it may mean two default streams
        array.stream = stream
        assert array.__cuda_array_interface__["stream"] == said


def test_memory_on_the_host_is_not_offered_as_memory_on_a_gpu():
    assert not hasattr(lend(consecutive())[0], "__cuda_array_interface__")


def test_allocated_memory_is_freed_with_its_last_reader(device):
    cuda = Cuda()
    array = DeviceArray.allocate(cuda, (2, 3), np.dtype("float32"))
    assert device.live() == {"allocations": 1}
    assert array.nbytes == 24
    capsule = array.__dlpack__()
    del array
    gc.collect()
    assert device.live() == {"allocations": 1}
    del capsule
    gc.collect()
    assert device.live() == {}


def test_memory_that_cannot_be_freed_does_no_harm(device):
    array = DeviceArray.allocate(Cuda(), (2, 3), np.dtype("float32"))
    device.fault = fake_gpu.cudaError_t.cudaErrorIllegalAddress
    del array
    gc.collect()


@pytest.mark.parametrize("known", [True, False])
def test_a_copy_on_the_host_waits_for_the_stream_that_fills_the_array(device, known):
    """The copy waits also if the array is of another library, without a ``Cuda``."""
    cuda, value = Cuda(), consecutive()
    stream = int(device.runtime.cudaStreamCreateWithFlags(1)[1])
    memory = fake_gpu.Array(device, np.zeros_like(value))
    device.queue(device.streams[stream], lambda: memory.write(value))
    array = DeviceArray(memory.pointer, value.shape, value.dtype, memory, stream, cuda=cuda if known else None)
    np.testing.assert_array_equal(array.numpy(), value)


@pytest.mark.parametrize(("reader", "waits"), [(None, 1), (1, 1), ("other", 1), (-1, 0)])
def test_a_reader_on_another_stream_waits_and_the_host_does_not(device, reader, waits):
    stream, other = (int(device.runtime.cudaStreamCreateWithFlags(1)[1]) for _ in range(2))
    array = DeviceArray.allocate(Cuda(), (2, 3), np.dtype("float32"), stream)
    device.calls.clear()
    array.__dlpack__(stream=other if reader == "other" else reader)
    assert device.count("cudaStreamWaitEvent") == waits
    array.__dlpack__(stream=stream)
    assert device.count("cudaStreamWaitEvent") == waits
    assert not {"cudaStreamSynchronize", "cudaEventSynchronize"} & set(device.count())
