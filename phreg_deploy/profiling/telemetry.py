"""What the GPU draws and how it is held back while something runs: NVML where it answers, sysfs on Jetson.

What a machine does not tell is None, with the reason in ``missing``; nothing is estimated. After NVIDIA's NVML API reference,
the kernel's documentation of ina3221 (hwmon), and the Jetson Linux developer guide ("Platform Power and Performance").
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import itertools
import re
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from phreg_deploy.errors import BackendMissing, PhregError

PERIOD = (0.02, 0.1)  # seconds; below, sampling itself heats a small board, above, short peaks go unseen
WHOLE = ("VDD_IN", "POM_5V_IN", "5V_IN")  # rails that feed the whole module; AGX modules have none
GPU = re.compile(r"gpu|ga10b|gv11b|gp10b|gm20b")  # devfreq nodes of Jetson's GPUs, e.g. 17000000.gpu, gpu-gpc-0
# Bits of NVML's clocks event reasons. "GPU idle" is none: it holds nothing back.
REASONS = {
    0x2: "applications clocks setting", 0x4: "software power cap", 0x8: "hardware slowdown", 0x10: "sync boost",
    0x20: "software thermal slowdown", 0x40: "hardware thermal slowdown", 0x80: "hardware power brake",
    0x100: "display clock setting", 0x200: "board limit", 0x400: "reliability",
}  # fmt: skip
OVERCURRENT = ("undervoltage", "average over-current", "instantaneous over-current")  # oc1 to oc3 of Orin's soctherm
SILENT = {  # why a Jetson may not tell
    "power": "no INA3221 rails in /sys/bus/i2c/drivers", "energy": "no INA3221 rails to integrate",
    "sm_clock": "no GPU in /sys/class/devfreq", "memory_clock": "only root may read /sys/kernel/debug/bpmp/debug/clk/emc/rate",
    "temperature": "no thermal zone of the GPU", "memory_used": "its memory is shared with the CPU",
    "throttled": "neither throttle alerts in /sys/class/thermal nor oc*_event_cnt in /sys/class/hwmon",
}  # fmt: skip


def words(bits: int) -> tuple[str, ...]:
    """NVML's clocks event reasons in words; unknown bits as a number."""
    named = [word for bit, word in REASONS.items() if bits & bit]
    rest = bits & ~(sum(REASONS) | 1)
    return (*named, *([f"unknown reason {rest:#x}"] if rest else []))


CALLS = (  # field, constant that it takes, conversion, calls with the newest first: older drivers lack it
    ("power", None, lambda milliwatts: milliwatts / 1e3, "nvmlDeviceGetPowerUsage"),
    ("energy", None, lambda millijoules: millijoules / 1e3, "nvmlDeviceGetTotalEnergyConsumption"),
    ("sm_clock", "NVML_CLOCK_SM", float, "nvmlDeviceGetClockInfo"),
    ("memory_clock", "NVML_CLOCK_MEM", float, "nvmlDeviceGetClockInfo"),
    ("temperature", "NVML_TEMPERATURE_GPU", float, "nvmlDeviceGetTemperatureV", "nvmlDeviceGetTemperature"),
    ("throttled", None, words, "nvmlDeviceGetCurrentClocksEventReasons", "nvmlDeviceGetCurrentClocksThrottleReasons"),
    ("memory_used", None, lambda memory: int(memory.used), "nvmlDeviceGetMemoryInfo"),
)


@dataclass(frozen=True)
class Sample:
    """One reading at ``at`` seconds. Power W, energy J since the driver was loaded, clocks MHz, temperature °C, memory bytes."""

    at: float
    power: float | None = None
    energy: float | None = None
    sm_clock: float | None = None
    memory_clock: float | None = None
    temperature: float | None = None
    throttled: tuple[str, ...] | None = None
    memory_used: int | None = None
    rails: dict[str, float] = field(default_factory=dict)


