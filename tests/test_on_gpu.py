"""What only a real GPU with a real TensorRT can say. Skipped, with the reason, where there is none."""

import shutil
import threading
from pathlib import Path

import numpy as np
import pytest

from phreg_deploy.bundle.bundle import Bundle
from phreg_deploy.errors import BackendMissing, PhregError
from phreg_deploy.runtime import FeatureExtractor
from phreg_deploy.runtime.parity import missed_gates, run_exam, worst
from tests.cli_helpers import invoke

pytestmark = pytest.mark.gpu

PRECISIONS = ("fp32", "fp16", "bf16", "int8", "fp8")
FRAMES = 10_000
SLACK = 8 << 20  # bytes by which free memory may move: other processes, and the driver's own pools


@pytest.fixture(scope="session")
def gpu():
    """The device; skips where there is none."""
    from phreg_deploy.runtime.gpu.cuda import Cuda

    try:
        return Cuda()
    except BackendMissing as error:
        pytest.skip(str(error))


@pytest.fixture(scope="session")
def trt(gpu):
    from phreg_deploy.runtime.gpu.trt_library import load_tensorrt

    try:
        return load_tensorrt()
    except BackendMissing as error:
        pytest.skip(str(error))


@pytest.fixture(scope="session")
def torch_cuda(gpu, torch):
    if not torch.cuda.is_available():
        pytest.skip("this PyTorch has no CUDA, or finds no GPU")
    return torch


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("on-gpu")


@pytest.fixture(scope="session")
def made(folder, student, bundle, photos, trt, gpu):
    """Bundles with their engines by precision and sizes, each made once: ``made("fp16")``, ``made("fp16", "wide")``."""
    from phreg_deploy.calibration import calibrate
    from phreg_deploy.export.exporter import ExportRequest, export_bundle

    there = {}

    def make(precision, sizes="fixed") -> Path:
        if precision in ("bf16",) and gpu.gpu.architecture < 80:
            pytest.skip(f"{gpu.gpu.name} has no bfloat16")
        if precision == "fp8" and gpu.gpu.architecture < 89:
            pytest.skip(f"{gpu.gpu.name} has no FP8")
        key = precision, sizes
        if key not in there:
            target = folder / "-".join(key)
            if precision in ("int8", "fp8"):
                calibrate(bundle, photos, target, mode=precision, target="trt")
            else:
                shape = {"image_size": "48:64:96", "batch": "1:2:4"} if sizes == "wide" else {}
                export_bundle(ExportRequest(str(student), precision=precision, **shape), target)
            there[key] = target, invoke("build", target, "--json")
        target, done = there[key]
        assert done.code == 0, done.err
        return target

    make.said = lambda precision, sizes="fixed": there[precision, sizes][1].document
    return make


def frames(seed=0, batch=1, size=(64, 64)):
    return np.random.default_rng(seed).integers(0, 256, (batch, *size, 3), dtype=np.uint8)


def close(got, wanted):
    for name in wanted:
        a, b = np.asarray(got[name], np.float64), np.asarray(wanted[name], np.float64)
        assert np.linalg.norm(a - b) <= 2e-2 * np.linalg.norm(b), name


# What is built


@pytest.mark.parametrize("precision", PRECISIONS)
def test_every_precision_is_built_and_passes_its_gate(made, precision):
    target = made(precision)
    assert made.said(precision)["missed"] == []
    with FeatureExtractor.load(target, "tensorrt") as extractor:
        parity = worst([case.parity for case in run_exam(extractor.bundle, extractor.run)])
        assert missed_gates(parity, precision, exam=True) == []


def test_every_size_and_batch_passes_the_gate(made):
    with FeatureExtractor.load(made("fp32", "wide"), "tensorrt") as extractor:
        for case in run_exam(extractor.bundle, extractor.run):
            assert missed_gates(case.parity, "fp32") == []
        with FeatureExtractor.load(extractor.bundle.folder, "onnxruntime-cpu") as other:
            for seed, (batch, size) in enumerate([(1, (48, 96)), (4, (96, 48)), (3, (80, 56))]):
                image = frames(seed, batch, size)
                close(extractor.run(image), other.run(image))


@pytest.mark.parametrize("precision", ["fp16", "bf16", "int8"])
def test_every_attention_is_fused(made, precision):
    made(precision)
    census = made.said(precision)["census"]
    assert census["fused_attention"] == [f"blocks.{i}.attn" for i in range(3)]


@pytest.mark.parametrize("precision", ["int8", "fp8"])
def test_every_linear_layer_that_is_meant_to_runs_in_eight_bits(made, precision):
    from phreg_deploy.export.engine.build import eight_bit_layers

    target = made(precision)
    assert set(eight_bit_layers(Bundle.read(target))) <= set(made.said(precision)["census"]["eight_bit"])


def test_a_second_build_finds_the_engine_and_a_forced_one_is_faster(made):
    target = made("fp16")
    assert invoke("build", target, "--json").document["cached"] is True
    again = invoke("build", target, "--force", "--json").document
    assert again["cached"] is False
    assert again["seconds"] < max(5.0, made.said("fp16")["seconds"]), "the timing cache was read"


