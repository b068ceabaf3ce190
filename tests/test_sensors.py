"""Power, clocks and throttling from a fake NVML and a fake Jetson's sysfs, whose names are checked against NVML's."""

import sys

import pytest

from phreg_deploy.errors import BackendMissing
from phreg_deploy.profiling.device import sensors
from phreg_deploy.profiling.device.sensors import JetsonSensors, Nvml, name_reasons
from phreg_deploy.profiling.device.telemetry import Telemetry
from tests.fake_sensors import FakeNvml, power_rails, write_files


def test_nvml_is_read_in_units_and_words():
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


def test_calls_that_a_driver_lacks_and_calls_that_fail_once_are_left_out():
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


def test_throttling_reasons_have_names():
    assert name_reasons(0) == name_reasons(1) == ()
    assert name_reasons(0x8000 | 0x40) == ("hardware thermal slowdown", "unknown reason 0x8000")


def test_the_fake_nvml_has_the_names_of_the_real_one():
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


def test_a_missing_module_and_a_missing_driver_are_explained(monkeypatch, tmp_path):
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


def test_a_jetson_is_read_from_sysfs(orin):
    jetson = JetsonSensors(orin)
    assert jetson.present
    assert (jetson.power_mode, jetson.release, jetson.clocks_locked()) == ("MAXN_SUPER (2)", "R36.4.3", False)
    found = jetson.read()
    assert found["rails"] == pytest.approx({"VDD_IN": 12.0, "VDD_CPU_GPU_CV": 4.5, "VDD_SOC": 1.5})
    assert found["power"] == pytest.approx(12.0), "the rail of the whole module, not the sum of all rails"
    assert (found["sm_clock"], found["temperature"], found["throttled"]) == (918.0, 52.5, ())
    assert "memory_clock" not in found
    write_files(
        orin,
        {
            "sys/class/thermal/cooling_device1/cur_state": 1,
            "sys/class/hwmon/hwmon1/oc3_event_cnt": 9,
            "sys/class/devfreq/17000000.gpu/min_freq": 918000000,
        },
    )
    assert jetson.read()["throttled"] == ("gpu-throttle-alert", "instantaneous over-current")
    assert jetson.read()["throttled"] == ("gpu-throttle-alert",), "each event counts once"
    assert jetson.clocks_locked()


def test_a_jetson_without_a_total_rail_sums_all_rails_or_none(tmp_path):
    second = power_rails({"NC": (0, 0), "VDDQ_VDD2_1V8AO": (5000, 100)}, "1-0041/hwmon/hwmon4")
    write_files(
        tmp_path,
        {
            **power_rails({"VDD_GPU_SOC": (10000, 1000), "VDD_CPU_CV": (10000, 500), "VIN_SYS_5V0": (5000, 600)}),
            **second,
        },
    )
    jetson = JetsonSensors(tmp_path)
    assert jetson.read()["power"] == pytest.approx(10 + 5 + 3 + 0.5)
    assert jetson.power_source == "VDD_GPU_SOC + VDD_CPU_CV + VIN_SYS_5V0 + VDDQ_VDD2_1V8AO"
    assert jetson.power_mode is None
    (tmp_path / "sys/bus/i2c/drivers/ina3221/1-0040/hwmon/hwmon3/curr2_input").unlink()
    assert jetson.read()["power"] is None


def test_a_desktop_is_no_jetson(tmp_path):
    write_files(
        tmp_path,
        {"sys/class/thermal/thermal_zone0/type": "x86_pkg_temp", "sys/class/thermal/thermal_zone0/temp": 40000},
    )
    assert not JetsonSensors(tmp_path).present
