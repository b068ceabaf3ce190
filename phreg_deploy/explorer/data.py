"""What the scripts of the page read: photographs, packed features, colours, norms, differences and heads, as JSON.

M images, (Hp, Wp) patch grid.
"""

from __future__ import annotations

from itertools import combinations
from typing import Any

import numpy as np
from PIL import Image

from phreg_deploy.artifacts.measures import cosine, outlier_mask
from phreg_deploy.bundle.heads import ServedHead
from phreg_deploy.explorer.exploration import Exploration
from phreg_deploy.explorer.packing import Packed, array, pack
from phreg_deploy.images.overlays import voc_colours
from phreg_deploy.images.pictures import HEAT, components, data_url, rgb_values, span
from phreg_deploy.layers import DEPTH, Layers
from phreg_deploy.verify.maps import Maps
from phreg_deploy.verify.measuring import STUDENT

# Bytes of all packed features before base64, which makes 4 of 3.
BUDGET = 1_200_000
# Tokens of a model that choose the colours.
TOKENS = 10_000
# Longest side of a photograph and of a label map, in pixels.
PHOTOGRAPH, LABELS = 336, 224


def page_data(exploration: Exploration) -> dict[str, Any]:
    """Return the JSON of the maps; ``{}`` without images."""
    maps = exploration.maps
    if maps is None:
        return {}
    keys = _layers(exploration, maps)
    models = list(maps.outputs)
    reference = STUDENT if STUDENT in models else models[0]
    packed = {key: pack(_of_layer(maps, "features", key), reference, BUDGET // len(keys)) for key in keys}
    compared = [b.check.by_image.reference for b in exploration.bundles if b.check.by_image is not None]
    order = f"lowest cosine with {compared[0]}" if compared else "highest artifact rate"
    depth = exploration.bundles[0].manifest.model.depth
    return {
        "models": models,
        "order": f"The images with the {order} are first.",
        "images": [{"name": n, "src": _photograph(image)} for n, image in zip(maps.names, maps.images)],
        "layers": [{"key": key, "name": f"layer {key}" if key else f"layer {depth}, the last"} for key in keys],
        "packed": {key: _packed(value) for key, value in packed.items()},
        "colours": {key: _colours(maps, key) for key in keys},
        "norms": {key: _norms(maps, key) for key in keys},
        "differences": {key: _differences(maps, key) for key in keys},
        "heads": [head for served in _heads(exploration) if (head := _head(maps, served))],
        "heat": HEAT.astype(int).tolist(),
    }


def _layers(exploration: Exploration, maps: Maps) -> list[str]:
    """The layers that every model has, "" for the last; a last layer that is served twice is listed once."""
    first = exploration.bundles[0].manifest
    served = first.layers or Layers((), True)
    blocks = [str(b) for b in served.blocks if b != first.model.depth or not served.norm]
    return [b for b in blocks if all(f"features.{b}" in outputs for outputs in maps.outputs.values())] + [""]


def _of_layer(maps: Maps, kind: str, key: str) -> dict[str, np.ndarray]:
    """One kind of output of a layer, by model."""
    name = f"{kind}.{key}" if key else kind
    return {model: np.nan_to_num(outputs[name], posinf=0.0, neginf=0.0) for model, outputs in maps.outputs.items()}


def _photograph(image: np.ndarray) -> str:
    picture = Image.fromarray(image)
    picture.thumbnail((PHOTOGRAPH, PHOTOGRAPH), Image.Resampling.LANCZOS)
    return data_url(picture)


def _packed(packed: Packed) -> dict[str, Any]:
    return {
        "codes": {model: array(packed.stored(model)) for model in packed.codes},
        "origin": packed.origin,
        "step": packed.step,
        "offset": packed.offset.tolist(),
        "rest": packed.rest,
        "kept": packed.kept,
        "channels": packed.channels,
        "error_p99": packed.error_p99,
        "error_max": packed.error_max,
    }


def _colours(maps: Maps, key: str) -> dict[str, Any]:
    """Features as colours, uint8 ``(M, Hp, Wp, 3)``, over one basis for all models and images."""
    features = _of_layer(maps, "features", key)
    flat = [value.reshape(-1, value.shape[-1]) for value in features.values()]
    basis = components([tokens[:: max(1, len(tokens) // TOKENS)] for tokens in flat])
    low, high = span(list(features.values()), basis)
    drawn = {name: np.rint(rgb_values(value, basis, low, high)).astype(np.uint8) for name, value in features.items()}
    return {name: array(value) for name, value in drawn.items()}


def _norms(maps: Maps, key: str) -> dict[str, Any]:
    """Norms in medians of the first model's, float32 ``(M, Hp, Wp)``, and the share of outliers in each image."""
    norms = _of_layer(maps, "token_norm", key)
    first = next(iter(norms.values()))
    median = max(float(np.median(first)) if key else float(np.nan_to_num(maps.median)), 1e-12)
    return {
        name: {
            "values": array((value / median).astype(np.float32)),
            "rates": outlier_mask(value, median).mean((1, 2)).tolist(),
        }
        for name, value in norms.items()
    }


def _differences(maps: Maps, key: str) -> dict[str, Any]:
    """1 - cosine of each patch between two models, float32 ``(M, Hp, Wp)``, by their numbers: "0,1"."""
    features = list(_of_layer(maps, "features", key).values())
    return {
        f"{a},{b}": array(np.maximum(1 - cosine(features[a], features[b]), 0).astype(np.float32))
        for a, b in combinations(range(len(features)), 2)
    }


def _heads(exploration: Exploration) -> list[ServedHead]:
    """Heads by the name of their output; of equal names the first bundle's."""
    heads: dict[str, ServedHead] = {}
    for bundle in exploration.bundles:
        for served in bundle.manifest.heads:
            heads.setdefault(served.output, served)
    return list(heads.values())


def _head(maps: Maps, served: ServedHead) -> dict[str, Any] | None:
    """Answers of a head by model, uint8 ``(M, h, w)``: classes, or depth from ``low`` (0) to ``high`` (255)."""
    answers: dict[str, np.ndarray] = {}
    for model, outputs in maps.outputs.items():
        value = outputs.get(served.output)
        if value is not None:
            step = -(-max(value.shape[1:]) // LABELS)
            answers[model] = np.nan_to_num(value[:, ::step, ::step], posinf=0.0, neginf=0.0)
    if not answers:
        return None
    facts: dict[str, Any] = {"output": served.output, "kind": served.kind, "ignore": served.ignore}
    if served.kind == DEPTH:
        low, high = np.quantile(np.concatenate([v.reshape(-1) for v in answers.values()]), (0.01, 0.99))
        scale = max(high - low, 1e-9)
        answers = {m: np.clip(255 * (v - low) / scale, 0, 255) for m, v in answers.items()}
        facts |= {"low": float(low), "high": float(high)}
    else:
        facts |= {"classes": list(served.classes), "colours": served.colours or voc_colours()[: len(served.classes)]}
    return {**facts, "maps": {model: array(value.astype(np.uint8)) for model, value in answers.items()}}
