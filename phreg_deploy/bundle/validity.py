"""Check the values of a manifest before any other file is read: types, bounds, shapes, file names."""

from __future__ import annotations

import re
from collections.abc import Collection
from typing import Any

from phreg_deploy.bundle.gates import GATES
from phreg_deploy.bundle.manifest import WEIGHTS, Manifest
from phreg_deploy.errors import PhregError
from phreg_deploy.layers import ATTENTION, NORM, kind_of, output_names
from phreg_deploy.readout import FINAL
from phreg_deploy.spec import Batches, Rotary, Sizes

# The numbers that one side of a shape may be, and whether it may have a name instead.
Side = tuple[set[int], bool]
LARGEST_SIDE, LARGEST_PATCH, MOST_SIZES = 16384, 1024, 256
# Images of the smallest batch, to which a single image is padded, and of the largest.
MOST_LOWEST, MOST_HIGHEST = 1024, 65536
# Bytes of the smallest batch at the largest size.
LARGEST_INPUT = 1 << 30
LARGEST_WIDTH, LARGEST_DEPTH, MOST_REGISTERS = 65536, 4096, 4096
MOST_HEADS = 64
# With 0.01 an image would be resized to a hundred times the input size.
LEAST_CROP = 0.1
FLOATS = ("float16", "float32")
# The types of each kind of output.
OUTPUTS = {"features": FLOATS, "token_norm": ("float32",), "cls": FLOATS, "attention": FLOATS}


def check_extent(sizes: Sizes, batches: Batches) -> None:
    """Raise ``PhregError`` for sizes or batches that no device could hold."""
    sides = [side for size in sizes.sizes for side in size]
    fits = 1 <= len(sizes.sizes) <= MOST_SIZES and all(1 <= side <= LARGEST_SIDE for side in sides)
    _expect(fits, "sizes", sizes.sizes, f"1 to {MOST_SIZES} sizes with sides from 1 to {LARGEST_SIDE}")
    numbers = (batches.lowest, batches.best, batches.highest)
    fits = all(_is_integer(n, 1, MOST_HIGHEST) for n in numbers)
    fits = fits and numbers[0] <= numbers[1] <= numbers[2] and numbers[0] <= MOST_LOWEST
    bounds = f"from 1 to {MOST_HIGHEST}, the lowest at most {MOST_LOWEST}"
    _expect(fits, "batches", numbers, f"lowest, best and highest in growing order, {bounds}")
    most = batches.lowest * max(h * w for h, w in sizes.sizes) * 3
    _expect(most <= LARGEST_INPUT, "batches", f"{most} bytes of a smallest batch", f"at most {LARGEST_INPUT}")


def read_manifest(data: Any) -> Manifest:
    """Build a manifest from JSON. Raises ``PhregError`` for unknown keys, wrong types and impossible values."""
    manifest = Manifest.from_json(data)
    _check_model(manifest.model)
    _check_preprocess(manifest.preprocess)
    _check_sizes(manifest)
    _check_rotary(manifest)
    _check_layers(manifest)
    known = isinstance(manifest.precision, str) and manifest.precision in GATES
    _expect(known, "precision", manifest.precision, f"one of {', '.join(GATES)}")
    _expect(_is_integer(manifest.opset, 1, 1000), "opset", manifest.opset, "a whole number")
    _expect(type(manifest.only_heads) is bool, "only_heads", manifest.only_heads, "true or false")
    _check_tensors(manifest)
    source, versions = manifest.source, manifest.versions
    for key in ("model", "weights_sha256"):
        _expect(isinstance(source.get(key), str), f"source.{key}", source.get(key), "text")
    _expect(all(isinstance(v, str) for v in versions.values()), "versions", versions, "texts")
    median = manifest.norm_median
    _expect(median is None or _is_number(median, 1e-12, 1e12), "norm_median", median, "a number above 0, or null")
    _expect(_is_texts(manifest.float_parts), "float_parts", manifest.float_parts, "a list of texts")
    _expect(type(manifest.random_weights) is bool, "random_weights", manifest.random_weights, "true or false")
    _expect(manifest.weights in (None, WEIGHTS), "weights", manifest.weights, f"{WEIGHTS} or null")
    _check_quantisation(manifest)
    return manifest


