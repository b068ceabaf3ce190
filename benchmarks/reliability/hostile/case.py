"""What a case of ``hostile`` is, and where it may write."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks.reliability.subjects import HERE, Subjects

# Files without end.
ENDLESS = ("pipe", "zero")


@dataclass(frozen=True)
class Place:
    """Folders of one case. ``root``: all of them; ``inputs``: what is hostile; ``output``: what a command writes.

    ``marker``: what a payload makes when it runs.
    """

    root: Path
    subjects: Subjects

    @property
    def inputs(self) -> Path:
        folder = self.root / "deep" / "in"
        folder.mkdir(parents=True, exist_ok=True)
        return folder

    @property
    def output(self) -> Path:
        return self.root / "deep" / "out"

    @property
    def marker(self) -> Path:
        return self.root / "it-ran"

    def extract(self, *words: object, bundle: Path | None = None) -> Sequence[object]:
        """The words of `extract` on the good bundle, or on another."""
        return ["extract", bundle or self.subjects.bundle, *words, "-o", self.output, "--quiet", *HERE]

    def write(self, name: str, data: bytes) -> Path:
        path = self.inputs / name
        path.write_bytes(data)
        return path


@dataclass(frozen=True)
class Case:
    """``make`` writes the input and returns a command. ``harmless``: to end with exit code 0 is right as well."""

    kind: str
    make: Callable[[Place], Sequence[object]]
    harmless: bool = False
