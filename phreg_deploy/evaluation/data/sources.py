"""Open what is evaluated, a timm model, a student or a bundle, behind one call. A bundle needs no PyTorch."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from phreg_deploy.bundle.bundle import is_bundle
from phreg_deploy.errors import PhregError
from phreg_deploy.layers import Layers, parse_layers
from phreg_deploy.readout import Readout
from phreg_deploy.spec import Preprocess
from phreg_deploy.student_record import model_path, read_readout

# Images a call of a PyTorch model.
BATCH = 4


@dataclass(frozen=True)
class Source:
    """``run`` turns uint8 images ``(B, H, W, 3)`` at ``size`` into a bundle's outputs by name, float32.

    ``digest`` identifies everything that decides the outputs, for the cache. ``layers``: as of a ``Head``.
    """

    name: str
    kind: str
    digest: str
    size: tuple[int, int]
    grid: tuple[int, int]
    preprocess: Preprocess
    layers: tuple[int, ...] | None
    runs_on: str
    run: Callable[[np.ndarray], dict[str, np.ndarray]]


def open_source(
    name: str,
    checkpoint: Path | None,
    size: tuple[int, int] | None,
    layers: str | None,
    readout: tuple[str | None, bool | None],
    device: str,
    backend: str,
    stack: ExitStack,
) -> Source:
    """Open a timm name, a student's folder or a bundle; ``stack`` closes it.

    Args:
        size: (height, width) of the input; None for its own.
        layers: as ``--layers`` of ``export``; None for the features after the last block.
        readout: name and projection of a PyTorch model's; what is None comes from a student's record.

    Raises:
        PhregError: a size or layers that it does not serve, or damaged files.
        BackendMissing: its backend or PyTorch is not installed.
    """
    if is_bundle(name):
        return _bundle(name, size, layers, backend, stack)
    return _model(name, checkpoint, size, layers, read_readout(name, *readout), device)


def _bundle(name: str, size: tuple[int, int] | None, layers: str | None, backend: str, stack: ExitStack) -> Source:
    from phreg_deploy.runtime.features import FeatureExtractor

    extractor = stack.enter_context(FeatureExtractor.load(name, backend))
    manifest = extractor.manifest
    manifest.need_features(name, "Take the bundle that has features too: a probe is trained on them.")
    size = size or manifest.sizes.default
    manifest.sizes.check(size, manifest.model.patch)
    blocks = None if layers is None else parse_layers(layers, manifest.model.depth)
    served = () if manifest.layers is None else manifest.layers.blocks
    missing = [block for block in blocks or () if block not in served]
    if missing:
        raise PhregError(
            f"layers: {name} does not serve layer {missing[0]}, expected {', '.join(map(str, served)) or 'none'}. "
            "Export it with --layers."
        )
    files = {key: value for key, value in manifest.files.items() if not key.endswith(".npz")}
    facts = {"files": files, "backend": extractor.backend, "compute": extractor.compute}
    patch = manifest.model.patch
    return Source(
        name,
        "bundle",
        _digest(facts),
        size,
        (size[0] // patch[0], size[1] // patch[1]),
        extractor.preprocess,
        blocks,
        extractor.backend,
        lambda images: extractor.dense(images).outputs(),
    )


def _model(
    name: str, checkpoint: Path | None, size: tuple[int, int] | None, layers: str | None, readout: Readout, device: str
) -> Source:
    from phreg_deploy.models.answers import model_answers
    from phreg_deploy.models.hardware import find_device
    from phreg_deploy.models.loading import load_model, model_preprocess
    from phreg_deploy.models.origin import model_identity
    from phreg_deploy.models.readouts import with_readout

    place = find_device(device)
    model = load_model(name, checkpoint=checkpoint, image_size=size)
    model, steps = with_readout(model, readout), model_preprocess(model)
    blocks = None if layers is None else parse_layers(layers, len(model.blocks))
    readout.check_outputs(blocks or (), len(model.blocks), False)
    answer = model_answers(model, steps, place, layers=None if blocks is None else Layers(blocks, True))

    def run(images: np.ndarray) -> dict[str, np.ndarray]:
        parts = [answer(images[i : i + BATCH]) for i in range(0, len(images), BATCH)]
        return {key: np.concatenate([part[key] for part in parts]) for key in parts[0]}

    return Source(
        name,
        "student" if model_path(name).is_dir() else "timm",
        _digest({"identity": model_identity(model).to_json(), "readout": readout.to_json()}),
        tuple(model.patch_embed.img_size),
        tuple(model.patch_embed.grid_size),
        steps,
        blocks,
        place,
        run,
    )


def _digest(facts: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()
