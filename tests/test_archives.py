"""Tar archives as arguments of ``extract``: order, names, damage, and members that must not be used."""

import io
import os
import tarfile

import numpy as np
import pytest

from phreg_deploy.errors import PhregError
from phreg_deploy.extraction.inputs.archives import ArchiveReader, list_members
from phreg_deploy.extraction.inputs.sources import find_images
from tests.cli_helpers import photograph
from tests.extraction_helpers import extract, files_of, index_of


def encoded(seed, kind="PNG"):
    data = io.BytesIO()
    photograph(seed, 80, 70).save(data, kind)
    return data.getvalue()


def write_tar(path, members, mode="w"):
    """``members``: (name, bytes), or (name, type, target) for a link."""
    with tarfile.open(path, mode) as tar:
        for name, *what in members:
            entry = tarfile.TarInfo(name)
            if len(what) == 2:
                entry.type, entry.linkname = what
                tar.addfile(entry)
            else:
                entry.size = len(what[0])
                tar.addfile(entry, io.BytesIO(what[0]))
    return path


def web_dataset(folder, name="shard-000.tar", mode="w", first=0):
    """Three samples, with labels beside the images."""
    members = []
    for i in range(first, first + 3):
        members += [(f"./{i:03d}.png", encoded(i)), (f"./{i:03d}.cls", b"7"), (f"./{i:03d}.seg.png", b"no image")]
    return write_tar(folder / name, members, mode)


@pytest.mark.parametrize(("name", "mode"), [("a.tar", "w"), ("a.tar.gz", "w:gz"), ("a.tgz", "w:gz")])
@pytest.mark.parametrize("options", [(), ("--shard", "1/1")])
def test_members_are_extracted_as_files_are(bundle, tmp_path, name, mode, options):
    (tmp_path / "in").mkdir()
    for i in range(3):
        (tmp_path / "in" / f"{i:03d}.png").write_bytes(encoded(i))
    assert extract(bundle, tmp_path / "in", tmp_path / "files").code == 0
    done = extract(bundle, web_dataset(tmp_path, name, mode), tmp_path / "out", *options)
    assert done.code == 0, done.err
    assert files_of(tmp_path / "out") == files_of(tmp_path / "files")
    entries = index_of(tmp_path / "out")["images"]
    assert [entry["image"] for entry in entries] == [f"{tmp_path / name}/./{i:03d}.png" for i in range(3)]
    again = extract(bundle, tmp_path / name, tmp_path / "out", *options, "--resume")
    assert again.code == 0, again.err


def test_archives_and_folders_together_in_shards(bundle, photos, tmp_path):
    archives = [web_dataset(tmp_path, f"shard-{n}.tar", first=n) for n in (0, 1)]
    given = [*archives, photos / "frame-00.png", archives[0]]
    sources = find_images(given)
    assert [source.name for source in sources] == ["000", "001", "002", "001-2", "002-2", "003", "frame-00"]
    for n in (1, 2, 3):
        assert extract(bundle, given, tmp_path / "out", "--shard", f"{n}/3").code == 0
    assert len(index_of(tmp_path / "out")["images"]) == 7
    first, second = (np.load(tmp_path / "out" / f"00{n}.npy") for n in (1, 2))
    assert np.array_equal(first, np.load(tmp_path / "out" / "001-2.npy")), "the archives overlap in 001 and 002"
    assert not np.array_equal(first, second)


@pytest.mark.parametrize("options", [(), ("--shard", "1/1")])
def test_a_name_that_leads_out_is_a_bad_file(bundle, tmp_path, options):
    bad = ["../out.png", "/tmp/absolute.png", "a/../../b.png", "c:\\d.png", "e:/f.png"]
    members = [(name, encoded(1)) for name in bad]
    links = [("soft.png", tarfile.SYMTYPE, "/etc/passwd"), ("hard.png", tarfile.LNKTYPE, "good.png")]
    links.append(("folder.png", tarfile.DIRTYPE, ""))
    path = write_tar(tmp_path / "x.tar", [*members, ("deep/good.png", encoded(2)), *links])
    (tmp_path / "below").mkdir()
    before = set(tmp_path.rglob("*"))
    done = extract(bundle, path, tmp_path / "below" / "out", *options, "--max-bad", "5")
    assert done.code == 0, done.err
    assert set(files_of(tmp_path / "below" / "out")) == {"deep/good.npy"}
    assert sorted(done.document["skipped"]) == sorted(f"{path}/{name}" for name in bad)
    assert all("leads out of the output folder" in reason for reason in done.document["skipped"].values())
    outside = {p for p in tmp_path.rglob("*") if tmp_path / "below" not in p.parents}
    assert outside == before


