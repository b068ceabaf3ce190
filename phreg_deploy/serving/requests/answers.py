"""Turn the features of one image into the bytes of an answer: npy, npz, Arrow, JSON or PNG."""

from __future__ import annotations

import io
import json
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from PIL import Image

from phreg_deploy.bundle.heads import ServedHead
from phreg_deploy.bundle.manifest import Manifest
from phreg_deploy.extras import is_importable
from phreg_deploy.images.overlays import classes_of, draw_answer, mask_palette
from phreg_deploy.images.pictures import colours, components, heat
from phreg_deploy.layers import DEPTH
from phreg_deploy.runtime.dense_features import DenseFeatures
from phreg_deploy.serving.requests.refusals import Refused

DTYPES = ("float32", "float16")
MEDIA = {
    "npy": "application/x-npy",
    "npz": "application/x-npz",
    "arrow": "application/vnd.apache.arrow.stream",
    "json": "application/json",
    "png": "image/png",
}
# Share of the heat over the image.
SHARE = 0.5
# Pictures of an overlay that need no head.
NORMS, FEATURES = "token_norm", "features"


def arrays_of(dense: DenseFeatures, names: Sequence[str], dtype: str, mask: np.ndarray | None) -> dict[str, np.ndarray]:
    """Return the outputs of one image by name, without the axis of the batch; ``mask`` too where there is one.

    Args:
        names: outputs of the bundle. dtype: of those that are not classes, one of ``DTYPES``.
    """
    outputs = dense.outputs()
    arrays = {name: outputs[name][0] for name in names}
    arrays = {name: array if array.dtype == np.uint8 else array.astype(dtype) for name, array in arrays.items()}
    return arrays if mask is None else {**arrays, "mask": mask}


def check_outputs(text: str, manifest: Manifest) -> list[str]:
    """Read a list of outputs, ``features,cls``. Raises ``Refused`` for one that the bundle does not have."""
    names = list(dict.fromkeys(part.strip() for part in text.split(",")))
    unknown = [name for name in names if name not in manifest.outputs]
    if unknown:
        raise Refused(
            422, f"outputs: got {', '.join(unknown)[:200]!r}, expected some of {', '.join(manifest.outputs)}."
        )
    return names


def encode(kind: str, arrays: Mapping[str, np.ndarray], facts: Mapping[str, object]) -> bytes:
    """Encode arrays, and ``facts`` where the format has a place for them.

    Args:
        kind: "npy" (exactly one array), "npz", "arrow" (a stream of one row, as of ``extract --format parquet``) or
            "json" (nested lists; values that are not finite are null).
    """
    if kind == "npy":
        (array,) = arrays.values()
        out = io.BytesIO()
        np.lib.format.write_array(out, np.ascontiguousarray(array), allow_pickle=False)
        return out.getvalue()
    if kind == "npz":
        out = io.BytesIO()
        named: dict[str, Any] = {name: np.ascontiguousarray(array) for name, array in arrays.items()}
        np.savez(out, **named)
        return out.getvalue()
    if kind == "arrow":
        return _arrow(arrays, facts)
    # JSON has no NaN and no infinity.
    lists = {name: _finite(array).tolist() for name, array in arrays.items()}
    return json.dumps({**facts, "outputs": lists}, allow_nan=False).encode()


def _finite(array: np.ndarray) -> np.ndarray:
    """Replace values that are not finite by None."""
    finite = np.isfinite(array)
    if finite.all():
        return array
    known = array.astype(object)
    known[~finite] = None
    return known


def check_arrow() -> None:
    """Raise ``Refused`` unless pyarrow is installed."""
    if not is_importable("pyarrow"):
        raise Refused(422, "format: got arrow, but pyarrow is not installed beside this service; ask for npz.")


