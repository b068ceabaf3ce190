"""Arrays that pass between libraries without a copy, tested on the host, where numpy and torch read the same DLPack."""

import ctypes
import gc
import weakref

import numpy as np
import pytest

from phreg_deploy.errors import PhregError
from phreg_deploy.runtime.gpu.arrays import CPU, GPU, MANAGED, DeviceArray, as_device, from_capsule, on_gpu
from phreg_deploy.runtime.gpu.cuda import Cuda
from tests import fake_gpu

HOST = (CPU, 0)
DTYPES = ["uint8", "int8", "int32", "int64", "float16", "float32", "float64"]
SHAPES = [(1, 4, 4, 3), (5,), (), (2, 0, 3), (3, 1, 2)]


@pytest.fixture
def device(monkeypatch):
    made = fake_gpu.Device()
    fake_gpu.install(monkeypatch, made)
    return made


def values(shape=(2, 3, 4), dtype="float32"):
    return (np.arange(np.prod(shape, dtype=int)) % 100).reshape(shape).astype(dtype)


def lend(array, where=HOST):
    """A numpy array as a ``DeviceArray``; the second value dies when nobody holds the first one's memory any more."""

    class Owner:
        def __init__(self):
            self.array = array

    owner = Owner()
    return DeviceArray(array.ctypes.data, array.shape, array.dtype, owner, device=where), weakref.ref(owner)


def gone(reference):
    gc.collect()
    return reference() is None


# Out


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_numpy_reads_what_is_lent(dtype, shape):
    array = values(shape, dtype)
    seen = np.from_dlpack(lend(array)[0])
    assert (seen.dtype, seen.shape) == (array.dtype, array.shape)
    np.testing.assert_array_equal(seen, array)
    assert not array.size or seen.ctypes.data == array.ctypes.data


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_torch_reads_and_writes_what_is_lent(torch, dtype, shape):
    array = values(shape, dtype)
    seen = torch.from_dlpack(lend(array)[0])
    np.testing.assert_array_equal(seen.numpy(), array)
    seen.fill_(7)
    assert (array == 7).all(), "it is the same memory"


def test_what_is_lent_lives_as_long_as_its_reader():
    array, owner = lend(values())
    seen = np.from_dlpack(array)
    del array
    assert not gone(owner)
    part = seen[0]
    del seen
    assert not gone(owner)
    del part
    assert gone(owner)


def test_torch_gives_back_what_it_was_lent(torch):
    array, owner = lend(values())
    seen = torch.from_dlpack(array)
    del array
    assert not gone(owner)
    del seen
    assert gone(owner)


def test_a_capsule_that_nobody_takes_holds_nothing():
    array, owner = lend(values())
    capsule = array.__dlpack__()
    del array
    assert not gone(owner)
    del capsule
    assert gone(owner)


@pytest.mark.parametrize("reader", [int, np.zeros(3).__getitem__, ctypes.c_int, from_capsule])
def test_a_reader_that_refuses_a_capsule_says_so_and_holds_nothing(reader):
    array, owner = lend(values(), (GPU, 0) if reader is not from_capsule else (10, 0))
    with pytest.raises((TypeError, IndexError, PhregError)) as caught:
        reader(array.__dlpack__())
    del array, caught
    assert gone(owner)


def test_numpy_refuses_memory_on_a_gpu_in_its_own_words():
    array, owner = lend(values(), (GPU, 0))
    with pytest.raises((BufferError, RuntimeError), match=r"[Dd]evice"):  # the kind is numpy's, by version
        np.from_dlpack(array)
    del array
    assert gone(owner)


def test_a_thousand_capsules_leave_nothing():
    array, _ = lend(values())
    owners = []
    for i in range(1000):
        array, owner = lend(values())
        owners.append(owner)
        if i % 2:
            np.from_dlpack(array)
        else:
            array.__dlpack__()
    del array
    gc.collect()
    assert sum(owner() is not None for owner in owners) == 0