def test_a_damaged_plan_is_not_run(made, tmp_path):
    target = Path(shutil.copytree(made("fp32"), tmp_path / "copy"))
    (plan,) = (target / "engines").glob("*.plan")
    plan.write_bytes(plan.read_bytes()[:-1] + b"\0")
    with pytest.raises(PhregError, match="is not run"):
        FeatureExtractor.load(target, "tensorrt")


@pytest.mark.parametrize("compatibility", ["version", "ampere+", "same-cc"])
def test_a_compatible_plan_answers(made, tmp_path, compatibility):
    target = Path(shutil.copytree(made("fp16"), tmp_path / "copy"))
    shutil.rmtree(target / "engines")
    done = invoke("build", target, "--compat", compatibility, "--allow-unfused", "--json")
    if done.code == 2:
        pytest.skip(done.document["error"])
    assert done.code == 0, done.err
    assert done.document["missed"] == []


# How it runs


def test_graphs_and_plain_calls_say_the_same(made):
    with FeatureExtractor.load(made("fp16"), "tensorrt") as extractor:
        answers = [extractor.run(frames(3)) for _ in range(4)]
        for other in answers[1:]:
            for name, value in answers[0].items():
                np.testing.assert_array_equal(other[name], value)


def test_shapes_that_come_and_go_keep_their_answers(made):
    work = [(frames(i, batch, size)) for i, (batch, size) in enumerate([(1, (64, 64)), (4, (96, 96)), (2, (48, 96))])]
    with FeatureExtractor.load(made("fp32", "wide"), "tensorrt") as extractor:
        first = [extractor.run(image) for image in work]
        for _ in range(3):
            for image, wanted in zip(work, first):
                for _ in range(3):  # plain, recorded, replayed
                    close(extractor.run(image), wanted)


