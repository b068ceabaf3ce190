"""``extract``: the files that it reads and writes, and those that remain after a bad file or Ctrl-C."""

import errno
import json
import os
import shutil

import numpy as np
import pytest
from PIL import Image

from phreg_deploy.runtime import FeatureExtractor
from tests.cli_helpers import leftovers, photograph

HERE = ("--backend", "onnxruntime-cpu", "--threads", "1")


@pytest.fixture
def pictures(photos, tmp_path):
    """Make three images, two of which have the same name in different folders, and a broken file."""
    folder = tmp_path / "in"
    (folder / "deep").mkdir(parents=True)
    for source, name in (("frame-00.png", "a.png"), ("frame-02.png", "b.png"), ("frame-01.jpg", "deep/a.jpg")):
        shutil.copy(photos / source, folder / name)
    (folder / "deep" / "broken.jpg").write_bytes(b"")
    return folder


def list_files(folder):
    return {p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file()}


def extract(run_cli, world, *more, bundle="bundle"):
    return run_cli("extract", getattr(world, bundle), *more, "-o", world.out, *HERE, "--json")


def test_sub_folders_keep_their_paths_and_the_features_are_the_extractors(world, run_cli, pictures):
    outcome = extract(run_cli, world, pictures, "--image-size", "48x64", "--skip-bad", bundle="wide_bundle")
    assert outcome.code == 0
    report = outcome.document
    assert list_files(world.out) == {"a.npy", "b.npy", "deep/a.npy", "features.json"}
    assert [entry["shape"] for entry in report["images"]] == [[6, 8, 48]] * 3
    assert list(report["skipped"]) == [str(pictures / "deep" / "broken.jpg")]
    assert "Left out: image: " in outcome.err
    index = json.loads((world.out / "features.json").read_text())
    assert index == {k: v for k, v in report.items() if k in index}
    assert index["settings"]["preprocess"]["exif"] is True
    with FeatureExtractor.load(world.wide_bundle, "onnxruntime-cpu", threads=1) as extractor:
        for entry in report["images"]:
            stored = np.load(world.out / entry["features"])
            assert stored.dtype == np.float32
            assert np.array_equal(stored, extractor(entry["image"], (48, 64)).features[0])


def test_a_second_file_of_the_same_name_gets_a_number(world, run_cli, pictures):
    for name in ("A.JPG", "a.cls.png"):  # the second one's features have the name of the first one's class token
        photograph(1, 70, 60).save(pictures / name)
    report = extract(run_cli, world, pictures, pictures / "deep" / "a.jpg", "--skip-bad").document
    names = [entry["features"].lower() for entry in report["images"]]
    assert len(set(names)) == len(names) == 5, "deep/a.jpg is asked for twice and extracted once"
    assert "a.cls.npy" not in names


def test_outputs_and_dtype(world, run_cli, pictures):
    image = pictures / "a.png"
    report = extract(run_cli, world, image, "--outputs", "features,cls,token_norm", "--dtype", "float16").document
    (entry,) = report["images"]
    with FeatureExtractor.load(world.bundle, "onnxruntime-cpu", threads=1) as extractor:
        dense = extractor(image)
    for kind, dtype in (("features", np.float16), ("cls", np.float16), ("token_norm", np.float32)):
        stored = np.load(world.out / entry[kind])
        assert stored.dtype == dtype
        assert np.array_equal(stored, getattr(dense, kind)[0].astype(dtype))
    assert list_files(world.out) == {"a.npy", "a.cls.npy", "a.token_norm.npy", "features.json"}


def test_features_beyond_float16_are_refused(world, run_cli, pictures, monkeypatch):
    real = FeatureExtractor.dense

    def large(self, batch):
        dense = real(self, batch)
        dense.features[0, 0, 0, 0] = 1e6
        return dense

    monkeypatch.setattr(FeatureExtractor, "dense", large)
    extract(run_cli, world, pictures / "a.png", "--dtype", "float16").refused(2, "reach 1000000", "--dtype float32")
    assert not world.out.exists()


def test_pictures_are_written_when_asked_for(world, run_cli, pictures):
    report = extract(run_cli, world, pictures / "a.png", "--pictures").document
    with Image.open(world.out / report["images"][0]["picture"]) as sheet:
        assert sheet.size == (816, 300)


def test_exif_can_be_turned_off(world, run_cli, pictures):
    tag = Image.Exif()
    tag[0x0112] = 6
    photograph(2, 80, 40).save(pictures / "turned.png", exif=tag)
    for option, expected in (("--exif", True), ("--no-exif", False)):
        report = extract(run_cli, world, pictures / "turned.png", option, "--force").document
        assert report["settings"]["preprocess"]["exif"] is expected
        with FeatureExtractor.load(world.bundle, "onnxruntime-cpu", threads=1) as extractor:
            right = extractor(pictures / "turned.png", exif=expected).features[0]
        assert np.array_equal(np.load(world.out / "turned.npy"), right)


