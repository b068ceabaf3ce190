"""Bundles with files that run something, lead out, take gigabytes, or never end."""

from __future__ import annotations

import json
import pickle
import shutil
import struct
import zipfile
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.reliability.hostile import files
from benchmarks.reliability.hostile.case import ENDLESS, Case, Place
from benchmarks.reliability.subjects import HERE
from tests.bundle_changes import write_hashes


def bundle_cases() -> dict[str, Case]:
    """Bundles for `extract`, with right hashes where they can have some."""
    cases = {}
    for name in ("manifest.json", "model.onnx", "reference.npz"):
        for kind in ENDLESS:
            cases[f"bundle, {name}, {kind}"] = Case("bundles", partial(_endless_bundle, name, kind))
    for name in ("../../../etc/passwd", "/etc/passwd", "..", "", "a/b", "x\0y", "nul\\x", "/dev/zero"):
        cases[f"bundle, manifest names {name!r}"] = Case("bundles", partial(_listed, name))
    cases["bundle, manifest names 100,000 files"] = Case("bundles", _many_listed)
    cases["bundle, manifest nested 100,000 deep"] = Case("bundles", lambda p: _bundle(p, manifest_json=b"[" * 100_000))
    cases["bundle, manifest of 65 MB"] = Case("bundles", lambda p: _bundle(p, manifest_json=b" " * (65 << 20)))
    cases["bundle, weights in another folder"] = Case("bundles", partial(_external, "../../../etc/passwd"))
    cases["bundle, weights in a device"] = Case("bundles", partial(_external, "/dev/zero"))
    cases["bundle, exam of 2.5 GB, squeezed"] = Case("bundles", _squeezed_exam)
    cases["bundle, exam with pickled objects"] = Case("bundles", _pickled_exam)
    cases["bundle, exam of 50,000 members"] = Case("bundles", _many_members)
    cases["bundle, graph of 100,000 properties"] = Case("bundles", _many_properties)
    return cases


def _bundle(place: Place, **changes: bytes) -> Sequence[object]:
    folder = files.changed(place.subjects.bundle, place.inputs / "copy", **changes)
    return place.extract(place.subjects.photos, bundle=folder)


def _endless_bundle(name: str, kind: str, place: Place) -> Sequence[object]:
    folder = _copy(place)
    files.endless(folder / name, kind)
    return place.extract(place.subjects.photos, bundle=folder)


def _listed(name: str, place: Place) -> Sequence[object]:
    return _bundle(place, manifest_json=_manifest(place, {name: "0" * 64}))


def _many_listed(place: Place) -> Sequence[object]:
    return _bundle(place, manifest_json=_manifest(place, {f"f{i}": "0" * 64 for i in range(100_000)}))


def _manifest(place: Place, listed: dict[str, str]) -> bytes:
    manifest = json.loads((place.subjects.bundle / "manifest.json").read_text())
    manifest["files"] |= listed
    return json.dumps(manifest).encode()


def _checked(place: Place, change: Callable[[Path], object]) -> Sequence[object]:
    """Change the exam, which `check` reads."""
    return ["check", _hashed(place, change)[1], *HERE]


def _hashed(place: Place, change: Callable[[Path], object]) -> Sequence[object]:
    folder = _copy(place)
    change(folder)
    return place.extract(place.subjects.photos, bundle=write_hashes(folder))


def _graph(place: Place, change: Callable[[Any], None]) -> Sequence[object]:
    import onnx

    def changed(folder: Path) -> None:
        model = onnx.load(folder / "model.onnx")
        change(model)
        (folder / "model.onnx").write_bytes(model.SerializeToString())

    return _hashed(place, changed)


def _external(location: str, place: Place) -> Sequence[object]:
    def change(model: Any) -> None:
        tensor = next(t for t in model.graph.initializer if len(t.raw_data) > 1000)
        length = len(tensor.raw_data)
        tensor.ClearField("raw_data")
        tensor.data_location = 1
        for key, value in (("location", location), ("offset", "0"), ("length", str(length))):
            entry = tensor.external_data.add()
            entry.key, entry.value = key, value

    return _graph(place, change)


def _many_properties(place: Place) -> Sequence[object]:
    def change(model: Any) -> None:
        for i in range(100_000):
            entry = model.metadata_props.add()
            entry.key, entry.value = f"phreg.x{i}", "[" * 100

    return _graph(place, change)


def _squeezed_exam(place: Place) -> Sequence[object]:
    def change(folder: Path) -> None:
        with zipfile.ZipFile(folder / "reference.npz", "w", zipfile.ZIP_DEFLATED, compresslevel=1) as archive:
            for name in ("image", "features", "cls", "token_norm"):
                with archive.open(f"0/{name}.npy", "w", force_zip64=True) as file:
                    file.write(_npy("|u1", f"({640 << 20},)"))
                    for _ in range(640):
                        file.write(bytes(1 << 20))

    return _checked(place, change)


def _pickled_exam(place: Place) -> Sequence[object]:
    def change(folder: Path) -> None:
        with zipfile.ZipFile(folder / "reference.npz", "w") as archive:
            for name in ("image", "features", "cls", "token_norm"):
                archive.writestr(f"0/{name}.npy", _npy("|O", "(1,)") + pickle.dumps(files.Runs(place.marker)))

    return _checked(place, change)


def _many_members(place: Place) -> Sequence[object]:
    def change(folder: Path) -> None:
        with zipfile.ZipFile(folder / "reference.npz", "w") as archive:
            for i in range(50_000):
                archive.writestr(f"{i}/image.npy", b"")

    return _checked(place, change)


def _npy(kind: str, shape: str) -> bytes:
    text = f"{{'descr': '{kind}', 'fortran_order': False, 'shape': {shape}, }}\n".encode()
    return b"\x93NUMPY\1\0" + struct.pack("<H", len(text)) + text


def _copy(place: Place) -> Path:
    return Path(shutil.copytree(place.subjects.bundle, place.inputs / "copy"))