def test_an_error_on_its_way_is_not_lost_when_a_reader_goes(torch):
    def fail():
        kept = (np.from_dlpack(lend(values())[0]), torch.from_dlpack(lend(values())[0]), lend(values())[0].__dlpack__())
        return kept[9]

    with pytest.raises(IndexError):
        fail()


@pytest.mark.parametrize("where", [(GPU, 0), (GPU, 3), HOST])
def test_a_capsule_says_where_its_memory_is(where):
    array, _ = lend(values(), where)
    assert array.__dlpack_device__() == where
    assert from_capsule(array.__dlpack__(), expected=(CPU, GPU)).device == where


def test_the_array_interface_says_what_there_is(device):
    array, _ = lend(values((2, 3), "float16"), (GPU, 0))
    facts = array.__cuda_array_interface__
    assert facts == {
        "shape": (2, 3),
        "typestr": "<f2",
        "data": (array.pointer, False),
        "strides": None,
        "version": 3,
        "stream": None,
    }
    for stream, said in ((0, 1), (5, 5)):  # 0 is forbidden: nobody knows which default stream it is
        array.stream = stream
        assert array.__cuda_array_interface__["stream"] == said


def test_memory_on_the_host_is_not_offered_as_memory_on_a_gpu():
    assert not hasattr(lend(values())[0], "__cuda_array_interface__")


# In


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_a_capsule_of_numpy_is_read_where_it_lies(dtype, shape):
    array = values(shape, dtype)
    seen = from_capsule(array.__dlpack__(), expected=(CPU,))
    assert (seen.shape, seen.dtype, seen.device) == (array.shape, array.dtype, HOST)
    assert not array.size or seen.pointer == array.ctypes.data
    np.testing.assert_array_equal(seen.numpy(), array)


def test_a_capsule_of_torch_is_read_where_it_lies(torch):
    tensor = torch.arange(24, dtype=torch.float32).reshape(2, 3, 4)
    seen = from_capsule(tensor.__dlpack__(), expected=(CPU,))
    assert seen.pointer == tensor.data_ptr()
    np.testing.assert_array_equal(seen.numpy(), tensor.numpy())
    part = from_capsule(tensor[1].__dlpack__(), expected=(CPU,))
    np.testing.assert_array_equal(part.numpy(), tensor[1].numpy())


def test_what_is_borrowed_is_given_back_with_its_last_reader(torch):
    class Mine(np.ndarray):
        pass

    array = values().view(Mine)
    owner = weakref.ref(array)
    seen = from_capsule(array.__dlpack__(), expected=(CPU,))
    del array
    assert not gone(owner)
    again = np.from_dlpack(seen)
    del seen
    assert not gone(owner)
    del again
    assert gone(owner)


def test_a_capsule_is_taken_once():
    capsule = values().__dlpack__()
    from_capsule(capsule, expected=(CPU,))
    with pytest.raises(ValueError, match="PyCapsule"):
        from_capsule(capsule, expected=(CPU,))


@pytest.mark.parametrize(
    ("view", "fits"),
    [
        (lambda a: a[::2], False),
        (lambda a: a.T, False),
        (lambda a: a[:, :, ::-1], False),
        (lambda a: a[:, :2], False),
        (lambda a: a[1:2, :, :], True),
        (lambda a: a[:1, None], True),
        (lambda a: a[:0].transpose(2, 1, 0), True),
    ],
)
def test_only_contiguous_arrays_are_read(view, fits):
    array = view(values((4, 3, 5)))
    if fits:
        seen = from_capsule(array.__dlpack__(), expected=(CPU,))
        np.testing.assert_array_equal(seen.numpy(), array)
    else:
        with pytest.raises(PhregError, match=r"got strides .* expected a contiguous array; make it one first"):
            from_capsule(array.__dlpack__(), expected=(CPU,))


