"""The images of an extraction: files, folders of files, and members of tar archives as WebDataset writes them."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from phreg_deploy.arguments import refuse_url
from phreg_deploy.errors import PhregError
from phreg_deploy.extraction.inputs.archives import Member, is_archive, list_members
from phreg_deploy.images.photographs import list_images

OUTPUTS = ("features", "cls", "token_norm")
# The name of the mask among the outputs; it is none of the graph's.
MASK = "mask"


@dataclass(frozen=True)
class ImageSource:
    """One image.

    ``path``: its file, or its archive. ``key``: its path in its folder or archive, with suffix. ``name``: of its
    features: the key without suffix, and with a number if another image has that name. ``member``: where it stands in
    the archive; None for a file.
    """

    path: Path
    key: str
    name: str
    member: Member | None = None

    def __str__(self) -> str:
        """The file, or ``ARCHIVE/MEMBER``."""
        return str(self.path) if self.member is None else f"{self.path}/{self.member.name}".rstrip("/")

    @property
    def stamp(self) -> list[int]:
        """Numbers that change when the image is replaced: see ``stamp_of``; for a member also its place and size."""
        return stamp_of(self.path) + ([] if self.member is None else [self.member.offset, self.member.size])


def find_images(images: Iterable[Path], outputs: Sequence[str] = ()) -> list[ImageSource]:
    """List every image once, in the order of the arguments; folders by name, archives in the order of their members.

    A name that another image has, also in other case, gets a number.

    Args:
        images: files, folders to search, or tar archives.
        outputs: of ``parse_outputs``, whose files must not collide either.

    Raises:
        PhregError: a path does not exist, a folder or archive holds no image, or a file is no archive.
    """
    kinds = {prefix for kind in (*OUTPUTS, MASK, *outputs) for prefix in _prefixes(kind)}
    found: list[ImageSource] = []
    visited, taken = set[str](), set[str]()
    for given in images:
        for source in _listed(given):
            place = os.path.abspath(source.path) + (f"\0{source.member.offset}" if source.member else "")
            if place in visited:
                continue
            visited.add(place)
            if source.member is not None and source.member.fault is not None:
                # It is never written, so it needs no name of its own.
                found.append(replace(source, name=""))
                continue
            name, count = source.name, 1
            while _collides(name.lower(), taken, kinds):
                count += 1
                name = f"{source.name}-{count}"
            taken.add(name.lower())
            found.append(source if count == 1 else replace(source, name=name))
    return found


def stamp_of(path: Path) -> list[int]:
    """A file's size in bytes and the time of its last change in nanoseconds; they change when it is replaced."""
    with contextlib.suppress(OSError):
        return [path.stat().st_size, path.stat().st_mtime_ns]
    return []


def _listed(given: Path) -> Iterator[ImageSource]:
    """The images of one argument, named by their keys."""
    if not given.exists():
        refuse_url(str(given))
        raise PhregError(f"image: there is no file {given}. Check the name.")
    if given.is_dir():
        for path in list_images(given):
            key = path.relative_to(given)
            yield ImageSource(path, key.as_posix(), key.with_suffix("").as_posix())
    elif is_archive(given):
        for member in list_members(given):
            yield ImageSource(given, member.name, member.key, member)
    else:
        yield ImageSource(given, given.name, Path(given.name).with_suffix("").as_posix())


def _prefixes(kind: str) -> list[str]:
    """``labels.street`` -> ``labels``, ``labels.street``: a name may end in either."""
    parts = kind.split(".")
    return [".".join(parts[: i + 1]) for i in range(len(parts))]


def _collides(name: str, taken: set[str], kinds: set[str]) -> bool:
    """Whether files ``NAME.npy`` and ``NAME.KIND.npy`` of a name are those of a name that is taken."""
    if name in taken:
        return True
    return any(
        f"{name}.{kind}" in taken or (name.endswith(f".{kind}") and name[: -len(kind) - 1] in taken) for kind in kinds
    )
