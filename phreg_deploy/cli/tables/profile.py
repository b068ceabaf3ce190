"""Tables of ``profile``."""

from __future__ import annotations

from typing import TYPE_CHECKING

from phreg_deploy.cli.console import Result, figure

if TYPE_CHECKING:
    from phreg_deploy.profiling.report import (
        BatchLatency,
        Comparison,
        Entry,
        GpuReport,
        Latency,
        ProfileReport,
        RegisterCost,
        ScenarioResult,
    )

LATENCY_COLUMNS = ["batch", "size", "part", "p50", "p90", "p99", "min", "rounds", "stable"]
QUANTILES = ("p50", "p90", "p95", "p99", "p99.9")
GPU_COLUMNS = ["batch", "CUDA graph", "milliseconds", *QUANTILES, "images/s", "stable"]
GPU_PARTS = ("latency", "h2d", "enqueue", "compute", "d2h")
WATCHED_COLUMNS = ["measurement", "batch", "W", "J per image", "SM MHz", "°C at most"]
GRAPH = {True: "graph", False: "no graph", None: "-"}


def show_profile(report: ProfileReport, bundle: str, without: str | None, result: Result) -> None:
    """Print all that was measured: the GPU first, then latencies, then the comparison with a baseline."""
    for line in report.remarks:
        result.say(line)
    for measured, folder in ((report.gpu, bundle), (report.without, without)):
        if measured is not None:
            _show_gpu(measured, f"{folder} on {report.conditions.gpu}", result)
    if report.registers is not None:
        _show_register_cost(report.registers, result)
    _show_latencies(report, result)
    if report.scenarios is not None:
        _show_scenarios(report.scenarios, result)
    if report.baseline is not None:
        _show_baseline(report.baseline, result)


def _show_latencies(report: ProfileReport, result: Result) -> None:
    where = report.conditions
    rows = [
        _latency_row(r, part, latency)
        for r in report.results
        for part, latency in (("graph", r.graph), ("extractor", r.extractor), ("preprocess", r.preprocess))
    ]
    title = f"Milliseconds on {where.backend} ({where.processor}, {where.cores} cores)"
    result.table(title, LATENCY_COLUMNS, rows)
    for r in report.results:
        added = (
            f"the extractor adds {100 * r.overhead:.1f} % to the bare graph"
            if r.overhead >= 0
            else "what the extractor adds to the bare graph is less than the noise"
        )
        result.say(
            f"batch {r.batch}: {r.images_per_second:.1f} images/s; {added}. Preprocessing of "
            f"{where.photograph} ({where.resize} resize) is "
            f"{100 * r.preprocess_share:.0f} % of the time from frame to features."
        )


def _latency_row(r: BatchLatency, part: str, latency: Latency) -> list[str]:
    times = (latency.p50, latency.p90, latency.p99, latency.minimum)
    return [
        str(r.batch),
        _size(r.size),
        part,
        *(f"{time:.2f}" for time in times),
        str(latency.rounds),
        "yes" if latency.stable else "NO",
    ]


def _show_gpu(report: GpuReport, title: str, result: Result) -> None:
    rows = [_gpu_row(r, part) for r in report.results for part in GPU_PARTS if part in r]
    result.table(title, GPU_COLUMNS, rows)
    rows = [[str(s["batch"]), str(s["streams"]), f"{s['images_per_second']:.1f}", _energy(s)] for s in report.streams]
    result.table("Threads that call at once", ["batch", "threads", "images/s", "J per image"], rows)
    for grouped in report.layers:
        title = f"Layers at batch {grouped['batch']}, by TensorRT's profiler"
        total = sum(grouped["parts"].values()) or 1.0
        parts = sorted(grouped["parts"].items(), key=lambda part: -part[1])
        rows = [[part, f"{ms:.3f}", f"{100 * ms / total:.1f} %"] for part, ms in parts]
        result.table(title, ["part", "milliseconds", "share"], rows)
    rows = [_watched_row(entry) for entry in report.watched if entry["telemetry"]]
    if rows:
        result.table("What the GPU did meanwhile", WATCHED_COLUMNS, rows)
    for roof in report.roofline:
        _show_roof(roof, result)
    for name, reason in report.missing.items():
        result.say(f"{name}: {reason}")
    for line in report.throttled():
        result.say(f"THROTTLED: {line}. The figures are those of a GPU that was held back.")


