"""Write the files of a bundle: the graph's metadata, the manifest with the hash of every file, arrays without dates."""

from __future__ import annotations

import io
import json
import zipfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from phreg_deploy.bundle.bundle import METADATA_PREFIX, file_digest
from phreg_deploy.bundle.manifest import ENGINES_SIGNATURE, MANIFEST, SIGNATURE, Manifest
from phreg_deploy.cards.bundle import bundle_card
from phreg_deploy.cards.metadata import CARD

# The oldest date that a zip can hold. With a fixed date, the same arrays always give the same bytes.
STAMP = (1980, 1, 1, 0, 0, 0)


def onnx_metadata(manifest: Manifest) -> dict[str, str]:
    """Return the manifest as metadata of the graph, which tells a reader of ``model.onnx`` alone how to feed it."""
    values = manifest.to_json()
    return {f"{METADATA_PREFIX}{key}": json.dumps(values[key], sort_keys=True) for key in values if key != "files"}


def write_onnx_metadata(graph: Any, manifest: Manifest) -> None:
    """Replace the ``metadata_props`` of an ``onnx.ModelProto`` by ``onnx_metadata(manifest)``."""
    del graph.metadata_props[:]
    for key, value in sorted(onnx_metadata(manifest).items()):
        entry = graph.metadata_props.add()
        entry.key, entry.value = key, value


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Write the manifest with the hash of every file in the folder, and the model card.

    Call it after the other files are written. The card has no hash: people edit it.
    """
    unlisted = (CARD, SIGNATURE, ENGINES_SIGNATURE)
    files = {p.name: file_digest(p) for p in sorted(folder.iterdir()) if p.is_file() and p.name not in unlisted}
    content = replace(manifest, files=files).to_json()
    (folder / MANIFEST).write_text(json.dumps(content, indent=1, sort_keys=True) + "\n")
    (folder / CARD).write_text(bundle_card(content), encoding="utf-8")


def write_npz(path: Path, arrays: dict[str, np.ndarray]) -> None:
    """Write an ``.npz`` file as ``np.savez`` does, with a fixed date: the same arrays give the same bytes."""
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as archive:
        for name, array in arrays.items():
            data = io.BytesIO()
            np.lib.format.write_array(data, np.ascontiguousarray(array), allow_pickle=False)
            archive.writestr(zipfile.ZipInfo(f"{name}.npy", STAMP), data.getvalue())
