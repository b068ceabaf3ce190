"""Graphs whose weights are beside them, as those of more than 2 GB; here the limit is lowered."""

import json
from pathlib import Path

import numpy as np
import onnx
import pytest

from phreg_deploy.bundle.bundle import Bundle
from phreg_deploy.errors import PhregError
from phreg_deploy.export import export
from phreg_deploy.onnx_graph import external
from phreg_deploy.runtime import FeatureExtractor
from tests.cli_helpers import invoke
from tests.rotary_models import pictures
from tests.small_models import save, small

pytestmark = pytest.mark.usefixtures("torch")
LIMIT = 20_000


@pytest.fixture
def low(monkeypatch):
    """Lower the limit, so that a small model is too large for one file."""
    monkeypatch.setattr(external, "MOST_BYTES", LIMIT)


@pytest.fixture
def quick(monkeypatch):
    """Try only the first smoothing."""
    monkeypatch.setattr("phreg_deploy.calibration.search.CANDIDATES", ())


@pytest.fixture
def source(tmp_path) -> Path:
    return save(small("dinov3"), tmp_path / "model")


@pytest.fixture
def large(low, source, tmp_path) -> Path:
    """A bundle with its weights beside the graph."""
    return export(str(source), tmp_path / "large", image_size="32:64:96").folder


def test_the_graph_holds_no_large_constants(large):
    assert (large / "model.onnx").stat().st_size < (large / "weights.bin").stat().st_size
    graph = onnx.load(large / "model.onnx", load_external_data=False).graph
    outside = {t.name: t for t in graph.initializer if t.data_location == onnx.TensorProto.EXTERNAL}
    assert "blocks.0.attn.qkv.weight" in outside
    for tensor in outside.values():
        places = {entry.key: entry.value for entry in tensor.external_data}
        assert places["location"] == "weights.bin"
        assert int(places["offset"]) % 4096 == 0
    assert json.loads((large / "manifest.json").read_text())["weights"] == "weights.bin"


@pytest.mark.parametrize("backend", ["onnxruntime-cpu", "openvino"])
def test_the_answers_are_those_of_one_file(large, source, tmp_path, monkeypatch, backend):
    if backend == "openvino":
        pytest.importorskip("openvino")
    monkeypatch.undo()
    whole = export(str(source), tmp_path / "whole", image_size="32:64:96")
    assert whole.manifest.weights is None
    images = pictures(small("dinov3"), (3, 5), 1)
    answers = []
    for folder in (large, whole.folder):
        with FeatureExtractor.load(folder, backend=backend) as extractor:
            answers.append(extractor.run(images)["features"])
    np.testing.assert_array_equal(*answers)


def test_half_precision_is_written_the_same_way(low, source, tmp_path):
    bundle = export(str(source), tmp_path / "half", precision="fp16")
    assert bundle.manifest.weights == "weights.bin"
    done = invoke("check", bundle.folder, "--backend", "onnxruntime-cpu", "--json")
    assert done.code == 0, done.err


def test_the_same_weights_give_the_same_bytes(low, source, tmp_path):
    files = [export(str(source), tmp_path / name).folder / "weights.bin" for name in ("first", "second")]
    assert files[0].read_bytes() == files[1].read_bytes()


def test_a_byte_that_was_changed_is_noticed(large):
    data = bytearray((large / "weights.bin").read_bytes())
    data[-1] ^= 1
    (large / "weights.bin").write_bytes(data)
    invoke("check", large, "--json").refused(2, "weights.bin has another sha256")


def test_missing_weights_are_named(large):
    (large / "weights.bin").unlink()
    invoke("check", large, "--json").refused(2, "weights.bin")


@pytest.mark.parametrize("name", ["../weights.bin", "other.bin", 1, True])
def test_no_other_name_is_read(large, name):
    manifest = json.loads((large / "manifest.json").read_text())
    (large / "manifest.json").write_text(json.dumps({**manifest, "weights": name}))
    with pytest.raises(PhregError, match=r"weights .*, expected weights.bin or null"):
        Bundle.read(large)


def test_it_is_calibrated_to_the_same_bundle(large, source, photos, tmp_path, monkeypatch, quick):
    done = invoke("calibrate", large, "--images", photos, "-o", tmp_path / "eight", "--json")
    assert done.code == 0, done.err
    eight = Bundle.read(tmp_path / "eight")
    eight.verify()
    assert eight.manifest.weights == "weights.bin", "8 bits do not fit below the lowered limit either"
    monkeypatch.setattr(external, "MOST_BYTES", 2**31)
    done = invoke("calibrate", large, "--images", photos, "-o", tmp_path / "one-file", "--json")
    assert done.code == 0, done.err
    one = Bundle.read(tmp_path / "one-file")
    one.verify()
    assert one.manifest.weights is None
    assert not (tmp_path / "one-file" / "weights.bin").exists()
    assert one.manifest.quantisation == eight.manifest.quantisation
    assert (one.folder / "reference.npz").read_bytes() == (eight.folder / "reference.npz").read_bytes()
    graphs = [onnx.load(bundle.graph).graph for bundle in (one, eight)]
    assert [t.name for t in graphs[0].initializer] == [t.name for t in graphs[1].initializer]
    assert all(a.raw_data == b.raw_data for a, b in zip(*(g.initializer for g in graphs)))


@pytest.mark.parametrize("mode", ["int8", "fp8"])
def test_it_is_calibrated_for_tensorrt(large, photos, tmp_path, mode, quick):
    options = ("--mode", mode, "--target", "trt", "--force", "--json")
    done = invoke("calibrate", large, "--images", photos, "-o", tmp_path / "eight", *options)
    assert done.code == 0, done.err
    assert invoke("check", tmp_path / "eight", "--backend", "onnxruntime-cpu", "--json").code == 0


def test_it_is_bisected(large):
    done = invoke("check", large, "--backend", "onnxruntime-cpu", "--bisect", "--json")
    assert done.code == 0, done.err


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("location", "../weights.bin", r"in '\.\./weights\.bin', expected a file beside it"),
        ("location", "other.bin", "in 'other.bin', expected a file beside it"),
        ("offset", str(2**40), r"expects \d+ bytes of .* in weights.bin, got 0"),
    ],
)
def test_a_constant_in_another_place_is_refused(large, key, value, message):
    model = onnx.load(large / "model.onnx", load_external_data=False)
    tensor = next(t for t in model.graph.initializer if t.data_location == onnx.TensorProto.EXTERNAL)
    next(entry for entry in tensor.external_data if entry.key == key).value = value
    (large / "model.onnx").write_bytes(model.SerializeToString())
    with pytest.raises(PhregError, match=message):
        external.load_apart(large / "model.onnx")


def test_constants_are_put_back_as_they_were(source, tmp_path):
    bundle = export(str(source), tmp_path / "whole", image_size="32:64:96")
    whole, (apart, arrays) = onnx.load(bundle.graph), external.load_apart(bundle.graph)
    assert arrays
    assert external.weight_bytes(apart) < external.weight_bytes(whole) / 10
    again = external.put_together(apart, arrays).graph.initializer
    assert [t.SerializeToString() for t in again] == [t.SerializeToString() for t in whole.graph.initializer]
