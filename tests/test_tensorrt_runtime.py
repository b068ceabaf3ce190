"""The TensorRT backend on a fake GPU: outputs, contexts per thread, CUDA graphs, position embeddings and timings."""

import threading

import numpy as np
import pytest

from phreg_deploy.errors import BackendMissing, PhregError
from phreg_deploy.runtime import FeatureExtractor
from tests import fake_gpu
from tests.frames import assert_same_outputs, random_frames, to_host
from tests.threads import run_in_threads


def count_uploads(device, size):
    """Count the copies of ``size`` bytes to the device."""
    kind = fake_gpu.cudaMemcpyKind.cudaMemcpyHostToDevice
    return sum(1 for name, words in device.calls if name == "cudaMemcpyAsync" and words[2:4] == (size, kind))


@pytest.mark.parametrize(
    ("name", "cases"),
    [
        ("bundle", [(1, (64, 64))]),
        ("wide_bundle", [(1, (64, 64)), (4, (48, 96)), (2, (64, 64)), (1, (96, 96)), (3, (48, 48))]),
        ("listed_bundle", [(1, (64, 64)), (2, (48, 96)), (1, (48, 96)), (2, (64, 64))]),
    ],
)
def test_outputs_equal_those_of_the_processor(load_engine, on_cpu, name, cases):
    extractor = load_engine(name)
    for seed, (batch, size) in enumerate(cases):
        image = random_frames(seed, batch, size)
        assert_same_outputs(extractor.run(image), on_cpu(name, image))


def test_the_extractor_names_backend_and_precision(load_engine):
    extractor = load_engine("bundle")
    assert (extractor.backend, extractor.compute, extractor.precision) == ("tensorrt", "fp32", "fp32")
    assert extractor(random_frames()[0]).features.shape == (1, 8, 8, 48)


def test_outputs_do_not_change_with_the_next_call(load_engine):
    extractor = load_engine("bundle")
    first = extractor.run(random_frames(0))
    kept = {name: value.copy() for name, value in first.items()}
    for seed in range(1, 5):
        extractor.run(random_frames(seed))
    assert_same_outputs(first, kept)


def test_eight_threads_get_their_own_outputs_from_a_context_each(load_engine, on_cpu, tensorrt):
    extractor, work = load_engine("wide_bundle"), []
    for i in range(8):
        image = random_frames(i, 1 + i % 3, [(64, 64), (48, 96)][i % 2])
        work.append((image, on_cpu("wide_bundle", image)))
    tensorrt.delay, barrier = 0.0005, threading.Barrier(8)

    def serve(i):
        barrier.wait()
        for _ in range(5):
            assert_same_outputs(extractor.run(work[i][0]), work[i][1])

    assert run_in_threads(serve, range(8)) == []
    assert 2 <= extractor.opened.device_memory()["contexts"] <= 8


def test_every_calling_thread_sets_its_device(load_engine, device):
    extractor, seen = load_engine("bundle"), []
    extractor.run(random_frames())  # this creates the context

    def serve():
        extractor.run(random_frames())
        seen.append(getattr(device.chosen, "index", None))

    thread = threading.Thread(target=serve)
    thread.start()
    thread.join()
    assert seen == [0]


def test_one_thread_has_one_context(load_engine):
    extractor = load_engine("wide_bundle")
    for size in ((64, 64), (48, 96)) * 4:
        extractor.run(random_frames(0, 1, size))
    assert extractor.opened.device_memory()["contexts"] == 1


def graph_calls(device):
    return device.count("cudaStreamBeginCapture"), device.count("cudaGraphLaunch")


def test_a_graph_is_recorded_on_the_second_call_and_replayed_from_then_on(load_engine, on_cpu, device):
    extractor = load_engine("bundle")
    for seed, wanted in enumerate([(0, 0), (1, 1), (1, 2), (1, 3)]):
        image = random_frames(seed)
        assert_same_outputs(extractor.run(image), on_cpu("bundle", image))
        assert graph_calls(device) == wanted


