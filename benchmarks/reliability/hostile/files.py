"""Write files that someone might send to do harm: bombs, names that lead out, pickles that run, files without end."""

from __future__ import annotations

import gzip
import io
import json
import os
import pickle
import shutil
import struct
import tarfile
import zipfile
import zlib
from collections.abc import Callable, Iterable
from pathlib import Path

from PIL import Image


def png(width: int, height: int, depth: int = 8, kind: int = 2, whole: bool = True, extra: bytes = b"") -> bytes:
    """A PNG of zeros, which compress to a thousandth. ``kind``: 0 grey, 2 RGB. Without ``whole`` only a first row.

    ``extra``: chunks before the pixels.
    """
    row = 1 + width * (3 if kind == 2 else 1) * depth // 8
    squeeze, pixels = zlib.compressobj(1), b""
    for _ in range(height if whole else 1):
        pixels += squeeze.compress(bytes(row))
    head = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, kind, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + head + extra + chunk(b"IDAT", pixels + squeeze.flush()) + chunk(b"IEND", b"")


def chunk(name: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))


def zeros(count: int) -> bytes:
    """``count`` zeros, deflated."""
    squeeze, block = zlib.compressobj(1), bytes(1 << 20)
    return b"".join(squeeze.compress(block) for _ in range(count >> 20)) + squeeze.flush()


def forged_jpeg(width: int, height: int) -> bytes:
    """A JPEG of 16x16 pixels whose header promises others."""
    data = bytearray(encoded("JPEG"))
    at = data.index(b"\xff\xc0") + 5
    data[at : at + 4] = struct.pack(">HH", height, width)
    return bytes(data)


def encoded(kind: str, side: int = 16, **options: object) -> bytes:
    out = io.BytesIO()
    Image.new("RGB", (side, side)).save(out, kind, **options)
    return out.getvalue()


def postscript(marker: Path) -> bytes:
    """An EPS file that asks its interpreter to write ``marker``."""
    return f"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n({marker}) (w) file closefile\nshowpage\n%%EOF\n".encode()


def tar(path: Path, members: Iterable[tuple[str, bytes] | tuple[str, bytes, str]], mode: str = "w") -> Path:
    """Write an archive; a member is (name, bytes), or (name, type, target) for a link."""
    with tarfile.open(path, mode) as archive:  # type: ignore[call-overload]
        for name, *what in members:
            entry = tarfile.TarInfo(name)
            if len(what) == 2:
                entry.type, entry.linkname = what
                archive.addfile(entry)
            else:
                entry.size = len(what[0])
                archive.addfile(entry, io.BytesIO(what[0]))
    return path


def header(name: str, size: int, kind: bytes = tarfile.REGTYPE) -> bytes:
    """The 512 bytes of a member."""
    entry = tarfile.TarInfo(name)
    entry.type = kind
    data = bytearray(entry.tobuf(tarfile.GNU_FORMAT))
    # Base 256, as GNU tar writes large numbers; it holds negative ones as well.
    data[124:136] = (b"\xff" if size < 0 else b"\x80\0\0\0")[:1] + size.to_bytes(11, "big", signed=True)
    return summed(data)


def summed(data: bytearray) -> bytes:
    """A member's header with the right checksum."""
    data[148:156] = b"%06o\0 " % (256 + sum(data[:148]) + sum(data[156:]))
    return bytes(data)


def squeezed_tar(path: Path, kind: bytes, count: int, filling: bytes = b"\0", name: str = "bomb") -> Path:
    """A .tar.gz with one header of ``kind`` and ``count`` MiB of filling."""
    block = (filling * (1 << 20))[: 1 << 20]
    with gzip.open(path, "wb", 1) as file:
        file.write(header(name, count << 20, kind))
        for _ in range(count):
            file.write(block)
    return path


def chained_headers(path: Path, count: int) -> Path:
    """An archive in which ``count`` extended headers stand before one another."""
    record = b"13 comment=x\n"
    one = header("more", len(record), tarfile.XHDTYPE) + record.ljust(512, b"\0")
    path.write_bytes(one * count + header("a.png", 0) + bytes(1024))
    return path


def sparse_map(path: Path, count: int) -> Path:
    """A .tar.gz with an old GNU sparse member whose map has ``count`` MiB."""
    first = bytearray(header("a.png", 0, tarfile.GNUTYPE_SPARSE))
    first[482] = 1
    entry = b"%011o\0%011o\0" % (0, 1)
    block = (entry * 21).ljust(504, b"\0") + b"\1".ljust(8, b"\0")
    with gzip.open(path, "wb", 1) as file:
        file.write(summed(first))
        for _ in range(count):
            file.write(block * 2048)
    return path


class Runs:
    """Unpickled, it makes a file."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Callable[..., object], tuple[object, ...]]:
        return os.mkdir, (str(self.marker),)


def pickled(path: Path, marker: Path, zipped: bool) -> Path:
    """A checkpoint with an object that runs when it is unpickled, bare or inside PyTorch's zip."""
    data = pickle.dumps({"state_dict": Runs(marker)})
    if not zipped:
        path.write_bytes(data)
        return path
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as archive:
        archive.writestr("archive/data.pkl", data)
        archive.writestr("archive/version", "3\n")
    return path


def squeezed_checkpoint(path: Path, count: int) -> Path:
    """PyTorch's zip with one tensor of ``count`` MiB of zeros, deflated."""
    import torch

    torch.save({"x": torch.zeros(1 << 18)}, path.with_suffix(".small"))
    with zipfile.ZipFile(path.with_suffix(".small")) as small, zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as big:
        for entry in small.infolist():
            if not entry.filename.endswith("data/0"):
                data = small.read(entry).replace(struct.pack("<i", 1 << 18), struct.pack("<i", count << 18))
                big.writestr(entry.filename, data)
                continue
            with big.open(entry.filename, "w", force_zip64=True) as file:
                for _ in range(count):
                    file.write(bytes(1 << 20))
    path.with_suffix(".small").unlink()
    return path


def safetensors(path: Path, table: object, length: int | None = None, data: bytes = b"") -> Path:
    """A .safetensors file with any table; ``length``: what its first 8 bytes say, when it is not the table's."""
    text = json.dumps(table).encode()
    path.write_bytes(struct.pack("<Q", len(text) if length is None else length) + text + data)
    return path


def endless(path: Path, kind: str) -> Path:
    """Replace ``path`` by a file without end: a "pipe", or a link to "zero"."""
    if path.exists() or path.is_symlink():
        path.unlink()
    if kind == "pipe":
        os.mkfifo(path)
    else:
        path.symlink_to("/dev/zero")
    return path


def changed(source: Path, target: Path, **files: object) -> Path:
    """Copy a folder, with other contents of some files: bytes, or JSON. Keys have "_" for the dot before the suffix."""
    shutil.copytree(source, target)
    for name, content in files.items():
        stem, _, suffix = name.rpartition("_")
        data = content if isinstance(content, bytes) else json.dumps(content).encode()
        (target / f"{stem}.{suffix}").write_bytes(data)
    return target
