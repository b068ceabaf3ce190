"""``extract --shard``: several processes write one output; a killed one loses nothing and repeats nothing."""

import json
import os
import shutil
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from phreg_deploy.errors import PhregError
from phreg_deploy.extraction.inputs.bad_files import BadFiles, check_max_bad
from phreg_deploy.extraction.inputs.shards import Shard
from phreg_deploy.heads import attach
from tests.cli_helpers import leftovers, photograph
from tests.extraction_helpers import extract, files_of, index_of, journaled, journals, kill_in
from tests.head_helpers import NAMES, head


@pytest.fixture(scope="module")
def images(made_once):
    """Twelve small images in two folders."""

    def make(folder):
        for i in range(12):
            path = folder / ("deep" if i % 3 else "") / f"photo-{i:02d}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            photograph(i, 80, 70).save(path)

    return made_once("twelve", make)


@pytest.fixture(scope="module")
def plain(made_once, bundle, images):
    """What one process without shards writes."""
    outputs = ("--outputs", "features,cls")
    return made_once("plain-extraction", lambda folder: extract(bundle, images, folder, *outputs))


def shard(bundle, images, out, text, *more):
    return extract(bundle, images, out, "--outputs", "features,cls", "--shard", text, *more)


def assert_same(out, plain):
    """The output has the same files and the same entries as that of one process, and nothing unfinished."""
    assert files_of(out) == files_of(plain)
    index, expected = index_of(out), index_of(plain)
    facts = [{key: entry[key] for key in expected["images"][0]} for entry in index["images"]]
    assert sorted(facts, key=lambda entry: entry["image"]) == expected["images"]
    assert {key: index[key] for key in ("settings", "complete", "skipped", "backend")} == {
        key: expected[key] for key in ("settings", "complete", "skipped", "backend")
    }
    assert sorted(journaled(out)) == sorted(entry["name"] for entry in index["images"])
    left = {path.name for path in (out / ".parts").iterdir() if path.suffix not in (".jsonl", ".lock")}
    assert left == set()
    assert leftovers(out.parent) == []


def test_shards_at_once_write_what_one_process_writes(bundle, images, plain, tmp_path):
    """Threads call the command at once; each opens the lock anew, as a process does."""
    from phreg_deploy.extraction.inputs.sources import find_images
    from phreg_deploy.extraction.sharded import extract_shard
    from phreg_deploy.extraction.task import ExtractionOptions
    from phreg_deploy.runtime import FeatureExtractor

    out, sources = tmp_path / "out", find_images([images])
    options = ExtractionOptions(outputs=("features", "cls"))
    with FeatureExtractor.load(bundle, "onnxruntime-cpu", threads=1) as extractor, ThreadPoolExecutor(5) as pool:
        work = [pool.submit(extract_shard, extractor, sources, out, options, Shard(n, 5)) for n in range(1, 6)]
        done = [future.result() for future in work]
    assert sum(one.extracted for one in done) == 12
    assert all(one.complete for one in done)
    assert any(one.joined for one in done)
    assert_same(out, plain)
    for entry in index_of(out)["images"]:
        assert set(entry["sha256"]) == {entry["features"], entry["cls"]}


def test_the_last_shard_joins_and_others_say_what_is_missing(bundle, images, plain, tmp_path):
    out = tmp_path / "out"
    first = shard(bundle, images, out, "1/2")
    assert first.document["joined"] is False
    assert not (out / "features.json").exists()
    assert "Other shards are not done" in first.err
    second = shard(bundle, images, out, "2/2")
    assert second.document["joined"] is True
    assert first.document["extracted"] + second.document["extracted"] == 12
    assert_same(out, plain)
    shard(bundle, images, out, "2/2").refused(2, "was begun before", "--resume")
    again = shard(bundle, images, out, "2/2", "--resume").document
    assert (again["extracted"], again["joined"]) == (0, True)
    over = shard(bundle, images, out, "2/2", "--force").document
    assert over["kept"] == 0
    assert_same(out, plain)