class Nvml:
    """One GPU as NVML sees it; ``missing``: what it does not tell, and why.

    From Ampere on (GA100 apart) its power is an average over a second, which flattens peaks; its energy counter is not.
    ``pci``: bus id, e.g. "0000:01:00.0", since NVML counts devices in another order than CUDA; None: by ``index``.
    Raises ``BackendMissing``: no nvidia-ml-py (``module`` replaces its ``pynvml``), no driver, no such device.
    """

    def __init__(self, index: int = 0, pci: str | None = None, module: Any = None) -> None:
        try:
            self.api = api = importlib.import_module("pynvml") if module is None else module
        except ImportError:
            raise BackendMissing('NVML: nvidia-ml-py is not installed. Run: pip install "phreg-deploy[cuda]"') from None
        self.missing: dict[str, str] = {}
        try:
            api.nvmlInit()
            device = api.nvmlDeviceGetHandleByPciBusId(pci.encode()) if pci else api.nvmlDeviceGetHandleByIndex(index)
        except api.NVMLError as error:
            raise BackendMissing(f"NVML: no device {pci or index} ({error}); is there an NVIDIA driver?") from None
        self._calls = {name: call for name, *how in CALLS if (call := self._first(device, name, *how)) is not None}

    def _first(self, device: Any, field: str, constant: str | None, convert: Any, *names: str) -> Any:
        """The first call that answers now, or None with the reason in ``missing``."""
        for name in names:
            try:
                arguments = (device,) if constant is None else (device, getattr(self.api, constant))
                call = functools.partial(getattr(self.api, name), *arguments)
                convert(call())
            except (self.api.NVMLError, AttributeError) as error:
                self.missing[field] = f"NVML: {error}"
                continue
            self.missing.pop(field, None)
            return lambda: convert(call())
        return None

    def read(self) -> dict[str, Any]:
        found = {}
        for name, call in self._calls.items():
            with contextlib.suppress(self.api.NVMLError):  # for the moment; this sample goes without
                found[name] = call()
        return found


class Jetson:
    """A Jetson as its sysfs tells, everything below ``root``."""

    def __init__(self, root: Path = Path("/")) -> None:
        # in7, where there is one, is a sum of shunts, and NC is not connected
        labels = sorted(root.glob("sys/bus/i2c/drivers/ina3221*/*/hwmon/hwmon*/in[123]_label"))
        self._rails = {name: path for path in labels if (name := _text(path)) and name != "NC"}
        self.whole = next((name for name in WHOLE if name in self._rails), None)
        clocks = sorted(root.glob("sys/class/devfreq/*/cur_freq"))
        self._clock = next((path for path in clocks if GPU.search(path.parent.name)), None)
        self._emc = root / "sys/kernel/debug/bpmp/debug/clk/emc/rate"  # root alone may read it
        zones = {_text(p): p.with_name("temp") for p in sorted(root.glob("sys/class/thermal/thermal_zone*/type"))}
        self._zone = next((p for part in ("gpu", "tj") for name, p in zones.items() if part in name.lower()), None)
        cooling = sorted(root.glob("sys/class/thermal/cooling_device*/type"))  # a fan holds nothing back, an alert does
        self._alerts = {_text(p): p.with_name("cur_state") for p in cooling if _text(p).endswith("-throttle-alert")}
        self._counts = {path: _number(path) for path in sorted(root.glob("sys/class/hwmon/hwmon*/oc*_event_cnt"))}
        release = re.search(r"# R(\d+) \(release\), REVISION: ([\d.]+)", _text(root / "etc/nv_tegra_release"))
        self.release = f"R{release[1]}.{release[2]}" if release else None
        mode = re.search(r"pmode:0*(\d+)", _text(root / "var/lib/nvpmodel/status"))
        known = dict(re.findall(r"<\s*POWER_MODEL\s+ID=(\d+)\s+NAME=(\S+)\s*>", _text(root / "etc/nvpmodel.conf")))
        self.power_mode = f"{known.get(mode[1], 'mode')} ({mode[1]})" if mode else None  # e.g. MAXN_SUPER (2)
        self.present = bool(self._rails or self.release)
        self.power_source = f"rail {self.whole}, the whole module" if self.whole else " + ".join(self._rails)

    def clocks_locked(self) -> bool | None:
        """Whether the GPU's lowest clock is its highest, as ``jetson_clocks`` makes it."""
        low, high = (self._clock and _number(self._clock.with_name(n)) for n in ("min_freq", "max_freq"))
        return None if low is None or high is None else low == high

    def read(self) -> dict[str, Any]:
        rails = {name: power for name, path in self._rails.items() if (power := _rail(path)) is not None}
        found: dict[str, Any] = {"rails": rails}
        complete = len(rails) == len(self._rails)  # a sum that lacks a rail would be too small
        found["power"] = rails.get(self.whole) if self.whole else sum(rails.values()) if rails and complete else None
        units = {"sm_clock": (self._clock, 1e6), "memory_clock": (self._emc, 1e6), "temperature": (self._zone, 1e3)}
        found.update({name: value / unit for name, (p, unit) in units.items() if (value := _number(p)) is not None})
        if self._alerts or self._counts:
            reasons = [name for name, path in self._alerts.items() if _number(path)]
            for path, before in self._counts.items():
                count = self._counts[path] = _number(path)
                if count is not None and before is not None and count > before:
                    number = int(path.name[2])
                    reasons.append(OVERCURRENT[number - 1] if 1 <= number <= 3 else f"over-current event oc{number}")
            found["throttled"] = tuple(reasons)
        return found


