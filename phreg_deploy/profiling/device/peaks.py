"""What a GPU can do at most: products in each precision and copies, measured once and kept on disk."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from phreg_deploy.errors import PhregError
from phreg_deploy.files.atomic import write_atomic
from phreg_deploy.files.cache import cache_folder
from phreg_deploy.json_files import read_json
from phreg_deploy.runtime.gpu.cuda import Cuda, Event, Stream
from phreg_deploy.runtime.gpu.memory import DeviceBuffer
from phreg_deploy.spec import Stored

# Bytes per copy, five times the largest L2 cache, and copies between two marks.
COPIED, COPIES = 256 << 20, 8
# Precision of a bundle -> that of the layers which it leaves in float.
AROUND = {"int8": "fp16", "fp8": "fp16"}
BANDWIDTH = "bandwidth"


@dataclass(frozen=True)
class Peaks(Stored):
    """Peaks of a device: operations per second of products, and bytes per second of copies; None if not measured.

    ``flops``: of products in ``precision``, the bundle's. ``around``: of products in the precision of the layers that
    an 8-bit bundle leaves in float; None if they are in ``precision`` too.
    """

    flops: float | None
    bandwidth: float | None
    note: str = ""
    precision: str | None = None
    around: float | None = None


def find_peaks(
    cuda: Cuda,
    precision: str,
    measure_product: Callable[[str], float] | None,
    conditions: Mapping[str, Any],
    folder: Path | None = None,
) -> tuple[Peaks, list[str]]:
    """Return the peaks for a bundle's precision and remarks for the user; what is not on disk is measured and kept.

    Args:
        measure_product: precision -> operations per second; None if nothing here can multiply.
        conditions: what the peaks depend on beside the GPU and its driver, as JSON: versions, power mode.
        folder: of the files; None for ``cache_folder()``.
    """
    key = {"gpu": cuda.gpu.to_json(), **conditions}
    digest = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:16]
    path = (folder or cache_folder()) / f"peaks-{digest}.json"
    known = _read(path, key)
    before, remarks = dict(known), list[str]()
    if BANDWIDTH not in known:
        known[BANDWIDTH] = measure_bandwidth(cuda)
    wanted = [precision, *([AROUND[precision]] if precision in AROUND else [])]
    for name in wanted if measure_product is not None else []:
        if name not in known and measure_product is not None:
            try:
                known[name] = measure_product(name)
            except PhregError as error:
                # The figures below the roof are worth more than the roof.
                remarks.append(f"No peak of {name} products: {error}")
    if known != before:
        remarks += _write(path, key, known)
    source = "measured now" if known != before else f"from an earlier run ({path.name})"
    note = f"bandwidth: device to device copies, reads and writes counted; {source}"
    around = known.get(AROUND[precision]) if precision in AROUND else None
    return Peaks(known.get(precision), known[BANDWIDTH], note, precision, around), remarks


def _read(path: Path, key: Mapping[str, Any]) -> dict[str, float]:
    """Read the peaks of a device; none if the file is missing, damaged or of another device."""
    try:
        stored = read_json(path)
        values = stored["values"] if stored["key"] == json.loads(json.dumps(key)) else {}
        sound = all(isinstance(value, float) and 0 < value < math.inf for value in values.values())
        return dict(values) if sound else {}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return {}


def _write(path: Path, key: Mapping[str, Any], values: dict[str, float]) -> list[str]:
    """Write the peaks; a failure is a remark, because they can be measured again."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(path, (json.dumps({"key": key, "values": values}, indent=1) + "\n").encode())
    except (OSError, PhregError) as error:
        return [f"The peaks were not kept, so the next profile measures them again: {error}"]
    return []


def measure_bandwidth(cuda: Cuda, *, size: int | None = None, rounds: int = 10) -> float:
    """Bytes per second of copies within device memory, each byte read and written, the best of ``rounds``.

    Args:
        size: bytes per copy, by default ``COPIED``; less where an eighth of the free memory is less.
    """
    size = min(size or COPIED, cuda.free_memory()[0] // 8)
    times = []
    with Stream(cuda) as stream, DeviceBuffer(cuda, size) as source, DeviceBuffer(cuda, size) as target:
        with Event(cuda) as start, Event(cuda) as end:
            for _ in range(rounds + 1):
                start.record(stream.handle)
                for _ in range(COPIES):
                    cuda.copy(target.pointer, source.pointer, size, "DeviceToDevice", stream.handle)
                end.record(stream.handle)
                end.wait()
                times.append(end.since(start))
    # The first round warms up.
    return 2 * size * COPIES / (min(times[1:]) * 1e-3)