def test_memory_elsewhere_is_refused_and_given_back():
    array, owner = lend(values())
    with pytest.raises(PhregError, match=r"got DLPack device type 1, expected 2 \(CUDA\)"):
        from_capsule(array.__dlpack__())
    del array
    assert gone(owner)


@pytest.mark.parametrize("dtype", ["bool", "complex64"])
def test_types_without_a_meaning_here_are_refused(dtype):
    with pytest.raises(PhregError, match="got DLPack type code"):
        from_capsule(values(dtype=dtype).__dlpack__(), expected=(CPU,))


def test_bfloat16_is_refused_in_words(torch):
    with pytest.raises(PhregError, match="type code 4 with 16 bits, expected integers or floats that numpy knows"):
        from_capsule(torch.zeros(3, dtype=torch.bfloat16).__dlpack__(), expected=(CPU,))


class Offer:
    """An array on a GPU by DLPack alone; remembers the stream that it was asked for."""

    def __init__(self, where=(GPU, 0), error=None):
        self.value, self.where, self.error, self.asked = values(), where, error, []

    def __dlpack_device__(self):
        return self.where

    def __dlpack__(self, *, stream):
        self.asked.append(stream)
        if self.error is not None:
            raise self.error
        return lend(self.value, self.where)[0].__dlpack__()


@pytest.mark.parametrize(("stream", "asked"), [(None, 1), (0, 1), (7, 7)])
def test_the_producer_is_told_the_stream_that_reads(stream, asked):
    offer = Offer()
    array = as_device(offer, stream)
    assert offer.asked == [asked], "0 is forbidden there; 1 is the default stream"
    assert array.stream == asked, "from that stream on it can be read"
    assert array.pointer == offer.value.ctypes.data


def test_the_array_interface_is_read_with_its_stream(device):
    array = fake_gpu.Array(device, values(), stream=9)
    seen = as_device(array)
    assert (seen.pointer, seen.shape, seen.dtype, seen.stream) == (array.pointer, array.shape, array.dtype, 9)
    assert as_device(seen) is seen


def test_managed_memory_counts_as_a_gpus():
    assert on_gpu(Offer((MANAGED, 0)))
    assert as_device(Offer((MANAGED, 0))).device == (MANAGED, 0)


def test_a_producer_that_refuses_is_quoted(torch):
    with pytest.raises(PhregError, match="Offer cannot be read: it requires grad"):
        as_device(Offer(error=BufferError("it requires grad")))


def test_what_is_not_on_a_gpu_is_refused(torch):
    for value in (values(), torch.zeros(3), [1, 2], None, Offer(HOST)):
        assert not on_gpu(value)
        with pytest.raises(PhregError, match=f"got {type(value).__name__}, expected an array on a GPU"):
            as_device(value)


# On a GPU


def test_fresh_memory_goes_with_its_last_reader(device):
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
    """Also of another library's memory, of which no device was given."""
    cuda, value = Cuda(), values()
    stream = int(device.runtime.cudaStreamCreateWithFlags(1)[1])
    memory = fake_gpu.Array(device, np.zeros_like(value))
    device.queue(device.streams[stream], lambda: memory.write(value))
    array = DeviceArray(memory.pointer, value.shape, value.dtype, memory, stream, cuda=cuda if known else None)
    np.testing.assert_array_equal(array.numpy(), value)


@pytest.mark.parametrize(("reader", "waits"), [(None, 1), (1, 1), (99, 1), (-1, 0)])
def test_a_reader_on_another_stream_waits(device, reader, waits):
    stream = int(device.runtime.cudaStreamCreateWithFlags(1)[1])
    array = DeviceArray.allocate(Cuda(), (2, 3), np.dtype("float32"), stream)
    array.__dlpack__(stream=reader)
    assert device.count("cudaStreamSynchronize") == waits
    array.__dlpack__(stream=stream)
    assert device.count("cudaStreamSynchronize") == waits
