"""The bundle: a folder that a device serves dense features from. ``docs/bundle-format.md`` is its written contract."""

from __future__ import annotations

import hashlib
import io
import json
import zipfile
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from phreg_deploy.errors import PhregError
from phreg_deploy.spec import Batches, ModelSpec, Preprocess, Sizes

FORMAT = 3
MANIFEST, GRAPH, REFERENCE, POSITIONS = "manifest.json", "model.onnx", "reference.npz", "pos_embed.npy"
CALIBRATION = "calibration.json"
STAMP = (1980, 1, 1, 0, 0, 0)  # the oldest date a zip can hold: the same bundle has the same bytes on any day

# 1st-percentile patch cosine at least; change of the norm-outlier rate at most, in percentage points; share of patches
# with the same nearest neighbour at least. "exam_p1": between two runtimes on one graph. They round differently, and every
# rounding moves others: for INT8 .995 was measured in float32, .983 with bfloat16 around the 8-bit layers; for FP8 .967 with
# FP16 against FP32 around it; for bfloat16 .9980-.9992 on a ViT-Tiny and its student, where PyTorch's own has .9986.
GATES = {
    "fp32": {"cosine_p1": 0.99999, "outlier_points": 0.0},
    "fp16": {"cosine_p1": 0.999, "outlier_points": 0.05},
    "bf16": {"cosine_p1": 0.999, "outlier_points": 0.05, "exam_p1": 0.997},
    "int8": {"cosine_p1": 0.99, "outlier_points": 0.1, "neighbours": 0.75, "exam_p1": 0.97},
    "fp8": {"cosine_p1": 0.99, "outlier_points": 0.1, "neighbours": 0.75, "exam_p1": 0.95},
}


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
    def from_json(cls, data: dict[str, Any]) -> Manifest:
        version = data.get("format") if isinstance(data, dict) else None
        if not isinstance(version, int):
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
        if fields["precision"] not in GATES:
            raise PhregError(f"manifest: got precision {fields['precision']!r}, expected one of {', '.join(GATES)}.")
        return cls(**fields)


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
        folder = Path(folder)
        path = folder / MANIFEST
        if not path.is_file():
            found = (
                "there is nothing"
                if not folder.exists()
                else "there is a file"
                if folder.is_file()
                else "the folder holds no manifest.json"
            )
            hint = (
                " It holds a model: run `phreg-deploy export` on it first."
                if (folder / "model.safetensors").is_file()
                else ""
            )
            raise PhregError(
                f"bundle: got {folder}, where {found}; expected a folder written by `phreg-deploy export`.{hint}"
            )
        try:
            manifest = Manifest.from_json(json.loads(path.read_text()))
        except (json.JSONDecodeError, UnicodeDecodeError) as error:
            raise PhregError(f"bundle: {path} is not valid JSON ({error}); copy or export the bundle again.") from None
        except PhregError as error:
            raise PhregError(f"bundle: {path}: {error}") from None
        missing = [name for name in manifest.files if not (folder / name).is_file()]
        if missing:
            raise PhregError(f"bundle: {folder} lacks {', '.join(missing)}; copy or export the bundle again.")
        return cls(folder, manifest)

    @property
    def graph(self) -> Path:
        return self.folder / GRAPH

    def verify(self) -> None:
        """Raise ``PhregError`` unless every file has the hash that the manifest gives it."""
        for name, expected in self.manifest.files.items():
            got = file_digest(self.folder / name)
            if got != expected:
                raise PhregError(
                    f"bundle: {self.folder / name} has sha256 {got[:16]}…, expected {expected[:16]}…: it was changed or damaged. Copy or export the bundle again."
                )

    def positions(self) -> np.ndarray:
        """The base position embedding, float32 ``(gh, gw, C)``; only in bundles with several sizes."""
        return self._load(POSITIONS, lambda p: np.load(p, allow_pickle=False))

    def reference(self) -> dict[str, np.ndarray]:
        """Seeded inputs and the PyTorch model's outputs, keyed ``{case}/{tensor}``, e.g. ``0/image``, ``0/features``."""
        return self._load(REFERENCE, _read_npz)

    def cases(self) -> list[dict[str, np.ndarray]]:
        """The reference, one dictionary per case."""
        flat = self.reference()
        count = 1 + max(int(key.split("/")[0]) for key in flat)
        return [
            {key.split("/", 1)[1]: value for key, value in flat.items() if key.startswith(f"{i}/")}
            for i in range(count)
        ]

    def _load(self, name: str, read: Any) -> Any:
        path = self.folder / name
        if not path.is_file():
            raise PhregError(f"bundle: {self.folder} has no {name}; export the bundle again.")
        try:
            return read(path)
        except (OSError, ValueError, EOFError, KeyError, zipfile.BadZipFile) as error:
            raise PhregError(f"bundle: {path} cannot be read ({error}); copy or export the bundle again.") from None


def _read_npz(path: Path) -> dict[str, np.ndarray]:
    with open(path, "rb") as file, np.load(file, allow_pickle=False) as data:
        return dict(data)


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
    return (Path(path) / MANIFEST).is_file()


def portrait(manifest: Manifest) -> dict[str, str]:
    """The manifest as the graph carries it, so that ``model.onnx`` says by itself how it wants to be fed."""
    facts = manifest.to_json()
    return {f"phreg.{key}": json.dumps(facts[key], sort_keys=True) for key in facts if key != "files"}


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