def test_eight_threads_get_their_own_answers(made):
    with FeatureExtractor.load(made("fp16", "wide"), "tensorrt") as extractor:
        work = [frames(i, 1 + i % 3, [(64, 64), (48, 96)][i % 2]) for i in range(8)]
        wanted, failed = [extractor.run(image) for image in work], []

        def serve(i):
            try:
                for _ in range(50):
                    close(extractor.run(work[i]), wanted[i])
            except BaseException as error:
                failed.append(error)

        threads = [threading.Thread(target=serve, args=(i,)) for i in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert failed == []


def test_memory_stays_flat(made, gpu):
    with FeatureExtractor.load(made("fp16"), "tensorrt") as extractor:
        image = frames()
        for _ in range(50):
            extractor.run(image)
        before = gpu.free_memory()[0]
        for _ in range(FRAMES):
            extractor.run(image)
        assert abs(gpu.free_memory()[0] - before) <= SLACK


def test_closing_gives_the_memory_back(made, gpu):
    def use():
        with FeatureExtractor.load(made("fp16"), "tensorrt") as extractor:
            for _ in range(3):
                extractor.run(frames())

    use()  # the driver keeps what it loads of kernels
    before = gpu.free_memory()[0]
    for _ in range(5):
        use()
    assert before - gpu.free_memory()[0] <= SLACK


@pytest.mark.parametrize("graph", [False, True])
def test_the_parts_of_an_inference_are_all_of_it(made, graph):
    """Against one pair of events around the same work: the marks between the parts cost next to nothing."""
    from phreg_deploy.runtime.gpu.cuda import Event

    with FeatureExtractor.load(made("fp16"), "tensorrt") as extractor:
        plan, feed = extractor.opened, extractor.feed(frames())
        for _ in range(20):
            plan.split(feed, graph)
        parts = [plan.split(feed, graph) for _ in range(200)]
        assert all(p["latency"] == pytest.approx(p["h2d"] + p["compute"] + p["d2h"], rel=1e-6) for p in parts)
        for _ in range(20):
            plan.run(feed)
        lane, whole = plan._contexts[0], []
        (recorded,) = [r for key, r in lane._recorded.items() if key[0] != "compute"]
        with Event(plan.cuda) as first, Event(plan.cuda) as last:
            for _ in range(200):
                first.record(lane.stream.handle)
                recorded.launch(lane.stream.handle)
                last.record(lane.stream.handle)
                last.wait()
                whole.append(last.since(first))
    if graph:  # without one, the host's own time is in the parts
        marks = 0.02  # milliseconds that four marks and three launches take more than two and one
        assert np.median([p["latency"] for p in parts]) == pytest.approx(np.median(whole), rel=0.05, abs=marks)


def test_layers_add_up(made):
    with FeatureExtractor.load(made("fp16"), "tensorrt") as extractor:
        times = extractor.opened.layers(extractor.feed(frames()), rounds=20)
        assert len(times) >= 3
        assert all(value >= 0 for value in times.values())
        assert sum(times.values()) > 0
        close(extractor.run(frames()), extractor.run(frames()))


# Arrays on the GPU


def test_tensors_of_torch_go_in_and_come_out_without_a_copy(made, torch_cuda):
    torch, image = torch_cuda, frames(1)
    with FeatureExtractor.load(made("fp16"), "tensorrt") as extractor:
        wanted = extractor.run(image)
        got = extractor.run(torch.from_numpy(image).cuda())
        tensors = {name: torch.from_dlpack(value) for name, value in got.items()}
        for name, tensor in tensors.items():
            assert tensor.is_cuda
            assert tensor.data_ptr() == got[name].pointer
        close({name: tensor.cpu().numpy() for name, tensor in tensors.items()}, wanted)
        close({name: value.numpy() for name, value in got.items()}, wanted)
        out = {name: torch.zeros_like(tensor) for name, tensor in tensors.items()}
        again = extractor.run(torch.from_numpy(image).cuda(), out=out)
        assert {name: value.pointer for name, value in again.items()} == {name: t.data_ptr() for name, t in out.items()}
        torch.cuda.synchronize()
        close({name: tensor.cpu().numpy() for name, tensor in out.items()}, wanted)
    close({name: tensor.cpu().numpy() for name, tensor in tensors.items()}, wanted)  # they outlive the extractor


def test_a_tensor_that_torch_is_still_filling_is_waited_for(made, torch_cuda):
    torch = torch_cuda
    with FeatureExtractor.load(made("fp16"), "tensorrt") as extractor:
        image = torch.from_numpy(frames(1)).cuda()
        wanted = extractor.run(frames(1))
        busy = torch.randn(4096, 4096, device="cuda")
        for side in (None, torch.cuda.Stream()):
            with torch.cuda.stream(side or torch.cuda.current_stream()):
                late = torch.zeros_like(image)
                torch.cuda.synchronize()
                for _ in range(30):
                    busy = torch.tanh(busy @ busy)
                late.copy_(image)
                got = extractor.run(late)
            close({name: value.numpy() for name, value in got.items()}, wanted)


@pytest.mark.parametrize("default", [False, True])
def test_a_stream_of_the_users_is_used_and_not_waited_for(made, torch_cuda, default):
    torch = torch_cuda
    with FeatureExtractor.load(made("fp16"), "tensorrt") as extractor:
        image = torch.from_numpy(frames(1)).cuda()
        wanted = extractor.run(frames(1))
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
        assert not done.query(), "the call came back before the work was done"
        close(extractor.run(frames(1)), wanted)  # on the host, behind it
        done.synchronize()
        close({name: tensor.cpu().numpy() for name, tensor in out.items()}, wanted)


def test_tensors_that_do_not_fit_are_refused(made, torch_cuda):
    torch = torch_cuda
    with FeatureExtractor.load(made("fp16"), "tensorrt") as extractor:
        image = torch.from_numpy(frames(1)).cuda()
        with pytest.raises(PhregError, match="contiguous"):
            extractor.run(image.transpose(1, 2))
        with pytest.raises(PhregError, match="on the GPU, expected uint8"):
            extractor.run(image.float())
        with pytest.raises(PhregError, match="expected an array on a GPU"):
            extractor.run(image.cpu())


def test_memory_stays_flat_with_tensors(made, torch_cuda, gpu):
    with FeatureExtractor.load(made("fp16"), "tensorrt") as extractor:
        image = torch_cuda.from_numpy(frames()).cuda()
        for _ in range(50):
            extractor.run(image)
        before = gpu.free_memory()[0]
        for _ in range(FRAMES // 10):
            extractor.run(image)
        assert abs(gpu.free_memory()[0] - before) <= SLACK


# ONNX Runtime


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_onnxruntime_on_cuda_passes_the_gate(made, gpu, torch_cuda, precision):
    import onnxruntime

    if "CUDAExecutionProvider" not in onnxruntime.get_available_providers():
        pytest.skip("this ONNX Runtime is the one for the processor")
    with FeatureExtractor.load(made(precision), "onnxruntime-cuda") as extractor:
        parity = worst([case.parity for case in run_exam(extractor.bundle, extractor.run)])
        assert missed_gates(parity, precision, exam=True) == []
        wanted = extractor.run(frames(1))
        got = extractor.run(torch_cuda.from_numpy(frames(1)).cuda())
        close({name: value.numpy() for name, value in got.items()}, wanted)


def test_auto_measures_the_gpu_too(made):
    with FeatureExtractor.load(made("fp32")) as extractor:
        assert "tensorrt (fp32)" in extractor.choice


def test_the_doctor_sees_what_there_is(made, gpu):
    done = invoke("doctor", "--json")
    assert gpu.gpu.name in done.out


def test_bisect_finds_nothing_in_an_engine_that_is_well(made):
    from phreg_deploy.runtime.backends.options import BackendOptions
    from phreg_deploy.verify.bisection import bisect

    assert bisect(Bundle.read(made("fp16")), "tensorrt", BackendOptions()).first is None
