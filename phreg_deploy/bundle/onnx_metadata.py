"""Read the ``metadata_props`` of an ONNX file without the onnx package, from protobuf's wire format.

A field is a key, 8 * number + type, and a value; a value of type 2 starts with its length. The graph is skipped by its
length: a file of gigabytes costs a few reads. Source: https://protobuf.dev/programming-guides/encoding/
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

# Field numbers of ModelProto.metadata_props, StringStringEntryProto.key and .value.
METADATA, KEY, VALUE = 14, 1, 2
VARINT, EIGHT_BYTES, LENGTH, FOUR_BYTES = 0, 1, 2, 5
# Fields at the top level, and bytes of one entry, at most.
MOST_FIELDS, MOST_BYTES = 10_000, 16 << 20


def read_metadata(path: Path) -> dict[str, str]:
    """Return the keys and values of the metadata in an ONNX file.

    Raises ``ValueError`` if it is no ONNX file or has too much metadata, and ``OSError`` if it cannot be read.
    """
    metadata: dict[str, str] = {}
    with open(path, "rb") as file:
        for number, start, length in _fields(file, 0, file.seek(0, 2)):
            if number != METADATA:
                continue
            if length > MOST_BYTES:
                raise ValueError(f"an entry of its metadata has {length} bytes, expected at most {MOST_BYTES}")
            pair = {KEY: "", VALUE: ""}
            for part, at, size in _fields(file, start, start + length):
                file.seek(at)
                pair[part] = file.read(size).decode()
            metadata[pair[KEY]] = pair[VALUE]
    return metadata


def _fields(file: BinaryIO, position: int, end: int) -> Iterator[tuple[int, int, int]]:
    """Yield number, start and length of every field of type ``LENGTH`` between two positions."""
    for _ in range(MOST_FIELDS):
        if position == end:
            return
        file.seek(position)
        key = _varint(file)
        number, kind = key >> 3, key & 7
        length = 0
        if kind == VARINT:
            _varint(file)
        elif kind == LENGTH:
            length = _varint(file)
        elif kind in (EIGHT_BYTES, FOUR_BYTES):
            length = 8 if kind == EIGHT_BYTES else 4
        else:
            raise ValueError(f"it is no ONNX file (a field of type {kind})")
        start = file.tell()
        position = start + length
        if number == 0 or position > end:
            raise ValueError("it is no ONNX file, or was cut short")
        if kind == LENGTH:
            yield number, start, length
    raise ValueError(f"it has more than {MOST_FIELDS} fields, or is no ONNX file")


def _varint(file: BinaryIO) -> int:
    """Read a number with 7 bits per byte, lowest first; a set top bit means that another byte follows."""
    value = 0
    for shift in range(0, 70, 7):
        byte = file.read(1)
        if not byte:
            raise ValueError("it is no ONNX file, or was cut short")
        value |= (byte[0] & 0x7F) << shift
        if byte[0] < 0x80:
            return value
    raise ValueError("it is no ONNX file (a number of more than ten bytes)")
