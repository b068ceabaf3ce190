"""`phreg-deploy doctor` on fake Jetsons: the version of JetPack, and which TensorRT it can use."""

import pytest

from phreg_deploy.doctor.system import Jetson, read_jetson
from tests.fake_machines import FakeMachine, make_jetson


def test_jetpack_6_2_can_use_its_tensorrt(tmp_path):
    found = make_jetson(tmp_path, "6.2+b77", "36.4.3", "10.3.0").findings()
    assert found["NVIDIA driver"].state == "CUDA 12.6, 1 GPU: Orin, SM 8.7, 32.0 GiB"
    assert found["JetPack"].state == "JetPack 6.2, L4T 36.4.3, NVIDIA Jetson AGX Orin Developer Kit"
    assert (found["TensorRT"].state, found["TensorRT"].usable, found["TensorRT"].mend) == ("10.3.0", True, None)
    assert found["cuda-python"].mend == 'pip install "phreg-deploy[cuda]" "cuda-python<13"'
    assert "use TensorRT" in found["onnxruntime on CUDA"].state
    assert found["onnxruntime on CUDA"].mend is None, "no wheel is proposed, because aarch64 has none"


def test_jetpack_7_2_with_tensorrt_11_4_0_is_refused(tmp_path):
    found = make_jetson(tmp_path, "7.2+b60", "39.2.0", "11.4.0.106").findings()["TensorRT"]
    assert not found.usable
    assert "11.4.1 is the first" in found.state
    assert found.mend.startswith("pip uninstall tensorrt; sudo apt install nvidia-jetpack")
    assert "--system-site-packages" in found.mend
    assert make_jetson(tmp_path, "7.2+b60", "39.2.0", "10.16.2").findings()["TensorRT"].usable


@pytest.mark.parametrize(
    ("jetpack", "tensorrt", "why"),
    [
        ((6, 2), (10, 3, 0), None),
        ((6, 2), (11, 4, 1), "JetPack 6.x stays"),
        ((6,), (11, 0, 0), "JetPack 6.x stays"),
        ((7, 2), (10, 16, 2), None),
        ((7, 2, 2), (11, 4, 0, 106), "do not support Jetson"),
        ((7, 2, 1), (11, 4, 1), "needs JetPack 7.2.2"),
        ((7,), (11, 4, 1), "needs JetPack 7.2.2"),
        ((7, 2, 2), (11, 4, 1, 5), None),
        ((8, 0), (12, 0), None),
        ((), (11, 3), "do not support"),
        ((), (11, 4, 1), None),
    ],
)
def test_each_jetpack_accepts_the_tensorrt_that_supports_it(jetpack, tensorrt, why):
    said = Jetson("Orin", "", jetpack).refusal(tensorrt)
    assert said is None if why is None else why in said


@pytest.mark.parametrize(
    ("l4t", "jetpack"), [("36.4.3", (6,)), ("38.4", (7,)), ("39.2.0", (7, 2, 0)), ("39.2.1", (7, 2, 1)), ("41.0", ())]
)
def test_jetpack_in_a_container_is_read_from_l4t(tmp_path, l4t, jetpack):
    make_jetson(tmp_path, None, l4t, "10.3.0")
    assert read_jetson(tmp_path).jetpack == jetpack


def test_a_container_without_the_jetsons_gpu_names_the_option(tmp_path):
    machine = FakeMachine(tmp_path, processor="aarch64")
    machine.write("proc/device-tree/compatible", "nvidia,p3737-0000\0nvidia,tegra234\0")
    found = machine.findings()
    assert "--runtime nvidia" in found["NVIDIA driver"].mend
    assert found["JetPack"].state == "JetPack of unknown version"
    assert "sudo apt install nvidia-jetpack" in found["TensorRT"].mend
    machine.write("var/lib/dpkg/status", "Package: nvidia-jetpack\nStatus: deinstall ok config-files\nVersion: 6.2\n")
    assert read_jetson(tmp_path).jetpack == (), "a removed package does not count"


def test_a_venv_that_hides_jetpacks_tensorrt_is_explained(tmp_path):
    machine = make_jetson(tmp_path, "6.2+b77", "36.4.3", "10.3.0")
    machine.modules.clear()
    machine.write("usr/lib/python3.10/dist-packages/tensorrt/__init__.py")
    found = machine.findings()["TensorRT"]
    assert "python3.10/dist-packages, which this environment does not see" in found.state
    assert "--system-site-packages" in found.mend
    assert "apt" not in found.mend
