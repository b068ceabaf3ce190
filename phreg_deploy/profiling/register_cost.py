"""Compare the GPU profiles of one model with and without registers."""

from __future__ import annotations

from phreg_deploy.errors import PhregError
from phreg_deploy.profiling.report import Entry, GpuReport, RegisterCost


def register_cost(with_registers: GpuReport, without: GpuReport) -> list[RegisterCost]:
    """Compare two profiles of one model, with and without registers, by batch, size and CUDA graph.

    Raises:
        PhregError: the reports are of different models, or have nothing in common.
    """
    reports = (with_registers, without)
    models = [{key: report.model[key] for key in ("width", "depth", "precision")} for report in reports]
    more, fewer = (int(report.model["registers"]) for report in reports)
    if models[0] != models[1] or more <= fewer:
        got = f"{models[0]} with {more} and {models[1]} with {fewer} registers"
        raise PhregError(f"registers: got {got}, expected one model, the one with more registers first.")
    sides = [{(r["batch"], *r["size"], r["graph"]): r for r in report.results} for report in reports]
    shared = [key for key in sides[0] if key in sides[1]]
    if not shared:
        raise PhregError(f"registers: no batch, size and graph in common: {list(sides[0])} and {list(sides[1])}.")
    return [_cost(sides[0][key], sides[1][key], (more, fewer)) for key in shared]


def _cost(more: Entry, fewer: Entry, registers: tuple[int, int]) -> RegisterCost:
    """Compare one result with registers to the same one without."""
    latency = (more["latency"]["p50"], fewer["latency"]["p50"])
    (low, high), (other_low, other_high) = more["latency"]["p50_interval"], fewer["latency"]["p50_interval"]
    timed = "compute" in more and "compute" in fewer
    return RegisterCost(
        batch=more["batch"],
        size=(more["size"][0], more["size"][1]),
        graph=more["graph"],
        registers=registers,
        latency=latency,
        ratio=latency[0] / latency[1],
        compute=more["compute"]["p50"] / fewer["compute"]["p50"] if timed else None,
        images_per_second=more["images_per_second"] / fewer["images_per_second"],
        measurable=low > other_high or other_low > high,
    )
