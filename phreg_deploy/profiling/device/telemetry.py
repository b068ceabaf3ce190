"""Sample what a GPU draws and how it is throttled while something runs.

A figure that the machine does not report is None, with the reason in ``missing``; nothing is estimated.
"""

from __future__ import annotations

import itertools
import threading
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from phreg_deploy.errors import BackendMissing, PhregError
from phreg_deploy.profiling.device.sensors import CALLS, JetsonSensors, Nvml

# Seconds between samples: below, sampling itself heats a small board; above, short peaks go unseen.
PERIOD = (0.02, 0.1)
# Why a Jetson may lack a figure.
SILENT = {
    "power": "no INA3221 rails in /sys/bus/i2c/drivers",
    "energy": "no INA3221 rails to integrate",
    "sm_clock": "no GPU in /sys/class/devfreq",
    "memory_clock": "only root may read /sys/kernel/debug/bpmp/debug/clk/emc/rate",
    "temperature": "no thermal zone of the GPU",
    "memory_used": "its memory is shared with the CPU",
    "throttled": "neither throttle alerts in /sys/class/thermal nor oc*_event_cnt in /sys/class/hwmon",
}


@dataclass(frozen=True)
class Sample:
    """One reading at ``at`` seconds.

    Power in W, energy in J since the driver was loaded, clocks in MHz, temperature in °C, memory in bytes.
    """

    at: float
    power: float | None = None
    energy: float | None = None
    sm_clock: float | None = None
    memory_clock: float | None = None
    temperature: float | None = None
    throttled: tuple[str, ...] | None = None
    memory_used: int | None = None
    rails: dict[str, float] = field(default_factory=dict)


class Telemetry:
    """Samples in a thread between ``start`` and ``stop``, or inside ``with``; each start drops the earlier samples.

    Args:
        index, pci, nvml: see ``Nvml``. period: seconds between samples, within ``PERIOD``. root: of the file system.
    """

    def __init__(
        self, index: int = 0, *, pci: str | None = None, period: float = 0.05, root: Path = Path("/"), nvml: Any = None
    ) -> None:
        if not PERIOD[0] <= period <= PERIOD[1]:
            raise PhregError(f"telemetry: got a period of {period} s, expected {PERIOD[0]} to {PERIOD[1]}.")
        self.period, self.jetson, self._nvml = period, JetsonSensors(root), None
        self.idle_power: float | None = None
        self.samples: list[Sample] = []
        try:
            self._nvml = Nvml(index, pci, nvml)
            self.missing = self._nvml.missing
        except BackendMissing as error:
            self.missing = {"NVML": str(error)}
        self._thread: threading.Thread | None = None
        self._over = threading.Event()

    def sample(self) -> Sample:
        """Take one reading. On a Jetson power comes from its rails: NVML knows only part of it."""
        found: dict[str, Any] = self._nvml.read() if self._nvml is not None else {}
        local = self.jetson.read() if self.jetson.present else {}
        if local.get("rails"):
            found.update(power=None, energy=None)
        found.update({name: value for name, value in local.items() if found.get(name) is None})
        return Sample(time.monotonic(), **found)

    def start(self) -> Telemetry:
        self._over.clear()
        self.samples = [self.sample()]
        self._thread = threading.Thread(target=self._run, name="telemetry", daemon=True)
        self._thread.start()
        return self

    def _run(self) -> None:
        while not self._over.wait(self.period):
            self.samples.append(self.sample())

    def stop(self) -> None:
        """Stop after a last sample: the energy then covers the whole time since ``start``."""
        if self._thread is not None:
            self._over.set()
            self._thread.join()
            self._thread = None
            self.samples.append(self.sample())

    __enter__ = start

    def __exit__(self, *_: object) -> None:
        self.stop()

    def measure_idle(self, seconds: float = 2.0) -> float | None:
        """Measure the mean power in W while nothing runs, and keep it for later summaries; None if unknown."""
        with self:
            time.sleep(seconds)
        self.idle_power = summarise(self.samples)["power"]["mean"]
        return self.idle_power

    def summary(self, frames: int | None = None) -> dict[str, Any]:
        """Summarise the last run, see ``summarise``, and add the conditions of the machine."""
        found, jetson = summarise(self.samples, frames, self.idle_power), self.jetson
        silent = [call[0] for call in CALLS if all(getattr(sample, call[0]) is None for sample in self.samples)]
        silent = [name for name in silent if name != "energy" or found["energy"]["joules"] is None]
        reasons = {
            **self.missing,
            **({name: f"Jetson: {why}." for name, why in SILENT.items()} if jetson.present else {}),
        }
        source = jetson.power_source if found["rails"] else "NVML"
        found["power"]["source"] = None if found["power"]["mean"] is None else source
        found.update(
            power_mode=jetson.power_mode,
            release=jetson.release,
            clocks_locked=jetson.clocks_locked(),
            missing={name: reasons.get(name, reasons.get("NVML", "no sample has it.")) for name in silent},
        )
        return found

    def clocks(self) -> dict[str, Any]:
        """What sets the clocks: the largest SM clock in MHz, a Jetson's power mode, and whether its clocks are locked.

        None where the machine does not report it.
        """
        most = None if self._nvml is None else self._nvml.largest_sm_clock()
        jetson = self.jetson
        return {"sm_clock": most, "power_mode": jetson.power_mode, "locked": jetson.clocks_locked()}

    def close(self) -> None:
        self.stop()
        if self._nvml is not None:
            self._nvml.api.nvmlShutdown()
            self._nvml = None


