"""Power, clocks and throttling from a fake NVML and a fake sysfs, and the names of both against the real ones."""

import itertools
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from phreg_deploy.errors import BackendMissing, PhregError
from phreg_deploy.profiling import sensors
from phreg_deploy.profiling.sensors import JetsonSensors, Nvml, name_reasons
from phreg_deploy.profiling.telemetry import Sample, Telemetry, summarise

ORIN_NX = {"VDD_IN": (5000, 2400), "VDD_CPU_GPU_CV": (5000, 900), "VDD_SOC": (5000, 300)}


class FakeNvml:
    """NVML of a GPU that takes 50 W; ``refuse``: calls that are not supported, ``failing``: those that fail for now."""

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


def write(root: Path, files: dict[str, object]) -> Path:
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(f"{text}\n")
    return root


def rails(powers: dict[str, tuple[int, int]], chip: str = "1-0040/hwmon/hwmon3") -> dict[str, object]:
    folder, files = f"sys/bus/i2c/drivers/ina3221/{chip}", {}
    for number, (label, (volts, amperes)) in enumerate(powers.items(), 1):
        files |= {
            f"{folder}/in{number}_label": label,
            f"{folder}/in{number}_input": volts,
            f"{folder}/curr{number}_input": amperes,
        }
    return files | {f"{folder}/in7_label": "sum of shunt voltages", f"{folder}/in7_input": 9}


@pytest.fixture
def orin(tmp_path):
    zone, cooling = "sys/class/thermal/thermal_zone", "sys/class/thermal/cooling_device"
    gpu = "sys/class/devfreq/17000000.gpu/"
    return write(tmp_path, {
        **rails(ORIN_NX),
        f"{gpu}cur_freq": 918000000, f"{gpu}min_freq": 306000000, f"{gpu}max_freq": 918000000,
        "sys/class/devfreq/15340000.vic/cur_freq": 1,
        f"{zone}0/type": "cpu-thermal", f"{zone}0/temp": 71000, f"{zone}1/type": "gpu-thermal", f"{zone}1/temp": 52500,
        f"{cooling}0/type": "pwm-fan", f"{cooling}0/cur_state": 3,
        f"{cooling}1/type": "gpu-throttle-alert", f"{cooling}1/cur_state": 0,
        "sys/class/hwmon/hwmon1/oc3_event_cnt": 7,
        "var/lib/nvpmodel/status": "pmode:0002 fmode:quiet",
        "etc/nvpmodel.conf": "< POWER_MODEL ID=0 NAME=15W >\nCPU_ONLINE CORE_0 1\n< POWER_MODEL ID=2 NAME=MAXN_SUPER >",
        "etc/nv_tegra_release": "# R36 (release), REVISION: 4.3, GCID: 38968081, BOARD: generic",
    })  # fmt: skip


def test_nvml_in_units_and_words():
    fake = FakeNvml()
    assert Nvml(module=fake).read() == {
        "power": 50.0,
        "energy": 1002.0,
        "sm_clock": 1500.0,
        "memory_clock": 9000.0,
        "temperature": 61.0,
        "throttled": ("software power cap", "software thermal slowdown"),
        "memory_used": 1 << 30,
    }
    Nvml(3, "0000:65:00.0", fake)
    assert fake.handles == [0, b"0000:65:00.0"]


def test_an_older_driver_and_a_call_that_fails_for_now():
    fake = FakeNvml(
        "nvmlDeviceGetTemperatureV", "nvmlDeviceGetCurrentClocksEventReasons", "nvmlDeviceGetTotalEnergyConsumption"
    )
    nvml = Nvml(module=fake)
    found = nvml.read()
    assert (found["temperature"], found["throttled"]) == (60.0, ("hardware slowdown",))
    assert "energy" not in found
    assert nvml.missing == {"energy": "NVML: Not Supported"}
    fake.failing.add("nvmlDeviceGetPowerUsage")
    assert "power" not in nvml.read()
    fake.failing.clear()
    assert nvml.read()["power"] == 50.0


def test_reasons_in_words():
    assert name_reasons(0) == name_reasons(1) == ()
    assert name_reasons(0x8000 | 0x40) == ("hardware thermal slowdown", "unknown reason 0x8000")


def test_the_names_are_those_of_the_real_module():
    real = pytest.importorskip("pynvml")
    names = {name for _, _, _, *names in sensors.CALLS for name in names}
    names |= {"nvmlInit", "nvmlShutdown", "nvmlDeviceGetHandleByIndex", "nvmlDeviceGetHandleByPciBusId"}
    assert [name for name in sorted(names) if not callable(getattr(real, name, None))] == []
    assert issubclass(real.NVMLError, Exception)
    for name in ("NVML_CLOCK_SM", "NVML_CLOCK_MEM", "NVML_TEMPERATURE_GPU"):
        assert getattr(real, name) == getattr(FakeNvml, name)
    bits = {
        name.split("Reason")[1]: value
        for name, value in vars(real).items()
        if name.startswith("nvmlClocksThrottleReason")
    }
    for bit, word in sensors.REASONS.items():
        spelled = (
            "".join(part.capitalize() for part in word.split()).replace("Software", "Sw").replace("Hardware", "Hw")
        )
        assert bits[spelled.replace("PowerBrake", "PowerBrakeSlowdown")] == bit
    assert bits["GpuIdle"] == 1
    assert "used" in dict(real.c_nvmlMemory_t._fields_)