def _watched_row(entry: Entry) -> list[str]:
    found = entry["telemetry"]
    energy, clock = found.get("energy") or {}, found.get("sm_clock") or {}
    return [
        entry["measurement"],
        str(entry["batch"]),
        figure((found.get("power") or {}).get("mean")),
        figure(energy.get("per_frame")),
        figure(clock.get("mean")),
        figure(found.get("temperature_max")),
    ]


def _show_roof(roof: Entry, result: Result) -> None:
    """Say how close an inference comes to the peaks, in the precision that it computes in."""
    peaks, whole = roof["peaks"], roof["total"]
    if whole.get("share_of_flops") is None:
        return
    precisions = " and ".join(name for name in (peaks["precision"], "fp16" if peaks["around"] else None) if name)
    result.say(
        f"batch {roof['batch']}: {100 * whole['share_of_flops']:.0f} % of the time that its products take at this "
        f"GPU's peak in {precisions}, {100 * whole['share_of_bandwidth']:.0f} % of its bandwidth."
    )


def _show_scenarios(scenarios: list[ScenarioResult], result: Result) -> None:
    counts = [[str(number) for number in (s.queries, s.samples, s.batch, s.threads)] for s in scenarios]
    rows = [[s.scenario, s.metric, f"{s.value:.3f}", *count, s.seconds] for s, count in zip(scenarios, counts)]
    columns = ["scenario", "metric", "value", "queries", "samples", "batch", "threads", "seconds"]
    result.table("Scenarios of MLPerf Inference", columns, rows)
    for s in scenarios:
        if not s.meets_rules:
            wanted = f"{s.rules['seconds']:g} s, {s.rules['queries']} queries, {s.rules['samples']} samples a query"
            result.say(f"{s.scenario} is shorter than MLPerf's rules want: at least {wanted}. Add --seconds 600.")


def _gpu_row(r: Entry, part: str) -> list[str]:
    return [
        str(r["batch"]),
        GRAPH[r["graph"]],
        part,
        *(f"{r[part][quantile]:.3f}" for quantile in QUANTILES),
        f"{r['images_per_second']:.1f}" if part == "latency" else "",
        "yes" if r["stable"] else "NO",
    ]


def _energy(sweep: Entry) -> str:
    energy = (sweep["telemetry"] or {}).get("energy") or {}
    return figure(energy.get("per_frame"))


def _show_register_cost(costs: list[RegisterCost], result: Result) -> None:
    rows = [
        [
            str(cost.batch),
            str(cost.graph),
            *(f"{latency:.3f}" for latency in cost.latency),
            f"{cost.ratio:.3f}",
            "yes" if cost.measurable else "no",
        ]
        for cost in costs
    ]
    result.table("What registers cost", ["batch", "graph", "with, ms", "without, ms", "ratio", "measurable"], rows)


def _show_baseline(comparison: Comparison, result: Result) -> None:
    other = "; OTHER CONDITIONS" if comparison.differences else ""
    largest = f"{1 + comparison.tolerance:.2f}"
    rows = [
        [str(row.batch), _size(row.size), f"{row.before:.2f}", f"{row.now:.2f}", f"{row.ratio:.2f}", largest]
        for row in comparison.rows
    ]
    title = f"Median milliseconds against {comparison.path}{other}"
    result.table(title, ["batch", "size", "before", "now", "ratio", "at most"], rows)
    for line in comparison.differences:
        result.say(f"Other condition: {line}.")


def _size(size: tuple[int, int]) -> str:
    return f"{size[0]}x{size[1]}"
