"""``benchmarks/trtexec.py`` on programs that print what trtexec prints."""

import pytest

from benchmarks.trtexec import time_engine

# As TensorRT 10 prints it.
SUMMARY = """
[11/27/2026-10:00:00] [I] === Performance summary ===
[11/27/2026-10:00:00] [I] Throughput: 812.345 qps
[11/27/2026-10:00:00] [I] Latency: min = 1.2 ms, max = 1.9 ms, median = 1.23 ms, percentile(99%) = 1.4 ms
[11/27/2026-10:00:00] [I] Enqueue Time: min = 0.01 ms, max = 0.2 ms, mean = 0.02 ms, median = 0.015 ms
[11/27/2026-10:00:00] [I] GPU Compute Time: min = 1.19 ms, max = 1.8 ms, mean = 1.21 ms, median = 1.20703 ms, percentile
[11/27/2026-10:00:00] [I] Total GPU Compute Time: 3.00012 s
"""
ERROR = "[11/27/2026-10:00:00] [E] Error[6]: The engine plan file is generated on an incompatible device"


@pytest.fixture
def trtexec(tmp_path, monkeypatch):
    """``trtexec(text, code)`` puts a program of that name on PATH, which prints the text; returns its words' file."""

    def put(text, code=0):
        (tmp_path / "text").write_text(text)
        tool = tmp_path / "trtexec"
        tool.write_text(f'#!/bin/sh\necho "$@" > "{tmp_path}/words"\ncat "{tmp_path}/text"\nexit {code}\n')
        tool.chmod(0o755)
        monkeypatch.setenv("PATH", f"{tmp_path}:/bin:/usr/bin")
        return tmp_path / "words"

    return put


def test_the_median_of_the_engine_alone_is_read(trtexec, tmp_path):
    words = trtexec(SUMMARY)
    assert time_engine(tmp_path / "a.plan", 2.4) == (1.20703, "")
    said = words.read_text().split()
    assert f"--loadEngine={tmp_path}/a.plan" in said
    assert {"--useCudaGraph", "--noDataTransfers", "--duration=2"} <= set(said)


@pytest.mark.parametrize(("text", "code", "reason"), [(ERROR, 1, "incompatible device"), ("", 0, "no summary")])
def test_what_went_wrong_is_said(trtexec, tmp_path, text, code, reason):
    trtexec(text, code)
    took, why = time_engine(tmp_path / "a.plan", 1)
    assert took is None
    assert f"exit code {code}" in why
    assert reason in why


def test_a_missing_trtexec_is_said(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr("benchmarks.trtexec.FOLDERS", str(tmp_path))
    took, why = time_engine(tmp_path / "a.plan", 1)
    assert took is None
    assert "trtexec is not installed" in why
