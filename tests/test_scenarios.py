"""The scenarios of MLPerf Inference: one query after another, and all samples at once."""

import threading
import time
from types import SimpleNamespace

import numpy as np
import pytest

from phreg_deploy.errors import PhregError
from phreg_deploy.profiling import profile
from phreg_deploy.profiling.scenarios import IMAGES, run_scenario
from phreg_deploy.progress import SILENT
from phreg_deploy.spec import Batches
from tests.cli_helpers import invoke


def served(run, batches="1:4:8"):
    return SimpleNamespace(run=run, manifest=SimpleNamespace(batches=Batches.parse(batches)))


def scenario(name, run, *, seconds=0.1, threads=1, **how):
    return run_scenario(served(run, **how), name, seconds=seconds, size=(8, 8), threads=threads, progress=SILENT)


def test_single_stream_sends_one_image_after_the_other_and_reports_the_90th_percentile():
    inside, seen = [], []

    def run(batch):
        inside.append(1)
        assert len(inside) == 1, "two queries at once"
        seen.append(batch[0].tobytes())
        # One query in five is slow: the median is not, and the 90th percentile is.
        time.sleep(0.004 if len(seen) % 5 == 0 else 0.0005)
        assert batch.shape == (1, 8, 8, 3)
        inside.pop()

    found = scenario("single-stream", run)
    assert found.metric == "90th percentile latency in ms"
    assert found.latency["p50"] < 4 <= found.value == pytest.approx(found.latency["p90"])
    assert (found.queries, found.samples, found.batch, found.threads) == (found.latency["rounds"],) * 2 + (1, 1)
    assert found.queries == len(seen) - 5 >= 64
    assert len(set(seen)) == IMAGES, "the images change from query to query"
    assert (found.seconds >= 0.1, found.minimum_seconds, found.minimum_queries, found.meets_rules) == (
        True,
        0.1,
        64,
        False,
    )


def test_offline_sends_all_samples_at_once_and_reports_their_rate():
    calls, threads = [], set()

    def run(batch):
        threads.add(threading.current_thread().name)
        calls.append(len(batch))
        time.sleep(0.002)

    found = scenario("offline", run, threads=2, seconds=0.2)
    assert (found.metric, found.queries, found.batch, found.threads) == ("samples per second", 1, 4, 2)
    assert set(calls) == {4}
    assert found.seconds >= 0.2
    assert found.value == pytest.approx(found.samples / found.seconds)
    assert 400 < found.value <= 2 * 4 / 0.002, "two threads of batches of 4 in 2 ms"
    assert found.samples % 4 == 0
    assert found.minimum_samples == found.samples
    assert found.latency["rounds"] == 1
    assert threads == {"offline"}


def test_long_runs_meet_the_rules(monkeypatch):
    clock = SimpleNamespace(now=0.0)
    monkeypatch.setattr("phreg_deploy.profiling.scenarios.time.perf_counter", lambda: clock.now)

    def run(batch):
        clock.now += 0.02 * len(batch)

    assert scenario("single-stream", run, seconds=600).meets_rules
    assert not scenario("single-stream", run, seconds=599).meets_rules
    found = scenario("offline", run, seconds=600)
    assert (found.meets_rules, found.samples >= 24_576) == (True, True)


@pytest.mark.parametrize("at", [3, 30])
def test_an_error_of_a_query_ends_the_scenario(at):
    seen = iter(range(10**9))

    def run(_batch):
        if next(seen) == at:
            raise PhregError("GPU: out of memory.")

    for name in ("single-stream", "offline"):
        seen = iter(range(10**9))
        with pytest.raises(PhregError, match="out of memory"):
            scenario(name, run, threads=2)


def test_what_cannot_be_run_is_refused(bundle):
    with pytest.raises(PhregError, match="serves 2 or more"):
        scenario("single-stream", np.asarray, batches="2:4:8")
    with pytest.raises(PhregError, match="scenario: got 'server', expected single-stream or offline"):
        profile(bundle, scenarios=["server"])
    assert invoke("profile", bundle, "--scenario", "server").code == 2


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ({"seconds": 0.0}, "seconds: got 0.0"),
        ({"seconds": float("nan")}, "seconds: got nan"),
        ({"fps": -1.0}, "fps: got -1.0"),
        ({"tolerance": float("nan")}, "tolerance: got nan"),
        ({"frame": (0, 640)}, "frame: got 0x640"),
    ],
)
def test_arguments_of_profile_out_of_bounds_are_refused(bundle, argument, message):
    """A tolerance of NaN would let every growth over a baseline pass."""
    with pytest.raises(PhregError, match=message):
        profile(bundle, **argument)


def test_profile_reports_scenarios_on_the_processor(wide_bundle):
    words = ["--backend", "onnxruntime-cpu", "--seconds", "0.1", "--scenario", "single-stream", "--scenario", "offline"]
    done = invoke("profile", wide_bundle, *words, "--json")
    assert done.code == 0, done.err
    single, offline = done.document["scenarios"]
    assert (single["scenario"], offline["scenario"], offline["threads"]) == ("single-stream", "offline", 1)
    assert single["value"] >= single["latency"]["p50"] > 0
    assert offline["value"] == pytest.approx(offline["samples"] / offline["seconds"])
    assert "Scenarios of MLPerf Inference" in done.err
    assert "offline is shorter than MLPerf's rules want: at least 600 s, 1 queries, 24576 samples a query" in done.err
