"""Optimization profiles of TensorRT: the input shapes that a plan serves, derived from the bundle's manifest."""

from __future__ import annotations

import itertools
from dataclasses import dataclass

from phreg_deploy.bundle.manifest import Manifest
from phreg_deploy.spec import Stored


@dataclass(frozen=True)
class ProfileShapes(Stored):
    """One optimization profile: input name -> (smallest, best, largest) shape."""

    inputs: dict[str, list[list[int]]]

    def holds(self, shapes: dict[str, tuple[int, ...]]) -> bool:
        """Return whether inputs of these shapes run in this profile."""
        for name, shape in shapes.items():
            lowest, _, highest = self.inputs.get(name, ([], [], []))
            if len(shape) != len(lowest) or not all(a <= b <= c for a, b, c in zip(lowest, shape, highest)):
                return False
        return True


def profiles_of(manifest: Manifest) -> list[ProfileShapes]:
    """Return the optimization profiles of a bundle: one for a fixed size or a range, one per size of a list.

    Each covers all batch sizes and is tuned for the best one. If the smallest batch is not the best, it gets profiles
    of its own, which come first: tactics tuned for a full batch make a single frame slow.
    """
    batches, patch, width = manifest.batches, manifest.model.patch, manifest.model.width
    sizes = manifest.sizes.sizes
    triples = [sizes] if manifest.sizes.mode == "range" else [(size,) * 3 for size in sizes]
    profiles = []
    full = (batches.lowest, batches.best, batches.highest)
    alone = [(batches.lowest,) * 3] if batches.lowest < batches.best else []
    for numbers, triple in itertools.product([*alone, full], triples):
        inputs = {"image": [[b, *size, 3] for b, size in zip(numbers, triple)]}
        if "pos_embed" in manifest.inputs:
            inputs["pos_embed"] = [[1, (h // patch[0]) * (w // patch[1]), width] for h, w in triple]
        profiles.append(ProfileShapes(inputs))
    return profiles