def test_damage(bundle, tmp_path):
    whole = web_dataset(tmp_path).read_bytes()
    members = list_members(tmp_path / "shard-000.tar")
    inside = tmp_path / "inside.tar"
    inside.write_bytes(whole[: members[2].offset + 100])
    done = extract(bundle, inside, tmp_path / "out")
    done.refused(2, "cannot be read", "inside.tar")
    assert set(files_of(tmp_path / "out")) == {"000.npy", "001.npy"}
    header = bytearray(whole)
    header[members[2].offset - 512 : members[2].offset] = b"\xff" * 512
    (tmp_path / "header.tar").write_bytes(header)
    done = extract(bundle, tmp_path / "header.tar", tmp_path / "out2", "--max-bad", "1")
    assert done.code == 0
    assert "cut off or damaged" in done.document["skipped"][str(tmp_path / "header.tar")]
    (tmp_path / "text.tar").write_text("no archive" * 100)
    extract(bundle, tmp_path / "text.tar", tmp_path / "no").refused(2, "archive: ", "expected a tar file of images")
    write_tar(tmp_path / "empty.tar", [("a.txt", b"x")])
    extract(bundle, tmp_path / "empty.tar", tmp_path / "no").refused(2, "holds no image")
    assert not (tmp_path / "no").exists()


def test_a_member_that_is_no_image_is_named(bundle, tmp_path):
    path = write_tar(tmp_path / "x.tar", [("good.png", encoded(0)), ("bad.jpg", b"text"), ("none.jpg", b"")])
    done = extract(bundle, path, tmp_path / "out", "--skip-bad")
    assert done.code == 0
    assert {name.rpartition("/")[2] for name in done.document["skipped"]} == {"bad.jpg", "none.jpg"}
    assert f"{path}/bad.jpg" in done.err


def test_members_are_read_forwards(tmp_path):
    path = web_dataset(tmp_path, "a.tar.gz", "w:gz")
    with ArchiveReader() as reader:
        data = [reader.read(path, member) for member in list_members(path)]
    assert data == [encoded(i) for i in range(3)]
    with ArchiveReader() as reader, pytest.raises(PhregError, match="cut off"):
        reader.read(path, list_members(path)[0].__class__("x", "x", 10**6, 10))


def header(name, size, kind=tarfile.REGTYPE):
    """The 512 bytes of a member of any size, also below 0."""
    entry = tarfile.TarInfo(name)
    entry.type = kind
    data = bytearray(entry.tobuf(tarfile.GNU_FORMAT))
    data[124:136] = (b"\xff" if size < 0 else b"\x80") + size.to_bytes(11, "big", signed=True)
    data[148:156] = b"%06o\0 " % (256 + sum(data[:148]) + sum(data[156:]))
    return bytes(data)


LONG = 3 << 20
SIZED = b"13 size=-512\n"
HEADERS = {
    "extended": (header("x", LONG, tarfile.XHDTYPE) + bytes(LONG), "a header of 3145728 bytes, expected at most 65536"),
    "global": (header("x", LONG, tarfile.XGLTYPE) + bytes(LONG), "a header of 3145728 bytes"),
    "name": (header("x", LONG, tarfile.GNUTYPE_LONGNAME) + b"a" * LONG, "a header of 3145728 bytes"),
    "chain": ((header("x", 512, tarfile.XHDTYPE) + b"13 comment=x\n".ljust(512, b"\0")) * 2000, "recursion"),
    "sparse": (header("x.png", 0, tarfile.GNUTYPE_SPARSE), "it holds a sparse file, expected whole ones"),
    "below 0": (header("x.png", -1024), "a size of -1024 bytes, expected none below 0"),
    "below 0 by pax": (
        header("x", len(SIZED), tarfile.XHDTYPE) + SIZED.ljust(512, b"\0") + header("x.png", 0),
        "a size of -512 bytes, expected none below 0",
    ),
}


@pytest.mark.parametrize("kind", HEADERS)
def test_a_header_that_is_a_bomb_ends_the_archive(bundle, tmp_path, kind):
    """``tarfile`` would read it at once, or go round for ever; what stands before it is extracted."""
    hostile, reason = HEADERS[kind]
    path = write_tar(tmp_path / "a.tar", [("good.png", encoded(0))])
    (good,) = list_members(path)
    end = -(-(good.offset + good.size) // tarfile.BLOCKSIZE) * tarfile.BLOCKSIZE
    path.write_bytes(path.read_bytes()[:end] + hostile)
    done = extract(bundle, path, tmp_path / "out", "--max-bad", "1")
    assert done.code == 0, done.err
    assert set(files_of(tmp_path / "out")) == {"good.npy"}
    (said,) = done.document["skipped"].values()
    assert reason in said


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="this system has no named pipes")
@pytest.mark.parametrize("name", ["a.tar", "a.png"])
def test_a_pipe_is_refused_and_not_waited_for(bundle, tmp_path, name):
    os.mkfifo(tmp_path / name)
    extract(bundle, tmp_path / name, tmp_path / "out").refused(2, name, "is a pipe or a device")
