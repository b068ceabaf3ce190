"""``extract --format parquet | zarr``: what is in the files, and what remains of a killed process."""

import json
import shutil

import numpy as np
import pytest

from phreg_deploy.extraction import blocks
from tests.cli_helpers import photograph
from tests.extraction_helpers import extract, index_of, journaled, kill_in

ALL = ("--outputs", "features,cls,token_norm", "--fit", "pad", "--dtype", "float16")
DTYPES = {"features": np.float16, "cls": np.float16, "token_norm": np.float32, "mask": np.bool_}
pytestmark = pytest.mark.parametrize("kind", ["parquet", "zarr"])


@pytest.fixture(autouse=True)
def libraries(kind, monkeypatch):
    pytest.importorskip({"parquet": "pyarrow.parquet", "zarr": "zarr"}[kind])
    monkeypatch.setattr(blocks, "MOST_ROWS", 4)


@pytest.fixture(scope="module")
def images(made_once):
    """Ten images, of which some are wide, so their masks differ."""

    def make(folder):
        (folder / "deep").mkdir(parents=True)
        for i in range(10):
            photograph(i, 80 + 40 * (i % 2), 70).save(folder / ("deep" if i % 3 else "") / f"p{i}.png")

    return made_once("ten", make)


@pytest.fixture(scope="module")
def plain(made_once, bundle, images):
    return made_once("plain-formats", lambda folder: extract(bundle, images, folder, *ALL))


def read_rows(out, kind):
    """Every image of the index: name -> its arrays by output."""
    rows = {}
    for entry in index_of(out)["images"]:
        if kind == "parquet":
            import pyarrow.parquet as pq

            table = pq.read_table(out / entry["file"])
            assert table["name"][entry["row"]].as_py() == entry["name"]
            assert table["artifact_rate"][entry["row"]].as_py() == pytest.approx(entry["artifact_rate"])
            values = {name: table[name].combine_chunks().to_numpy_ndarray()[entry["row"]] for name in DTYPES}
            values["mask"] = values["mask"].astype(bool)
            settings = json.loads(table.schema.metadata[b"phreg"])
        else:
            import zarr

            group = zarr.open_group(out / entry["file"], mode="r")
            assert group["features"].chunks == (1, 8, 8, 48)
            values = {name: group[name][entry["row"]] for name in DTYPES}
            settings = group.attrs["phreg"]
        assert settings == index_of(out)["settings"]
        rows[entry["name"]] = values
    return rows


def assert_same(out, plain, kind):
    index, expected = index_of(out), index_of(plain)
    assert (index["format"], index["complete"], index["settings"]) == (kind, True, expected["settings"])
    rows = read_rows(out, kind)
    assert sorted(journaled(out)) == sorted(rows)
    assert [entry["image"] for entry in expected["images"]] == sorted(entry["image"] for entry in index["images"])
    for entry in expected["images"]:
        values = rows[entry["features"].removesuffix(".npy")]
        for name, dtype in DTYPES.items():
            assert values[name].dtype == dtype
            assert np.array_equal(values[name], np.load(plain / entry[name])), (entry["image"], name)
    assert [path for path in out.rglob("*") if path.suffix in (".partial", ".writing")] == []


def test_the_files_hold_what_npy_files_hold(bundle, images, plain, tmp_path, kind):
    out = tmp_path / "out"
    done = extract(bundle, images, out, *ALL, "--format", kind)
    assert done.code == 0, done.err
    assert_same(out, plain, kind)
    digests = {name for entry in index_of(out)["images"] for name in entry["sha256"]}
    assert len(digests) == (3 if kind == "parquet" else 3 * 4), "three blocks of at most four images"


def test_shards_write_files_of_their_own(bundle, images, plain, tmp_path, kind):
    out = tmp_path / "out"
    for n in (1, 2):
        assert extract(bundle, images, out, *ALL, "--format", kind, "--shard", f"{n}/2").code == 0
    assert_same(out, plain, kind)
    assert {entry["file"].partition("-of-")[0] for entry in index_of(out)["images"]} == {"features-1", "features-2"}


# Before and after the journal's lines: the header of a journal is not written by ``os.write``.
@pytest.mark.parametrize(("function", "at"), [("write", 1), ("write", 2), ("write", -2), ("write", 3), ("write", 4)])
def test_a_killed_process_loses_no_finished_block(bundle, images, plain, tmp_path, kind, function, at):
    out = tmp_path / "out"
    assert kill_in(function, at, bundle, images, out, *ALL, "--format", kind)
    before = journaled(out)
    assert len(before) == min(10, 4 * (at - 1 if at > 0 else -at))
    resumed = extract(bundle, images, out, *ALL, "--format", kind, "--resume").document
    assert (resumed["kept"], resumed["extracted"]) == (len(before), 10 - len(before))
    assert_same(out, plain, kind)


def test_a_damaged_block_and_a_changed_image_are_extracted_again(bundle, images, tmp_path, kind):
    photos, out = shutil.copytree(images, tmp_path / "photos"), tmp_path / "out"
    assert extract(bundle, photos, out, *ALL, "--format", kind).code == 0
    entries = index_of(out)["images"]
    damaged = out / next(iter(entries[0]["sha256"]))
    damaged.write_bytes(damaged.read_bytes()[:-1])
    photograph(50, 90, 70).save(entries[5]["image"])
    resumed = extract(bundle, photos, out, *ALL, "--format", kind, "--resume").document
    assert (resumed["kept"], resumed["extracted"]) == (2, 8), "blocks of 4, 4 and 2 images"
    extract(bundle, photos, tmp_path / "plain", *ALL)
    assert_same(out, tmp_path / "plain", kind)


def test_what_a_format_cannot_hold_is_refused(bundle, images, tmp_path, kind, monkeypatch, run_cli):
    out = tmp_path / "out"
    extract(bundle, images, out, "--format", kind, "--window", "64").refused(2, f"got --window with {kind}")
    extract(bundle, images, out, "--format", kind, "--pictures").refused(2, f"got --pictures with {kind}")
    monkeypatch.setitem(__import__("sys").modules, {"parquet": "pyarrow", "zarr": "zarr"}[kind], None)
    extract(bundle, images, out, "--format", kind).refused(4, f'pip install "phreg-deploy[{kind}]"')
    assert not out.exists()


def test_another_format_in_one_output_is_refused(bundle, images, tmp_path, kind):
    out = tmp_path / "out"
    assert extract(bundle, images, out, "--shard", "1/2").code == 0
    extract(bundle, images, out, "--shard", "2/2", "--format", kind).refused(
        2, f"another format (there npy, here {kind})"
    )
