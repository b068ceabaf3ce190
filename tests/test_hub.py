"""Students and bundles are pushed to a hub and read from it by name, against a hub on this machine."""

import json
import os
import shutil
import socket
import subprocess
import sys

import pytest

from phreg_deploy.errors import PhregError
from phreg_deploy.hub.names import HubName, check_repository, parse_hub_name
from tests.cli_helpers import ROOT, without
from tests.fake_hub import TOKEN, FakeHub

pytest.importorskip("huggingface_hub")
TORCH = ["torch", "timm", "safetensors", "torchvision", "onnx", "onnxscript"]
MANY = 5


@pytest.fixture
def hub():
    served = FakeHub()
    yield served
    served.close()


@pytest.fixture
def online(hub, tmp_path):
    """Run commands in another process, which knows the hub's address and token and has a cache of its own."""

    def run(*commands, blocked=(), home="home", **environment):
        known = {"HF_ENDPOINT": hub.address, "HF_HOME": str(tmp_path / home), "HF_HUB_OFFLINE": "0", "HF_TOKEN": TOKEN}
        known |= {"HF_HUB_DISABLE_XET": "1", "HF_HUB_ETAG_TIMEOUT": "2", "HF_HUB_DISABLE_TELEMETRY": "1"}
        outcomes = without(blocked, commands, **{**known, **environment})
        return outcomes[0] if len(commands) == 1 else outcomes

    return run


def test_a_pushed_bundle_is_served_in_another_process_without_torch(hub, online, world):
    shutil.copytree(world.int8_bundle, world.out)
    (world.out / "engines").mkdir()
    (world.out / "engines" / "gpu.plan").write_bytes(b"a plan")
    (world.out / "private-notes.txt").write_text("not for others")
    pushed = online(["push", world.out, "org/served", "--private", "--json"], blocked=TORCH)
    assert pushed.code == 0, pushed.err
    files = hub.repositories["org/served"].files("main")[1]
    expected = {"manifest.json", "model.onnx", "reference.npz", "calibration.json", "README.md"}
    assert set(files) == expected | {".gitattributes"}
    assert set(pushed.document["files"]) == expected
    assert hub.repositories["org/served"].private
    assert 'FeatureExtractor.load("hf-hub:org/served")' in files["README.md"].decode()
    image = world.photos / "frame-02.png"
    shutil.rmtree(world.out)
    outcomes = online(
        ["inspect", "hf-hub:org/served", "--json"],
        ["check", "hf-hub:org/served", "--json"],
        ["extract", "hf-hub:org/served", image, "-o", world.out, "--backend", "onnxruntime-cpu", "--json"],
        ["profile", "hf-hub:org/served", "--seconds", "0.1", "--backend", "onnxruntime-cpu", "--json"],
        ["push", "hf-hub:org/served", "org/copy", "--json"],
        blocked=TORCH,
        home="another",
    )
    assert [outcome.code for outcome in outcomes] == [0] * MANY, [outcome.err[-600:] for outcome in outcomes]
    assert outcomes[0].document["precision"] == "int8"
    assert (world.out / "frame-02.npy").is_file()
    assert set(hub.repositories["org/copy"].files("main")[1]) == set(files)
    assert not any("gpu.plan" in line or "private-notes" in line for line in hub.requests)