def test_no_graph_is_used_where_every_call_has_another_shape(load_engine, on_cpu, device):
    extractor = load_engine("wide_bundle")
    for seed in range(6):
        image = random_frames(seed, 1, [(64, 64), (48, 96)][seed % 2])
        assert_same_outputs(extractor.run(image), on_cpu("wide_bundle", image))
    assert graph_calls(device) == (0, 0)


@pytest.mark.parametrize("other", [(1, (96, 96)), (1, (48, 48)), (4, (64, 64))])
def test_a_graph_is_recorded_again_after_another_shape(load_engine, on_cpu, device, other):
    """NVIDIA: a recorded graph is invalid once its context was given other shapes or addresses."""
    extractor = load_engine("wide_bundle")
    for seed, (batch, size) in enumerate([*[(1, (64, 64))] * 3, other, *[(1, (64, 64))] * 4]):
        image = random_frames(seed, batch, size)
        assert_same_outputs(extractor.run(image), on_cpu("wide_bundle", image))
    assert graph_calls(device) == (2, 5)


def test_host_and_device_calls_keep_each_others_graphs(load_engine, on_cpu, device):
    extractor, array = load_engine("bundle"), fake_gpu.Array(device, random_frames(9))
    for seed in range(4):
        assert_same_outputs(extractor.run(random_frames(seed)), on_cpu("bundle", random_frames(seed)))
        assert_same_outputs(to_host(extractor.run(array)), on_cpu("bundle", random_frames(9)))
    assert graph_calls(device) == (2, 7), "only the first call was plain"


@pytest.mark.parametrize(
    "failure", ["enqueue", "cudaStreamBeginCapture", "cudaStreamEndCapture", "cudaGraphInstantiate"]
)
def test_a_recording_that_fails_is_no_failed_request(load_engine, on_cpu, device, tensorrt, caplog, failure):
    extractor = load_engine("bundle")
    extractor.run(random_frames(0))
    for seed in (1, 2, 3):
        if failure == "enqueue":
            tensorrt.fail_enqueue = 1 if seed < 3 else None
        elif seed < 3:
            device.fail_call(failure, 1, fake_gpu.cudaError_t.cudaErrorStreamCaptureInvalidated)
        assert_same_outputs(extractor.run(random_frames(seed)), on_cpu("bundle", random_frames(seed)))
    assert device.count("cudaGraphLaunch") == 0
    (record,) = caplog.records
    assert "CUDA graphs are off for one of its contexts, because recording failed 2 times" in record.getMessage()
    assert not [held for held in record.args if isinstance(held, BaseException)], "it would keep the outputs alive"
    extractor.close()
    assert device.live() == {}


def test_one_recording_that_fails_is_tried_again(load_engine, device, tensorrt, caplog):
    extractor = load_engine("bundle")
    extractor.run(random_frames(0))
    tensorrt.fail_enqueue = 1
    for seed in (1, 2, 3):
        extractor.run(random_frames(seed))
    assert graph_calls(device) == (2, 2)
    assert caplog.records == []


def test_another_thread_may_synchronise_the_gpu_during_a_recording(load_engine, on_cpu, device):
    extractor, seen, end = load_engine("bundle"), [], device.runtime.cudaStreamEndCapture
    extractor.run(random_frames(0))

    def end_late(stream):
        thread = threading.Thread(target=lambda: seen.append(device.runtime.cudaDeviceSynchronize()[0].name))
        thread.start()
        thread.join()
        return end(stream)

    device.runtime.cudaStreamEndCapture = end_late
    for seed in (1, 2):
        assert_same_outputs(extractor.run(random_frames(seed)), on_cpu("bundle", random_frames(seed)))
    assert seen == ["cudaErrorStreamCaptureUnsupported"] * 2