class Telemetry:
    """Samples in a thread between ``start`` and ``stop``, or inside ``with``; may be started again, which forgets what was.

    Args:
        index, pci, nvml: see ``Nvml``. period: seconds between samples, within ``PERIOD``. root: of the file system.
    """

    def __init__(
        self, index: int = 0, *, pci: str | None = None, period: float = 0.05, root: Path = Path("/"), nvml: Any = None
    ) -> None:
        if not PERIOD[0] <= period <= PERIOD[1]:
            raise PhregError(f"telemetry: got a period of {period} s, expected {PERIOD[0]} to {PERIOD[1]}.")
        self.period, self.jetson, self._nvml = period, Jetson(root), None
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
        """One reading now. On a Jetson its rails speak for power, not NVML, which knows only part of it."""
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
        """End sampling with a last sample, so that the energy covers everything since ``start``."""
        if self._thread is not None:
            self._over.set()
            self._thread.join()
            self._thread = None
            self.samples.append(self.sample())

    __enter__ = start

    def __exit__(self, *_: object) -> None:
        self.stop()

    def measure_idle(self, seconds: float = 2.0) -> float | None:
        """Mean power in W while nothing runs, kept for later summaries; None where no power is told."""
        with self:
            time.sleep(seconds)
        self.idle_power = summarise(self.samples)["power"]["mean"]
        return self.idle_power

    def summary(self, frames: int | None = None) -> dict[str, Any]:
        """Figures of the last run, see ``summarise``, and the conditions they hold in."""
        found, jetson = summarise(self.samples, frames, self.idle_power), self.jetson
        silent = [call[0] for call in CALLS if all(getattr(sample, call[0]) is None for sample in self.samples)]
        silent = [name for name in silent if name != "energy" or found["energy"]["joules"] is None]
        told = {**self.missing, **({name: f"Jetson: {why}." for name, why in SILENT.items()} if jetson.present else {})}
        source = jetson.power_source if found["rails"] else "NVML"
        found["power"]["source"] = None if found["power"]["mean"] is None else source
        found.update(
            power_mode=jetson.power_mode, release=jetson.release, clocks_locked=jetson.clocks_locked(),
            missing={name: told.get(name, told.get("NVML", "no sample tells.")) for name in silent},
        )  # fmt: skip
        return found

    def close(self) -> None:
        self.stop()
        if self._nvml is not None:
            self._nvml.api.nvmlShutdown()
            self._nvml = None


def summarise(samples: list[Sample], frames: int | None = None, idle: float | None = None) -> dict[str, Any]:
    """Power (W), energy (J, per frame, and above ``idle`` W), clocks (MHz), temperature and throttling of a run of samples.

    Energy: difference of NVML's counter, else the integral of power by trapezoids. ``throttled``: reason -> share of samples.
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
    told = [s.throttled for s in samples if s.throttled is not None]
    return {
        "seconds": samples[-1].at - samples[0].at if samples else 0.0, "samples": len(samples),
        "power": {"mean": mean, "peak": max((p for _, p in powers), default=None), "idle": idle},
        "energy": {
            "joules": joules, "source": source,
            "per_frame": joules / frames if joules is not None and frames else None,
            "per_frame_above_idle": (joules - idle * span) / frames if joules is not None and idle is not None and frames else None,
        },
        "rails": {name: _least_mean([s.rails.get(name) for s in samples])["mean"] for name in sorted({n for s in samples for n in s.rails})},
        "sm_clock": _least_mean([s.sm_clock for s in samples]), "memory_clock": _least_mean([s.memory_clock for s in samples]),
        "temperature_max": max((s.temperature for s in samples if s.temperature is not None), default=None),
        "memory_peak": max((s.memory_used for s in samples if s.memory_used is not None), default=None),
        "throttled": {r: sum(r in t for t in told) / len(told) for r in sorted({r for t in told for r in t})} if told else None,
    }  # fmt: skip


def _least_mean(values: list[float | None]) -> dict[str, float | None]:
    told = [value for value in values if value is not None]
    return {"minimum": min(told, default=None), "mean": sum(told) / len(told) if told else None}


def _rail(label: Path) -> float | None:
    """Watts of one rail: millivolts times milliamperes are microwatts."""
    volts, amperes = (_number(label.with_name(f"{kind}{label.name[2]}_input")) for kind in ("in", "curr"))
    return None if volts is None or amperes is None else volts * amperes * 1e-6


def _text(path: Path) -> str:
    with contextlib.suppress(OSError):
        return path.read_text(errors="replace").strip("\x00 \n")
    return ""


def _number(path: Path | None) -> float | None:
    """None too where a sensor is asleep or switched off: it refuses to be read."""
    text = _text(path) if path is not None else ""
    return float(text) if re.fullmatch(r"-?\d+", text) else None