def artifact_json(dense: DenseFeatures, mask: np.ndarray | None) -> bytes:
    """Return the artifact rate and the norms of the patch tokens that are image, as JSON."""
    norms = dense.token_norm[0] if mask is None else dense.token_norm[0][mask]
    return json.dumps(
        {
            "artifact_rate": float(dense.artifact_rate[0]),
            "patches": int(norms.size),
            "norm": {"smallest": float(norms.min()), "median": float(np.median(norms)), "largest": float(norms.max())},
            "compared_with": dense.norm_median if dense.norm_median is not None else float(np.median(norms)),
        }
    ).encode()


def _arrow(arrays: Mapping[str, np.ndarray], facts: Mapping[str, object]) -> bytes:
    import pyarrow as pa

    columns = {}
    for name, array in arrays.items():
        plain = array.view(np.uint8) if array.dtype == bool else array
        columns[name] = pa.FixedShapeTensorArray.from_numpy_ndarray(np.stack([plain]))
    table = pa.table(columns).replace_schema_metadata({"phreg": json.dumps(facts)})
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table)
    return bytes(sink.getvalue())


def find_head(manifest: Manifest, name: str | None, kinds: Sequence[str]) -> ServedHead:
    """Return the head whose output has this name, or the only one of these kinds.

    Raises:
        Refused: the bundle has no such head, or several and no name was given.
    """
    heads = [head for head in manifest.heads if head.kind in kinds]
    names = ", ".join(head.output for head in heads)
    if not heads:
        raise Refused(
            422, f"head: this bundle has no head for {' or '.join(kinds)}. Attach one: phreg-deploy attach --help"
        )
    if name is None and len(heads) > 1:
        raise Refused(422, f"head: got no name, expected one of {names}.")
    found = [head for head in heads if name in (None, head.output)]
    if not found:
        raise Refused(422, f"head: got {str(name)[:60]!r}, expected one of {names}.")
    return found[0]


def class_map(dense: DenseFeatures, head: ServedHead) -> np.ndarray:
    """Return the classes of one image, uint8 ``(h, w)``."""
    return classes_of(head.kind, dense.heads[head.output][0])


def label_png(classes: np.ndarray, head: ServedHead, size: tuple[int, int]) -> bytes:
    """Return classes as a PNG with a palette, enlarged by the nearest one to ``size`` (height, width)."""
    picture = Image.fromarray(classes).resize((size[1], size[0]), Image.Resampling.NEAREST)
    picture.putpalette(mask_palette(head.colours).tobytes())
    return png(picture)


def draw(dense: DenseFeatures, picture: Image.Image, what: str, manifest: Manifest) -> bytes:
    """Draw one output over the image: classes of a head, "token_norm" as heat, depth or "features" as colours alone."""
    head = manifest.head(what)
    side = max(picture.size)
    if head is not None:
        drawn = draw_answer(picture, head.kind, dense.heads[what][0], head.colours)
        return png(drawn.resize(picture.size) if head.kind == DEPTH else drawn)
    if what == FEATURES:
        features = dense.features[0]
        return png(colours(features, components([features]), side).resize(picture.size))
    top = 3 * (dense.norm_median or float(np.median(dense.token_norm)))
    return png(Image.blend(picture, heat(dense.token_norm[0], top, side).resize(picture.size), SHARE))


def check_drawn(name: str | None, manifest: Manifest) -> str:
    """Return what an overlay shows: an output of a head, "token_norm" or "features"; None for the only head, or norms.

    Raises:
        Refused: another name, or several heads and no name.
    """
    heads = [head.output for head in manifest.heads]
    if name is None and len(heads) < 2:
        return heads[0] if heads else NORMS
    # A bundle may serve heads alone.
    drawn = [*heads, *(output for output in (NORMS, FEATURES) if output in manifest.outputs)]
    if name not in drawn:
        raise Refused(422, f"of: got {str(name)[:60]!r}, expected one of {', '.join(drawn)}.")
    return name


def png(picture: Image.Image) -> bytes:
    """Encode a picture as PNG."""
    out = io.BytesIO()
    picture.save(out, "PNG", compress_level=1)
    return out.getvalue()
