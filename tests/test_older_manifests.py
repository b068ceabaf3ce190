"""Manifests of calibrated bundles that older versions wrote are still read."""

import json

import pytest

from phreg_deploy.bundle.bundle import Bundle
from phreg_deploy.bundle.manifest import FORMAT, Manifest
from phreg_deploy.calibration import calibrate
from phreg_deploy.errors import PhregError
from phreg_deploy.quantisation import Smoothing


def test_a_manifest_of_the_first_format_is_still_read(world):
    data = json.loads((world.bundle / "manifest.json").read_text())
    assert data["format"] == FORMAT == 4
    old = {k: v for k, v in data.items() if k != "quantisation"} | {"format": 1}
    assert Manifest.from_json(old) == Manifest.from_json(data)
    with pytest.raises(PhregError, match=r"missing keys \['quantisation'\]"):
        Manifest.from_json(old | {"format": 2})
    folder = world.copy("bundle", manifest=json.dumps(old).encode())
    calibrate(folder, world.photos, world.out, smoothing=Smoothing(), float_macs=0)
    assert Bundle.read(world.out).manifest.to_json()["format"] == 4


def test_a_manifest_from_before_exif_keeps_its_preprocessing(world):
    data = json.loads((world.bundle / "manifest.json").read_text())
    assert (data["preprocess"]["exif"], data["preprocess"]["fast"]) == (True, True)
    steps = {k: v for k, v in data["preprocess"].items() if k not in ("exif", "fast")}
    old = Manifest.from_json(data | {"format": 2, "preprocess": steps})
    assert (old.preprocess.exif, old.preprocess.fast) == (False, False)
