"""The backend ``auto`` on a machine without a GPU: it measures ONNX Runtime and OpenVINO, and takes the faster."""

import importlib
import sys

import numpy as np
import pytest

from phreg_deploy.bundle.bundle import Bundle
from phreg_deploy.errors import BackendMissing, PhregError
from phreg_deploy.runtime import FeatureExtractor
from phreg_deploy.runtime.auto import choose
from phreg_deploy.runtime.backends.options import BackendOptions
from phreg_deploy.runtime.backends.registry import BACKENDS, GPU

openvino = pytest.importorskip("openvino")

PROCESSOR = [name for name in BACKENDS if name not in GPU]


@pytest.fixture(autouse=True)
def _no_gpu(monkeypatch):
    """Hide a GPU; ``test_auto_on_gpu.py`` covers machines with one."""
    monkeypatch.setattr("phreg_deploy.runtime.backends.registry.driver_present", lambda: False)


choice = importlib.import_module("phreg_deploy.runtime.auto")
BF16 = "BF16" in openvino.Core().get_property("CPU", "OPTIMIZATION_CAPABILITIES")
needs_bf16 = pytest.mark.skipif(not BF16, reason="this processor has no bfloat16 instructions")


def load(folder, backend="openvino", **tuning):
    return FeatureExtractor.load(folder, backend, **{"threads": 1, **tuning})


def test_auto_reports_its_choice_and_the_reason(bundle, run_cli):
    document = run_cli("check", bundle, "--json").document
    assert document["backend"] in PROCESSOR
    assert document["choice"].startswith(f"{document['backend']}: ")
    assert "onnxruntime-cpu (fp32) " in document["choice"]
    assert "openvino (fp32) " in document["choice"]
    assert document["choice"].count(" ms") == 2
    said = run_cli("check", bundle).out
    assert any(f"Backend {name}: " in said for name in PROCESSOR)
    assert "Backend " not in run_cli("check", bundle, "--backend", "openvino").out


@pytest.mark.parametrize("fastest", PROCESSOR)
def test_auto_takes_the_faster_one_and_closes_the_other(bundle, monkeypatch, fastest):
    closed = []
    for name, module in (("openvino", "openvino_backend"), ("onnxruntime-cpu", "onnxruntime_backend")):
        kind = next(
            v
            for k, v in vars(importlib.import_module(f"phreg_deploy.runtime.backends.{module}")).items()
            if k.endswith("Backend")
        )
        monkeypatch.setattr(kind, "close", lambda self, name=name: closed.append(name))
    monkeypatch.setattr(choice, "_measure", lambda candidate, *_: 1.0 if candidate.name == fastest else 2.0)
    opened, reason = choose(Bundle.read(bundle), BackendOptions(1))
    assert opened.name == fastest
    assert reason.startswith(f"{fastest}: the fastest here; {PROCESSOR[0]} (")
    assert closed == [name for name in PROCESSOR if name != fastest]


def flip_outputs(monkeypatch, *names):
    """Make these backends return flipped outputs."""
    real = choice.open_backend

    def opened(bundle, name, *others):
        backend = real(bundle, name, *others)
        if name in names:
            right = backend.run
            backend.run = lambda feed: {k: np.flip(v, -1) for k, v in right(feed).items()}
        return backend

    monkeypatch.setattr(choice, "open_backend", opened)


@pytest.mark.parametrize("bad", PROCESSOR)
def test_auto_skips_a_backend_that_fails_the_exam(bundle, monkeypatch, bad):
    flip_outputs(monkeypatch, bad)
    opened, reason = choose(Bundle.read(bundle), BackendOptions(1))
    assert opened.name == next(name for name in PROCESSOR if name != bad)
    assert f"{bad} fails the exam (1st-percentile patch cosine" in reason
    assert " ms" not in reason, "a single remaining backend is not timed"


def test_auto_raises_if_no_backend_passes_the_exam(bundle, monkeypatch):
    flip_outputs(monkeypatch, *PROCESSOR)
    with pytest.raises(
        PhregError, match=r"no installed backend serves .*: onnxruntime-cpu fails the exam .*; openvino fails the exam"
    ):
        FeatureExtractor.load(bundle)


def test_auto_takes_the_only_runtime_installed(bundle, monkeypatch):
    monkeypatch.setitem(sys.modules, "openvino", None)
    with load(bundle, "auto") as extractor:
        assert (extractor.backend, extractor.choice) == ("onnxruntime-cpu", "onnxruntime-cpu: the only one installed")
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(BackendMissing, match="no runtime is installed"):
        load(bundle, "auto")


@needs_bf16
def test_auto_takes_openvino_for_bfloat16(bundle, run_cli):
    run_cli("check", bundle, "--backend", "onnxruntime-cpu", "--compute", "bf16", "--json").refused(
        2, "compute: got bf16", "--backend openvino"
    )
    document = run_cli("check", bundle, "--compute", "bf16", "--json").document
    assert (document["backend"], document["compute"], document["missed"]) == ("openvino", "bf16", [])
    assert "onnxruntime-cpu does not serve it (compute: got bf16" in document["choice"]
