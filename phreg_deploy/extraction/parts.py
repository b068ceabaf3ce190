"""The part of an output that one process writes: which files are whole, by digest, and which images they hold.

``extraction.json`` in the output says what all parts have in common. ``.parts/03-of-16.jsonl`` is the journal of one
part: a line for each group of files that were renamed to their places, so a killed process leaves whole files alone.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from phreg_deploy.errors import FORCE, RESUME, PhregError
from phreg_deploy.extraction.feature_files import INDEX
from phreg_deploy.extraction.inputs.shards import Shard
from phreg_deploy.extraction.inputs.sources import ImageSource
from phreg_deploy.files.atomic import check_target
from phreg_deploy.files.temporary import make_locked_folder, open_locked
from phreg_deploy.json_files import read_json

PLAN, PARTS = "extraction.json", ".parts"


@dataclass(frozen=True)
class Group:
    """Files that were finished together: path in the output -> size and sha256; and the entries of their images."""

    files: dict[str, tuple[int, str]]
    images: list[dict[str, Any]]

    def is_whole(self, output: Path) -> bool:
        """Whether every file is there with its size and digest."""
        return all(_measure(output / name) == tuple(facts) for name, facts in self.files.items())


@dataclass
class Journal:
    """What a journal says; ``complete`` if it ends with the mark of a finished part."""

    backends: list[str] = field(default_factory=list)
    skipped: dict[str, str] = field(default_factory=dict)
    complete: bool = False


def journal_path(output: Path, shard: Shard) -> Path:
    return output / PARTS / f"{shard.name}.jsonl"


def read_lines(path: Path) -> Iterator[dict[str, Any]]:
    """The whole lines of a journal. A line that a killed process or a damaged disk cut off says nothing."""
    with contextlib.suppress(FileNotFoundError), open(path, encoding="utf-8", errors="replace") as file:
        for line in file:
            with contextlib.suppress(ValueError):
                record = json.loads(line) if line.endswith("\n") else None
                if isinstance(record, dict):
                    yield record


def read_groups(path: Path, summary: Journal | None = None) -> Iterator[Group]:
    """The groups of a journal, one after the other; ``summary`` is filled meanwhile."""
    summary = summary or Journal()
    for record in read_lines(path):
        summary.complete = record.get("complete") is True
        if "backend" in record:
            summary.backends.append(record["backend"])
        if "skipped" in record:
            summary.skipped[record["skipped"]] = record["reason"]
        if "files" in record:
            yield Group({name: (size, digest) for name, (size, digest) in record["files"].items()}, record["images"])


class Part(AbstractContextManager["Part"]):
    """One shard's part of ``output``, locked by this process. ``scratch``: a folder for files that are not whole."""

    def __init__(
        self, output: Path, shard: Shard, plan: dict[str, Any], backend: str, *, resume: bool, force: bool
    ) -> None:
        """Open the part.

        Raises:
            PhregError: another process writes it; it was begun before, without ``resume`` and ``force``; or the output
                was begun with another plan.
        """
        self.output, self.shard, self.backend = output, shard, backend
        self.path = journal_path(output, shard)
        self.scratch = self.path.with_suffix(".writing")
        self.done: dict[str, dict[str, Any]] = {}
        self._locked = self._file = -1
        _agree(output, {"version": 1, "shards": shard.count, **plan})
        lock = self.path.with_suffix(".lock")
        lock.touch()
        try:
            self._locked = open_locked(lock)
        except BlockingIOError:
            raise PhregError(
                f"shard: another process writes shard {shard} of {output}; give each process another shard."
            ) from None
        except OSError:  # a file system without locks
            self._locked = -1
        if self.path.exists() and not (resume or force):
            self.close()
            raise PhregError(
                f"shard: shard {shard} of {output} was begun before; add {RESUME} to continue it, or {FORCE} "
                "to start it over."
            )
        shutil.rmtree(self.scratch, ignore_errors=True)
        self.scratch.mkdir()

    def begin(self, sources: Sequence[ImageSource], resume: bool) -> None:
        """Start the journal; with ``resume``, keep the groups that are whole and whose images did not change.

        Raises ``PhregError`` if the part holds images that are not among ``sources``.
        """
        stamps = {source.name: source.stamp for source in sources}
        kept: list[Group] = []
        lost: list[str] = []
        for group in read_groups(self.path):
            if resume and (others := [entry["image"] for entry in group.images if entry["name"] not in stamps]):
                raise PhregError(
                    f"resume: {self.output} holds images that are not asked for now, e.g. {others[0]}; name the same "
                    "images as before."
                )
            unchanged = all(entry["stamp"] == stamps.get(entry["name"]) for entry in group.images)
            if resume and unchanged and group.is_whole(self.output):
                kept.append(group)
                continue
            lost += group.files
        if lost:
            # The index says that these files are whole, so it goes first.
            (self.output / INDEX).unlink(missing_ok=True)
        for name in lost:
            (self.output / name).unlink(missing_ok=True)
        fresh = self.scratch / "journal"
        with open(fresh, "w", encoding="utf-8") as file:
            for record in [{"shard": str(self.shard), "backend": self.backend}, *map(vars, kept)]:
                file.write(json.dumps(record) + "\n")
        os.replace(fresh, self.path)
        self._file = os.open(self.path, os.O_WRONLY | os.O_APPEND)
        self.done = {entry["name"]: entry for group in kept for entry in group.images}

    def publish(self, files: Sequence[str], images: list[dict[str, Any]]) -> None:
        """Rename ``files`` of the scratch folder to their places in the output, and note that they are whole.

        A file that is not in the scratch folder is in its place already.
        """
        facts = {}
        for name in files:
            made, place = self.scratch / name, self.output / name
            source = made if made.exists() else place
            facts[name] = _measure(source)
            if source is made:
                place.parent.mkdir(parents=True, exist_ok=True)
                os.replace(made, place)
        self._write({"files": facts, "images": images})
        self.done.update({entry["name"]: entry for entry in images})

    def skip(self, source: ImageSource, reason: str) -> None:
        """Note an image that cannot be read."""
        self._write({"skipped": str(source), "reason": reason})

    def finish(self) -> None:
        """Note that every image of the shard is done or skipped."""
        self._write({"complete": True, "images": len(self.done)})

    def _write(self, record: dict[str, Any]) -> None:
        data = (json.dumps(record) + "\n").encode()
        while data:
            data = data[os.write(self._file, data) :]

    def close(self) -> None:
        """Remove what is not whole, and unlock the part."""
        if self._file >= 0:
            os.close(self._file)
        if self._locked >= 0:
            shutil.rmtree(self.scratch, ignore_errors=True)
            os.close(self._locked)
        self._file = self._locked = -1

    def __exit__(self, *_error: object) -> None:
        self.close()


