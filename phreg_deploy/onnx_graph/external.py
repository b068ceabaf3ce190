"""Write a graph's weights beside it where one ONNX file cannot hold them, and read such graphs.

Protobuf holds 2 GB at most. ONNX stores larger tensors as places in another file, "external data":
https://github.com/onnx/onnx/blob/main/docs/ExternalData.md
"""

from __future__ import annotations

from pathlib import Path

import onnx
from onnx import ModelProto, TensorProto

from phreg_deploy.errors import PhregError

# Bytes of weights that one file holds, with room for the graph itself.
MOST_BYTES = 2**31 - 2**24
# Smaller constants stay in the graph; larger ones start at multiples of a page, so that runtimes can map them.
LEAST, PAGE = 1024, 4096


def weight_bytes(model: ModelProto) -> int:
    """Bytes of a graph's constants."""
    return sum(len(tensor.raw_data) for tensor in model.graph.initializer)


def fits(model: ModelProto) -> bool:
    """Whether one file holds the graph and its constants."""
    return weight_bytes(model) <= MOST_BYTES


def write_graph(model: ModelProto, path: Path, beside: str | None) -> None:
    """Write a graph, with its large constants in a file of the name ``beside`` in the same folder, if one is given.

    ``model`` loses the constants that go to that file: they should not be in memory twice.

    Raises:
        onnx.checker.ValidationError: the graph is malformed.
    """
    if beside is not None:
        with open(path.parent / beside, "wb") as file:
            for tensor in model.graph.initializer:
                if len(tensor.raw_data) >= LEAST:
                    file.write(bytes(-file.tell() % PAGE))
                    _move(tensor, beside, file.tell())
                    file.write(tensor.raw_data)
                    tensor.ClearField("raw_data")
    path.write_bytes(model.SerializeToString(deterministic=True))
    # By its path, because the checker serialises a graph in memory.
    onnx.checker.check_model(str(path))


def load_graph(path: Path, command: str) -> ModelProto:
    """Read a graph and its constants into memory.

    Raises:
        PhregError: ``command`` changes the graph in memory, which the format allows up to 2 GB only.
    """
    model = onnx.load(path)
    if not fits(model):
        raise PhregError(
            f"{command}: the weights of {path} take {weight_bytes(model) / 2**30:.1f} GB, and a graph in memory holds "
            "2 GB at most. "
            "Export the model in fp16 instead, or take a smaller one."
        )
    return model


def _move(tensor: TensorProto, location: str, offset: int) -> None:
    """Make a constant point to its place in another file."""
    tensor.data_location = TensorProto.EXTERNAL
    places = {"location": location, "offset": str(offset), "length": str(len(tensor.raw_data))}
    for key, value in places.items():
        entry = tensor.external_data.add()
        entry.key, entry.value = key, value