@pytest.mark.parametrize("named", [True, False])
def test_a_bad_file_is_left_out_and_changes_the_exit_code(world, run_cli, pictures, named):
    asked = [pictures / "a.png", pictures / "deep" / "broken.jpg"] if named else [pictures]
    outcome = extract(run_cli, world, *asked)
    outcome.refused(2, "broken.jpg", "holds the features of the others", "--skip-bad")
    assert "a.npy" in list_files(world.out)
    assert list(outcome.document["skipped"]) == [str(pictures / "deep" / "broken.jpg")]
    assert extract(run_cli, world, *asked, "--skip-bad", "--force").code == 0


def interrupt(monkeypatch, at):
    """Raise ``KeyboardInterrupt`` while the features of the ``at``-th image are written."""
    real, calls = np.save, []

    def save(*arguments, **options):
        calls.append(1)
        if len(calls) == at:
            raise KeyboardInterrupt
        real(*arguments, **options)

    monkeypatch.setattr(np, "save", save)


def test_ctrl_c_keeps_finished_images_and_resume_extracts_the_rest(world, run_cli, pictures, monkeypatch):
    (pictures / "deep" / "broken.jpg").unlink()
    options = [pictures, "--outputs", "features,cls"]
    with monkeypatch.context() as patch:
        interrupt(patch, 4)  # the class token of the second image
        outcome = extract(run_cli, world, *options)
    outcome.refused(130, "Interrupted", "features of 1 of 3 images", "--resume")
    assert "distill" not in outcome.err
    assert list_files(world.out) == {"a.npy", "a.cls.npy", "features.json"}
    assert json.loads((world.out / "features.json").read_text())["complete"] is False
    extract(run_cli, world, *options).refused(2, "exists already")
    extract(run_cli, world, *options, "--resume", "--dtype", "float16").refused(2, "another dtype")
    extract(run_cli, world, pictures / "b.png", "--outputs", "features,cls", "--resume").refused(2, "not asked for now")

    kept = (world.out / "a.npy").stat().st_ino
    resumed = extract(run_cli, world, *options, "--resume")
    assert resumed.code == 0
    assert resumed.document["complete"] is True
    assert (world.out / "a.npy").stat().st_ino == kept, "it was extracted again"
    whole = {name: (world.out / name).read_bytes() for name in list_files(world.out) - {"features.json"}}
    assert extract(run_cli, world, *options, "--force").code == 0
    assert {name: (world.out / name).read_bytes() for name in whole} == whole
    assert leftovers(world.tmp) == []


def test_resume_extracts_an_image_that_changed(world, run_cli, pictures):
    assert extract(run_cli, world, pictures, "--skip-bad").code == 0
    photograph(9, 70, 60).save(pictures / "a.png")
    os.utime(pictures / "a.png", (1, 1))
    assert extract(run_cli, world, pictures, "--skip-bad", "--resume").code == 0
    with FeatureExtractor.load(world.bundle, "onnxruntime-cpu", threads=1) as extractor:
        assert np.array_equal(np.load(world.out / "a.npy"), extractor(pictures / "a.png").features[0])


def test_ctrl_c_does_not_replace_an_output_by_a_smaller_one(world, run_cli, pictures, monkeypatch):
    assert extract(run_cli, world, pictures, "--skip-bad").code == 0
    before = {name: (world.out / name).read_bytes() for name in list_files(world.out)}
    interrupt(monkeypatch, 3)
    extract(run_cli, world, pictures, "--force").refused(130, "Nothing new was kept", "as it was before")
    assert {name: (world.out / name).read_bytes() for name in list_files(world.out)} == before


def test_resume_of_another_folder_is_refused(world, run_cli, pictures):
    world.out.mkdir()
    (world.out / "features.json").write_text("[]")
    extract(run_cli, world, pictures, "--resume").refused(2, "no whole features.json", "--force")


def test_a_full_disk_is_reported_as_full(world, run_cli, pictures, monkeypatch):
    """The message is the system's; that of ``np.save`` would name a number of bytes instead."""
    from pathlib import Path

    real = Path.write_bytes

    def full(self, data):
        if self.suffix == ".npy":
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return real(self, data)

    monkeypatch.setattr(Path, "write_bytes", full)
    extract(run_cli, world, pictures / "a.png").refused(2, "the disk is full", "free space")
    assert not world.out.exists()
