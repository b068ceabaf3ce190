"""Split images into those that a probe is trained on and those that it is tested on, by groups that stay together."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from phreg_deploy.errors import PhregError

FOLDERS = ("train", "val")
# Endings of names that number the frames of one video: "0016E5_07959" and "frame-03".
NUMBER = re.compile(r"[_-]?\d+$")


@dataclass(frozen=True)
class Split:
    """Names to train on and to test on; ``groups``: group of each name; ``how``: a sentence for reports."""

    train: tuple[str, ...]
    val: tuple[str, ...]
    groups: dict[str, str]
    how: str


def group_of(name: str, rule: str) -> str:
    """Return the group of an image: its folder and what ``rule`` keeps of its name.

    Args:
        rule: "prefix", the name without its last number (``0016E5`` of ``0016E5_07959``), or the name itself where
            nothing is left; "image", every image alone; "folder"; or a regular expression, whose first group, or whole
            match, is the group.

    Raises:
        PhregError: the regular expression is none, or does not match.
    """
    path = PurePosixPath(name)
    if rule == "image":
        return name
    if rule == "folder":
        return str(path.parent)
    if rule == "prefix":
        return str(path.with_name(NUMBER.sub("", path.stem) or path.name))
    try:
        match = re.search(rule, name)
    except re.error as error:
        raise PhregError(f"group: {rule!r} is no regular expression ({error}).") from None
    if match is None:
        raise PhregError(f"group: {rule!r} does not match the name {name}; expected a match in every name.")
    return (match[1] if match.re.groups else match[0]) or ""


def split_names(names: Sequence[str], how: str, rule: str, share: float) -> Split:
    """Split ``names``, paths relative to the images' folder.

    Args:
        how: "folders" (``train/`` and ``val/``), "hash", "auto" (folders where both are there, else hash), or two
            files of names with a comma between, ``train.txt,val.txt``.
        rule: see ``group_of``. share: of the groups to test on, with "hash"; a new image moves no other one.

    Raises:
        PhregError: a side is empty, a name of a list is unknown or in both, or ``how`` is something else.
    """
    groups = {name: group_of(name, rule) for name in names}
    first = {name: PurePosixPath(name).parts[0] for name in names}
    if how == "auto":
        how = "folders" if set(FOLDERS) <= set(first.values()) else "hash"
    if how == "folders":
        train, val = (tuple(n for n in names if first[n] == folder) for folder in FOLDERS)
        if not train or not val:
            raise PhregError("split: expected images in the folders train/ and val/; use --split hash.")
        return Split(train, val, groups, "by the folders train/ and val/")
    if how == "hash":
        return _by_hash(names, groups, rule, share)
    lists = how.split(",")
    if len(lists) != 2:
        raise PhregError(f"split: got {how!r}, expected auto, folders, hash, or two files TRAIN.txt,VAL.txt.")
    train, val = (_listed(Path(path.strip()), names) for path in lists)
    both = set(train) & set(val)
    if both:
        raise PhregError(f"split: {min(both)} is in both lists, expected each image in one of them.")
    return Split(train, val, groups, f"by the lists {lists[0]} and {lists[1]}")


def _by_hash(names: Sequence[str], groups: dict[str, str], rule: str, share: float) -> Split:
    place = {group: int(hashlib.sha256(group.encode()).hexdigest()[:8], 16) / 2**32 for group in groups.values()}
    if len(place) < 2:
        raise PhregError(
            f"split: the {len(names)} images are one group by --group {rule}, so none is left to test on. Use --group "
            "image where they are no frames of a video, a regular expression, or --split."
        )
    chosen = {group for group, value in place.items() if value < share}
    # With few groups, none or all of them may lie below the share.
    chosen = chosen or {min(place, key=place.__getitem__)}
    if len(chosen) == len(place):
        chosen.remove(max(place, key=place.__getitem__))
    train = tuple(n for n in names if groups[n] not in chosen)
    val = tuple(n for n in names if groups[n] in chosen)
    return Split(train, val, groups, f"by a hash of {len(place)} groups, {len(chosen)} of them to test on")


def _listed(path: Path, names: Sequence[str]) -> tuple[str, ...]:
    try:
        lines = [line.strip() for line in path.read_text().splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise PhregError(f"split: {path} cannot be read ({error}); expected one name of an image a line.") from None
    known = {str(PurePosixPath(name).with_suffix("")): name for name in names} | {name: name for name in names}
    unknown = [line for line in lines if line not in known]
    if unknown:
        raise PhregError(
            f"split: {path} names {unknown[0]!r}, but there is no such image with a truth; expected paths relative to "
            "the images' folder, with or without suffix."
        )
    if not lines:
        raise PhregError(f"split: {path} is empty, expected one name of an image a line.")
    return tuple(dict.fromkeys(known[line] for line in lines))