def test_position_embeddings_are_uploaded_once_while_the_grid_stays_the_same(load_engine, device):
    extractor = load_engine("wide_bundle")
    for seed in range(5):
        extractor.run(random_frames(seed, 2))
    assert count_uploads(device, 8 * 8 * 48 * 4) == 1
    assert count_uploads(device, 2 * 64 * 64 * 3) == 2, "one upload in the plain call, one in the recording"


def test_each_grid_gets_its_own_position_embedding(load_engine, on_cpu):
    extractor = load_engine("wide_bundle")
    for seed, size in enumerate([(48, 96), (96, 48), (48, 96), (96, 48)]):  # the same number of patches in another grid
        image = random_frames(seed, 1, size)
        assert_same_outputs(extractor.run(image), on_cpu("wide_bundle", image))


def test_shapes_outside_every_profile_are_refused_with_the_command(load_engine, on_cpu):
    extractor = load_engine("wide_bundle")
    feed = {"image": random_frames(0, 1, (128, 64)), "pos_embed": np.zeros((1, 128, 48), np.float32)}
    with pytest.raises(PhregError, match=r"got inputs of .*\(1, 128, 64, 3\).*Build the bundle again"):
        extractor.opened.run(feed)
    assert_same_outputs(extractor.run(random_frames(1)), on_cpu("wide_bundle", random_frames(1)))
    with pytest.raises(PhregError, match="expected"):
        extractor.run(random_frames(0, 5))


def test_a_tensor_of_another_type_is_refused(load_engine):
    with pytest.raises(PhregError, match="got image in float32, expected uint8"):
        load_engine("bundle").opened.run({"image": random_frames().astype(np.float32)})


def test_a_plan_of_another_graph_is_refused(load_engine, device, tensorrt):
    from phreg_deploy.bundle.profiles import ProfileShapes
    from phreg_deploy.runtime.backends.tensorrt_backend import Plan
    from phreg_deploy.runtime.gpu.cuda import Cuda

    plan = load_engine("bundle").opened.plan.read()
    with pytest.raises(PhregError, match="not of this bundle"):
        Plan(tensorrt.module, Cuda(), plan, [ProfileShapes({"other": [[1], [1], [1]]})])


def test_another_precision_or_device_than_the_engines_is_refused(load_engine, device):
    folder = load_engine("bundle").bundle.folder
    with pytest.raises(PhregError, match="got bf16, but an engine computes in what its bundle says: fp32"):
        FeatureExtractor.load(folder, "tensorrt", compute="bf16")
    with pytest.raises(BackendMissing, match="got device 3, expected one of 0 to 0"):
        FeatureExtractor.load(folder, "tensorrt", device=3)


def test_without_an_engine_the_command_is_named(bundle, tensorrt):
    with pytest.raises(BackendMissing, match=f"phreg-deploy build {bundle}"):
        FeatureExtractor.load(bundle, "tensorrt")


@pytest.mark.parametrize("graph", [False, True])
def test_an_inference_is_timed_in_parts(load_engine, on_cpu, graph):
    extractor = load_engine("bundle")
    for _ in range(3):
        parts = extractor.opened.split(extractor.feed(random_frames()), graph)
        assert parts["latency"] == pytest.approx(parts["h2d"] + parts["compute"] + parts["d2h"])
        assert all(value >= 0 for value in parts.values())
        assert parts["compute"] > parts["h2d"]
    assert_same_outputs(extractor.run(random_frames(1)), on_cpu("bundle", random_frames(1)))


def test_each_layer_is_timed(load_engine, on_cpu):
    extractor = load_engine("bundle")
    for _ in range(3):
        extractor.run(random_frames())
    times = extractor.opened.layers(extractor.feed(random_frames()), rounds=4)
    assert len(times) > 10
    assert list(times.values()) == pytest.approx([0.01] * len(times))
    for seed in range(3):
        assert_same_outputs(extractor.run(random_frames(seed)), on_cpu("bundle", random_frames(seed)))
