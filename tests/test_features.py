import sys

import numpy as np
import pytest
from PIL import Image

from phreg_deploy.bundle.bundle import Bundle
from phreg_deploy.errors import BackendMissing, PhregError
from phreg_deploy.export.exporter import ExportRequest, export_bundle
from phreg_deploy.models.checkpoint import write_student
from phreg_deploy.models.registers import add_registers
from phreg_deploy.profiling.latency import measure_bundle, summarise
from phreg_deploy.progress import SILENT
from phreg_deploy.runtime import FeatureExtractor
from phreg_deploy.runtime.parity import missed_gates, run_exam
from tests.small_models import plant, small
from tests.threads import run_in_threads


@pytest.fixture(scope="module")
def bundles(tmp_path_factory):
    """Bundles of one student with a fixed size, and with several sizes and batches."""
    root = tmp_path_factory.mktemp("bundles")
    (root / "student").mkdir()
    record = {"scores": {"median_norm": 7.0}, "recipe": {"name": "transplant"}}
    write_student(add_registers(small("dinov2"), 4), record, root / "student")
    export_bundle(ExportRequest(str(root / "student")), root / "fixed")
    export_bundle(ExportRequest(str(root / "student"), image_size="28:56:112", batch="1:2:4"), root / "range")
    export_bundle(ExportRequest(str(root / "student"), image_size="56,28x70", precision="fp16"), root / "list")
    return root


@pytest.mark.parametrize("name", ["fixed", "range", "list"])
def test_a_bundle_passes_its_own_exam(bundles, name):
    with FeatureExtractor.load(bundles / name) as extractor:
        cases = run_exam(extractor.bundle, extractor.run)
        assert len(cases) == {"fixed": 1, "range": 3, "list": 2}[name]
        assert all(missed_gates(case.parity, extractor.manifest.precision) == [] for case in cases)


def test_images_of_every_kind_give_the_same_features(bundles, tmp_path):
    array = np.random.default_rng(0).integers(0, 256, (90, 120, 3), dtype=np.uint8)
    Image.fromarray(array).save(tmp_path / "a.png")
    with FeatureExtractor.load(bundles / "fixed") as extractor:
        results = [
            extractor(kind) for kind in (array, Image.fromarray(array), tmp_path / "a.png", str(tmp_path / "a.png"))
        ]
        several = extractor([array, array, array])  # more than the bundle's batch of one
    for result in results[1:]:
        np.testing.assert_array_equal(result.features, results[0].features)
    assert several.features.shape == (3, 4, 4, 48)
    np.testing.assert_array_equal(several.features[2], results[0].features[0])
    assert results[0].features.dtype == np.float32
    assert results[0].cls.shape == (1, 48)
    assert results[0].token_norm.shape == (1, 4, 4)
    assert results[0].artifact_rate.shape == (1,)


def test_the_live_artifact_rate_is_measured_against_the_base(bundles):
    with FeatureExtractor.load(bundles / "fixed") as extractor:
        dense = extractor(np.zeros((56, 56, 3), np.uint8))
    assert dense.norm_median == 7.0
    expected = np.mean((dense.token_norm > 14) | (dense.token_norm < 3.5))
    assert dense.artifact_rate[0] == pytest.approx(expected)


def test_a_planted_artifact_shows_in_the_live_rate(tmp_path):
    (tmp_path / "model").mkdir()
    write_student(
        plant(small("augreg")), {"scores": {"median_norm": None}, "recipe": {"name": "none"}}, tmp_path / "model"
    )
    export_bundle(ExportRequest(str(tmp_path / "model")), tmp_path / "bundle")
    with FeatureExtractor.load(tmp_path / "bundle") as extractor:
        dense = extractor(np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8))
    assert dense.artifact_rate[0] == pytest.approx(1 / 16)
    assert dense.token_norm[0].argmax() == 0


def test_sizes_and_batches_outside_the_bundle_are_refused_by_name(bundles):
    image = np.zeros((56, 56, 3), np.uint8)
    with FeatureExtractor.load(bundles / "range") as extractor:
        assert extractor(image, size=(28, 98)).features.shape == (1, 2, 7, 48)
        with pytest.raises(PhregError, match="got 140x56, expected 28x28 to 112x112"):
            extractor(image, size=(140, 56))
        with pytest.raises(PhregError, match="got 5 images, expected 1 to 4"):
            extractor.run(np.zeros((5, 56, 56, 3), np.uint8))
        with pytest.raises(PhregError, match=r"got float64 \(1, 56, 56, 3\), expected a uint8"):
            extractor.run(np.zeros((1, 56, 56, 3)))
        with pytest.raises(PhregError, match="empty list"):
            extractor([])
    with FeatureExtractor.load(bundles / "list") as extractor:
        assert extractor(image, size=(28, 70)).features.shape == (1, 2, 5, 48)
        with pytest.raises(PhregError, match="expected 56x56 or 28x70"):
            extractor(image, size=(28, 56))


