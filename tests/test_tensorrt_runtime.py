"""The TensorRT backend on a GPU that is not there: answers, lanes, graphs, memory and order, on ``tests/fake_gpu``."""

import shutil
import threading
from pathlib import Path

import numpy as np
import pytest

from phreg_deploy.errors import BackendMissing, PhregError
from phreg_deploy.export.engine.build import BuildRequest, build_engine
from phreg_deploy.runtime import FeatureExtractor
from phreg_deploy.runtime.gpu.arrays import DeviceArray
from tests import fake_gpu, nvidia

FRAMES = 2000


@pytest.fixture(scope="module")
def listed(tmp_path_factory, student) -> Path:
    """The student at two sizes, one or two images, in FP16."""
    from phreg_deploy.export.exporter import ExportRequest, export_bundle

    folder = tmp_path_factory.mktemp("bundles") / "listed"
    export_bundle(ExportRequest(str(student), image_size="64,48x96", batch="1:1:2", precision="fp16"), folder)
    return folder


@pytest.fixture
def load(tensorrt, tmp_path, request):
    """A fixture's bundle, copied, built and opened by TensorRT; closed at the end of the test."""
    opened = []

    def open_it(name):
        folder = tmp_path / name
        shutil.copytree(request.getfixturevalue(name), folder)
        build_engine(BuildRequest(folder, check=False))
        opened.append(FeatureExtractor.load(folder, "tensorrt"))
        return opened[-1]

    yield open_it
    for extractor in opened:
        extractor.close()


@pytest.fixture
def expected(request):
    """What ONNX Runtime answers on the processor: ``expected(name, batch)``."""
    opened = {}

    def answers(name, batch):
        if name not in opened:
            opened[name] = FeatureExtractor.load(request.getfixturevalue(name), "onnxruntime-cpu", threads=1)
        return opened[name].run(batch)

    return answers


def frames(seed=0, batch=1, size=(64, 64)):
    return np.random.default_rng(seed).integers(0, 256, (batch, *size, 3), dtype=np.uint8)


def same(got, wanted):
    assert got.keys() == wanted.keys()
    for name in wanted:
        assert got[name].dtype == wanted[name].dtype
        np.testing.assert_allclose(got[name], wanted[name], rtol=1e-5, atol=1e-6, err_msg=name)


def make_stream(device):
    return int(device.runtime.cudaStreamCreateWithFlags(1)[1])


def uploads(device, size):
    """Copies of so many bytes to the device."""
    kind = fake_gpu.cudaMemcpyKind.cudaMemcpyHostToDevice
    return sum(1 for name, words in device.calls if name == "cudaMemcpyAsync" and words[2:4] == (size, kind))


# Answers


@pytest.mark.parametrize(
    ("name", "cases"),
    [
        ("bundle", [(1, (64, 64))]),
        ("wide_bundle", [(1, (64, 64)), (4, (48, 96)), (2, (64, 64)), (1, (96, 96)), (3, (48, 48))]),
        ("listed", [(1, (64, 64)), (2, (48, 96)), (1, (48, 96)), (2, (64, 64))]),
    ],
)
def test_answers_are_those_of_the_processor(load, expected, name, cases):
    extractor = load(name)
    for seed, (batch, size) in enumerate(cases):
        image = frames(seed, batch, size)
        same(extractor.run(image), expected(name, image))


def test_the_extractor_says_what_runs(load):
    extractor = load("bundle")
    assert (extractor.backend, extractor.compute, extractor.precision) == ("tensorrt", "fp32", "fp32")
    assert extractor(frames()[0]).features.shape == (1, 8, 8, 48)


def test_answers_do_not_change_when_the_next_one_comes(load):
    extractor = load("bundle")
    first = extractor.run(frames(0))
    kept = {name: value.copy() for name, value in first.items()}
    for seed in range(1, 5):
        extractor.run(frames(seed))
    same(first, kept)


