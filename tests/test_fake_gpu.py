"""The fake GPU and the fake TensorRT have only names that NVIDIA's libraries have, and refuse what CUDA refuses."""

import pytest

from tests import fake_gpu, nvidia

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
