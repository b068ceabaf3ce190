"""Writing a bundle: the manifest inside the graph, the manifest with the hash of every file, arrays without dates."""

from __future__ import annotations

import io
import json
import zipfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from phreg_deploy.bundle.bundle import METADATA_PREFIX, file_digest
from phreg_deploy.bundle.manifest import MANIFEST, Manifest

STAMP = (1980, 1, 1, 0, 0, 0)  # the oldest date a zip can hold: the same bundle has the same bytes on any day


def onnx_metadata(manifest: Manifest) -> dict[str, str]:
    """The manifest as the graph carries it, so that ``model.onnx`` says by itself how it wants to be fed."""
    facts = manifest.to_json()
    return {f"{METADATA_PREFIX}{key}": json.dumps(facts[key], sort_keys=True) for key in facts if key != "files"}


def write_onnx_metadata(graph: Any, manifest: Manifest) -> None:
    """Replace the ``metadata_props`` of an ONNX ``graph`` by the manifest's onnx_metadata."""
    del graph.metadata_props[:]
    for key, value in sorted(onnx_metadata(manifest).items()):
        entry = graph.metadata_props.add()
        entry.key, entry.value = key, value


def write_manifest(folder: Path, manifest: Manifest) -> None:
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