# Before a file gets its name; between the files of one image; after them, before the journal; in the journal; at the
# mark of the end; while the index is written.
@pytest.mark.parametrize(
    ("function", "at"),
    [("replace", 2), ("replace", 3), ("replace", -3), ("write", 3), ("write", -3), ("write", 13), ("replace", 26)],
)
def test_a_killed_process_loses_nothing_and_repeats_nothing(bundle, images, plain, tmp_path, function, at):
    out = tmp_path / "out"
    assert kill_in(function, at, bundle, images, out, "--outputs", "features,cls", "--shard", "1/1")
    before = journaled(out)
    kept = {name: (out / name).stat().st_ino for name in files_of(out) if name.removesuffix(".npy") in before}
    resumed = shard(bundle, images, out, "1/1", "--resume").document
    assert (resumed["kept"], resumed["extracted"]) == (len(before), 12 - len(before))
    assert {name: (out / name).stat().st_ino for name in kept} == kept, "a finished image was written again"
    assert_same(out, plain)


def test_an_output_that_is_started_over_loses_its_index_first(bundle, images, plain, tmp_path):
    """A complete index must not name files that are gone."""
    out, words = tmp_path / "out", ("--outputs", "features,cls", "--shard", "1/1")
    assert extract(bundle, images, out, *words).code == 0
    whole = files_of(out)
    for at in (1, 2, 3, -3):
        assert kill_in("unlink", at, bundle, images, out, *words, "--force")
        assert not (out / "features.json").exists() or files_of(out) == whole, at
        assert shard(bundle, images, out, "1/1", "--resume").code == 0
        assert_same(out, plain)


def test_a_cut_off_line_and_a_changed_file_are_found_by_digest(bundle, images, plain, tmp_path):
    out = tmp_path / "out"
    assert shard(bundle, images, out, "1/1").code == 0
    (journal,) = journals(out)
    lines = journal.read_bytes().splitlines(keepends=True)
    journal.write_bytes(b"".join(lines[:5]) + lines[5][:40])
    victim = out / json.loads(lines[2])["images"][0]["features"]
    data = bytearray(victim.read_bytes())
    data[-1] ^= 1
    victim.write_bytes(data)
    resumed = shard(bundle, images, out, "1/1", "--resume").document
    assert (resumed["kept"], resumed["extracted"]) == (3, 9)
    assert_same(out, plain)


def test_two_processes_with_one_shard_are_refused(bundle, images, tmp_path):
    import fcntl

    out = tmp_path / "out"
    assert shard(bundle, images, out, "1/2").code == 0
    with open(out / ".parts" / "1-of-2.lock") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        shard(bundle, images, out, "1/2", "--resume").refused(2, "another process writes shard 1/2")
    assert shard(bundle, images, out, "1/2", "--resume").code == 0


def test_other_options_and_other_outputs_are_refused(bundle, images, plain, tmp_path):
    out = tmp_path / "out"
    assert shard(bundle, images, out, "1/3").code == 0
    shard(bundle, images, out, "2/3", "--dtype", "float16").refused(2, "begun with another dtype")
    shard(bundle, images, out, "2/4").refused(2, "begun with another shards (there 3, here 4)")
    extract(bundle, images, out).refused(2, "exists already")
    copy = shutil.copytree(plain, tmp_path / "plain")
    shard(bundle, images, copy, "1/2").refused(2, "was not written in shards")
    for text in ("0/4", "5/4", "3", "a/b", "1/0"):
        shard(bundle, images, tmp_path / "no", text).refused(2, f"shard: got '{text}'")
    assert not (tmp_path / "no").exists()


def test_a_missing_file_is_found_when_shards_are_joined(bundle, images, tmp_path):
    out = tmp_path / "out"
    assert shard(bundle, images, out, "1/2").code == 0
    next(out.rglob("*.cls.npy")).unlink()
    shard(bundle, images, out, "2/2").refused(2, "is missing", "shard 1/2 again with --resume")
    assert shard(bundle, images, out, "1/2", "--resume").document["joined"] is True


def test_ctrl_c_keeps_finished_images(bundle, images, plain, tmp_path, monkeypatch):
    out, real, calls = tmp_path / "out", np.save, []

    def save(*arguments, **options):
        calls.append(1)
        if len(calls) == 6:
            raise KeyboardInterrupt
        real(*arguments, **options)

    with monkeypatch.context() as patch:
        patch.setattr(np, "save", save)
        shard(bundle, images, out, "1/1").refused(130, "keeps 2 of 12 images of shard 1/1", "--resume")
    assert shard(bundle, images, out, "1/1", "--resume").document["kept"] == 2
    assert_same(out, plain)