def test_one_extractor_serves_several_threads(bundles):
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (8, 1, 56, 56, 3), dtype=np.uint8)
    sizes = [(56, 56), (28, 84)] * 4
    with FeatureExtractor.load(bundles / "range") as extractor:
        expected = [extractor(im[0], size=s).features for im, s in zip(images, sizes)]
        got = [None] * 8

        def serve(i):
            for _ in range(5):
                got[i] = extractor(images[i][0], size=sizes[i]).features

        assert run_in_threads(serve, range(8)) == []
    for a, b in zip(got, expected):
        np.testing.assert_array_equal(a, b)


def test_a_closed_extractor_refuses_images(bundles):
    extractor = FeatureExtractor.load(bundles / "fixed", "onnxruntime-cpu")
    assert extractor.backend == "onnxruntime-cpu"
    assert extractor.choice == "onnxruntime-cpu: as asked"
    extractor.close()
    extractor.close()
    with pytest.raises(PhregError, match="was closed"):
        extractor(np.zeros((56, 56, 3), np.uint8))


@pytest.mark.parametrize("backend", ["onnxruntime-cpu", "openvino"])
def test_an_extractor_that_is_closed_during_a_call_says_so(bundles, monkeypatch, backend):
    """Another thread may close it between the checks of a call and its run."""
    pytest.importorskip({"onnxruntime-cpu": "onnxruntime"}.get(backend, backend))
    extractor = FeatureExtractor.load(bundles / "fixed", backend, threads=1)
    feed = extractor.feed

    def close_meanwhile(batch):
        extractor.close()
        return feed(batch)

    monkeypatch.setattr(extractor, "feed", close_meanwhile)
    with pytest.raises(PhregError, match="was closed; load the bundle again"):
        extractor(np.zeros((56, 56, 3), np.uint8))


def test_a_backend_that_is_not_installed_is_refused(bundles, monkeypatch):
    for module in ("tensorrt", "tensorrt_lean"):
        monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(BackendMissing, match="needs tensorrt, which is not installed"):
        FeatureExtractor.load(bundles / "fixed", backend="tensorrt")
    with pytest.raises(PhregError, match="got 'gpu', expected auto, onnxruntime-cpu"):
        FeatureExtractor.load(bundles / "fixed", backend="gpu")


def test_the_same_student_and_settings_give_the_same_files(bundles, tmp_path):
    export_bundle(ExportRequest(str(bundles / "student"), image_size="28:56:112", batch="1:2:4"), tmp_path / "again")
    assert Bundle.read(tmp_path / "again").manifest == Bundle.read(bundles / "range").manifest  # hashes of every file
    assert (tmp_path / "again" / "manifest.json").read_bytes() == (bundles / "range" / "manifest.json").read_bytes()


def test_a_latency_report_carries_its_conditions(bundles):
    with FeatureExtractor.load(bundles / "range", "onnxruntime-cpu", threads=1) as extractor:
        report = measure_bundle(extractor, batches=[1, 4], size=None, seconds=0.1, threads=1, progress=SILENT).to_json()
    assert [r["batch"] for r in report["results"]] == [1, 4]
    for result in report["results"]:
        graph = result["graph"]
        assert graph["rounds"] >= 10
        assert graph["minimum"] <= graph["p50"] <= graph["p90"] <= graph["p99"] <= graph["maximum"]
    assert report["conditions"]["backend_version"].startswith("onnxruntime")
    assert report["conditions"]["threads"] == 1


def test_preprocessing_is_measured_on_the_frame_that_was_asked_for(bundles, monkeypatch):
    prepared = []
    real = FeatureExtractor.prepare
    monkeypatch.setattr(
        FeatureExtractor, "prepare", lambda self, x, size: (prepared.append(x.shape), real(self, x, size))
    )
    with FeatureExtractor.load(bundles / "range", "onnxruntime-cpu", threads=1) as extractor:
        asked = {"batches": [2], "size": None, "seconds": 0.1, "threads": 1, "progress": SILENT}
        report = measure_bundle(extractor, **asked, frame=(720, 1280)).to_json()
    assert set(prepared) == {(720, 1280, 3)}
    assert report["conditions"]["photograph"] == "1280x720 noise"
    assert report["conditions"]["resize"] == "fast"
    (result,) = report["results"]
    preparing = 2 * result["preprocess"]["p50"]
    assert result["preprocess_share"] == pytest.approx(preparing / (preparing + result["extractor"]["p50"]))


def test_a_drifting_machine_is_called_unstable():
    assert summarise([1.0] * 10).stable
    assert not summarise([1.0] * 5 + [2.0] * 5).stable


@pytest.mark.parametrize("backend", ["auto", "onnxruntime-cpu"])
def test_a_requested_gpu_is_not_replaced_by_the_processor(bundles, monkeypatch, backend):
    monkeypatch.setattr("phreg_deploy.runtime.backends.registry.driver_present", lambda: False)
    with pytest.raises(PhregError, match=r"got GPU 3, but .* runs on the processor"):
        FeatureExtractor.load(bundles / "fixed", backend, device=3)
