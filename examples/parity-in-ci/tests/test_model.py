"""Tests of the bundle that this project serves. pyproject.toml names the bundle, the photographs and the bars."""


def test_parity(assert_parity):
    assert_parity()


def test_artifact_rate(assert_artifact_rate):
    assert_artifact_rate()


def test_latency(assert_latency):
    assert_latency()
