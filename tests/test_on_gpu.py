"""Engines on a real GPU with a real TensorRT; skipped, with the reason, on other machines."""

import shutil
from pathlib import Path

import numpy as np
import pytest

from phreg_deploy.bundle.bundle import Bundle
from phreg_deploy.errors import PhregError
from phreg_deploy.runtime import FeatureExtractor
from phreg_deploy.runtime.parity import missed_gates, run_exam, worst
from tests.cli_helpers import invoke
from tests.frames import random_frames
from tests.real_gpu_fixtures import MEMORY_TOLERANCE, assert_close, assert_memory_stays_flat
from tests.threads import run_in_threads

pytestmark = pytest.mark.gpu

PRECISIONS = ("fp32", "fp16", "bf16", "int8", "fp8")


@pytest.mark.parametrize("precision", PRECISIONS)
def test_every_precision_is_built_and_passes_its_gate(engine_of, precision):
    target = engine_of(precision)
    assert engine_of.report(precision)["missed"] == []
    with FeatureExtractor.load(target, "tensorrt") as extractor:
        parity = worst([case.parity for case in run_exam(extractor.bundle, extractor.run)])
        assert missed_gates(parity, precision, exam=True) == []


def test_every_size_and_batch_passes_the_gate(engine_of):
    with FeatureExtractor.load(engine_of("fp32", "wide"), "tensorrt") as extractor:
        for case in run_exam(extractor.bundle, extractor.run):
            assert missed_gates(case.parity, "fp32") == []
        with FeatureExtractor.load(extractor.bundle.folder, "onnxruntime-cpu") as other:
            for seed, (batch, size) in enumerate([(1, (48, 96)), (4, (96, 48)), (3, (80, 56))]):
                image = random_frames(seed, batch, size)
                assert_close(extractor.run(image), other.run(image))


@pytest.mark.parametrize("precision", ["fp16", "bf16", "int8"])
def test_every_attention_is_fused(engine_of, precision):
    engine_of(precision)
    census = engine_of.report(precision)["census"]
    assert census["fused_attention"] == [f"blocks.{i}.attn" for i in range(3)]


@pytest.mark.parametrize("precision", ["int8", "fp8"])
def test_every_linear_layer_that_is_meant_to_runs_in_eight_bits(engine_of, precision):
    from phreg_deploy.export.engine.build import eight_bit_layers

    target = engine_of(precision)
    assert set(eight_bit_layers(Bundle.read(target))) <= set(engine_of.report(precision)["census"]["eight_bit"])


def test_a_second_build_finds_the_engine_and_a_forced_one_is_faster(engine_of):
    target = engine_of("fp16")
    assert invoke("build", target, "--json").document["cached"] is True
    again = invoke("build", target, "--force", "--json").document
    assert again["cached"] is False
    assert again["seconds"] < max(5.0, engine_of.report("fp16")["seconds"]), "the timing cache was read"


def test_a_damaged_plan_is_not_run(engine_of, tmp_path):
    target = Path(shutil.copytree(engine_of("fp32"), tmp_path / "copy"))
    (plan,) = (target / "engines").glob("*.plan")
    plan.write_bytes(plan.read_bytes()[:-1] + b"\0")
    with pytest.raises(PhregError, match="is not run"):
        FeatureExtractor.load(target, "tensorrt")


@pytest.mark.parametrize("compatibility", ["version", "ampere+", "same-cc"])
def test_a_compatible_plan_passes_the_exam(engine_of, tmp_path, compatibility):
    target = Path(shutil.copytree(engine_of("fp16"), tmp_path / "copy"))
    shutil.rmtree(target / "engines")
    done = invoke("build", target, "--compat", compatibility, "--allow-unfused", "--json")
    if done.code == 2:
        pytest.skip(done.document["error"])
    assert done.code == 0, done.err
    assert done.document["missed"] == []


def test_graphs_and_plain_calls_give_the_same_outputs(engine_of):
    with FeatureExtractor.load(engine_of("fp16"), "tensorrt") as extractor:
        answers = [extractor.run(random_frames(3)) for _ in range(4)]
        for other in answers[1:]:
            for name, value in answers[0].items():
                np.testing.assert_array_equal(other[name], value)


