"""Write an ONNX file of one matrix product without the package onnx, which a device does not need.

The numbers are those of ``onnx.proto``: fields of its messages, and ``TensorProto.DataType``.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

# Precision -> ``TensorProto.DataType`` of the operands, and bytes of an element.
OPERANDS = {"fp32": (1, 4), "fp16": (10, 2), "bf16": (16, 2), "int8": (3, 1), "fp8": (17, 1)}
HALF, IR_VERSION, OPSET = 10, 10, 21
# Of operands in 8 bits; products of 448, the largest FP8 number, then stay within FP16.
SCALE = 1 / 448


def product_graph(precision: str, side: int) -> bytes:
    """The file of ``product = a b``, both ``(side, side)`` inputs in ``precision``.

    Operands in 8 bits are dequantised to FP16 by a scale of the same type, and ``product`` is in FP16: TensorRT joins
    both steps with the product. NVIDIA/TensorRT#4832 is of a scale in FP16 beside a result in FP32.
    """
    kind, size = OPERANDS[precision]
    eight = size == 1
    nodes, initializers, operands = [], list[bytes](), ["a", "b"]
    if eight:
        scale = np.full((), SCALE, np.float16).tobytes()
        initializers = [_message((2, HALF), (8, "scale"), (9, scale))]
        nodes = [_node("DequantizeLinear", [name, "scale"], f"{name}/half") for name in operands]
        operands = [f"{name}/half" for name in operands]
    nodes.append(_node("MatMul", operands, "product"))
    graph = _message(
        *((1, node) for node in nodes),
        (2, "product"),
        *((5, tensor) for tensor in initializers),
        *((11, _value(name, kind, side)) for name in ("a", "b")),
        (12, _value("product", HALF if eight else kind, side)),
    )
    return _message((1, IR_VERSION), (7, graph), (8, _message((2, OPSET))))


def bytes_of(name: str, precision: str, side: int) -> int:
    """Bytes of a tensor of ``product_graph``."""
    size = OPERANDS[precision][1]
    return side * side * (max(size, 2) if name == "product" else size)


def _node(operator: str, inputs: Iterable[str], output: str) -> bytes:
    return _message(*((1, name) for name in inputs), (2, output), (3, f"{output}/{operator}"), (4, operator))


def _value(name: str, kind: int, side: int) -> bytes:
    shape = _message(*((1, _message((1, side))) for _ in range(2)))
    return _message((1, name), (2, _message((1, _message((1, kind), (2, shape))))))


def _message(*fields: tuple[int, int | str | bytes]) -> bytes:
    """A protobuf message of fields (number, value)."""
    parts = []
    for number, value in fields:
        if isinstance(value, int):
            parts += [_varint(number << 3), _varint(value)]
        else:
            data = value.encode() if isinstance(value, str) else value
            parts += [_varint(number << 3 | 2), _varint(len(data)), data]
    return b"".join(parts)


def _varint(number: int) -> bytes:
    groups = bytearray()
    while number > 127:
        groups.append(number & 127 | 128)
        number >>= 7
    return bytes([*groups, number])