def _agree(output: Path, plan: dict[str, Any]) -> None:
    """Make the output folder and its plan, or compare the plan of the process that made it."""
    check_target(output, force=True)
    if not output.exists() or not any(output.iterdir()):
        # The folder gets its name with the plan in it, so other processes never see it without.
        made, lock = make_locked_folder(output)
        try:
            (made / PARTS).mkdir()
            (made / PLAN).write_text(json.dumps(plan, indent=1) + "\n")
            with contextlib.suppress(FileExistsError):
                _name(made, output)
        finally:
            shutil.rmtree(made, ignore_errors=True)
            if lock is not None:
                os.close(lock)
    if not (output / PLAN).exists():
        raise PhregError(
            f"output: {output} exists already and was not written in shards; choose another name, or remove it."
        )
    try:
        earlier = read_json(output / PLAN)
        flat = {**earlier, **earlier["settings"]}
    except (OSError, ValueError, KeyError, TypeError):
        raise PhregError(f"output: {output / PLAN} is damaged; choose another output, or remove it.") from None
    wanted = {**plan, **plan["settings"]}
    if differing := sorted(key for key in wanted if key != "settings" and flat.get(key) != wanted[key]):
        key = differing[0]
        raise PhregError(
            f"shard: {output} was begun with another {key} (there {flat.get(key)}, here {wanted[key]}); give all "
            "processes the same options, or choose another output."
        )


def _name(made: Path, output: Path) -> None:
    """Rename a folder to a name that is free or an empty folder. Raises ``FileExistsError`` if it is neither."""
    try:
        os.rename(made, output)
    except OSError as error:
        if error.errno in (errno.ENOTEMPTY, errno.EEXIST):
            raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(output)) from None
        raise


def _measure(path: Path) -> tuple[int, str] | None:
    """A file's size and sha256; None if it cannot be read."""
    try:
        with open(path, "rb") as file:
            digest = hashlib.sha256()
            size = 0
            while block := file.read(1 << 20):
                digest.update(block)
                size += len(block)
    except OSError:
        return None
    return size, digest.hexdigest()