class Watch:
    """What was sampled during one measurement."""

    def __init__(self, telemetry: Telemetry | None) -> None:
        self._telemetry = telemetry

    def summary(self, frames: int) -> dict[str, Any]:
        """``{"telemetry": ...}`` of the measurement, in which ``frames`` frames were served; None without sensors."""
        return {"telemetry": None if self._telemetry is None else self._telemetry.summary(frames)}


@contextmanager
def watched(telemetry: Telemetry | None) -> Iterator[Watch]:
    """Sample during the block; the ``Watch`` summarises it until the next block begins."""
    if telemetry is None:
        yield Watch(None)
        return
    telemetry.start()
    try:
        yield Watch(telemetry)
    finally:
        telemetry.stop()


def summarise(samples: list[Sample], frames: int | None = None, idle: float | None = None) -> dict[str, Any]:
    """Summarise samples: power (W), energy (J; per frame; above ``idle`` W), clocks (MHz), temperature, throttling.

    Energy is the difference of NVML's counter, else the integral of power by trapezoids. ``throttled``: reason -> share
    of samples.
    """
    powers = [(s.at, s.power) for s in samples if s.power is not None]
    counted = [(s.at, s.energy) for s in samples if s.energy is not None]
    joules, span, source = None, 0.0, None
    if len(counted) > 1 and counted[-1][1] > counted[0][1]:  # a counter that did not tick says nothing
        span, joules = (last - first for first, last in zip(counted[0], counted[-1]))
        source = "NVML total energy counter"
    elif len(powers) > 1:
        joules = sum((b[0] - a[0]) * (a[1] + b[1]) / 2 for a, b in itertools.pairwise(powers))
        span, source = powers[-1][0] - powers[0][0], "integral of sampled power"
    mean = joules / span if joules is not None and span > 0 else None
    rails = sorted({name for sample in samples for name in sample.rails})
    return {
        "seconds": samples[-1].at - samples[0].at if samples else 0.0,
        "samples": len(samples),
        "power": {"mean": mean, "peak": _largest(s.power for s in samples), "idle": idle},
        "energy": {"joules": joules, "source": source, **_per_frame(joules, span, frames, idle)},
        "rails": {name: _least_mean([s.rails.get(name) for s in samples])["mean"] for name in rails},
        "sm_clock": _least_mean([s.sm_clock for s in samples]),
        "memory_clock": _least_mean([s.memory_clock for s in samples]),
        "temperature_max": _largest(s.temperature for s in samples),
        "memory_peak": _largest(s.memory_used for s in samples),
        "throttled": _throttled_shares(samples),
    }


def _per_frame(joules: float | None, span: float, frames: int | None, idle: float | None) -> dict[str, float | None]:
    if joules is None or not frames:
        return {"per_frame": None, "per_frame_above_idle": None}
    above_idle = None if idle is None else (joules - idle * span) / frames
    return {"per_frame": joules / frames, "per_frame_above_idle": above_idle}


def _throttled_shares(samples: list[Sample]) -> dict[str, float] | None:
    reasons = [sample.throttled for sample in samples if sample.throttled is not None]
    if not reasons:
        return None
    names = sorted({name for sample in reasons for name in sample})
    return {name: sum(name in sample for sample in reasons) / len(reasons) for name in names}


def _largest(values: Iterable[float | None]) -> float | None:
    return max((value for value in values if value is not None), default=None)


def _least_mean(values: list[float | None]) -> dict[str, float | None]:
    measured = [value for value in values if value is not None]
    return {"minimum": min(measured, default=None), "mean": sum(measured) / len(measured) if measured else None}
