"""Verbs, videos and the pytest plugin on bundles that serve their heads alone."""

from importlib.util import find_spec

import numpy as np
import pytest

from phreg_deploy.bundle.bundle import Bundle
from tests.broken_bundles import BrokenBundle
from tests.plugin_runs import report
from tests.video_files import video_frames, write_video

HERE = ("--backend", "onnxruntime-cpu", "--threads", "1", "--json")


def test_verbs_serve_it(run_cli, alone, photos, tmp_path):
    done = run_cli("extract", alone, photos, "-o", tmp_path / "out", "--outputs", "labels", "--pictures", *HERE)
    assert done.code == 0, done.err
    first = done.document["images"][0]
    assert np.load(tmp_path / "out" / first["labels"]).shape == (32, 32)
    assert first["shape"] == [8, 8]
    assert (tmp_path / "out" / first["picture"]).is_file()
    shards = ("--shard", "1/1", *(("--format", "zarr") if find_spec("zarr") else ()))
    words = ("extract", alone, photos, "-o", tmp_path / "shards", "--outputs", "labels,token_norm", *shards)
    assert run_cli(*words, *HERE).code == 0
    seen, page = ("--images", photos, "--limit", "2"), tmp_path / "page.html"
    done = run_cli("explore", alone, *seen, "-o", page, *HERE)
    assert done.code == 0, done.err
    assert "head_change" in page.read_text()
    assert run_cli("check", alone, *seen, "--report", page, *HERE).code == 0
    scores = run_cli("artifacts", alone, *seen, "--picture", tmp_path / "p.png", "--json").document
    assert scores["norm_outliers"]["rate"] >= 0
    assert scores["shift_incoherence"] is None
    assert run_cli("profile", alone, "--seconds", "0.1", *HERE).code == 0
    assert run_cli("inspect", alone).code == 0


def test_what_needs_features_is_refused(run_cli, alone, beside, bundle, photos, street, demo_scenes, tmp_path):
    def refused(*words):
        run_cli(*words[:-1], "--json").refused(2, *words[-1])
        assert not (tmp_path / "out").exists()

    street.write(tmp_path / "street")
    out, head = ("-o", tmp_path / "out"), ("--head", tmp_path / "street")
    seen, truth = ("--images", photos), ("--images", demo_scenes / "images", "--masks", demo_scenes / "masks")
    refused("extract", alone, photos, *out, ["no features", "--outputs labels"])
    refused("explore", alone, beside, *seen, *out, ["differ in whether they serve features"])
    refused("explore", alone, *seen, *out, "--cosine", "0.9", ["explore: --cosine", "no features"])
    refused("check", alone, "--cosine", "0.9", ["check: --cosine", "no features"])
    refused("evaluate", alone, *truth, "--no-cache", ["no features", "has features too"])
    refused("probe", alone, *truth, *out, ["no features"])
    refused("calibrate", alone, *seen, *out, ["no features", "Calibrate the bundle that has features", "--only-head"])
    refused("attach", alone, *head, *out, ["no features", "that the heads were attached to"])
    refused("attach", bundle, "--only-head", *out, ["has no head", "--head HEAD"])
    refused("attach", beside, "--only-head", "--labels", *out, ["without a head"])
    refused("export", "vit", "--only-head", *out, ["got --only-head without a head"])
    refused("export", "vit", "--only-head", *head, "--attention", *out, ["--attention with --only-head"])


def test_the_service_and_the_card_know_what_is_there(alone, beside):
    from phreg_deploy.cards.bundle import bundle_card
    from phreg_deploy.serving.requests.answers import check_drawn, check_outputs
    from phreg_deploy.serving.requests.refusals import Refused

    own, other = (Bundle.read(folder).manifest for folder in (alone, beside))
    assert check_drawn("features", other) == "features"
    for check in (check_drawn, check_outputs):
        with pytest.raises(Refused, match=r"got 'features', expected .*labels"):
            check("features", own)
    assert "dense.features" in bundle_card(other.to_json())
    card = bundle_card(own.to_json())
    assert "dense.heads" in card
    assert "dense.features" not in card


def test_export_calibrates_before_it_takes_features_out(run_cli, student, street, photos, tmp_path):
    street.write(tmp_path / "street")
    words = ("export", student, "--head", tmp_path / "street", "--labels", "--only-head", "--json")
    done = run_cli(*words, "-o", tmp_path / "fp32")
    assert done.code == 0, done.err
    done = run_cli(*words, "-o", tmp_path / "int8", "--precision", "int8", "--images", photos)
    assert done.code == 0, done.err
    manifest = Bundle.read(tmp_path / "int8").manifest
    assert (manifest.precision, sorted(manifest.outputs)) == ("int8", ["labels", "token_norm"])
    assert f"Next: phreg-deploy check {tmp_path / 'int8'}" in " ".join(done.err.split())
    assert done.document["check"]["passed"]
    assert Bundle.read(tmp_path / "fp32").manifest.only_heads


def test_a_video_shows_what_is_served(run_cli, alone, tmp_path):
    cv2 = pytest.importorskip("cv2")
    video = write_video(tmp_path / "drive.avi", video_frames(3), fps=100)
    words = ("watch", video, alone, "--every-frame", "--write", tmp_path / "overlay.mp4")
    done = run_cli(*words, "--backend", "onnxruntime-cpu", "--json")
    assert done.code == 0, done.err
    frame = cv2.VideoCapture(str(tmp_path / "overlay.mp4")).read()[1]
    # The image, its norms and the labels.
    assert frame.shape == (360, 3 * 360, 3)


def test_the_plugin_judges_it(run, pytester, alone, beside, student, photos):
    code = """
    import pytest

    def test_parity(assert_parity):
        assert_parity({parity})

    def test_rate(assert_artifact_rate):
        assert_artifact_rate(at_most={rate}, limit=2)
    """
    words = (f"--phreg-bundle={alone}", f"--phreg-images={photos}", "--phreg-artifacts=artifacts")
    for reference in (student, beside):
        parity = f"reference={str(reference)!r}, images={str(photos)!r}, limit=2"
        run(code.format(parity=parity, rate=1), *words).assert_outcomes(passed=2)
    outcome = run(code.format(parity="cosine=0.9", rate=0), *words)
    outcome.stdout.fnmatch_lines(["*cosine_p1: got the bar 0.9, but only heads were compared*"])
    broken = BrokenBundle(alone, pytester.path / "broken")
    for node in broken.model.graph.node:
        if node.op_type == "ArgMax":
            node.op_type = "ArgMin"
    outcome = run(code.format(parity="", rate=1), f"--phreg-bundle={broken.save()}", *words[1:])
    outcome.assert_outcomes(failed=1, passed=1)
    path, document = report(pytester, "parity")
    assert [miss["gate"] for miss in document["missed"]] == ["head_change"]
    assert path.with_suffix(".png").is_file()
