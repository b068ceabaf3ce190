"""A fake NVML, and the sysfs files of a fake Jetson."""

from pathlib import Path
from types import SimpleNamespace

# Power rails of a Jetson Orin NX: millivolts and milliamperes.
ORIN_NX = {"VDD_IN": (5000, 2400), "VDD_CPU_GPU_CV": (5000, 900), "VDD_SOC": (5000, 300)}


class FakeNvml:
    """NVML of a GPU that draws 50 W.

    ``refuse``: names of calls that are never supported. ``failing``: names of calls that fail until they are removed.
    """

    NVML_CLOCK_SM, NVML_CLOCK_MEM, NVML_TEMPERATURE_GPU = 1, 2, 0

    class NVMLError(Exception):
        pass

    def __init__(self, *refuse: str):
        self.refuse, self.failing, self.open, self.handles, self.joules = set(refuse), set(), 0, [], 1000.0

    def __getattr__(self, name):
        if not name.startswith("nvmlDeviceGet"):
            raise AttributeError(name)

        def call(*arguments):
            if name in self.refuse | self.failing:
                raise self.NVMLError("Not Supported")
            return getattr(self, "_" + name.removeprefix("nvmlDeviceGet"))(*arguments)

        return call

    def nvmlInit(self):
        if "nvmlInit" in self.refuse:
            raise self.NVMLError("Driver Not Loaded")
        self.open += 1

    def nvmlShutdown(self):
        self.open -= 1

    def _HandleByIndex(self, index):
        self.handles.append(index)
        return "gpu"

    _HandleByPciBusId = _HandleByIndex

    def _PowerUsage(self, gpu):
        return 50_000

    def _TotalEnergyConsumption(self, gpu):
        self.joules += 1
        return int(1e3 * self.joules)

    def _ClockInfo(self, gpu, kind):
        return {1: 1500, 2: 9000}[kind]

    def _TemperatureV(self, gpu, sensor):
        return 61

    def _Temperature(self, gpu, sensor):
        return 60

    def _CurrentClocksEventReasons(self, gpu):
        return 0x24

    def _CurrentClocksThrottleReasons(self, gpu):
        return 0x8

    def _MemoryInfo(self, gpu):
        return SimpleNamespace(used=1 << 30)


def write_files(root: Path, files: dict[str, object]) -> Path:
    """Write files, path -> content, below ``root``; return ``root``."""
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(f"{text}\n")
    return root


def power_rails(powers: dict[str, tuple[int, int]], chip: str = "1-0040/hwmon/hwmon3") -> dict[str, object]:
    """List the files of a power sensor, path -> content, from each rail's millivolts and milliamperes."""
    folder, files = f"sys/bus/i2c/drivers/ina3221/{chip}", {}
    for number, (label, (volts, amperes)) in enumerate(powers.items(), 1):
        files |= {
            f"{folder}/in{number}_label": label,
            f"{folder}/in{number}_input": volts,
            f"{folder}/curr{number}_input": amperes,
        }
    return files | {f"{folder}/in7_label": "sum of shunt voltages", f"{folder}/in7_input": 9}