def test_changing_shapes_do_not_change_outputs(engine_of):
    shapes = [(1, (64, 64)), (4, (96, 96)), (2, (48, 96))]
    work = [random_frames(seed, batch, size) for seed, (batch, size) in enumerate(shapes)]
    with FeatureExtractor.load(engine_of("fp32", "wide"), "tensorrt") as extractor:
        first = [extractor.run(image) for image in work]
        for _ in range(3):
            for image, wanted in zip(work, first):
                for _ in range(3):  # plain, recorded, replayed
                    assert_close(extractor.run(image), wanted)


def test_eight_threads_get_their_own_outputs(engine_of):
    with FeatureExtractor.load(engine_of("fp16", "wide"), "tensorrt") as extractor:
        work = [random_frames(i, 1 + i % 3, [(64, 64), (48, 96)][i % 2]) for i in range(8)]
        wanted = [extractor.run(image) for image in work]

        def serve(i):
            for _ in range(50):
                assert_close(extractor.run(work[i]), wanted[i])

        assert run_in_threads(serve, range(8)) == []


def test_memory_stays_flat(engine_of, gpu):
    with FeatureExtractor.load(engine_of("fp16"), "tensorrt") as extractor:
        image = random_frames()
        assert_memory_stays_flat(lambda: extractor.run(image), gpu, calls=10_000)


def test_closing_gives_the_memory_back(engine_of, gpu):
    def use():
        with FeatureExtractor.load(engine_of("fp16"), "tensorrt") as extractor:
            for _ in range(3):
                extractor.run(random_frames())

    use()  # the driver keeps the kernels that it loads
    before = gpu.free_memory()[0]
    for _ in range(5):
        use()
    assert before - gpu.free_memory()[0] <= MEMORY_TOLERANCE


@pytest.mark.parametrize("graph", [False, True])
def test_the_parts_of_an_inference_add_up_to_all_of_it(engine_of, graph):
    """Their sum equals the time between one pair of events around the same work."""
    from phreg_deploy.runtime.gpu.cuda import Event

    with FeatureExtractor.load(engine_of("fp16"), "tensorrt") as extractor:
        plan, feed = extractor.opened, extractor.feed(random_frames())
        for _ in range(20):
            plan.split(feed, graph)
        parts = [plan.split(feed, graph) for _ in range(200)]
        assert all(p["latency"] == pytest.approx(p["h2d"] + p["compute"] + p["d2h"], rel=1e-6) for p in parts)
        for _ in range(20):
            plan.run(feed)
        lane, whole = plan._contexts[0], []
        recorded = lane._recordings._graphs["with copies"]
        with Event(plan.cuda) as first, Event(plan.cuda) as last:
            for _ in range(200):
                first.record(lane.stream.handle)
                recorded.launch(lane.stream.handle)
                last.record(lane.stream.handle)
                last.wait()
                whole.append(last.since(first))
    if graph:  # without a graph, the parts include the time of the host
        marks = 0.02  # ms: four events and three launches instead of two and one
        assert np.median([p["latency"] for p in parts]) == pytest.approx(np.median(whole), rel=0.05, abs=marks)


def test_every_layer_has_a_time(engine_of):
    with FeatureExtractor.load(engine_of("fp16"), "tensorrt") as extractor:
        times = extractor.opened.layers(extractor.feed(random_frames()), rounds=20)
        assert len(times) >= 3
        assert all(value >= 0 for value in times.values())
        assert sum(times.values()) > 0
        assert_close(extractor.run(random_frames()), extractor.run(random_frames()))


def test_auto_measures_the_gpu_too(engine_of):
    with FeatureExtractor.load(engine_of("fp32")) as extractor:
        assert "tensorrt (fp32)" in extractor.choice


def test_the_selftest_passes(gpu, trt, torch, tmp_path):
    done = invoke("selftest", "--gpu", "--quick", "--frames", "200", "-o", tmp_path / "selftest.zip")
    assert done.code == 0, done.out


def test_the_doctor_names_the_gpu(engine_of, gpu):
    done = invoke("doctor", "--json")
    assert gpu.gpu.name in done.out


def test_bisect_finds_nothing_in_a_correct_engine(engine_of):
    from phreg_deploy.runtime.backends.options import BackendOptions
    from phreg_deploy.verify.bisection import bisect

    assert bisect(Bundle.read(engine_of("fp16")), "tensorrt", BackendOptions()).first is None
