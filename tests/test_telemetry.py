"""Samples of power, energy and clocks: the sensor of each, their summary, and the times at which they are taken."""

import itertools
import time

import pytest

from phreg_deploy.errors import PhregError
from phreg_deploy.profiling.device.telemetry import Sample, Telemetry, summarise
from tests.fake_sensors import FakeNvml


def test_on_a_jetson_power_comes_from_the_rails_and_the_rest_from_nvml(orin):
    board = Telemetry(root=orin, nvml=FakeNvml())
    sample = board.sample()
    assert (sample.power, sample.energy) == (pytest.approx(12.0), None)
    assert (sample.sm_clock, sample.temperature) == (1500.0, 61.0)
    with board:
        time.sleep(0.12)
    found = board.summary()
    assert found["energy"]["source"] == "integral of sampled power"
    assert found["power"]["mean"] == pytest.approx(12.0)
    assert found["power"]["source"] == "rail VDD_IN, the whole module"
    assert found["missing"] == {}


def test_energy_is_the_counters_difference():
    samples = [
        Sample(10.0, power=1.0, energy=100.0),
        Sample(11.0, power=2.0, energy=130.0),
        Sample(12.0, power=3.0, energy=180.0),
    ]
    found = summarise(samples, frames=40, idle=10.0)
    assert found["energy"] == {
        "joules": 80.0,
        "source": "NVML total energy counter",
        "per_frame": 2.0,
        "per_frame_above_idle": 1.5,
    }
    assert found["power"] == {"mean": 40.0, "peak": 3.0, "idle": 10.0}
    still = [Sample(s.at, power=s.power, energy=100.0) for s in samples]
    assert summarise(still)["energy"]["joules"] == 4.0, "a counter that did not change gives no energy"
    assert summarise(still)["energy"]["per_frame"] is None


def test_samples_are_summarised_by_mean_extremes_and_energy():
    samples = [
        Sample(0.0, power=10.0, sm_clock=1000, throttled=(), temperature=50, memory_used=5, rails={"A": 1.0}),
        Sample(
            1.0, power=None, sm_clock=600, throttled=("sync boost",), temperature=70, memory_used=9, rails={"A": 3.0}
        ),
        Sample(
            3.0, power=30.0, sm_clock=None, throttled=("sync boost", "board limit"), temperature=60, rails={"B": 8.0}
        ),
    ]
    found = summarise(samples, frames=3)
    assert found["energy"]["joules"] == 60.0, "trapezoids over the samples with a value: 3 s from 10 to 30 W"
    assert found["energy"]["per_frame_above_idle"] is None
    assert found["sm_clock"] == {"minimum": 600, "mean": 800}
    assert found["memory_clock"] == {"minimum": None, "mean": None}
    assert found["throttled"] == pytest.approx({"sync boost": 2 / 3, "board limit": 1 / 3})
    assert (found["temperature_max"], found["memory_peak"], found["seconds"], found["samples"]) == (70, 9, 3.0, 3)
    assert found["rails"] == {"A": 2.0, "B": 8.0}
    assert summarise([])["energy"]["joules"] is None


def test_the_sampler_runs_between_start_and_stop_and_may_start_again(tmp_path):
    fake = FakeNvml()
    sampler = Telemetry(root=tmp_path, nvml=fake, period=0.02)
    assert sampler.measure_idle(0.4) is not None
    first = sampler.samples
    assert 3 <= len(first) <= 23, "at most one a period, and fewer on a busy machine"
    assert all(b.at > a.at for a, b in itertools.pairwise(first))
    count = len(first)
    time.sleep(0.06)
    assert len(sampler.samples) == count
    with sampler:
        ended = time.monotonic()
    assert sampler.samples[0].at > first[-1].at
    assert sampler.samples[-1].at >= ended, "the energy up to the end"
    assert sampler.summary()["power"]["idle"] == sampler.idle_power
    assert sampler.summary()["missing"] == {}
    sampler.close()
    assert fake.open == 0


@pytest.mark.parametrize("period", [0.001, 1.0])
def test_a_period_out_of_range_is_refused(period):
    with pytest.raises(PhregError, match=r"expected 0\.02 to 0\.1"):
        Telemetry(period=period)
