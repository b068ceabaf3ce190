"""What the charts of the page read: norm histograms by block, parity percentiles, sensitivities of layers; as JSON."""

from __future__ import annotations

from typing import Any

import numpy as np

from phreg_deploy.explorer.exploration import Exploration
from phreg_deploy.verify.maps import Maps

# Histograms of log2(norm / median), from 1/16 to 256 medians.
EDGES = np.arange(-4, 8.001, 0.125)


def chart_data(exploration: Exploration) -> dict[str, Any]:
    """Return the JSON of every chart; parts that were not measured are empty."""
    bundles = exploration.bundles
    return {
        "norms": [] if exploration.maps is None else norm_histograms(exploration.maps),
        "percentiles": {
            f"{b.name} and {b.check.by_image.reference}": b.check.by_image.percentiles
            for b in bundles
            if b.check.by_image is not None
        },
        "sensitivity": {b.name: list(b.layers) for b in bundles if b.layers},
    }


def norm_histograms(maps: Maps) -> list[dict[str, Any]]:
    """Share of patch tokens by norm after each block, in medians of the first model that has the block.

    ``centres``: the middle of each bin in medians. ``shares``: by model. ``largest``: in medians, by model.
    """
    centres = [round(float(2 ** (edge + 0.0625)), 4) for edge in EDGES[:-1]]
    charts = []
    for block in sorted({block for blocks in maps.norms.values() for block in blocks}):
        of_block = {model: np.nan_to_num(blocks[block]) for model, blocks in maps.norms.items() if block in blocks}
        median = max(float(np.median(next(iter(of_block.values())))), 1e-12)
        shares, largest = {}, {}
        for model, norms in of_block.items():
            place = np.log2(np.maximum(norms / median, 1e-12))
            counts, _ = np.histogram(np.clip(place, EDGES[0], EDGES[-1]), EDGES)
            shares[model] = [round(float(share), 6) for share in counts / len(norms)]
            largest[model] = float(norms.max() / median)
        charts.append({"block": block, "centres": centres, "shares": shares, "largest": largest, "median": median})
    return charts
