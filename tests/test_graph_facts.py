"""Metadata of a graph, read without the onnx package, equals what the onnx package reads."""

import pytest

from phreg_deploy.bundle.onnx_metadata import MOST_BYTES, read_metadata
from phreg_deploy.bundle.writing import onnx_metadata

onnx = pytest.importorskip("onnx")


def model(pairs, **fields):
    made = onnx.ModelProto(**fields)
    for key, value in pairs:
        entry = made.metadata_props.add()
        entry.key, entry.value = key, value
    return made


def test_metadata_of_a_bundle_equals_that_read_by_onnx(bundle, wide_bundle):
    from phreg_deploy.bundle.bundle import Bundle

    for folder in (bundle, wide_bundle):
        loaded = onnx.load(folder / "model.onnx")
        metadata = read_metadata(folder / "model.onnx")
        assert metadata == {entry.key: entry.value for entry in loaded.metadata_props}
        assert metadata == onnx_metadata(Bundle.read(folder).manifest)


@pytest.mark.parametrize(
    "pairs",
    [[], [("a", "1")], [("", "x"), ("b", "")], [("κλειδί", "値" * 5000)], [(str(i), "v" * i) for i in range(300)]],
)
def test_metadata_of_any_model_equals_that_read_by_onnx(tmp_path, pairs):
    made = model(
        pairs, ir_version=10, producer_name="p", model_version=2**62, graph=onnx.GraphProto(name="g" * 100_000)
    )
    (tmp_path / "m").write_bytes(made.SerializeToString())
    assert read_metadata(tmp_path / "m") == dict(pairs)


def test_the_weights_are_not_read(tmp_path):
    """A sparse file stands for a graph of 8 GB, which is skipped."""
    tail = model([("a", "1")]).SerializeToString()
    length, size = bytearray(), 8 << 30
    rest = size
    while rest >= 0x80:
        length.append(rest & 0x7F | 0x80)
        rest >>= 7
    length.append(rest)
    with open(tmp_path / "m", "wb") as file:
        file.write(bytes([7 << 3 | 2]) + bytes(length))
        file.seek(size, 1)
        file.write(tail)
    assert read_metadata(tmp_path / "m") == {"a": "1"}


WRONG = {
    "text": b"noise",
    "zeros": bytes(100),
    "cut in a length": model([("key", "value")]).SerializeToString()[:1],
    "cut in a value": model([("key", "value")]).SerializeToString()[:-2],
    "an entry that is longer than the file": bytes([14 << 3 | 2, 100, 1]),
    "a part that is longer than its entry": bytes([14 << 3 | 2, 3, 1 << 3 | 2, 100, 65]),
    "an endless number": b"\x08" + b"\xff" * 20,
    "too many fields": bytes([1 << 3, 1]) * 20_000,
    "not text": bytes([14 << 3 | 2, 4, 1 << 3 | 2, 2, 0xFF, 0xFE]),
    "a large entry": model([("key", "v" * (MOST_BYTES + 1))]).SerializeToString(),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_file_that_is_no_model_is_a_value_error(tmp_path, name):
    (tmp_path / "m").write_bytes(WRONG[name])
    with pytest.raises(ValueError, match=r"no ONNX file|cut short|fields|decode|at most"):
        read_metadata(tmp_path / "m")