def test_eight_threads_get_their_own_answers_from_a_lane_each(load, expected, tensorrt):
    extractor, work = load("wide_bundle"), []
    for i in range(8):
        image = frames(i, 1 + i % 3, [(64, 64), (48, 96)][i % 2])
        work.append((image, expected("wide_bundle", image)))
    tensorrt.delay, failed, barrier = 0.0005, [], threading.Barrier(8)

    def serve(i):
        try:
            barrier.wait()
            for _ in range(5):
                same(extractor.run(work[i][0]), work[i][1])
        except BaseException as error:
            failed.append(error)

    threads = [threading.Thread(target=serve, args=(i,)) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failed == []
    assert 2 <= extractor.opened.device_memory()["contexts"] <= 8


def test_every_thread_that_calls_has_chosen_the_device(load, device):
    extractor, seen = load("bundle"), []
    extractor.run(frames())  # the lane is there already

    def serve():
        extractor.run(frames())
        seen.append(getattr(device.chosen, "index", None))

    thread = threading.Thread(target=serve)
    thread.start()
    thread.join()
    assert seen == [0]


def test_one_thread_has_one_lane(load):
    extractor = load("wide_bundle")
    for size in ((64, 64), (48, 96)) * 4:
        extractor.run(frames(0, 1, size))
    assert extractor.opened.device_memory()["contexts"] == 1


# CUDA graphs


def graph_calls(device):
    return device.count("cudaStreamBeginCapture"), device.count("cudaGraphLaunch")


def test_a_graph_is_recorded_on_the_second_call_and_replayed_from_then_on(load, expected, device):
    extractor = load("bundle")
    for seed, wanted in enumerate([(0, 0), (1, 1), (1, 2), (1, 3)]):
        image = frames(seed)
        same(extractor.run(image), expected("bundle", image))
        assert graph_calls(device) == wanted


def test_no_graph_is_used_where_every_call_has_another_shape(load, expected, device):
    extractor = load("wide_bundle")
    for seed in range(6):
        image = frames(seed, 1, [(64, 64), (48, 96)][seed % 2])
        same(extractor.run(image), expected("wide_bundle", image))
    assert graph_calls(device) == (0, 0)


@pytest.mark.parametrize("other", [(1, (96, 96)), (1, (48, 48)), (4, (64, 64))])
def test_a_graph_is_recorded_anew_after_another_shape(load, expected, device, other):
    """NVIDIA: what was recorded of a context is undefined once the context was given other shapes or addresses."""
    extractor = load("wide_bundle")
    for seed, (batch, size) in enumerate([*[(1, (64, 64))] * 3, other, *[(1, (64, 64))] * 4]):
        image = frames(seed, batch, size)
        same(extractor.run(image), expected("wide_bundle", image))
    assert graph_calls(device) == (2, 5)


def test_a_graph_is_recorded_anew_after_an_array_on_the_gpu(load, expected, device):
    extractor = load("bundle")
    for seed in range(3):
        extractor.run(frames(seed))
    extractor.run(fake_gpu.Array(device, frames(9)))
    for seed in range(3):
        same(extractor.run(frames(seed)), expected("bundle", frames(seed)))
    assert graph_calls(device) == (2, 4)


def test_a_recording_that_fails_leaves_a_lane_that_works(load, expected, device, tensorrt):
    extractor = load("bundle")
    extractor.run(frames(0))
    tensorrt.fail_enqueue = 1
    with pytest.raises(PhregError, match="could not start the inference"):
        extractor.run(frames(1))
    for seed in (2, 3):
        same(extractor.run(frames(seed)), expected("bundle", frames(seed)))
    extractor.close()
    assert device.live() == {}


# Position embeddings and profiles


def test_position_embeddings_are_uploaded_once_as_long_as_the_grid_is_one(load, device):
    extractor = load("wide_bundle")
    for seed in range(5):
        extractor.run(frames(seed, 2))
    assert uploads(device, 8 * 8 * 48 * 4) == 1
    assert uploads(device, 2 * 64 * 64 * 3) == 2, "the image goes up by itself once, and once while it is recorded"


def test_each_grid_gets_its_own_position_embedding(load, expected):
    extractor = load("wide_bundle")
    for seed, size in enumerate([(48, 96), (96, 48), (48, 96), (96, 48)]):  # as many patches, in another order
        image = frames(seed, 1, size)
        same(extractor.run(image), expected("wide_bundle", image))


def test_shapes_outside_every_profile_are_refused_in_words(load, expected):
    extractor = load("wide_bundle")
    feed = {"image": frames(0, 1, (128, 64)), "pos_embed": np.zeros((1, 128, 48), np.float32)}
    with pytest.raises(PhregError, match=r"got inputs of .*\(1, 128, 64, 3\).*Build the bundle again"):
        extractor.opened.run(feed)
    same(extractor.run(frames(1)), expected("wide_bundle", frames(1)))
    with pytest.raises(PhregError, match="expected"):
        extractor.run(frames(0, 5))


def test_a_tensor_of_another_type_is_refused_in_words(load):
    with pytest.raises(PhregError, match="got image in float32, expected uint8"):
        load("bundle").opened.run({"image": frames().astype(np.float32)})


def test_a_plan_of_another_graph_is_refused(load, device, tensorrt):
    from phreg_deploy.bundle.profiles import ProfileShapes
    from phreg_deploy.runtime.backends.tensorrt_backend import Plan
    from phreg_deploy.runtime.gpu.cuda import Cuda

    plan = load("bundle").opened.plan.read()
    with pytest.raises(PhregError, match="not of this bundle"):
        Plan(tensorrt.module, Cuda(), plan, [ProfileShapes({"other": [[1], [1], [1]]})])


def test_a_plan_in_float32_is_asked_for_nothing_else(load, device):
    folder = load("bundle").bundle.folder
    with pytest.raises(PhregError, match="got bf16, but an engine computes in what its bundle says: fp32"):
        FeatureExtractor.load(folder, "tensorrt", compute="bf16")
    with pytest.raises(BackendMissing, match="got device 3, expected one of 0 to 0"):
        FeatureExtractor.load(folder, "tensorrt", device=3)


def test_without_an_engine_the_command_is_named(bundle, tensorrt):
    with pytest.raises(BackendMissing, match=f"phreg-deploy build {bundle}"):
        FeatureExtractor.load(bundle, "tensorrt")


# What is freed, and when


def test_closing_frees_everything(load, device):
    extractor = load("wide_bundle")
    for seed in range(3):
        extractor.run(frames(seed))
    extractor.opened.split(extractor.feed(frames()))
    assert device.live()
    extractor.close()
    assert device.live() == {}
    extractor.close()


def test_after_closing_every_use_is_refused(load, device):
    extractor = load("bundle")
    backend = extractor.opened
    extractor.close()
    with pytest.raises(PhregError, match="was closed"):
        extractor.run(frames())
    for use in (backend.run, backend.split, backend.layers):
        with pytest.raises(PhregError, match="was closed; load the bundle again"):
            use({"image": frames()})
    with pytest.raises(PhregError, match="was closed"):
        backend.run_device(DeviceArray(1, (1, 64, 64, 3), np.dtype(np.uint8)), {})


@pytest.mark.parametrize("call", ["run", "split", "layers"])
def test_closing_frees_everything_after_an_inference_that_failed(load, expected, device, tensorrt, call):
    extractor = load("bundle")
    tensorrt.fail_enqueue = 1
    with pytest.raises(PhregError, match="could not start the inference; the device may be out of memory"):
        getattr(extractor.opened, call)({"image": frames()})
    same(extractor.run(frames(1)), expected("bundle", frames(1)))
    extractor.close()
    assert device.live() == {}


@pytest.mark.parametrize("call", ["cudaStreamCreateWithFlags", "cudaEventCreate"])
def test_a_lane_that_is_not_finished_leaves_nothing(load, expected, device, call):
    extractor = load("bundle")
    device.fail_call(call)
    with pytest.raises(PhregError, match="out of memory"):
        extractor.run(frames())
    assert device.live() == {}
    same(extractor.run(frames()), expected("bundle", frames()))


def test_a_context_that_cannot_be_made_leaves_nothing(load, device, tensorrt):
    extractor, tensorrt.contexts = load("bundle"), 0
    with pytest.raises(PhregError, match="no execution context; the GPU has too little memory"):
        extractor.run(frames())
    assert device.live() == {}
    extractor.close()


@pytest.mark.parametrize("call", ["cudaMalloc", "cudaMallocHost"])
@pytest.mark.parametrize("at", [1, 2, 3, 4, 5])
def test_out_of_memory_is_said_in_words_and_the_next_call_answers(load, expected, device, call, at):
    extractor = load("wide_bundle")
    device.fail_call(call, at)
    with pytest.raises(PhregError, match=f"out of memory in {call}. Use a smaller batch"):
        extractor.run(frames())
    device.failing.clear()
    same(extractor.run(frames(1)), expected("wide_bundle", frames(1)))
    extractor.close()
    assert device.live() == {}


@pytest.mark.parametrize("call", ["cudaMalloc", "cudaMallocHost"])
@pytest.mark.parametrize("at", [1, 2, 3])
def test_out_of_memory_while_buffers_grow_leaves_a_lane_that_works(load, expected, device, call, at):
    extractor = load("wide_bundle")
    for seed in range(3):
        extractor.run(frames(seed))
    device.fail_call(call, at)
    large = frames(4, 4, (96, 96))
    with pytest.raises(PhregError, match="out of memory"):
        extractor.run(large)
    same(extractor.run(frames(1)), expected("wide_bundle", frames(1)))
    same(extractor.run(large), expected("wide_bundle", large))
    extractor.close()
    assert device.live() == {}


@pytest.mark.parametrize("call", ["cudaStreamEndCapture", "cudaGraphInstantiate", "cudaGraphLaunch"])
def test_a_graph_that_fails_leaves_nothing(load, device, call):
    extractor = load("bundle")
    extractor.run(frames())
    device.fail_call(call, 1, fake_gpu.cudaError_t.cudaErrorLaunchFailure)
    with pytest.raises(PhregError, match=rf"{call} failed with CUDA error 719 \(cudaErrorLaunchFailure\)"):
        extractor.run(frames())
    extractor.close()
    assert device.live() == {}


def test_closing_goes_on_after_an_error_and_raises_it(load, device):
    extractor = load("bundle")
    extractor.run(frames())
    before = device.live()
    device.fail_call("cudaFree", 1, fake_gpu.cudaError_t.cudaErrorInvalidValue)
    with pytest.raises(PhregError, match="cudaFree failed"):
        extractor.close()
    assert device.live() == {"allocations": 1}, before
    extractor.close()


def test_thousands_of_frames_take_no_more_memory(load, device):
    extractor = load("bundle")
    image = frames()
    for _ in range(3):
        extractor.run(image)
    before, calls = device.live(), device.count()
    device.calls.clear()
    for _ in range(FRAMES):
        extractor.run(image)
        if len(device.calls) > 1000:
            assert not any(
                name.startswith(("cudaMalloc", "cudaEventCreate", "cudaGraphInst")) for name, _ in device.calls
            )
            device.calls.clear()
    assert device.live() == before
    assert calls["cudaMalloc"] == 4


# Arrays on the GPU


def outputs(device, expected, name, image):
    return {key: fake_gpu.Array(device, np.full_like(value, 7)) for key, value in expected(name, image).items()}


def test_an_array_on_the_gpu_is_read_where_it_lies(load, expected, device):
    extractor, image = load("bundle"), frames()
    array = fake_gpu.Array(device, image)
    device.calls.clear()
    got = extractor.run(array)
    assert all(isinstance(value, DeviceArray) for value in got.values())
    assert device.count("cudaMemcpyAsync") == 0
    same({name: value.numpy() for name, value in got.items()}, expected("bundle", image))


def test_the_callers_memory_is_written(load, expected, device):
    extractor, image = load("wide_bundle"), frames(0, 2, (48, 96))
    out = outputs(device, expected, "wide_bundle", image)
    got = extractor.run(fake_gpu.Array(device, image), out=out)
    assert {name: value.pointer for name, value in got.items()} == {name: value.pointer for name, value in out.items()}
    same({name: value.read() for name, value in out.items()}, expected("wide_bundle", image))
    same({name: value.numpy() for name, value in got.items()}, expected("wide_bundle", image))


def test_outputs_that_are_not_given_are_made(load, expected, device):
    extractor, image = load("bundle"), frames()
    given = outputs(device, expected, "bundle", image)["features"]
    got = extractor.run(fake_gpu.Array(device, image), out={"features": given})
    same({name: value.numpy() for name, value in got.items()}, expected("bundle", image))
    assert got["features"].pointer == given.pointer


def test_the_callers_stream_is_used_and_not_waited_for(load, expected, device):
    extractor, image, stream = load("wide_bundle"), frames(), make_stream(device)
    extractor.run(frames(5))  # the position embedding is there
    out = outputs(device, expected, "wide_bundle", image)
    device.calls.clear()
    extractor.run(fake_gpu.Array(device, image), out=out, stream=stream)
    assert device.count("cudaStreamSynchronize") == device.count("cudaEventSynchronize") == 0
    assert device.count("cudaMemcpyAsync") == 0
    assert all((value.read() == 7).all() for value in out.values()), "nobody has waited yet"
    device.runtime.cudaStreamSynchronize(stream)
    same({name: value.read() for name, value in out.items()}, expected("wide_bundle", image))


def test_the_next_call_on_the_host_waits_for_the_callers_stream(load, expected, device):
    extractor, image, stream = load("bundle"), frames(), make_stream(device)
    extractor.run(frames(5))
    out = outputs(device, expected, "bundle", image)
    extractor.run(fake_gpu.Array(device, image), out=out, stream=stream)
    device.calls.clear()
    same(extractor.run(frames(6)), expected("bundle", frames(6)))
    lane = extractor.opened._contexts[0]
    assert [words[0] for name, words in device.calls if name == "cudaStreamWaitEvent"] == [lane.stream.handle]
    same({name: value.read() for name, value in out.items()}, expected("bundle", image))


def test_two_streams_of_the_caller_are_put_in_order(load, expected, device):
    extractor, first, second = load("bundle"), make_stream(device), make_stream(device)
    outs = []
    for seed, stream in enumerate((first, second)):
        outs.append(outputs(device, expected, "bundle", frames(seed)))
        extractor.run(fake_gpu.Array(device, frames(seed)), out=outs[-1], stream=stream)
    device.runtime.cudaStreamSynchronize(second)
    for seed, out in enumerate(outs):
        same({name: value.read() for name, value in out.items()}, expected("bundle", frames(seed)))


def test_another_grid_waits_for_the_one_before_on_the_callers_stream(load, expected, device):
    extractor, stream = load("wide_bundle"), make_stream(device)
    work = [(frames(i, 1, size), {}) for i, size in enumerate([(48, 96), (96, 48), (64, 64)])]
    for image, out in work:
        out.update(outputs(device, expected, "wide_bundle", image))
        extractor.run(fake_gpu.Array(device, image), out=out, stream=stream)
    device.runtime.cudaStreamSynchronize(stream)
    for image, out in work:
        same({name: value.read() for name, value in out.items()}, expected("wide_bundle", image))


class Late(fake_gpu.Array):
    """An array that its library is still filling on a stream of its own."""

    def __init__(self, device, value, stream):
        super().__init__(device, np.zeros_like(value), stream=stream)
        device.queue(device.streams[stream], lambda: self.write(value))


class Lent:
    """The same by DLPack alone: the library makes the reader's stream wait for its own, as the protocol has it."""

    def __init__(self, device, value, stream):
        self.array, self.stream = Late(device, value, stream), stream

    def __dlpack_device__(self):
        return (2, 0)

    def __dlpack__(self, *, stream):
        assert stream not in (None, 0), "the protocol forbids it on CUDA"
        device = self.array.device
        if stream != -1:
            mark = device.mark(device.streams[self.stream])
            device.queue(device.streams[stream], lambda: device.finish(mark))
        return DeviceArray(self.array.pointer, self.array.shape, self.array.dtype, self.array).__dlpack__()


@pytest.mark.parametrize("kind", [Late, Lent])
@pytest.mark.parametrize("own", [False, True])
def test_an_array_that_is_still_being_filled_is_waited_for(load, expected, device, kind, own):
    extractor, image, producer = load("bundle"), frames(), make_stream(device)
    stream = make_stream(device) if own else None
    got = extractor.run(kind(device, image, producer), stream=stream)
    same({name: value.numpy() for name, value in got.items()}, expected("bundle", image))


@pytest.mark.parametrize("kind", [Late, Lent])
def test_the_default_stream_of_the_caller_is_number_nought(load, expected, device, kind):
    extractor, image, producer = load("bundle"), frames(), make_stream(device)
    got = extractor.run(kind(device, image, producer), stream=0)
    assert got["features"].__cuda_array_interface__["stream"] == 1, "0 is forbidden there"
    same({name: value.numpy() for name, value in got.items()}, expected("bundle", image))


def test_outputs_live_longer_than_the_extractor(load, expected, device):
    extractor, image = load("bundle"), frames()
    got = extractor.run(fake_gpu.Array(device, image))
    extractor.close()
    same({name: value.numpy() for name, value in got.items()}, expected("bundle", image))
    assert got["features"].__dlpack__(stream=5) is not None, "its work is done: there is no stream left to wait for"


def test_outputs_on_the_gpu_are_freed_with_their_last_reader(load, device):
    extractor = load("bundle")
    array = fake_gpu.Array(device, frames())
    kept = extractor.run(array)
    before = device.live()
    for _ in range(5):
        extractor.run(array)
        assert device.live() == before
    del kept
    assert device.live()["allocations"] == before["allocations"] - 3


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda d: fake_gpu.Array(d, frames(), strides=(24576, 384, 6, 2)), "expected a contiguous array"),
        (
            lambda d: fake_gpu.Array(d, frames().astype(np.float32)),
            r"got float32 \(1, 64, 64, 3\) on the GPU, expected uint8",
        ),
        (lambda d: fake_gpu.Array(d, frames()[0]), r"got uint8 \(64, 64, 3\) on the GPU"),
        (lambda d: fake_gpu.Array(d, frames(0, 2)), "batch"),
        (lambda d: fake_gpu.Array(d, frames(0, 1, (80, 64))), "80x64"),
        (lambda d: frames().tolist(), "got list, expected a uint8 RGB array"),
    ],
)
def test_what_is_no_batch_on_the_gpu_is_refused(load, device, change, words):
    with pytest.raises(PhregError, match=words):
        load("bundle").run(change(device))


