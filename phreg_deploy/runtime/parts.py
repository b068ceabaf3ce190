"""Run a bundle on any number of images, in batches that it serves."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from phreg_deploy.bundle.exam import check_shapes
from phreg_deploy.bundle.manifest import Manifest
from phreg_deploy.runtime.dense_features import DenseFeatures


def dense_in_parts(
    manifest: Manifest, images: Any, size: tuple[int, int], run: Callable[[Any], dict[str, np.ndarray]]
) -> DenseFeatures:
    """Features of ``images``, which can be sliced, at the input size (height, width).

    Args:
        run: the outputs of at most ``manifest.batches.highest`` of them, for at least ``lowest``.

    Raises:
        PhregError: outputs of other shapes than the manifest's.
    """
    lowest, highest, parts = manifest.batches.lowest, manifest.batches.highest, []
    for start in range(0, len(images), highest):
        part = images[start : start + highest]
        outputs = run(part)
        check_shapes(manifest, outputs, (max(len(part), lowest), *size, 3))
        parts.append({name: value[: len(part)] for name, value in outputs.items()})
    joined = parts[0] if len(parts) == 1 else {name: np.concatenate([p[name] for p in parts]) for name in parts[0]}
    return DenseFeatures.of(joined, manifest.norm_median, manifest.heads)