def check_files(files: dict[str, Any], required: Collection[str]) -> None:
    """Raise ``PhregError`` unless ``files`` maps bare file names, all ``required`` ones included, to sha256 hashes."""
    for name, digest in files.items():
        is_bare = bool(name) and name not in (".", "..") and not re.search(r"[/\\\x00-\x1f]", name)
        _expect(is_bare and len(name.encode()) <= 255, "files", name, "the bare name of a file in the bundle")
        known = isinstance(digest, str) and re.fullmatch("[0-9a-f]{64}", digest) is not None
        _expect(known, f"files.{name}", digest, "a sha256 in 64 small hexadecimal digits")
    missing = [name for name in required if name not in files]
    _expect(not missing, "files", f"no hash of {', '.join(missing)}", "one of every file that is read")


def _check_model(model: Any) -> None:
    _expect(isinstance(model.architecture, str), "model.architecture", model.architecture, "text")
    _expect(model.family in ("vit", "eva"), "model.family", model.family, "vit or eva")
    for key, most in (("patch", LARGEST_PATCH), ("grid", LARGEST_SIDE)):
        pair = getattr(model, key)
        _expect(_is_pair(pair, most), f"model.{key}", pair, f"two numbers from 1 to {most}")
    bounds = {
        "width": (1, LARGEST_WIDTH),
        "depth": (1, LARGEST_DEPTH),
        "heads": (1, LARGEST_WIDTH),
        "registers": (0, MOST_REGISTERS),
        "parameters": (0, 1 << 50),
    }
    for key, (least, most) in bounds.items():
        value = getattr(model, key)
        _expect(_is_integer(value, least, most), f"model.{key}", value, f"a whole number from {least} to {most}")
    _expect(model.heads <= model.width, "model.heads", model.heads, f"at most the width, {model.width}")
    _expect(type(model.class_token) is bool, "model.class_token", model.class_token, "true or false")


def _check_preprocess(preprocess: Any) -> None:
    for key, least in (("mean", -1e3), ("std", 1e-6)):
        values = getattr(preprocess, key)
        fits = isinstance(values, tuple) and len(values) == 3 and all(_is_number(v, least, 1e3) for v in values)
        _expect(fits, f"preprocess.{key}", values, "three numbers" + (" above 0" if key == "std" else ""))
    pct = preprocess.crop_pct
    _expect(_is_number(pct, LEAST_CROP, 1), "preprocess.crop_pct", pct, f"a number from {LEAST_CROP} to 1")


def _check_sizes(manifest: Manifest) -> None:
    sizes, patch = manifest.sizes, manifest.model.patch
    counts = {"fixed": (1, 1), "list": (2, MOST_SIZES), "range": (3, 3)}
    known = isinstance(sizes.mode, str) and sizes.mode in counts
    _expect(known, "sizes.mode", sizes.mode, "fixed, list or range")
    least, most = counts[sizes.mode]
    _expect(least <= len(sizes.sizes) <= most, "sizes", sizes.sizes, f"{least} to {most} sizes with mode {sizes.mode}")
    check_extent(sizes, manifest.batches)
    fit = all(h % patch[0] == 0 and w % patch[1] == 0 for h, w in sizes.sizes)
    _expect(fit, "sizes", sizes.sizes, f"multiples of the patch, {patch[0]}x{patch[1]}")
    if sizes.mode == "range":
        grow = all(a <= b <= c for a, b, c in zip(*sizes.sizes))
        _expect(grow, "sizes", sizes.sizes, "least, preferred and most in growing order")


def _check_rotary(manifest: Manifest) -> None:
    rotary, model = manifest.rotary, manifest.model
    if rotary is None:
        return
    _expect(manifest.sizes.dynamic, "rotary", "an object", "null with one fixed size")
    _expect(isinstance(rotary.kind, str), "rotary.kind", rotary.kind, "text")
    fits = rotary.temperature is None or _is_number(rotary.temperature, 1e-12, 1e12)
    _expect(fits, "rotary.temperature", rotary.temperature, "a number above 0, or null")
    known = isinstance(rotary.coordinates, str) and rotary.coordinates in ("index", "centered")
    _expect(known, "rotary.coordinates", rotary.coordinates, "index or centered")
    _expect(_is_number(rotary.offset, -1e6, 1e6), "rotary.offset", rotary.offset, "a number")
    fits = rotary.reference is None or _is_pair(rotary.reference, LARGEST_SIDE)
    _expect(fits, "rotary.reference", rotary.reference, "two whole numbers above 0, or null")
    for key, most in (("layers", model.depth), ("heads", model.heads)):
        value = getattr(rotary, key)
        _expect(type(value) is int and value in (1, most), f"rotary.{key}", value, f"1 or {most}")
    _expect(_is_integer(rotary.pairs, 1, LARGEST_WIDTH), "rotary.pairs", rotary.pairs, "a whole number above 0")
    check_table(rotary, manifest.sizes, model.patch)


