"""Latency statistics, rounds in turn, several streams at once, and frames at a fixed rate."""

import threading
import time
from types import SimpleNamespace

import numpy as np
import pytest

from phreg_deploy.errors import PhregError
from phreg_deploy.profiling import load, timing
from phreg_deploy.progress import SILENT


def test_percentiles_and_the_interval_of_the_median_are_right():
    found = timing.describe(range(1, 1002))
    names = ("rounds", "min", "mean", "p50", "p90", "p95", "p99", "p99.9", "max", "std")
    std = np.sqrt((1001**2 - 1) / 12)
    assert [found[n] for n in names] == pytest.approx([1001, 1, 501, 501, 901, 951, 991, 1000, 1001, std])
    values = (rng := np.random.default_rng(5)).gamma(2.0, 1.0, 100)
    resampled = np.percentile([np.median(rng.choice(values, 100)) for _ in range(4000)], (2.5, 97.5))
    assert timing.bootstrap(values) == timing.bootstrap(values) == pytest.approx(resampled, rel=0.05)
    assert timing.bootstrap(np.full(20, 3.0)) == [3.0, 3.0]


def test_configurations_are_measured_in_turn_until_they_agree():
    assert all(timing.is_stable(means) for means in ([10, 10.2, 10.4], [90, 10, 10, 10]))
    assert not any(timing.is_stable(means) for means in ([10, 10], [10, 10.2, 10.51], [10, 10, 10, 90]))
    order, drift = [], iter(range(10**9))

    def steady():
        order.append("A")
        return {"latency": 2.0, "compute": 1.0}

    def drifting():
        order.append("B")
        return {"latency": 1.0 * 2 ** next(drift)} if len(order) < 40 else {"latency": 1.0}

    found = timing.measure({"A": steady}, 0.01, 0, SILENT)["A"]
    assert (found["stable"], found["windows"], found["latency"]["rounds"] > 9) == (True, 3, True)
    order.clear()
    found = timing.measure({"A": steady, "B": drifting}, 0.0, 0, SILENT)
    assert "".join(order[2:10]) == "ABBAABBA", "each was called once before, to warm up"
    assert found["A"]["windows"] == found["B"]["windows"] > 3
    assert (found["B"]["stable"], found["B"]["latency"]["max"]) == (True, 1.0), (
        "the windows in which it drifted are discarded"
    )
    forever = iter(range(10**9))
    found = timing.measure({"A": lambda: {"latency": 1.5 ** next(forever)}}, 0.0, 0, SILENT)["A"]
    assert (found["stable"], found["windows"]) == (False, 9)


def test_streams_run_at_once_and_count_what_ended_together():
    # Calls this long, so that a busy machine adds little to them.
    one = load.sweep(lambda: time.sleep(0.04), 1, 0.4, SILENT, batch=4)
    four = load.sweep(lambda: time.sleep(0.04), 4, 0.4, SILENT, batch=4)
    assert 20 < one["images_per_second"] <= 100
    assert one["images_per_second"] == pytest.approx(4 * one["calls"] / one["seconds"])
    assert four["images_per_second"] > 1.5 * one["images_per_second"]
    assert four["latency"]["min"] >= 40
    entries = [{"images_per_second": r, "latency": {"p50": took}} for r, took in ((1, 1), (3, 4), (2, 2), (3, 3))]
    load.mark_pareto(entries)
    assert [entry["pareto"] for entry in entries] == [True, False, True, True]
    callers = []

    def uneven():
        callers.append(threading.get_ident())
        time.sleep(0.05 if callers[-1] == callers[0] else 0.01)

    assert load.sweep(uneven, 2, 0.1, SILENT)["calls"] < 16, "calls of one thread alone do not count"


@pytest.mark.parametrize("at", [4, 12])  # during and after warm-up
def test_an_error_in_a_stream_ends_all(at):
    seen = iter(range(10**9))

    def failing():
        if next(seen) == at:
            raise PhregError("GPU: out of memory.")
        time.sleep(0.001)

    begun = time.perf_counter()
    with pytest.raises(PhregError, match="out of memory"):
        load.sweep(failing, 3, 30.0, SILENT)
    assert time.perf_counter() - begun < 5


@pytest.mark.parametrize(("service", "frames", "misses", "longest"), [(5, 50, 0, 5), (16, 38, 1, 238)])
def test_frames_at_a_fixed_rate_are_missed_when_a_call_takes_too_long(service, frames, misses, longest):
    """At 100 frames a second and 16 ms per call, every frame waits 6 ms longer than the one before."""
    clock = SimpleNamespace(now=0.0, perf_counter=lambda: clock.now)
    clock.sleep = lambda seconds: setattr(clock, "now", clock.now + seconds)
    found = load.pace(lambda: clock.sleep(service / 1e3), 100, 0.5, clock)
    assert (found["expected"], found["frames"], found["misses"], found["kept_up"]) == (50, frames, misses, frames == 50)
    assert (found["response"]["max"], found["wait"]["max"]) == pytest.approx((longest, longest - service))
    assert found["jitter"] == pytest.approx(6 * misses * np.std(range(frames)), abs=1e-6)
