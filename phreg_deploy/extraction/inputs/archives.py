"""Tar archives of images, as WebDataset writes them: list the members, and read them in the order of the archive."""

from __future__ import annotations

import tarfile
import zlib
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from phreg_deploy.errors import PhregError
from phreg_deploy.images.photographs import SUFFIXES
from phreg_deploy.json_files import is_regular

ARCHIVES = (".tar", ".tar.gz", ".tgz")
# Bytes of a member. A larger one is listed as bad, since it would be read into memory at once.
MOST_BYTES = 1 << 30
# Bytes of a header that extends another one: a long name, or records of pax.
MOST_HEADER = 1 << 16
PAX = (tarfile.XHDTYPE, tarfile.XGLTYPE, tarfile.SOLARIS_XHDTYPE)
EXTENSIONS = (*PAX, tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK)
# What damaged archives raise, plain or compressed. ``tarfile`` reads headers that extend others by recursion.
DAMAGE = (tarfile.TarError, EOFError, zlib.error, OSError, ValueError, RecursionError)


@dataclass(frozen=True)
class Member:
    """A member of an archive: its ``name``, and ``offset`` and ``size`` of its bytes (in the unpacked archive).

    ``key``: the name up to the first dot of its last part, as in WebDataset. ``fault``: why it cannot be used.
    """

    name: str
    key: str
    offset: int
    size: int
    fault: str | None = None


class _BoundedHeader(tarfile.TarInfo):
    """A header that takes little memory: ``tarfile`` reads an extension, and the map of a sparse file, at once.

    Raises ``tarfile.ReadError`` for a larger extension, a sparse file, or a size below 0, behind which ``tarfile`` of
    Python before 3.12.12 would go back for ever (CVE-2025-8194).
    """

    @classmethod
    def frombuf(cls, buf: bytes | bytearray, encoding: str, errors: str) -> tarfile.TarInfo:  # type: ignore[override]
        info = super().frombuf(buf, encoding, errors)
        if info.type in EXTENSIONS and info.size > MOST_HEADER:
            raise tarfile.ReadError(f"a header of {info.size} bytes, expected at most {MOST_HEADER}")
        if info.type == tarfile.GNUTYPE_SPARSE:
            raise tarfile.ReadError("it holds a sparse file, expected whole ones")
        return _checked(info)

    def _proc_gnusparse_10(self, *_arguments: object) -> None:
        raise tarfile.ReadError("it holds a sparse file, expected whole ones")


def _checked(info: tarfile.TarInfo) -> tarfile.TarInfo:
    if info.size < 0:
        raise tarfile.ReadError(f"a size of {info.size} bytes, expected none below 0")
    return info


def is_archive(path: Path) -> bool:
    """Whether a file is a tar archive, by its name."""
    return path.name.lower().endswith(ARCHIVES)


def list_members(path: Path) -> list[Member]:
    """List the images of an archive, in its order. Only headers are read; links are never followed.

    A member is an image if the part of its name after the first dot is an image's suffix: ``a.jpg``, not ``a.seg.png``.
    A member that must not be used has a ``fault``. An archive that is cut off has one member with a fault at its end.

    Raises:
        PhregError: no tar archive, or one without an image.
    """
    members: list[Member] = []
    if not is_regular(path):
        raise PhregError(f"archive: {path} is a pipe or a device; expected a tar file of images.")
    try:
        with tarfile.open(path, tarinfo=_BoundedHeader) as tar:
            try:
                # Records of pax may change a size.
                members.extend(member for entry in tar if (member := _image(path, _checked(entry))) is not None)
                _check_end(tar)
            except DAMAGE as error:
                members.append(
                    Member("", "", 0, 0, f"archive: {path} is cut off or damaged after what was read ({error})")
                )
    except DAMAGE as error:
        # ``tarfile`` lists every compression that it tried, in lines.
        reason = str(error).partition("\n")[0].rstrip(":. ")
        raise PhregError(f"archive: {path} cannot be read ({reason}); expected a tar file of images.") from None
    if not members:
        raise PhregError(f"archive: {path} holds no image; expected members such as KEY.jpg.")
    return members


class ArchiveReader(AbstractContextManager["ArchiveReader"]):
    """Reads members; keeps the last archive open, so reading in its order moves forward only."""

    def __init__(self) -> None:
        self.path: Path | None = None
        self.tar: tarfile.TarFile | None = None

    def read(self, path: Path, member: Member) -> bytes:
        """Return the bytes of a member. Raises ``PhregError`` for one with a fault, or an archive that is cut off."""
        if member.fault is not None:
            raise PhregError(member.fault)
        name = f"{path}/{member.name}"
        try:
            if self.tar is None or self.path != path:
                self.close()
                self.tar, self.path = tarfile.open(path, tarinfo=_BoundedHeader), path  # noqa: SIM115
            file = self.tar.fileobj
            assert file is not None
            file.seek(member.offset)
            data = file.read(member.size)
        except DAMAGE as error:
            raise PhregError(f"image: {name} cannot be read ({error}); the archive is damaged.") from None
        if len(data) < member.size:
            raise PhregError(f"image: {name} is cut off: {len(data)} of {member.size} bytes are there.")
        return data

    def close(self) -> None:
        """Close the archive that is open."""
        if self.tar is not None:
            self.tar.close()
        self.tar = self.path = None

    def __exit__(self, *_error: object) -> None:
        self.close()


def _image(path: Path, entry: tarfile.TarInfo) -> Member | None:
    """The member that an entry is; None for folders, links and other files than images."""
    place = PurePosixPath(entry.name)
    stem, dot, suffix = place.name.partition(".")
    if not entry.isreg() or entry.issparse() or not stem or f"{dot}{suffix.lower()}" not in SUFFIXES:
        return None
    fault = None
    if place.is_absolute() or ".." in place.parts or "\\" in entry.name or "\0" in entry.name or ":" in place.parts[0]:
        fault = "its name leads out of the output folder"
    elif entry.size > MOST_BYTES:
        fault = f"it has {entry.size} bytes, more than {MOST_BYTES}"
    key = place.with_name(stem).as_posix()
    return Member(
        entry.name, key, entry.offset_data, entry.size, fault and f"image: {path}/{entry.name} is not read: {fault}."
    )


def _check_end(tar: tarfile.TarFile) -> None:
    """Raise ``TarError`` unless the archive ends in zeros or with its last member: ``tarfile`` stops silently."""
    if tar.fileobj is not None:
        tar.fileobj.seek(tar.offset)
        if any(tar.fileobj.read(tarfile.BLOCKSIZE)):
            raise tarfile.TarError("there is a header that is none")
