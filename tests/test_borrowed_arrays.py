"""Arrays of numpy, torch and GPU libraries that are read without a copy, and given back."""

import weakref

import numpy as np
import pytest

from phreg_deploy.errors import PhregError
from phreg_deploy.runtime.gpu.arrays import CPU, GPU, MANAGED, as_device, from_capsule, on_gpu
from tests import fake_gpu
from tests.lent_arrays import HOST, consecutive, every_dtype, every_shape, is_freed, lend


@every_dtype
@every_shape
def test_a_capsule_of_numpy_is_read_where_it_lies(dtype, shape):
    array = consecutive(shape, dtype)
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


def test_borrowed_memory_is_given_back_with_its_last_reader(torch):
    class Mine(np.ndarray):
        pass

    array = consecutive().view(Mine)
    owner = weakref.ref(array)
    seen = from_capsule(array.__dlpack__(), expected=(CPU,))
    del array
    assert not is_freed(owner)
    again = np.from_dlpack(seen)
    del seen
    assert not is_freed(owner)
    del again
    assert is_freed(owner)


def test_a_capsule_is_taken_once():
    capsule = consecutive().__dlpack__()
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
    array = view(consecutive((4, 3, 5)))
    if fits:
        seen = from_capsule(array.__dlpack__(), expected=(CPU,))
        np.testing.assert_array_equal(seen.numpy(), array)
    else:
        with pytest.raises(PhregError, match=r"got strides .* expected a contiguous array; make it one first"):
            from_capsule(array.__dlpack__(), expected=(CPU,))


def test_memory_elsewhere_is_refused_and_given_back():
    array, owner = lend(consecutive())
    with pytest.raises(PhregError, match=r"got DLPack device type 1, expected 2 \(CUDA\)"):
        from_capsule(array.__dlpack__())
    del array
    assert is_freed(owner)


@pytest.mark.parametrize("dtype", ["bool", "complex64"])
def test_bool_and_complex_arrays_are_refused(dtype):
    if dtype == "bool" and np.lib.NumpyVersion(np.__version__) < "1.25.0":
        pytest.skip("this numpy lends no bool arrays")
    with pytest.raises(PhregError, match="got DLPack type code"):
        from_capsule(consecutive(dtype=dtype).__dlpack__(), expected=(CPU,))


def test_bfloat16_is_refused_with_the_reason(torch):
    with pytest.raises(PhregError, match="type code 4 with 16 bits, expected integers or floats that numpy knows"):
        from_capsule(torch.zeros(3, dtype=torch.bfloat16).__dlpack__(), expected=(CPU,))


class Offer:
    """An array on a GPU that offers DLPack alone, and records the streams that readers give."""

    def __init__(self, where=(GPU, 0), error=None):
        self.value, self.where, self.error, self.asked = consecutive(), where, error, []

    def __dlpack_device__(self):
        return self.where

    def __dlpack__(self, *, stream):
        self.asked.append(stream)
        if self.error is not None:
            raise self.error
        return lend(self.value, self.where)[0].__dlpack__()


@pytest.mark.parametrize(("stream", "asked"), [(None, 1), (0, 1), (7, 7)])
def test_the_producer_gets_the_stream_that_reads(stream, asked):
    offer = Offer()
    array = as_device(offer, stream)
    assert offer.asked == [asked], "DLPack forbids stream 0; 1 is the default stream"
    assert array.stream == asked, "work on that stream may read it"
    assert array.pointer == offer.value.ctypes.data


def test_the_array_interface_is_read_with_its_stream(device):
    array = fake_gpu.Array(device, consecutive(), stream=9)
    seen = as_device(array)
    assert (seen.pointer, seen.shape, seen.dtype, seen.stream) == (array.pointer, array.shape, array.dtype, 9)
    assert as_device(seen) is seen


def test_managed_memory_counts_as_memory_of_a_gpu():
    assert on_gpu(Offer((MANAGED, 0)))
    assert as_device(Offer((MANAGED, 0))).device == (MANAGED, 0)


def test_a_producer_that_refuses_is_quoted(torch):
    with pytest.raises(PhregError, match="Offer cannot be read: it requires grad"):
        as_device(Offer(error=BufferError("it requires grad")))


def test_arrays_that_are_not_on_a_gpu_are_refused(torch):
    for value in (consecutive(), torch.zeros(3), [1, 2], None, Offer(HOST)):
        assert not on_gpu(value)
        with pytest.raises(PhregError, match=f"got {type(value).__name__}, expected an array on a GPU"):
            as_device(value)
