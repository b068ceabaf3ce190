"""An earlier report of ``profile`` as a gate: read, compared in its conditions, and then in its medians."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from phreg_deploy.errors import PhregError

# Conditions of a report that latency depends on; a difference in one of them is no change of the bundle's speed.
COMPARED = (
    "processor", "cores", "gpu", "backend", "backend_version", "threads", "mode", "compute", "precision", "graph_sha256",
)  # fmt: skip
EXPECTED = "expected what `phreg-deploy profile --json` printed"
KINDS = (  # keys that another JSON document of this project is known by, and what it is
    ({"sizes", "batches", "preprocess"}, "a bundle's manifest"),
    ({"recipe", "scores"}, "a student's record"),
    ({"comparisons", "artifacts"}, "a report of `phreg-deploy check`"),
    ({"layers", "float_layers"}, "a report of `phreg-deploy calibrate`"),
    ({"norm_outliers", "shift_incoherence"}, "a report of `phreg-deploy artifacts`"),
    ({"findings"}, "a report of `phreg-deploy doctor`"),
    ({"images", "skipped"}, "an index of `phreg-deploy extract`"),
    ({"error", "exit_code"}, "the error of a command that failed"),
)
Case = tuple[int, tuple[int, int]]  # batch and (height, width)


@dataclass(frozen=True)
class Baseline:
    """An earlier report: its ``conditions``, and the extractor's median milliseconds for each batch and size."""

    path: Path
    conditions: dict[str, Any]
    medians: dict[Case, float]

    @classmethod
    def read(cls, path: Path) -> Baseline:
        """Read a file that holds a report as its only document or as its last line.

        Raises:
            PhregError: unreadable, empty, not JSON, or JSON of another kind, which is then named.
        """
        document = _read_json(path)
        try:
            conditions = document.get("conditions", {})
            medians = {
                (int(r["batch"]), (int(r["size"][0]), int(r["size"][1]))): float(r["extractor"]["p50"])
                for r in document["results"]
            }
            sound = all(0 < value < math.inf for value in medians.values()) and isinstance(conditions, dict)
        except (AttributeError, KeyError, TypeError, ValueError, IndexError):
            sound = False
        if not sound or not medians:
            raise PhregError(f"baseline: {path} is not a report of latencies but {_kind(document)}; {EXPECTED}.")
        return cls(path, conditions, medians)

    def differences(self, conditions: dict[str, Any], cases: list[Case]) -> list[str]:
        """What differs between the baseline and a run under ``conditions`` that measures ``cases``, one text each.

        Raises:
            PhregError: no batch and size is in both.
        """
        if not set(cases) & set(self.medians):
            raise PhregError(
                f"baseline: {self.path} has no batch and size in common with this run, which measures {_cases(cases)}; it holds {_cases(self.medians)}."
            )
        found = []
        for name in COMPARED:
            before, now = self.conditions.get(name), conditions.get(name)
            if before != now:
                was = "not recorded" if name not in self.conditions else _short(before)
                found.append(f"{name.replace('_', ' ')}: {was} in the baseline, {_short(now)} now")
        lacking = [case for case in cases if case not in self.medians]
        return found + ([f"{_cases(lacking)}: not in the baseline"] if lacking else [])

    def rows(self, results: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """Each measured batch and size that the baseline has too: medians in milliseconds before and now, and their ratio."""
        found = []
        for result in results:
            size = (result["size"][0], result["size"][1])
            before, now = self.medians.get((result["batch"], size)), result["extractor"]["p50"]
            if before is not None:
                row = {
                    "batch": result["batch"],
                    "size": list(size),
                    "before": before,
                    "now": now,
                    "ratio": now / before,
                }
                found.append(row)
        return found


def slower_rows(rows: list[dict[str, Any]], tolerance: float) -> list[str]:
    """The rows whose median grew by more than ``tolerance`` (0.1 is 10 %), one text each."""
    return [
        f"batch {r['batch']} at {r['size'][0]}x{r['size'][1]}: {r['now']:.2f} ms, {r['ratio']:.2f}x the baseline's {r['before']:.2f} ms"
        for r in rows
        if r["ratio"] > 1 + tolerance
    ]


def _read_json(path: Path) -> Any:
    try:
        text = path.read_text(encoding="utf-8").strip()
    except OSError as error:
        raise PhregError(f"baseline: {path} cannot be read ({error.strerror}).") from None
    except UnicodeDecodeError:
        raise PhregError(f"baseline: {path} is not JSON but a binary file; {EXPECTED}.") from None
    if not text:
        raise PhregError(f"baseline: {path} is empty; {EXPECTED}.")
    for part in (text, text.splitlines()[-1]):  # a file that was written whole, or what a terminal showed
        try:
            return json.loads(part)
        except (ValueError, RecursionError):
            continue
    raise PhregError(f"baseline: {path} is not JSON; {EXPECTED}.")


def _kind(document: Any) -> str:
    if not isinstance(document, dict):
        return f"a JSON {'list' if isinstance(document, list) else 'value'}"
    known = next((text for keys, text in KINDS if keys <= set(document)), None)
    if known is not None:
        return known
    keys = ", ".join(repr(key) for key in list(document)[:5])
    return f"a JSON object with the keys {keys}" if keys else "an empty JSON object"


def _cases(cases: Any) -> str:
    return ", ".join(f"batch {batch} at {size[0]}x{size[1]}" for batch, size in sorted(cases))


def _short(value: Any) -> str:
    return (
        "the default"
        if value is None
        else f"{value[:16]}…"
        if isinstance(value, str) and len(value) == 64
        else str(value)
    )
