"""Hold a graph's weights apart from it: as arrays in memory, or in a file beside it where one file cannot hold both.

Protobuf holds 2 GB at most. ONNX stores larger tensors as places in another file, "external data":
https://github.com/onnx/onnx/blob/main/docs/ExternalData.md
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import onnx
from onnx import ModelProto, TensorProto, helper

from phreg_deploy.errors import PhregError
from phreg_deploy.onnx_graph.wiring import copy_without

# Bytes of weights that one file holds, with room for the graph itself.
MOST_BYTES = 2**31 - 2**24
# Smaller constants stay in the graph; larger ones start at multiples of a page, so that runtimes can map them.
LEAST, PAGE = 1024, 4096
# The place that a graph names for constants in memory: the format wants one, and none is read.
MEMORY = "memory"
# Constants that are not in their graph, by name.
Arrays = Mapping[str, np.ndarray]


def weight_bytes(model: ModelProto) -> int:
    """Bytes of the constants that are in a graph."""
    return sum(len(tensor.raw_data) for tensor in model.graph.initializer)


def fits(model: ModelProto) -> bool:
    """Whether one file holds the graph and its constants."""
    return weight_bytes(model) <= MOST_BYTES


def write_graph(model: ModelProto, path: Path, beside: str | None, check: bool = True) -> None:
    """Write a graph, with its large constants in a file of the name ``beside`` in the same folder, if one is given.

    ``model`` loses the constants that go to that file: they should not be in memory twice. ``check``: outputs without
    a shape are malformed too.

    Raises:
        onnx.checker.ValidationError: the graph is malformed.
    """
    if beside is not None:
        with open(path.parent / beside, "wb") as file:
            for tensor in model.graph.initializer:
                if len(tensor.raw_data) >= LEAST:
                    file.write(bytes(-file.tell() % PAGE))
                    _move(tensor, beside, file.tell(), len(tensor.raw_data))
                    file.write(tensor.raw_data)
                    tensor.ClearField("raw_data")
    path.write_bytes(model.SerializeToString(deterministic=True))
    if check:
        # By its path, because the checker serialises a graph in memory.
        onnx.checker.check_model(str(path))


def load_apart(path: Path) -> tuple[ModelProto, dict[str, np.ndarray]]:
    """Read a graph, and its large constants as arrays; those in a file beside it are mapped, not read.

    Raises:
        PhregError: a constant is in a file elsewhere, or beyond the end of its file.
    """
    model = onnx.load(path, load_external_data=False)
    mapped: dict[str, np.ndarray] = {}
    files: dict[str, np.ndarray] = {}
    for tensor in model.graph.initializer:
        if tensor.data_location == TensorProto.EXTERNAL:
            place = {entry.key: entry.value for entry in tensor.external_data}
            name = place.get("location", "")
            if Path(name).name != name or not (path.parent / name).is_file():
                raise PhregError(
                    f"graph: {path} keeps {tensor.name} in {name!r}, expected a file beside it. Export the model again."
                )
            if name not in files:
                files[name] = np.asarray(np.memmap(path.parent / name, np.uint8, "r"))
            start, length = int(place.get("offset", 0)), int(place.get("length", 0))
            values = files[name][start : start + length]
            if len(values) != length or length != _size(tensor):
                raise PhregError(
                    f"graph: {path} expects {_size(tensor)} bytes of {tensor.name} in {name}, got {len(values)}. "
                    "Export the model again."
                )
            mapped[tensor.name] = _view(tensor, values)
    graph, arrays = take_apart(model)
    return graph, {**arrays, **mapped}


def take_apart(model: ModelProto) -> tuple[ModelProto, dict[str, np.ndarray]]:
    """Copy a graph without its large constants, and return them as read-only arrays by name."""
    apart, arrays = copy_without(model, {tensor.name for tensor in model.graph.initializer}), dict[str, np.ndarray]()
    for tensor in model.graph.initializer:
        raw = tensor.raw_data
        if len(raw) < LEAST:
            apart.graph.initializer.append(tensor)
        else:
            arrays[tensor.name] = _view(tensor, np.frombuffer(raw, np.uint8))
            # A message of its own: a graph would keep the memory of the bytes that are removed from it.
            place = TensorProto()
            place.CopyFrom(tensor)
            place.ClearField("raw_data")
            _move(place, MEMORY, 0, len(raw))
            apart.graph.initializer.append(place)
    return apart, arrays


def put_together(model: ModelProto, arrays: Arrays) -> ModelProto:
    """Put the constants that are not in a graph into it, in place."""
    for tensor in model.graph.initializer:
        if tensor.data_location == TensorProto.EXTERNAL:
            tensor.ClearField("external_data")
            tensor.ClearField("data_location")
            tensor.raw_data = np.ascontiguousarray(arrays[tensor.name]).tobytes()
    return model


def absent(name: str, kind: int, shape: tuple[int, ...]) -> TensorProto:
    """Describe a constant of an ONNX type whose values are not in the graph; a session takes them from memory."""
    tensor = TensorProto(name=name, data_type=kind, dims=shape)
    _move(tensor, MEMORY, 0, _size(tensor))
    return tensor


def _view(tensor: TensorProto, values: np.ndarray) -> np.ndarray:
    """See bytes as the values of a constant."""
    return values.view(helper.tensor_dtype_to_np_dtype(tensor.data_type)).reshape(tuple(tensor.dims))


def _size(tensor: TensorProto) -> int:
    """Bytes of a constant, by its type and shape."""
    return int(np.prod(tensor.dims, dtype=np.int64)) * helper.tensor_dtype_to_np_dtype(tensor.data_type).itemsize


def _move(tensor: TensorProto, location: str, offset: int, length: int) -> None:
    """Make a constant point to its place in another file."""
    tensor.data_location = TensorProto.EXTERNAL
    for key, value in {"location": location, "offset": str(offset), "length": str(length)}.items():
        entry = tensor.external_data.add()
        entry.key, entry.value = key, value
