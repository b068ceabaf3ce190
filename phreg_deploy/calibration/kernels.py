"""Count the integer kernels of an optimized graph, and name each 8-bit layer that runs in float, with the reason."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnx
from onnx import ModelProto

from phreg_deploy.errors import PhregError
from phreg_deploy.files.temporary import scratch_folder
from phreg_deploy.onnx_graph.external import Arrays
from phreg_deploy.onnx_graph.session import open_session
from phreg_deploy.onnx_graph.wiring import Wiring

# ONNX Runtime appends this to the name of weights that it made unsigned; see ``instructions.EXACT``.
UNSIGNED = "_s8_2_u8"
INTEGER = ("MatMulIntegerToFloat", "MatMulInteger", "QLinearMatMul", "QGemm", "DynamicQuantizeMatMul")


@dataclass(frozen=True)
class Census:
    """``integer``: linear layers that an integer kernel computes; ``floats``: the others, with the reason."""

    integer: list[str]
    floats: dict[str, str]


def open_counted(model: ModelProto, expected: list[str], arrays: Arrays | None = None) -> tuple[Any, Census]:
    """Open a session of ``model``, and count the integer kernels of the graph that ONNX Runtime optimized.

    ``arrays``: the constants that are not in the graph.

    Raises ``PhregError`` if a layer of ``expected`` runs in float; the message says why. Also if the optimized graph
    does not fit into the folder for temporary files.
    """
    with scratch_folder("phreg-kernels") as folder:
        path = folder / "optimized.onnx"
        try:
            session = open_session(model, path, arrays=arrays)
        except PhregError:
            _check_room(folder, model.ByteSize() + sum(array.nbytes for array in (arrays or {}).values()))
            raise
        census = count(onnx.load(path, load_external_data=False), expected)
    if census.floats:
        name, reason = next(iter(census.floats.items()))
        raise PhregError(
            f"census: {len(census.floats)} of {len(expected)} linear layers that were meant to run in 8 bits run in "
            f"float, e.g. {name}: {reason}."
        )
    return session, census


def _check_room(folder: Path, needed: int) -> None:
    """Raise ``PhregError`` if a disk is full: ONNX Runtime says only that it cannot write the graph.

    ``needed``: bytes of the graph, which may be there in part.
    """
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise PhregError(
            f"calibrate: the disk is full: {folder.parent}, for temporary files, has {free / 1e6:.1f} MB left, and the "
            f"graph takes {needed / 1e6:.1f} MB. Free space, or set TMPDIR to another folder."
        )


def count(optimized: ModelProto, expected: list[str]) -> Census:
    """Count the integer kernels of an optimized graph.

    Args:
        expected: names of the layers whose weights are ``NAME.int8``. On x86 without VNNI, ONNX Runtime renames them to
            ``NAME.int8_s8_2_u8`` when it makes them unsigned.
    """
    wiring = Wiring(optimized)
    integer, floats = [], {}
    for name in expected:
        readers = wiring.readers.get(f"{name}.int8", wiring.readers.get(f"{name}.int8{UNSIGNED}", []))
        if any(r.op_type in INTEGER for r in readers):
            integer.append(name)
        elif not readers:
            floats[name] = "its 8-bit weights are gone, folded back into float"
        else:
            floats[name] = _reason(readers[0], wiring)
    return Census(integer, floats)


def _reason(reader: Any, wiring: Wiring) -> str:
    """Say why no integer kernel computes a layer whose weights a DequantizeLinear still reads."""
    path = [reader.op_type]
    while path[-1] not in ("Gemm", "MatMul", "FusedMatMul", "FusedGemm") and reader.output and len(path) < 5:
        following = wiring.readers.get(reader.output[0], [])
        if not following:
            break
        if len(following) > 1:
            shared = f"one {path[-1]} feeds {len(following)} operators"
            return f"{shared}, and is fused into none of them; give each MatMul its own"
        reader = following[0]
        path.append(reader.op_type)
    if path[-1] in ("Gemm", "FusedGemm"):
        return f"{' -> '.join(path)}: MatMulAddFusion took the Add for a 1-D bias; it must be [1, 1, O]"
    source = wiring.producer.get(reader.input[0]) if reader.op_type == "MatMul" else None
    layers = 0 if source is None or source.op_type != "DequantizeLinear" else _products(source.input[0], wiring)
    if layers > 1:
        advice = "give each a QuantizeLinear and a DequantizeLinear of its own"
        return f"{' -> '.join(path)}: one 8-bit input feeds {layers} layers; {advice}"
    return f"{' -> '.join(path)}: no integer kernel was chosen"


def _products(quantised: str, wiring: Wiring) -> int:
    """Count the operators that read an 8-bit tensor through a DequantizeLinear."""
    return sum(len(wiring.readers.get(reader.output[0], [])) for reader in wiring.readers.get(quantised, []))
