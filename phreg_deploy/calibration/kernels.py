"""Counts the integer kernels of an optimized graph: what was meant to run in 8 bits, and does not, is an error."""

from __future__ import annotations

import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnx
from onnx import ModelProto

from phreg_deploy.errors import PhregError
from phreg_deploy.onnx_graph.session import open_session
from phreg_deploy.onnx_graph.wiring import Wiring

UNSIGNED = (
    "_s8_2_u8"  # what ONNX Runtime appends to the name of weights that it made unsigned, see ``instructions.EXACT``
)
INTEGER = ("MatMulIntegerToFloat", "MatMulInteger", "QLinearMatMul", "QGemm", "DynamicQuantizeMatMul")


@dataclass(frozen=True)
class Census:
    """``integer``: linear layers that an integer kernel computes; ``floats``: the others, with the reason in words."""

    integer: list[str]
    floats: dict[str, str]


def open_counted(model: ModelProto, meant: list[str]) -> tuple[Any, Census]:
    """A session of ``model``, and the census of its graph after ONNX Runtime's own optimization.

    Raises:
        PhregError: a layer of ``meant`` runs in float, with the reason.
    """
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "optimized.onnx"
        session = open_session(model, path)
        found = count(onnx.load(path), meant)
    if found.floats:
        name, reason = next(iter(found.floats.items()))
        raise PhregError(
            f"census: {len(found.floats)} of {len(meant)} linear layers that were meant to run in 8 bits run in float, e.g. {name}: {reason}."
        )
    return session, found


def count(optimized: ModelProto, meant: list[str]) -> Census:
    """The census of an optimized graph. ``meant``: names of the layers whose weights are ``NAME.int8``.

    On x86 without VNNI their name is ``NAME.int8_s8_2_u8`` once they have been made unsigned.
    """
    wiring = Wiring(optimized)
    integer, floats = [], {}
    for name in meant:
        readers = wiring.readers.get(f"{name}.int8", wiring.readers.get(f"{name}.int8{UNSIGNED}", []))
        if any(r.op_type in INTEGER for r in readers):
            integer.append(name)
        elif not readers:
            floats[name] = "its 8-bit weights are gone, folded back into float"
        else:
            floats[name] = _reason(readers[0], wiring)
    return Census(integer, floats)


def _reason(reader: Any, wiring: Wiring) -> str:
    """What became of weights that a DequantizeLinear still reads."""
    path = [reader.op_type]
    while path[-1] not in ("Gemm", "MatMul", "FusedMatMul", "FusedGemm") and reader.output and len(path) < 5:
        following = wiring.readers.get(reader.output[0], [])
        if not following:
            break
        if len(following) > 1:
            return f"one {path[-1]} feeds {len(following)} operators, so that it is fused into none; give each MatMul its own"
        reader = following[0]
        path.append(reader.op_type)
    if path[-1] in ("Gemm", "FusedGemm"):
        return f"{' -> '.join(path)}: MatMulAddFusion took the Add for a 1-D bias; it must be [1, 1, O]"
    source = (
        wiring.producer.get(reader.input[0]) if reader.op_type == "MatMul" else None
    )  # the input's DequantizeLinear
    shared = 0 if source is None or source.op_type != "DequantizeLinear" else _products(source.input[0], wiring)
    if shared > 1:
        return f"{' -> '.join(path)}: one 8-bit input feeds {shared} layers; give each a QuantizeLinear and a DequantizeLinear of its own"
    return f"{' -> '.join(path)}: no integer kernel was chosen"


def _products(quantised: str, wiring: Wiring) -> int:
    return sum(len(wiring.readers.get(reader.output[0], [])) for reader in wiring.readers.get(quantised, []))