def test_outputs_of_another_kind_are_refused(load, expected, device):
    extractor, image = load("bundle"), frames()
    array = fake_gpu.Array(device, image)
    wrong = fake_gpu.Array(device, np.zeros((1, 8, 8, 48), np.float16))
    with pytest.raises(PhregError, match=r"out: got features as float16 .*expected float32"):
        extractor.run(array, out={"features": wrong})
    with pytest.raises(PhregError, match="out: got colours, expected"):
        extractor.run(array, out={"colours": wrong})
    with pytest.raises(PhregError, match="got ndarray, expected an array on a GPU"):
        extractor.run(array, out={"features": np.zeros((1, 8, 8, 48), np.float32)})
    with pytest.raises(PhregError, match="out and stream are for a batch on the GPU"):
        extractor.run(image, stream=5)
    got = extractor.run(array)
    same({name: value.numpy() for name, value in got.items()}, expected("bundle", image))


# One inference taken apart


@pytest.mark.parametrize("graph", [False, True])
def test_an_inference_is_taken_apart(load, expected, graph):
    extractor = load("bundle")
    for _ in range(3):
        parts = extractor.opened.split(extractor.feed(frames()), graph)
        assert parts["latency"] == pytest.approx(parts["h2d"] + parts["compute"] + parts["d2h"])
        assert all(value >= 0 for value in parts.values())
        assert parts["compute"] > parts["h2d"]
    same(extractor.run(frames(1)), expected("bundle", frames(1)))


def test_layers_are_timed_one_by_one(load, expected):
    extractor = load("bundle")
    for _ in range(3):
        extractor.run(frames())
    times = extractor.opened.layers(extractor.feed(frames()), rounds=4)
    assert len(times) > 10
    assert list(times.values()) == pytest.approx([0.01] * len(times))
    for seed in range(3):
        same(extractor.run(frames(seed)), expected("bundle", frames(seed)))


# The double itself


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
