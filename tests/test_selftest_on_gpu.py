"""`phreg-deploy selftest --gpu` on the fake GPU: each check passes on a sound one, and fails for a fault of its kind."""

import json
import threading
import zipfile

import pytest

from phreg_deploy.errors import PhregError
from phreg_deploy.selftest import selftest
from phreg_deploy.selftest.checks import FAIL, PASS, SKIP
from tests.cli_helpers import invoke


@pytest.fixture
def check(tensorrt, request, tmp_path, monkeypatch, all_freed):
    """``check("wide_bundle", quick=True)`` runs the checks on fixtures' bundles: name -> check."""
    monkeypatch.setattr("phreg_deploy.selftest.engines.SECONDS", 0.05)
    monkeypatch.setattr("phreg_deploy.selftest.engines.WARMUP", 0)
    monkeypatch.setattr("phreg_deploy.selftest.serving.ROUNDS", 6)
    monkeypatch.setattr("phreg_deploy.selftest.serving.WARM", 4)

    def run(*names, quick=True, frames=12):
        bundles = [request.getfixturevalue(name) for name in names]
        verdict = selftest(tmp_path / "out.zip", gpu=True, bundles=bundles, quick=quick, frames=frames, force=True)
        return {one.name: one for one in verdict.checks}

    return run


def failed(checks):
    return [name for name, one in checks.items() if one.verdict == FAIL]


def test_a_sound_gpu_passes_every_check(check):
    checks = check("wide_bundle", "fp16_bundle", "int8_trt_bundle", quick=False)
    assert failed(checks) == []
    for number, precision in enumerate(("fp32", "fp16", "int8"), 1):
        for path in ("plain", "captured", "replayed", "device arrays", "misaligned frames"):
            assert checks[f"bundle {number} {precision}, {path}"].verdict == PASS
    assert "profile" in checks["bundle 1 fp32, exam"].detail
    assert checks["bundle 2 fp16, fused and 8-bit layers"].detail == "3 of 3 attentions are fused"
    assert checks["bundle 3 int8, two threads and a synchronising one"].verdict == PASS
    assert checks["bundle 2 fp16, memory"].verdict == PASS
    for kind in ("version", "ampere+", "same-cc"):
        assert checks[f"bundle 2 fp16, --compat {kind}"].verdict == PASS
    assert checks["INT8 on Orin"].verdict == SKIP