def _check_layers(manifest: Manifest) -> None:
    layers, depth = manifest.layers, manifest.model.depth
    if layers is None:
        return
    fits = isinstance(layers.blocks, tuple) and bool(layers.blocks)
    fits = fits and all(_is_integer(block, 1, depth) for block in layers.blocks)
    fits = fits and list(layers.blocks) == sorted(set(layers.blocks))
    _expect(fits, "layers.blocks", layers.blocks, f"whole numbers from 1 to {depth} in growing order")
    _expect(isinstance(layers.norm, bool), "layers.norm", layers.norm, "true or false")
    readout = manifest.readout.name
    fits = readout == FINAL or depth not in layers.blocks
    _expect(fits, "layers.blocks", layers.blocks, f"none with the last block and the readout {readout}")


def check_table(rotary: Rotary, sizes: Sizes, patch: tuple[int, int]) -> None:
    """Raise ``PhregError`` for a rotary embedding whose sines and cosines no device should hold at the largest size."""
    height, width = max(sizes.sizes, key=lambda size: size[0] * size[1])
    most = 8 * rotary.layers * rotary.heads * rotary.pairs * (height // patch[0]) * (width // patch[1])
    if most > LARGEST_INPUT:
        raise PhregError(
            f"image size: got up to {height}x{width}, for which the rotary embedding has {most} bytes of sines and "
            f"cosines; expected at most {LARGEST_INPUT}. Choose a smaller largest size."
        )


def _check_tensors(manifest: Manifest) -> None:
    """Check names, types and shapes of inputs and outputs against model, sizes and batches."""
    sizes, patch, width = manifest.sizes, manifest.model.patch, manifest.model.width
    projected = _projected_width(manifest)
    free = sizes.dynamic
    batch: Side = ({manifest.batches.lowest, manifest.batches.highest}, manifest.batches.dynamic)
    height, breadth = (({size[axis] for size in sizes.sizes}, free) for axis in (0, 1))
    rows, columns = (({side // step for side in sides}, free) for (sides, _), step in zip((height, breadth), patch))
    tokens: Side = ({(h // patch[0]) * (w // patch[1]) for h, w in sizes.sizes}, free)
    one, colours, channels, joint = (({n}, False) for n in (1, 3, width, projected))
    shapes: dict[str, list[Side]] = {
        "image": [batch, height, breadth, colours],
        "pos_embed": [one, tokens, channels],
        "features": [batch, rows, columns, joint],
        "token_norm": [batch, rows, columns],
        "cls": [batch, joint],
        "attention": [batch, ({manifest.model.heads}, False), rows, columns],
    }
    types = {"image": ("uint8",), "pos_embed": ("float32",), "rotary": ("float32",), **OUTPUTS}
    inputs = {"image"} | ({"pos_embed"} if free and "pos_embed" in manifest.inputs else set())
    if manifest.rotary is not None:
        inputs |= {"rotary"}
        fixed = (2, manifest.rotary.layers, manifest.rotary.heads, manifest.rotary.pairs)
        two, layers, heads, pairs = (({n}, False) for n in fixed)
        shapes["rotary"] = [two, layers, heads, tokens, pairs]
    attention = manifest.model.class_token and manifest.readout.name == FINAL and ATTENTION in manifest.outputs
    outputs = (
        {NORM} if manifest.only_heads else set(output_names(manifest.model.class_token, manifest.layers, attention))
    )
    _check_heads(manifest)
    outputs |= {head.output for head in manifest.heads}
    for key, described, names in (("inputs", manifest.inputs, inputs), ("outputs", manifest.outputs, outputs)):
        _expect(set(described) == names, key, sorted(described), ", ".join(sorted(names)))
        for name, tensor in described.items():
            dtypes: tuple[str, ...]
            head = manifest.head(name)
            if head is not None:
                finer = zip((rows, columns), head.cells(patch))
                known = head.shape(batch, [({side * cells for side in sides}, free) for (sides, _), cells in finer])
                shape, dtypes = [({s}, False) if isinstance(s, int) else s for s in known], (head.dtype,)
            else:
                shape, dtypes = shapes[kind_of(name)], types[kind_of(name)]
                if name != kind_of(name):
                    # A further layer is not projected.
                    shape = [channels if side is joint else side for side in shape]
            fits = isinstance(tensor, dict) and set(tensor) == {"dtype", "shape"} and tensor["dtype"] in dtypes
            fits = fits and isinstance(tensor["shape"], list) and len(tensor["shape"]) == len(shape)
            fits = fits and all(_fits(side, *allowed) for side, allowed in zip(tensor["shape"], shape))
            _expect(fits, f"{key}.{name}", tensor, "the type and shape that follow from model, sizes and batches")


def _check_heads(manifest: Manifest) -> None:
    names = [head.output for head in manifest.heads]
    _expect(len(set(names)) == len(names) <= MOST_HEADS, "heads", names, f"at most {MOST_HEADS} with different outputs")
    _expect(bool(names) or not manifest.only_heads, "heads", "none", "at least one with only_heads")
    served = () if manifest.layers is None else manifest.layers.blocks
    for head in manifest.heads:
        fits = head.layers is None or set(head.layers) <= set(served)
        _expect(fits, "heads", f"one that reads the layers {head.layers}", f"layers that are served, {served}")


def _projected_width(manifest: Manifest) -> int:
    """Return the channels of the features: the model's width, or what the projection that is stored has."""
    features = manifest.outputs.get("features")
    shape = features.get("shape") if isinstance(features, dict) else None
    if not manifest.readout.project or not isinstance(shape, list) or not shape:
        return manifest.model.width
    _expect(_is_integer(shape[-1], 1, LARGEST_WIDTH), "outputs.features", features, "a projected width above 0")
    return int(shape[-1])


def _fits(side: Any, allowed: set[int], free: bool) -> bool:
    """Whether a side of a shape is the only number allowed or, if it is free, the name of an axis."""
    return (type(side) is int and allowed == {side}) or (free and isinstance(side, str))


def _check_quantisation(manifest: Manifest) -> None:
    """Check what readers use of a calibration."""
    facts, in_eight_bits = manifest.quantisation, manifest.precision in ("int8", "fp8")
    got = "null" if facts is None else "an object"
    _expect((facts is not None) == in_eight_bits, "quantisation", got, "one with int8 and fp8, else null")
    if facts is None:
        return
    _expect(isinstance(facts, dict), "quantisation", facts, "an object")
    _expect(facts.get("mode") == manifest.precision, "quantisation.mode", facts.get("mode"), manifest.precision)
    _expect(facts.get("target") in ("cpu", "trt"), "quantisation.target", facts.get("target"), "cpu or trt")
    _expect(_is_number(facts.get("float_macs"), 0, 1), "quantisation.float_macs", facts.get("float_macs"), "a share")
    for key in ("float_layers", "missed"):
        _expect(_is_texts(facts.get(key)), f"quantisation.{key}", facts.get(key), "a list of texts")
    fidelity, images = facts.get("fidelity"), facts.get("images")
    figures = [fidelity.get(key) if isinstance(fidelity, dict) else None for key in ("cosine_mean", "cosine_p1")]
    _expect(all(type(f) in (int, float) for f in figures), "quantisation.fidelity", fidelity, "an object of figures")
    report = images.get("report") if isinstance(images, dict) else None
    fits = isinstance(report, dict) and _is_integer(report.get("count"), 0, 1 << 50)
    _expect(fits, "quantisation.images", images, "an object with the count of each share")


def _expect(fits: bool, key: str, got: Any, expected: str) -> None:
    if not fits:
        text = repr(got)
        text = text if len(text) <= 80 else text[:79] + "…"
        raise PhregError(f"manifest: got {key} {text}, expected {expected}; it is damaged. Export the bundle again.")


def _is_integer(value: Any, least: int, most: int) -> bool:
    return type(value) is int and least <= value <= most


def _is_number(value: Any, least: float, most: float) -> bool:
    # False for NaN.
    return type(value) in (int, float) and least <= value <= most


def _is_pair(value: Any, most: int) -> bool:
    return isinstance(value, tuple) and len(value) == 2 and all(_is_integer(v, 1, most) for v in value)


def _is_texts(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(v, str) for v in value)