@pytest.mark.parametrize("sharded", [True, False])
def test_bad_files_up_to_a_limit(bundle, images, tmp_path, sharded):
    photos, out = shutil.copytree(images, tmp_path / "photos"), tmp_path / "out"
    for name in ("deep/photo-05.png", "photo-06.png"):
        (photos / name).write_bytes(b"no image")
    more = ("--shard", "1/1") if sharded else ()
    stopped = extract(bundle, photos, out, *more, "--max-bad", "10%")
    stopped.refused(2, "2 files cannot be read, more than --max-bad 10% allows (1)", "photo-05.png", "--resume")
    assert len(stopped.document["skipped"]) == 2
    kept = files_of(out)
    assert 0 < len(kept) < 10
    resumed = extract(bundle, photos, out, *more, "--max-bad", "2", "--resume")
    assert resumed.code == 0
    assert len(resumed.document["skipped"]) == 2
    assert kept.items() <= files_of(out).items()
    assert len(index_of(out)["images"]) == 10
    assert sorted(index_of(out)["skipped"]) == sorted(resumed.document["skipped"])
    extract(bundle, photos, out, *more, "--resume").refused(2, "2 of 12 files cannot be read", "--max-bad")
    extract(bundle, photos, out, *more, "--skip-bad", "--max-bad", "1").refused(2, "got --skip-bad and --max-bad")


@pytest.mark.parametrize("text", ["-1", "101%", "many", "", "1.5", "%"])
def test_a_wrong_limit_is_refused(text):
    with pytest.raises(PhregError, match="max-bad: got"):
        check_max_bad(text)


@pytest.mark.parametrize(("text", "most"), [("1%", 2), ("0.3%", 0), ("20", 20), ("0", 0), ("100%", 250), (None, None)])
def test_limits(text, most):
    assert BadFiles(text, 250).most == most


def test_shards_are_stable_and_nearly_equal():
    keys = [f"folder/{i}.jpg" for i in range(4000)]
    parts = [[key for key in keys if Shard(n, 16).holds(key)] for n in range(1, 17)]
    assert sorted(key for part in parts for key in part) == sorted(keys)
    assert all(190 < len(part) < 310 for part in parts)
    assert Shard.parse(" 3/16") == Shard(3, 16)
    assert Shard(3, 16).name == "03-of-16"
    assert [n for n in range(1, 17) if Shard(n, 16).holds("folder/0.jpg")] == [8], "it changed"


def test_a_replaced_image_is_extracted_again(bundle, images, tmp_path):
    photos, out = shutil.copytree(images, tmp_path / "photos"), tmp_path / "out"
    assert shard(bundle, photos, out, "1/1").code == 0
    before = files_of(out)
    photograph(77, 80, 70).save(photos / "photo-03.png")
    os.utime(photos / "photo-03.png", (1, 1))
    assert shard(bundle, photos, out, "1/1", "--resume").document["extracted"] == 1
    changed = {name for name, data in files_of(out).items() if before[name] != data}
    assert changed == {"photo-03.npy", "photo-03.cls.npy"}
    (photos / "photo-03.png").unlink()
    shard(bundle, photos, out, "1/1", "--resume").refused(2, "not asked for now")


@pytest.mark.parametrize("more", [(), ("--shard", "1/1")])
def test_the_index_names_the_classes_of_each_answer(bundle, street, images, tmp_path, more):
    several, out = tmp_path / "several.bundle", tmp_path / "out"
    attach(bundle, {"": street, "far": head(1, task="depth", seed=2)}, several)
    words = (several, images, out, "--outputs", "segmentation,labels,depth.far,features", *more)
    assert extract(*words).code == 0
    expected = [
        {"output": "segmentation", "kind": "segmentation", "classes": list(NAMES)},
        {"output": "depth.far", "kind": "depth", "classes": []},
        {"output": "labels", "kind": "labels", "classes": list(NAMES)},
    ]
    index = index_of(out)
    assert index["heads"] == expected
    # As older versions wrote it.
    (out / "features.json").write_text(json.dumps({key: index[key] for key in index if key != "heads"}))
    before = {name: (out / name).stat().st_ino for name in files_of(out)}
    assert extract(*words, "--resume").code == 0
    assert index_of(out)["heads"] == expected
    assert {name: (out / name).stat().st_ino for name in files_of(out)} == before, "nothing was extracted again"
    assert extract(several, images, tmp_path / "plain", *more).code == 0
    assert index_of(tmp_path / "plain")["heads"] == []
