"""PyTorch tensors on a real GPU go in and come out without a copy; skipped, with the reason, on other machines."""

import threading

import pytest

from phreg_deploy.errors import PhregError
from phreg_deploy.runtime import FeatureExtractor
from phreg_deploy.runtime.parity import missed_gates, run_exam, worst
from tests.frames import pointers, random_frames, to_host
from tests.real_gpu_fixtures import assert_close, assert_memory_stays_flat
from tests.threads import run_in_threads

pytestmark = pytest.mark.gpu


def test_tensors_of_torch_go_in_and_come_out_without_a_copy(engine_of, torch_cuda):
    torch, image = torch_cuda, random_frames(1)
    with FeatureExtractor.load(engine_of("fp16"), "tensorrt") as extractor:
        wanted = extractor.run(image)
        got = extractor.run(torch.from_numpy(image).cuda())
        tensors = {name: torch.from_dlpack(value) for name, value in got.items()}
        for name, tensor in tensors.items():
            assert tensor.is_cuda
            assert tensor.data_ptr() == got[name].pointer
        assert_close({name: tensor.cpu().numpy() for name, tensor in tensors.items()}, wanted)
        assert_close(to_host(got), wanted)
        out = {name: torch.zeros_like(tensor) for name, tensor in tensors.items()}
        again = extractor.run(torch.from_numpy(image).cuda(), out=out)
        assert pointers(again) == {name: t.data_ptr() for name, t in out.items()}
        torch.cuda.synchronize()
        assert_close({name: tensor.cpu().numpy() for name, tensor in out.items()}, wanted)
    assert_close(
        {name: tensor.cpu().numpy() for name, tensor in tensors.items()}, wanted
    )  # also after the extractor was closed


def test_a_tensor_that_torch_is_still_filling_is_waited_for(engine_of, torch_cuda):
    torch = torch_cuda
    with FeatureExtractor.load(engine_of("fp16"), "tensorrt") as extractor:
        image = torch.from_numpy(random_frames(1)).cuda()
        wanted = extractor.run(random_frames(1))
        busy = torch.randn(4096, 4096, device="cuda")
        for side in (None, torch.cuda.Stream()):
            with torch.cuda.stream(side or torch.cuda.current_stream()):
                late = torch.zeros_like(image)
                torch.cuda.synchronize()
                for _ in range(30):
                    busy = torch.tanh(busy @ busy)
                late.copy_(image)
                got = extractor.run(late)
            assert_close(to_host(got), wanted)


@pytest.mark.parametrize("default", [False, True])
def test_a_stream_of_the_users_is_used_and_not_waited_for(engine_of, torch_cuda, default):
    torch = torch_cuda
    with FeatureExtractor.load(engine_of("fp16"), "tensorrt") as extractor:
        image = torch.from_numpy(random_frames(1)).cuda()
        wanted = extractor.run(random_frames(1))
        stream = torch.cuda.default_stream() if default else torch.cuda.Stream()
        out = {
            name: torch.zeros(value.shape, dtype=torch.from_numpy(value).dtype, device="cuda")
            for name, value in wanted.items()
        }
        extractor.run(image, out=out, stream=stream.cuda_stream)
        torch.cuda.synchronize()
        busy, done = torch.randn(8192, 8192, device="cuda"), torch.cuda.Event()
        with torch.cuda.stream(stream):
            for tensor in out.values():
                tensor.zero_()
            for _ in range(20):
                busy = torch.tanh(busy @ busy)
            extractor.run(image, out=out, stream=stream.cuda_stream)
            done.record()
        assert not done.query(), "the call returned before the work was done"
        assert_close(extractor.run(random_frames(1)), wanted)  # images on the host, queued behind the work
        done.synchronize()
        assert_close({name: tensor.cpu().numpy() for name, tensor in out.items()}, wanted)


@pytest.mark.parametrize("own", [False, True])
def test_every_frame_of_a_batch_is_read_where_it_lies(engine_of, torch_cuda, own):
    """TensorRT takes addresses that are multiples of 256 bytes; frames lie at any."""
    torch = torch_cuda
    with FeatureExtractor.load(engine_of("fp16"), "tensorrt") as extractor:
        stream = torch.cuda.Stream().cuda_stream if own else None
        for offset in (0, 1, 108, 255):
            memory = torch.zeros(offset + 64 * 64 * 3, dtype=torch.uint8, device="cuda")
            for seed in range(4):  # plain, recorded, replayed
                image = random_frames(seed)
                frame = memory[offset:].view(1, 64, 64, 3)
                frame.copy_(torch.from_numpy(image))
                got = to_host(extractor.run(frame, stream=stream))
                assert_close(got, extractor.run(image))


def test_two_threads_work_beside_one_that_synchronises_the_gpu(engine_of, torch_cuda):
    torch, stop = torch_cuda, threading.Event()
    with FeatureExtractor.load(engine_of("fp16"), "tensorrt") as extractor:
        wanted = [extractor.run(random_frames(seed)) for seed in range(2)]

        def synchronise():
            while not stop.is_set():
                torch.cuda.synchronize()

        beside = threading.Thread(target=synchronise)
        beside.start()
        try:

            def serve(seed):
                frame = torch.from_numpy(random_frames(seed)).cuda()
                for _ in range(200):
                    assert_close(to_host(extractor.run(frame)), wanted[seed])

            assert run_in_threads(serve, range(2)) == []
        finally:
            stop.set()
            beside.join()


def test_tensors_that_do_not_fit_are_refused(engine_of, torch_cuda):
    torch = torch_cuda
    with FeatureExtractor.load(engine_of("fp16"), "tensorrt") as extractor:
        image = torch.from_numpy(random_frames(1)).cuda()
        with pytest.raises(PhregError, match="contiguous"):
            extractor.run(image.transpose(1, 2))
        with pytest.raises(PhregError, match="on the GPU, expected uint8"):
            extractor.run(image.float())
        with pytest.raises(PhregError, match="expected an array on a GPU"):
            extractor.run(image.cpu())


def test_memory_stays_flat_with_tensors(engine_of, torch_cuda, gpu):
    with FeatureExtractor.load(engine_of("fp16"), "tensorrt") as extractor:
        image = torch_cuda.from_numpy(random_frames()).cuda()
        assert_memory_stays_flat(lambda: extractor.run(image), gpu, calls=1000)


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_onnxruntime_on_cuda_passes_the_gate(engine_of, gpu, torch_cuda, precision):
    import onnxruntime

    if "CUDAExecutionProvider" not in onnxruntime.get_available_providers():
        pytest.skip("this ONNX Runtime is the one for the processor")
    with FeatureExtractor.load(engine_of(precision), "onnxruntime-cuda") as extractor:
        parity = worst([case.parity for case in run_exam(extractor.bundle, extractor.run)])
        assert missed_gates(parity, precision, exam=True) == []
        wanted = extractor.run(random_frames(1))
        got = extractor.run(torch_cuda.from_numpy(random_frames(1)).cuda())
        assert_close(to_host(got), wanted)
