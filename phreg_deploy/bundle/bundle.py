"""The bundle: a folder that a device serves dense features from. ``docs/bundle-format.md`` is its written contract."""

from __future__ import annotations

import hashlib
import json
import os
import struct
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from phreg_deploy.arguments import refuse_url
from phreg_deploy.bundle.exam import read_cases, read_positions
from phreg_deploy.bundle.manifest import GRAPH, MANIFEST, POSITIONS, REFERENCE, Manifest
from phreg_deploy.bundle.onnx_metadata import read_metadata
from phreg_deploy.bundle.validity import check_files, read_manifest
from phreg_deploy.errors import PhregError
from phreg_deploy.json_files import check_regular, read_json

T = TypeVar("T")

METADATA_PREFIX = "phreg."  # before each key of the graph's metadata
UNREADABLE = (
    OSError,
    ValueError,
    EOFError,
    KeyError,
    NotImplementedError,
    RuntimeError,
    OverflowError,
    struct.error,
    zipfile.BadZipFile,
)  # fmt: skip  (what numpy and zipfile raise on files that others wrote)


@dataclass(frozen=True)
class Bundle:
    """A bundle on disk that has been read; ``verify`` compares every file with its hash."""

    folder: Path
    manifest: Manifest

    @classmethod
    def read(cls, folder: Path | str) -> Bundle:
        """Read the manifest.

        Raises:
            PhregError: no folder, no manifest, damaged, of a newer format, or a file that is missing.
        """
        refuse_url(str(folder))
        folder = Path(folder)
        path = folder / MANIFEST
        if not os.path.isfile(path):
            found = (
                "there is nothing"
                if not os.path.exists(folder)
                else "there is a file"
                if os.path.isfile(folder)
                else "the folder holds no manifest.json"
            )
            hint = (
                " It holds a model: run `phreg-deploy export` on it first."
                if os.path.isfile(folder / "model.safetensors")
                else ""
            )
            raise PhregError(
                f"bundle: got {folder}, where {found}; expected a folder written by `phreg-deploy export`.{hint}"
            )
        check_regular(folder, [MANIFEST])
        try:
            manifest = read_manifest(read_json(path))
            check_files(manifest.files, manifest.required())
        except PhregError as error:
            raise PhregError(f"bundle: {path}: {error}") from None
        except (OSError, ValueError, RecursionError) as error:
            raise PhregError(f"bundle: {path} is not valid JSON ({error}); copy or export the bundle again.") from None
        check_regular(folder, list(manifest.files))
        return cls(folder, manifest)

    @property
    def graph(self) -> Path:
        return self.folder / GRAPH

    def verify(self) -> None:
        """Raise ``PhregError`` unless every file has the hash that the manifest gives it, and the graph says what it says."""
        check_files(self.manifest.files, self.manifest.required())
        for name, expected in self.manifest.files.items():
            if self._load(name, file_digest) != expected:
                raise PhregError(
                    f"bundle: {self.folder / name} has another sha256 than {MANIFEST} says, {expected[:16]}…: it was changed or damaged. Copy or export the bundle again."
                )
        self._compare()

    def _compare(self) -> None:
        """Raise unless the manifest is the one that was written into the graph, of which there is a hash."""
        written = self._load(GRAPH, read_metadata)
        try:
            facts = {
                k.removeprefix(METADATA_PREFIX): json.loads(v)
                for k, v in written.items()
                if k.startswith(METADATA_PREFIX)
            }
            graph = read_manifest({**facts, "files": self.manifest.files})
        except (PhregError, ValueError, RecursionError) as error:
            raise PhregError(
                f"bundle: {self.graph} does not say how it is fed ({error}); copy or export the bundle again."
            ) from None
        differing = [key for key in Manifest.__dataclass_fields__ if getattr(graph, key) != getattr(self.manifest, key)]
        if differing:
            raise PhregError(
                f"bundle: {self.folder / MANIFEST} and {GRAPH} disagree on {', '.join(differing)}: one of them was edited, or is another bundle's. Copy or export the bundle again."
            )

    def positions(self) -> np.ndarray:
        """The base position embedding, float32 ``(gh, gw, C)``; only in bundles with several sizes."""
        model = self.manifest.model
        return self._load(POSITIONS, lambda path: read_positions(path, (*model.grid, model.width)))

    def cases(self) -> list[dict[str, np.ndarray]]:
        """The reference: seeded inputs and the right answers, one dictionary per case.

        Each holds ``image``, ``features``, ``token_norm``, and ``cls`` where the bundle has it, of shapes that the manifest allows.
        """
        return self._load(REFERENCE, lambda path: read_cases(path, self.manifest))

    def _load(self, name: str, read: Callable[[Path], T]) -> T:
        path = self.folder / name
        check_regular(self.folder, [name])
        try:
            return read(path)
        except UNREADABLE as error:
            raise PhregError(f"bundle: {path} cannot be read ({error}); copy or export the bundle again.") from None


def file_digest(path: Path) -> str:
    """sha256 of a file, read in pieces."""
    with open(path, "rb") as file:
        return (
            hashlib.file_digest(file, "sha256").hexdigest() if hasattr(hashlib, "file_digest") else _digest_3_10(file)
        )


def _digest_3_10(file: Any) -> str:
    digest = hashlib.sha256()
    while piece := file.read(1 << 20):
        digest.update(piece)
    return digest.hexdigest()


def is_bundle(path: Path | str) -> bool:
    return os.path.isfile(Path(path) / MANIFEST)
