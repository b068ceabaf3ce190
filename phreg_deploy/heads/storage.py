"""Read and write the files of a head: ``head.safetensors`` and ``head.json`` (``docs/heads.md``), or a state dict."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

from phreg_deploy.arguments import WEIGHTS, refuse_url
from phreg_deploy.errors import PhregError
from phreg_deploy.extras import DISTILL, require
from phreg_deploy.files.atomic import atomic_folder
from phreg_deploy.json_files import read_json

# The format of head.json.
NEWEST = 1
FACTS, TENSORS = "head.json", "head.safetensors"
KEYS = {"task", "classes", "colours", "layers", "width", "ignore", "bins", "depth_range", "trained_on"}


def read_tensors(path: Path) -> dict[str, np.ndarray]:
    """Read a state dict from ``.safetensors``, or from ``.pth``, ``.pt`` or ``.bin`` by ``weights_only``; float32.

    Raises:
        PhregError: the file is missing, has another suffix, is damaged, or holds more than tensors or no finite ones.
        BackendMissing: safetensors is missing, or PyTorch for a file that is not ``.safetensors``.
    """
    refuse_url(str(path))
    if not path.is_file():
        raise PhregError(f"head: there is no file {path}.")
    if path.suffix not in WEIGHTS:
        raise PhregError(f"head: got {path.name}, expected {', '.join(WEIGHTS[:-1])} or {WEIGHTS[-1]}.")
    if path.suffix == ".safetensors":
        require("reading a head", evaluate=("safetensors",))
        from safetensors import SafetensorError
        from safetensors.numpy import load

        try:
            tensors = load(path.read_bytes())
        except (OSError, SafetensorError, TypeError, KeyError, ValueError) as error:
            raise PhregError(f"head: {path} is damaged or of another type ({error}); copy it again.") from None
    else:
        require(f"reading {path.name}", distill=DISTILL)
        from phreg_deploy.models.weights import read_weights

        tensors = {key: value.float().numpy() for key, value in read_weights(path).items()}
    floats = {key: np.asarray(value, np.float32) for key, value in tensors.items()}
    bad = sorted(key for key, value in floats.items() if not np.isfinite(value).all())
    if bad:
        raise PhregError(f"head: {bad[0]} in {path} holds NaN or infinity; expected finite weights.")
    return floats


def read_facts(folder: Path) -> dict[str, Any]:
    """Read ``head.json``: the facts by the names of ``KEYS``, and ``eps`` of a batch norm that is not folded, or None.

    Raises:
        PhregError: the file is missing, damaged, or of a newer format.
    """
    path = folder / FACTS
    try:
        facts = read_json(path)
    except (OSError, ValueError) as error:
        raise PhregError(f"head: {path} cannot be read ({error}); expected a folder written by `probe`.") from None
    version = facts.get("format") if isinstance(facts, dict) else None
    if type(version) is not int:
        raise PhregError(f"head: {path} is damaged (no format number); copy the head again.")
    if version > NEWEST:
        raise PhregError(f"head: {path} has format {version}, expected at most {NEWEST}. Upgrade phreg-deploy.")
    normalisation = facts.get("normalisation")
    kind = normalisation.get("kind") if isinstance(normalisation, dict) else None
    if kind not in ("folded", "standard", "batch_norm"):
        raise PhregError(
            f"head: {path} has the normalisation {normalisation!r}, expected kind folded, standard or batch_norm."
        )
    eps = normalisation.get("eps")
    if kind == "batch_norm" and not (type(eps) is float and 0 <= eps < 1):
        raise PhregError(f"head: {path} has the eps {eps!r} of a batch norm, expected a number from 0 to 1.")
    missing = sorted(KEYS - set(facts))
    if missing:
        raise PhregError(f"head: {path} is damaged (no {missing[0]}); copy the head again.")
    return {**{key: facts[key] for key in KEYS}, "eps": eps if kind == "batch_norm" else None}


def write_head(
    folder: Path,
    tensors: dict[str, np.ndarray],
    facts: dict[str, Any],
    force: bool = False,
    reads: Iterable[Path | None] = (),
) -> None:
    """Write ``head.json`` and ``head.safetensors``; the normalisation is folded. ``force``: see ``atomic_folder``."""
    require("writing a head", evaluate=("safetensors",))
    from safetensors.numpy import save

    document = {"format": NEWEST, "normalisation": {"kind": "folded"}, **facts}
    with atomic_folder(folder, force, reads) as place:
        (place / TENSORS).write_bytes(save({k: np.ascontiguousarray(v) for k, v in tensors.items()}))
        (place / FACTS).write_text(json.dumps(document, indent=1, sort_keys=True) + "\n")