def test_no_module_and_no_driver_are_said(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "pynvml", None)
    with pytest.raises(BackendMissing, match=r'pip install "phreg-deploy\[cuda\]"'):
        Nvml()
    with pytest.raises(BackendMissing, match="Driver Not Loaded"):
        Nvml(module=FakeNvml("nvmlInit"))
    with Telemetry(root=tmp_path) as nothing:
        pass
    found = nothing.summary(frames=10)
    assert found["power"] == {"mean": None, "peak": None, "idle": None, "source": None}
    assert found["energy"]["per_frame"] is found["throttled"] is found["power_mode"] is found["clocks_locked"] is None
    assert set(found["missing"]) == {call[0] for call in sensors.CALLS}
    assert "nvidia-ml-py is not installed" in found["missing"]["power"]


def test_jetson(orin):
    jetson = JetsonSensors(orin)
    assert jetson.present
    assert (jetson.power_mode, jetson.release, jetson.clocks_locked()) == ("MAXN_SUPER (2)", "R36.4.3", False)
    found = jetson.read()
    assert found["rails"] == pytest.approx({"VDD_IN": 12.0, "VDD_CPU_GPU_CV": 4.5, "VDD_SOC": 1.5})
    assert found["power"] == pytest.approx(12.0), "the rail that feeds the module, not the sum with its branches"
    assert (found["sm_clock"], found["temperature"], found["throttled"]) == (918.0, 52.5, ())
    assert "memory_clock" not in found
    write(
        orin,
        {
            "sys/class/thermal/cooling_device1/cur_state": 1,
            "sys/class/hwmon/hwmon1/oc3_event_cnt": 9,
            "sys/class/devfreq/17000000.gpu/min_freq": 918000000,
        },
    )
    assert jetson.read()["throttled"] == ("gpu-throttle-alert", "instantaneous over-current")
    assert jetson.read()["throttled"] == ("gpu-throttle-alert",), "events count once"
    assert jetson.clocks_locked()


def test_a_jetson_without_a_rail_for_the_whole_sums_them_all_or_nothing(tmp_path):
    second = rails({"NC": (0, 0), "VDDQ_VDD2_1V8AO": (5000, 100)}, "1-0041/hwmon/hwmon4")
    write(
        tmp_path,
        {**rails({"VDD_GPU_SOC": (10000, 1000), "VDD_CPU_CV": (10000, 500), "VIN_SYS_5V0": (5000, 600)}), **second},
    )
    jetson = JetsonSensors(tmp_path)
    assert jetson.read()["power"] == pytest.approx(10 + 5 + 3 + 0.5)
    assert jetson.power_source == "VDD_GPU_SOC + VDD_CPU_CV + VIN_SYS_5V0 + VDDQ_VDD2_1V8AO"
    assert jetson.power_mode is None
    (tmp_path / "sys/bus/i2c/drivers/ina3221/1-0040/hwmon/hwmon3/curr2_input").unlink()
    assert jetson.read()["power"] is None


def test_a_desktop_is_no_jetson(tmp_path):
    write(
        tmp_path,
        {"sys/class/thermal/thermal_zone0/type": "x86_pkg_temp", "sys/class/thermal/thermal_zone0/temp": 40000},
    )
    assert not JetsonSensors(tmp_path).present


def test_on_a_jetson_the_rails_speak_for_power_and_nvml_for_the_rest(orin):
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
    assert summarise(still)["energy"]["joules"] == 4.0, "a counter that did not tick is not zero joules"
    assert summarise(still)["energy"]["per_frame"] is None


def test_figures_of_samples():
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
    assert found["energy"]["joules"] == 60.0, "trapezoids over what was told: 3 s from 10 to 30 W"
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
    assert sampler.measure_idle(0.1) is not None
    first = sampler.samples
    assert 3 <= len(first) <= 8
    assert all(b.at > a.at for a, b in itertools.pairwise(first))
    count = len(first)
    time.sleep(0.06)
    assert len(sampler.samples) == count
    with sampler:
        ended = time.monotonic()
    assert sampler.samples[0].at > first[-1].at
    assert sampler.samples[-1].at >= ended, "energy up to the end"
    assert sampler.summary()["power"]["idle"] == sampler.idle_power
    assert sampler.summary()["missing"] == {}
    sampler.close()
    assert fake.open == 0


@pytest.mark.parametrize("period", [0.001, 1.0])
def test_a_period_that_is_refused(period):
    with pytest.raises(PhregError, match=r"expected 0\.02 to 0\.1"):
        Telemetry(period=period)
