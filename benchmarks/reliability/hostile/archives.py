"""Archives whose names lead out, whose headers are bombs, or that never end."""

from __future__ import annotations

import tarfile
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

from benchmarks.reliability.hostile import files
from benchmarks.reliability.hostile.case import ENDLESS, Case, Place

NAMES = ("../../out.png", "/tmp/phreg-hostile.png", "a/../../../b.png", "c:\\d.png", "..\\..\\e.png", "f/./../g.png")
# MiB: more than a case may take in memory.
LARGE = 2560

WRITERS: dict[str, Callable[[Path], Path]] = {
    "symbolic link": lambda path: files.tar(path, [("a.png", tarfile.SYMTYPE, "/etc/passwd")]),
    "hard link": lambda path: files.tar(path, [("a.png", tarfile.LNKTYPE, "../../a")]),
    "device": lambda path: files.tar(path, [("a.png", tarfile.CHRTYPE, "")]),
    "image of 65,535 pixels square": lambda path: files.tar(path, [("a.png", files.png(65535, 65535, whole=False))]),
    "image of 2.5 GB": lambda path: files.squeezed_tar(path, tarfile.REGTYPE, LARGE, name="a.png"),
    "other file of 2.5 GB": lambda path: files.squeezed_tar(path, tarfile.REGTYPE, LARGE),
    "extended header of 2.5 GB": lambda path: files.squeezed_tar(path, tarfile.XHDTYPE, LARGE),
    "global header of 2.5 GB": lambda path: files.squeezed_tar(path, tarfile.XGLTYPE, LARGE),
    "name of 2.5 GB": lambda path: files.squeezed_tar(path, tarfile.GNUTYPE_LONGNAME, LARGE, b"a"),
    "sparse map of 256 MB": lambda path: files.sparse_map(path, 256),
    "20,000 extended headers for one member": lambda path: files.chained_headers(path, 20_000),
    "100,000 members": lambda path: files.tar(path, [(f"{i}.txt", b"") for i in range(100_000)]),
    "20,000 members that are no image": lambda path: files.tar(path, [(f"{i}.png", b"") for i in range(20_000)]),
    "size below 0": lambda path: _raw(path, files.header("a.png", -1024) + bytes(2048)),
    "size of 8 exabytes": lambda path: _raw(path, files.header("a.png", 2**63 - 1) + bytes(2048)),
    "zeros of 2.5 GB, squeezed": lambda path: _squeezed_zeros(path),
}


def archive_cases() -> dict[str, Case]:
    """Archives for `extract`."""
    writers = {**WRITERS, **{f"member {name}": partial(_named, name) for name in NAMES}}
    cases = {f"archive, {name}": Case("archives", partial(_extract, write)) for name, write in writers.items()}
    for kind in ENDLESS:
        cases[f"archive, {kind}"] = Case("archives", partial(_endless, kind))
    return cases


def _extract(write: Callable[[Path], Path], place: Place) -> Sequence[object]:
    return place.extract(write(place.inputs / "a.tar.gz"))


def _named(name: str, path: Path) -> Path:
    return files.tar(path.with_name("a.tar"), [(name, files.encoded("PNG"))])


def _raw(path: Path, data: bytes) -> Path:
    path = path.with_name("raw.tar")
    path.write_bytes(data)
    return path


def _squeezed_zeros(path: Path) -> Path:
    import gzip

    with gzip.open(path, "wb", 1) as file:
        for _ in range(LARGE):
            file.write(bytes(1 << 20))
    return path


def _endless(kind: str, place: Place) -> Sequence[object]:
    return place.extract(files.endless(place.inputs / "a.tar", kind))
