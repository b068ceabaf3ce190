"""Fix the image size of a graph for several sizes: its position embeddings become constants."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import onnx
from onnx import ValueInfoProto, numpy_helper

# Metadata that would no longer be true.
OUTDATED = ("phreg.inputs", "phreg.sizes")


def fix_size(
    source: Path,
    target: Path,
    size: tuple[int, int],
    tables: Mapping[str, np.ndarray],
    shapes: Mapping[str, Sequence[int]],
) -> None:
    """Write a copy of a graph that takes images of one size only. The batch may still have any size that it had.

    Args:
        source: a graph with the inputs ``image`` and ``tables``. Weights beside it are not read; put a copy beside
            ``target``.
        size: (height, width) of the images.
        tables: values of the other inputs at this size.
        shapes: of the outputs by name, with any number for the batch.
    """
    model = onnx.load(source, load_external_data=False)
    graph = model.graph
    for value in [value for value in graph.input if value.name in tables]:
        graph.input.remove(value)
        graph.initializer.append(numpy_helper.from_array(np.ascontiguousarray(tables[value.name]), value.name))
    (image,) = graph.input
    _set_sides(image, (0, *size, 3))
    for value in graph.output:
        _set_sides(value, shapes[value.name])
    kept = [entry for entry in model.metadata_props if entry.key not in OUTDATED]
    del model.metadata_props[:]
    model.metadata_props.extend(kept)
    target.write_bytes(model.SerializeToString(deterministic=True))
    # By its path, because weights may be beside it.
    onnx.checker.check_model(str(target))


def _set_sides(value: ValueInfoProto, shape: Sequence[int]) -> None:
    for dim, side in list(zip(value.type.tensor_type.shape.dim, shape))[1:]:
        dim.Clear()
        dim.dim_value = int(side)
