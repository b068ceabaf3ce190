"""The reports of a profile; ``to_json`` of each is what ``phreg-deploy profile --json`` prints."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from phreg_deploy.spec import Stored

# Milliseconds of one part of an inference (rounds, min, mean, p50 ... p99.9, max, std, p50_interval), by part, and the
# entry's own keys. The keys are made by ``timing.describe``.
Entry = dict[str, Any]


@dataclass(frozen=True)
class Conditions(Stored):
    """What the figures depend on: the machine and its load, the versions, the bundle.

    ``cores``: that this process may use. ``load``: over 1, 5 and 15 minutes. ``driver``: the CUDA version that a GPU's
    driver supports. ``clocks``: of a GPU, see ``Telemetry.clocks``. ``photograph``: what preprocessing was measured on,
    and ``resize``, by which code.
    """

    processor: str
    cores: int | None
    load: list[float] | None
    system: str
    python: str
    backend: str
    compute: str
    choice: str
    backend_version: str
    threads: int | None
    mode: str
    gpu: str | None
    driver: int | None
    clocks: Entry | None
    precision: str
    model: str
    registers: int
    random_weights: bool
    graph_sha256: str | None
    photograph: str
    resize: str


@dataclass(frozen=True)
class Latency(Stored):
    """Milliseconds per call. ``stable``: the medians of the two halves of the run agree, see ``latency.summarise``."""

    rounds: int
    minimum: float
    mean: float
    p50: float
    p90: float
    p99: float
    maximum: float
    stable: bool


@dataclass(frozen=True)
class BatchLatency(Stored):
    """Latencies at one batch and (height, width): the graph alone, the extractor around it, preprocessing of one image.

    ``overhead``: median of the extractor over that of the graph, less 1. ``images_per_second``: of the extractor.
    ``preprocess_share``: of the time from frames to features.
    """

    batch: int
    size: tuple[int, int]
    graph: Latency
    extractor: Latency
    preprocess: Latency
    overhead: float
    images_per_second: float
    preprocess_share: float


@dataclass(frozen=True)
class GpuReport(Stored):
    """A bundle on a GPU.

    ``results`` per batch and CUDA graph; ``streams`` per batch and number of threads; ``layers``, ``queue`` and
    ``roofline`` per batch. ``memory`` in bytes; ``idle_power`` in W; ``missing``: figure -> the reason why there is
    none. ``watched``: power, energy, clocks and throttling during each measurement. ``stable``: all results are.
    ``peaks``: what the device can do.
    """

    method: Entry
    model: Entry
    memory: Entry
    idle_power: float | None
    results: list[Entry]
    streams: list[Entry]
    layers: list[Entry]
    queue: list[Entry]
    roofline: list[Entry]
    missing: dict[str, str]
    watched: list[Entry]
    stable: bool
    peaks: Entry | None

    def throttled(self) -> list[str]:
        """The measurements during which the GPU was held back, one text each."""
        texts = []
        for entry in self.watched:
            reasons = ((entry["telemetry"] or {}).get("throttled") or {}).items()
            if any(share for _, share in reasons):
                said = ", ".join(f"{name} {100 * share:.0f} %" for name, share in reasons if share)
                texts.append(f"{entry['measurement']} at batch {entry['batch']}: {said} of the time")
        return texts


@dataclass(frozen=True)
class RegisterCost(Stored):
    """A model with registers against the same model without, at one batch, size and CUDA graph.

    ``registers`` and ``latency`` (medians in milliseconds): with and without. ``ratio`` of the latencies;
    ``compute`` and ``images_per_second`` are ratios too. ``measurable``: the intervals of the medians do not
    overlap.
    """

    batch: int
    size: tuple[int, int]
    graph: bool | None
    registers: tuple[int, int]
    latency: tuple[float, float]
    ratio: float
    compute: float | None
    images_per_second: float
    measurable: bool


@dataclass(frozen=True)
class BaselineRow(Stored):
    """Medians of the extractor in milliseconds, in the baseline and now, at one batch and (height, width)."""

    batch: int
    size: tuple[int, int]
    before: float
    now: float
    ratio: float


@dataclass(frozen=True)
class Comparison(Stored):
    """A profile against a baseline. ``differences`` in their conditions; ``tolerance``: growth that is allowed."""

    path: str
    differences: list[str]
    tolerance: float
    rows: list[BaselineRow]

    def slower(self) -> list[str]:
        """The rows whose median grew by more than ``tolerance`` (0.1 is 10 %), one text each."""
        return [
            f"batch {row.batch} at {row.size[0]}x{row.size[1]}: {row.now:.2f} ms, {row.ratio:.2f}x the baseline's "
            f"{row.before:.2f} ms"
            for row in self.rows
            if row.ratio > 1 + self.tolerance
        ]


@dataclass(frozen=True)
class ScenarioResult(Stored):
    """A run as MLPerf Inference defines it, see ``scenarios``.

    ``metric`` and ``value``: "90th percentile latency in ms" or "samples per second". ``seconds``: that it took.
    ``minimum_seconds``, ``minimum_queries`` and ``minimum_samples`` (of each query): of this run. ``rules``: those of
    MLPerf. ``meets_rules``: this run is as long as they want. ``latency``: milliseconds of queries.
    """

    scenario: str
    metric: str
    value: float
    queries: int
    samples: int
    batch: int
    threads: int
    seconds: float
    minimum_seconds: float
    minimum_queries: int
    minimum_samples: int
    rules: Entry
    meets_rules: bool
    latency: Entry


@dataclass(frozen=True)
class ProfileReport:
    """What ``profile`` measured.

    ``without``: the GPU report of the model without registers; ``remarks``: lines for the user. Neither is in the JSON.
    """

    conditions: Conditions
    results: list[BatchLatency]
    gpu: GpuReport | None = None
    without: GpuReport | None = None
    registers: list[RegisterCost] | None = None
    baseline: Comparison | None = None
    scenarios: list[ScenarioResult] | None = None
    remarks: list[str] = field(default_factory=list)

    @property
    def slower(self) -> list[str]:
        """The medians that grew too much, see ``Comparison``."""
        return self.baseline.slower() if self.baseline is not None else []

    def to_json(self) -> dict[str, Any]:
        optional: dict[str, Any] = {
            "gpu": self.gpu,
            "registers": self.registers,
            "baseline": self.baseline,
            "scenarios": self.scenarios,
        }
        return {
            "conditions": self.conditions.to_json(),
            "results": [result.to_json() for result in self.results],
            **{name: _to_json(part) for name, part in optional.items() if part is not None},
            "slower": self.slower,
        }


def _to_json(part: Any) -> Any:
    return [item.to_json() for item in part] if isinstance(part, list) else part.to_json()
