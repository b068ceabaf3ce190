"""Read and verify a bundle, the folder that a device serves dense features from (``docs/bundle-format.md``)."""

from __future__ import annotations

import hashlib
import json
import os
import struct
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import numpy as np

from phreg_deploy.arguments import refuse_url
from phreg_deploy.bundle.exam import read_cases, read_positions
from phreg_deploy.bundle.manifest import GRAPH, MANIFEST, POSITIONS, REFERENCE, ROTARY, Manifest
from phreg_deploy.bundle.onnx_metadata import read_metadata
from phreg_deploy.bundle.validity import check_files, read_manifest
from phreg_deploy.errors import PhregError
from phreg_deploy.hub.download import local_path
from phreg_deploy.json_files import check_regular, read_json

T = TypeVar("T")
AGAIN = "copy or export the bundle again"

# Starts each key of the graph's metadata.
METADATA_PREFIX = "phreg."
# numpy and zipfile raise these on damaged or foreign files.
DAMAGED = (OSError, ValueError, EOFError, LookupError, RuntimeError, ArithmeticError, struct.error, zipfile.BadZipFile)


@dataclass(frozen=True)
class Bundle:
    """A bundle on disk whose manifest was read; ``verify`` compares every file with its hash."""

    folder: Path
    manifest: Manifest

    @classmethod
    def read(cls, folder: Path | str) -> Bundle:
        """Read the manifest.

        ``folder``: a folder, or ``hf-hub:org/name``, which is downloaded and raises as ``hub.download.local_path``.
        Raises ``PhregError`` if there is no folder or no manifest, if the manifest is damaged or of a newer format, or
        if a file is missing.
        """
        refuse_url(str(folder))
        folder = local_path(folder)
        path = folder / MANIFEST
        if not os.path.isfile(path):
            raise PhregError(_no_bundle(folder))
        check_regular(folder, [MANIFEST])
        try:
            manifest = read_manifest(read_json(path))
            check_files(manifest.files, manifest.required())
        except PhregError as error:
            raise PhregError(f"bundle: {path}: {error}") from None
        except (OSError, ValueError, RecursionError) as error:
            raise PhregError(f"bundle: {path} is not valid JSON ({error}); {AGAIN}.") from None
        check_regular(folder, list(manifest.files))
        return cls(folder, manifest)

    @property
    def graph(self) -> Path:
        return self.folder / GRAPH

    def verify(self) -> None:
        """Compare files with hashes, and the graph's metadata with the manifest; raise ``PhregError`` if any differ."""
        check_files(self.manifest.files, self.manifest.required())
        for name, expected in self.manifest.files.items():
            if self._load(name, file_digest) != expected:
                raise PhregError(
                    f"bundle: {self.folder / name} has another sha256 than {MANIFEST} says, {expected[:16]}…: it was "
                    "changed or damaged. Copy or export the bundle again."
                )
        self._compare_with_graph()

    def _compare_with_graph(self) -> None:
        """Raise unless the graph's metadata holds the same manifest; ``verify`` has checked the graph's hash."""
        metadata = self._load(GRAPH, read_metadata)
        try:
            values = {
                key.removeprefix(METADATA_PREFIX): json.loads(value)
                for key, value in metadata.items()
                if key.startswith(METADATA_PREFIX)
            }
            graph = read_manifest({**values, "files": self.manifest.files})
        except (PhregError, ValueError, RecursionError) as error:
            raise PhregError(f"bundle: {self.graph} does not say how it is fed ({error}); {AGAIN}.") from None
        differing = [key for key in Manifest.__dataclass_fields__ if getattr(graph, key) != getattr(self.manifest, key)]
        if differing:
            raise PhregError(
                f"bundle: {self.folder / MANIFEST} and {GRAPH} disagree on {', '.join(differing)}: one of them was "
                "edited, or is another bundle's. Copy or export the bundle again."
            )

    def positions(self) -> np.ndarray:
        """Read the position embedding at the model's own grid, float32 ``(gh, gw, C)``; only for several sizes."""
        model = self.manifest.model
        return self._load(POSITIONS, lambda path: read_positions(path, (*model.grid, model.width)))

    def frequencies(self) -> np.ndarray:
        """Read the rotary embedding's frequencies, float32 ``(2, L, H, D / 2)``; only if ``rotary`` is an input."""
        rotary = self.manifest.rotary
        assert rotary is not None
        shape = (2, rotary.layers, rotary.heads, rotary.pairs)
        return self._load(ROTARY, lambda path: read_positions(path, shape))

    def cases(self) -> list[dict[str, np.ndarray]]:
        """Read the exam, a dictionary per case: ``image``, ``features``, ``token_norm`` and perhaps ``cls``."""
        return self._load(REFERENCE, lambda path: read_cases(path, self.manifest))

    def _load(self, name: str, read: Callable[[Path], T]) -> T:
        path = self.folder / name
        check_regular(self.folder, [name])
        try:
            return read(path)
        except DAMAGED as error:
            raise PhregError(f"bundle: {path} cannot be read ({error}); {AGAIN}.") from None


def _no_bundle(folder: Path) -> str:
    """Return the message for a folder without manifest."""
    there = "the folder holds no manifest.json"
    if not os.path.exists(folder):
        there = "there is nothing"
    elif os.path.isfile(folder):
        there = "there is a file"
    hint = ""
    if os.path.isfile(folder / "model.safetensors"):
        hint = " It holds a model: run `phreg-deploy export` on it first."
    return f"bundle: got {folder}, where {there}; expected a folder written by `phreg-deploy export`.{hint}"


def file_digest(path: Path) -> str:
    """Return the sha256 of a file in hexadecimal."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while piece := file.read(1 << 20):
            digest.update(piece)
    return digest.hexdigest()


def is_bundle(path: Path | str) -> bool:
    """Return whether a folder, or a repository on the hub, holds a manifest."""
    return os.path.isfile(local_path(path) / MANIFEST)
