"""The bundle: a folder that a device serves dense features from. ``docs/bundle-format.md`` is its written contract."""

from __future__ import annotations

import hashlib
import io
import json
import os
import struct
import zipfile
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from phreg_deploy.arguments import refuse_url
from phreg_deploy.documents import check_regular, read_json
from phreg_deploy.errors import PhregError
from phreg_deploy.exam import read_cases, read_positions
from phreg_deploy.gates import GATES
from phreg_deploy.graph_facts import read_metadata
from phreg_deploy.spec import Batches, ModelSpec, Preprocess, Sizes
from phreg_deploy.validity import check_files, check_manifest

T = TypeVar("T")

FORMAT = 3
MANIFEST, GRAPH, REFERENCE, POSITIONS = "manifest.json", "model.onnx", "reference.npz", "pos_embed.npy"
CALIBRATION = "calibration.json"
MARK = "phreg."  # before each key of the graph's metadata
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
STAMP = (1980, 1, 1, 0, 0, 0)  # the oldest date a zip can hold: the same bundle has the same bytes on any day


@dataclass(frozen=True)
class Manifest:
    """What ``manifest.json`` says. ``inputs`` and ``outputs`` map names to ``{"dtype", "shape"}``.

    ``norm_median``: the base model's median pre-norm patch-token norm, which live artifact rates are measured against;
    None where nobody measured it. ``source``: where the weights came from, with their sha256. ``float_parts``: what
    stayed in a higher precision than ``precision``. ``quantisation``: what ``calibrate`` did and measured; None in a
    bundle that was not calibrated.
    """

    model: ModelSpec
    preprocess: Preprocess
    sizes: Sizes
    batches: Batches
    precision: str
    opset: int
    inputs: dict[str, dict[str, Any]]
    outputs: dict[str, dict[str, Any]]
    source: dict[str, Any]
    versions: dict[str, str]
    norm_median: float | None = None
    float_parts: list[str] = field(default_factory=list)
    random_weights: bool = False
    quantisation: dict[str, Any] | None = None
    files: dict[str, str] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        own = {k: getattr(self, k) for k in self.__dataclass_fields__}
        stored = {k: own[k].to_json() for k in ("model", "preprocess", "sizes", "batches")}
        return {"format": FORMAT, **own, **stored}

    @classmethod
    def from_json(cls, data: Any) -> Manifest:
        """Read a manifest's JSON; an unknown key, a wrong type or an absurd number is a ``PhregError``."""
        version = data.get("format") if isinstance(data, dict) else None
        if type(version) is not int or version < 1:
            raise PhregError("manifest: it has no format number; it is damaged or not ours.")
        if version > FORMAT:
            raise PhregError(
                f"manifest: got format {version}, expected at most {FORMAT}. Upgrade phreg-deploy, or export the bundle again."
            )
        fields = {k: v for k, v in data.items() if k != "format"}
        if version == 1:  # before calibration
            fields.setdefault("quantisation", None)
        missing = sorted(set(cls.__dataclass_fields__) - set(fields))
        unknown = sorted(set(fields) - set(cls.__dataclass_fields__))
        if missing or unknown:
            raise PhregError(
                f"manifest: missing keys {missing}, unknown keys {unknown}; it is damaged. Export the bundle again."
            )
        fields.update(
            model=ModelSpec.from_json(fields["model"]), preprocess=Preprocess.from_json(fields["preprocess"]),
            sizes=Sizes.from_json(fields["sizes"]), batches=Batches.from_json(fields["batches"]),
        )  # fmt: skip
        for key in ("inputs", "outputs", "source", "versions", "files"):
            if not isinstance(fields[key], dict):
                raise PhregError(f"manifest: {key} is no object; it is damaged. Export the bundle again.")
        manifest = cls(**fields)
        check_manifest(manifest, GATES)
        return manifest

    def required(self) -> list[str]:
        """Names of the files that are read."""
        return [
            GRAPH, REFERENCE,
            *([POSITIONS] if "pos_embed" in self.inputs else []), *([CALIBRATION] if self.quantisation else []),
        ]  # fmt: skip


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
            manifest = Manifest.from_json(read_json(path))
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
            facts = {k.removeprefix(MARK): json.loads(v) for k, v in written.items() if k.startswith(MARK)}
            graph = Manifest.from_json({**facts, "files": self.manifest.files})
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


def portrait(manifest: Manifest) -> dict[str, str]:
    """The manifest as the graph carries it, so that ``model.onnx`` says by itself how it wants to be fed."""
    facts = manifest.to_json()
    return {f"{MARK}{key}": json.dumps(facts[key], sort_keys=True) for key in facts if key != "files"}


def engrave(graph: Any, manifest: Manifest) -> None:
    """Replace the ``metadata_props`` of an ONNX ``graph`` by the manifest's portrait."""
    del graph.metadata_props[:]
    for key, value in sorted(portrait(manifest).items()):
        entry = graph.metadata_props.add()
        entry.key, entry.value = key, value


def seal(folder: Path, manifest: Manifest) -> None:
    """Write the manifest of a folder whose other files are all there, with the hash of each."""
    files = {p.name: file_digest(p) for p in sorted(folder.iterdir()) if p.is_file()}
    (folder / MANIFEST).write_text(
        json.dumps(replace(manifest, files=files).to_json(), indent=1, sort_keys=True) + "\n"
    )


def write_npz(path: Path, arrays: dict[str, np.ndarray]) -> None:
    """``np.savez`` without the clock: the same arrays give the same bytes."""
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as archive:
        for name, array in arrays.items():
            data = io.BytesIO()
            np.lib.format.write_array(data, np.ascontiguousarray(array), allow_pickle=False)
            archive.writestr(zipfile.ZipInfo(f"{name}.npy", STAMP), data.getvalue())
