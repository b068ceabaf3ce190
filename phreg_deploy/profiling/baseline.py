"""Compare a profile with an earlier report: first the conditions, then the medians."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from phreg_deploy.errors import PhregError
from phreg_deploy.profiling.report import BaselineRow, BatchLatency, Conditions, GpuReport

# Latencies are comparable only where these conditions agree.
COMPARED = (
    "processor",
    "cores",
    "gpu",
    "driver",
    "clocks",
    "backend",
    "backend_version",
    "threads",
    "mode",
    "compute",
    "precision",
    "graph_sha256",
)
# Mean clocks under load that differ by more than this share are another condition.
CLOCKS_AGREE = 0.05
EXPECTED = "expected what `phreg-deploy profile --json` printed"
# Keys by which other JSON documents of this project are known, and what to call the document.
KINDS = (
    ({"sizes", "batches", "preprocess"}, "a bundle's manifest"),
    ({"recipe", "scores"}, "a student's record"),
    ({"comparisons", "artifacts"}, "a report of `phreg-deploy check`"),
    ({"layers", "float_layers"}, "a report of `phreg-deploy calibrate`"),
    ({"norm_outliers", "shift_incoherence"}, "a report of `phreg-deploy artifacts`"),
    ({"findings"}, "a report of `phreg-deploy doctor`"),
    ({"images", "skipped"}, "an index of `phreg-deploy extract`"),
    ({"error", "exit_code"}, "the error of a command that failed"),
)
# A batch and (height, width).
Case = tuple[int, tuple[int, int]]


@dataclass(frozen=True)
class Baseline:
    """An earlier report: its ``conditions``, and the extractor's median milliseconds for each batch and size.

    ``telemetry``: of its GPU while the extractor was measured; empty on the processor.
    """

    path: Path
    conditions: dict[str, Any]
    medians: dict[Case, float]
    telemetry: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def read(cls, path: Path) -> Baseline:
        """Read a file whose only document or last line is a report.

        Raises:
            PhregError: the file is unreadable, empty, not JSON, or another kind of JSON.
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
        return cls(path, conditions, medians, _telemetry(document.get("gpu")))

    def differences(self, conditions: Conditions, cases: list[Case]) -> list[str]:
        """List how the baseline differs from a run under ``conditions`` that measures ``cases``, one text each.

        Raises:
            PhregError: no batch and size is in both.
        """
        if not set(cases) & set(self.medians):
            raise PhregError(
                f"baseline: {self.path} has no batch and size in common with this run, which measures "
                f"{_cases(cases)}; it holds {_cases(self.medians)}."
            )
        current, differences = conditions.to_json(), []
        for name in COMPARED:
            before, now = self.conditions.get(name), current[name]
            if before != now:
                was = "not recorded" if name not in self.conditions else _short(before)
                differences.append(f"{name.replace('_', ' ')}: {was} in the baseline, {_short(now)} now")
        lacking = [case for case in cases if case not in self.medians]
        return differences + ([f"{_cases(lacking)}: not in the baseline"] if lacking else [])

    def held_back(self, gpu: GpuReport | None) -> list[str]:
        """List what only a measurement shows: another mean clock under load, and throttling on one side; one text each.

        ``gpu``: of this run.
        """
        before, now = self.telemetry, _telemetry(None if gpu is None else gpu.to_json())
        if not before or not now:
            return []
        texts = []
        was, is_now = ((side.get("sm_clock") or {}).get("mean") for side in (before, now))
        if was and is_now and abs(is_now / was - 1) > CLOCKS_AGREE:
            texts.append(f"mean SM clock under load: {was:.0f} MHz in the baseline, {is_now:.0f} MHz now")
        shares = [(side.get("throttled") or {}).items() for side in (before, now)]
        reasons = [sorted(name for name, share in side if share) for side in shares]
        if reasons[0] != reasons[1]:
            said = [", ".join(names) or "not at all" for names in reasons]
            texts.append(f"throttled: {said[0]} in the baseline, {said[1]} now")
        return texts

    def rows(self, results: list[BatchLatency]) -> list[BaselineRow]:
        """Compare the medians of each batch and size that the baseline has too."""
        rows = []
        for result in results:
            before, now = self.medians.get((result.batch, result.size)), result.extractor.p50
            if before is not None:
                rows.append(BaselineRow(result.batch, result.size, before, now, now / before))
        return rows


def _telemetry(gpu: Any) -> dict[str, Any]:
    """The telemetry of the extractor's measurement in a GPU report as JSON; empty if there is none."""
    try:
        entry = next(entry for entry in gpu["watched"] if entry["measurement"] == "extractor")
        return dict(entry["telemetry"] or {})
    except (TypeError, KeyError, StopIteration, ValueError):
        return {}


def _read_json(path: Path) -> Any:
    try:
        text = path.read_text(encoding="utf-8").strip()
    except OSError as error:
        raise PhregError(f"baseline: {path} cannot be read ({error.strerror}).") from None
    except UnicodeDecodeError:
        raise PhregError(f"baseline: {path} is not JSON but a binary file; {EXPECTED}.") from None
    if not text:
        raise PhregError(f"baseline: {path} is empty; {EXPECTED}.")
    # The file holds one document, or all that a terminal showed.
    for part in (text, text.splitlines()[-1]):
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
    if value is None:
        return "the default"
    if isinstance(value, dict):
        known = [name for name in sorted(value) if value[name] is not None]
        return ", ".join(f"{name.replace('_', ' ')} {_short(value[name])}" for name in known) or "unknown"
    is_hash = isinstance(value, str) and len(value) == 64
    return f"{value[:16]}…" if is_hash else str(value)
