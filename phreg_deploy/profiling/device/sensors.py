"""Read power, clocks, temperature and throttling of a GPU: from NVML, and on a Jetson from sysfs.

Sources: NVIDIA's NVML API reference, the kernel's documentation of ina3221 (hwmon), and the Jetson Linux developer
guide ("Platform Power and Performance").
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import re
from pathlib import Path
from typing import Any

from phreg_deploy.errors import BackendMissing
from phreg_deploy.runtime.gpu.jetson import read_l4t, read_text

# Rails that feed the whole module; AGX modules have none.
WHOLE = ("VDD_IN", "POM_5V_IN", "5V_IN")
# The devfreq nodes of a Jetson's GPU, e.g. 17000000.gpu, gpu-gpc-0.
GPU = re.compile(r"gpu|ga10b|gv11b|gp10b|gm20b")
# Bits of NVML's clocks event reasons, without "GPU idle", which does not throttle.
REASONS = {
    0x2: "applications clocks setting", 0x4: "software power cap", 0x8: "hardware slowdown", 0x10: "sync boost",
    0x20: "software thermal slowdown", 0x40: "hardware thermal slowdown", 0x80: "hardware power brake",
    0x100: "display clock setting", 0x200: "board limit", 0x400: "reliability",
}  # fmt: skip
# The events oc1 to oc3 of Orin's soctherm.
OVERCURRENT = ("undervoltage", "average over-current", "instantaneous over-current")


def name_reasons(bits: int) -> tuple[str, ...]:
    """Names of NVML's clocks event reasons; unknown bits as a number."""
    named = [word for bit, word in REASONS.items() if bits & bit]
    rest = bits & ~(sum(REASONS) | 1)
    return (*named, *([f"unknown reason {rest:#x}"] if rest else []))


# Field of a ``Sample``, constant that the call takes, conversion, and calls with the newest first: old drivers lack it.
CALLS = (
    ("power", None, lambda milliwatts: milliwatts / 1e3, "nvmlDeviceGetPowerUsage"),
    ("energy", None, lambda millijoules: millijoules / 1e3, "nvmlDeviceGetTotalEnergyConsumption"),
    ("sm_clock", "NVML_CLOCK_SM", float, "nvmlDeviceGetClockInfo"),
    ("memory_clock", "NVML_CLOCK_MEM", float, "nvmlDeviceGetClockInfo"),
    ("temperature", "NVML_TEMPERATURE_GPU", float, "nvmlDeviceGetTemperatureV", "nvmlDeviceGetTemperature"),
    (
        "throttled",
        None,
        name_reasons,
        "nvmlDeviceGetCurrentClocksEventReasons",
        "nvmlDeviceGetCurrentClocksThrottleReasons",
    ),
    ("memory_used", None, lambda memory: int(memory.used), "nvmlDeviceGetMemoryInfo"),
)


class Nvml:
    """A GPU as NVML reports it; ``missing``: figure -> the reason why there is none.

    From Ampere on, except GA100, power is averaged over a second, which flattens peaks; the energy counter is exact.
    ``pci``: bus id, e.g. "0000:01:00.0", because NVML numbers devices in another order than CUDA; None: by ``index``.
    ``module`` replaces nvidia-ml-py's ``pynvml``. Raises ``BackendMissing``: no nvidia-ml-py, driver or such device.
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
        self._device = device
        self._calls = {name: call for name, *how in CALLS if (call := self._first(device, name, *how)) is not None}

    def _first(self, device: Any, field: str, constant: str | None, convert: Any, *names: str) -> Any:
        """The first call that works, or None with the reason in ``missing``."""
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

    def largest_sm_clock(self) -> float | None:
        """The largest SM clock in MHz that the present settings allow; None if the driver does not report it."""
        with contextlib.suppress(self.api.NVMLError, AttributeError):
            return float(self.api.nvmlDeviceGetMaxClockInfo(self._device, self.api.NVML_CLOCK_SM))
        return None

    def read(self) -> dict[str, Any]:
        found = {}
        for name, call in self._calls.items():
            with contextlib.suppress(self.api.NVMLError):  # for the moment; this sample goes without
                found[name] = call()
        return found


class JetsonSensors:
    """The sensors and settings of a Jetson, read from the files below ``root``."""

    def __init__(self, root: Path = Path("/")) -> None:
        # in7, where there is one, is a sum of shunts, and NC is not connected
        labels = sorted(root.glob("sys/bus/i2c/drivers/ina3221*/*/hwmon/hwmon*/in[123]_label"))
        self._rails = {name: path for path in labels if (name := read_text(path)) and name != "NC"}
        self.whole = next((name for name in WHOLE if name in self._rails), None)
        clocks = sorted(root.glob("sys/class/devfreq/*/cur_freq"))
        self._clock = next((path for path in clocks if GPU.search(path.parent.name)), None)
        self._emc = root / "sys/kernel/debug/bpmp/debug/clk/emc/rate"  # root alone may read it
        zones = {read_text(p): p.with_name("temp") for p in sorted(root.glob("sys/class/thermal/thermal_zone*/type"))}
        self._zone = next((p for part in ("gpu", "tj") for name, p in zones.items() if part in name.lower()), None)
        cooling = sorted(root.glob("sys/class/thermal/cooling_device*/type"))  # a fan holds nothing back, an alert does
        self._alerts = {
            read_text(p): p.with_name("cur_state") for p in cooling if read_text(p).endswith("-throttle-alert")
        }
        self._counts = {path: _number(path) for path in sorted(root.glob("sys/class/hwmon/hwmon*/oc*_event_cnt"))}
        release = read_l4t(root)
        self.release = f"R{'.'.join(map(str, release))}" if release else None
        mode = re.search(r"pmode:0*(\d+)", read_text(root / "var/lib/nvpmodel/status"))
        known = dict(re.findall(r"<\s*POWER_MODEL\s+ID=(\d+)\s+NAME=(\S+)\s*>", read_text(root / "etc/nvpmodel.conf")))
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


def _rail(label: Path) -> float | None:
    """Watts of one rail: millivolts times milliamperes are microwatts."""
    volts, amperes = (_number(label.with_name(f"{kind}{label.name[2]}_input")) for kind in ("in", "curr"))
    return None if volts is None or amperes is None else volts * amperes * 1e-6


def _number(path: Path | None) -> float | None:
    """None too where a sensor is asleep or switched off: it refuses to be read."""
    text = read_text(path) if path is not None else ""
    return float(text) if re.fullmatch(r"-?\d+", text) else None
