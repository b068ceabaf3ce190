"""Build the engine of a bundle, examine it on every path, and measure what an inference takes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from phreg_deploy.bundle.bundle import Bundle
from phreg_deploy.bundle.plan_keys import BuildSettings
from phreg_deploy.bundle.plans import INSPECTED, StoredPlan, list_plans
from phreg_deploy.export.engine.build import BuildRequest, build_engine
from phreg_deploy.export.engine.exam import examine
from phreg_deploy.export.engine.findings import NO, UNKNOWN
from phreg_deploy.export.engine.report import BuildReport
from phreg_deploy.profiling.timing import measure
from phreg_deploy.progress import Progress
from phreg_deploy.runtime.features import FeatureExtractor
from phreg_deploy.runtime.trt.recordings import CAPTURED, PLAIN, REPLAYED
from phreg_deploy.selftest.archive import Archive
from phreg_deploy.selftest.checks import Failed, Sheet, Skipped
from phreg_deploy.selftest.subjects import Subject

# Path of images in the GPU's memory -> bytes between an aligned address and the image.
ON_DEVICE = {"device arrays": 0, "misaligned frames": 108}
PATHS = (PLAIN, CAPTURED, REPLAYED, *ON_DEVICE)
# Seconds of timing and milliseconds of warm-up, for each engine.
SECONDS, WARMUP = 1.0, 200.0
# The first TensorRT issue to look at if an INT8 engine cannot be built on Orin, and Orin's architecture.
ORIN, ORIN_ISSUE = 87, "https://github.com/NVIDIA/TensorRT/issues/4832"


@dataclass(frozen=True)
class Built:
    """The engine of a subject."""

    subject: Subject
    bundle: Bundle
    report: BuildReport
    plan: StoredPlan


class EngineChecks:
    """The checks of one GPU's engines; ``archive`` gets what TensorRT's inspector says, and ``timings``."""

    def __init__(self, sheet: Sheet, archive: Archive, device: int, architecture: int, progress: Progress) -> None:
        self.sheet, self.archive, self.device, self.progress = sheet, archive, device, progress
        self.architecture, self.timings = architecture, dict[str, Any]()

    def check(self, subject: Subject) -> Built | None:
        """Build, count, examine and time the engine of a subject; None if it could not be built."""
        built: list[Built] = []
        if not self.sheet.run(f"{subject}, engine", lambda: self._build(subject, built)):
            return None
        self.sheet.run(f"{subject}, fused and 8-bit layers", lambda: judge_layers(built[0].report))
        runs = list[Mapping[str, Any]]()
        if self.sheet.run(f"{subject}, exam", lambda: self._examine(built[0], runs)) or runs:
            for path in PATHS:
                self.sheet.run(f"{subject}, {path}", lambda path=path: judge_path(runs, path))  # type: ignore[misc]
        self.sheet.run(f"{subject}, timing", lambda: self._time(built[0]))
        return built[0]

    def _build(self, subject: Subject, built: list[Built]) -> str:
        try:
            report, plan = build(subject.folder, self.device, BuildSettings(), self.progress)
        except Exception as error:
            if subject.precision == "int8" and self.architecture == ORIN:
                raise Failed(f"{error} Compare {ORIN_ISSUE}, which is of INT8 on Orin.") from error
            raise
        built.append(Built(subject, Bundle.read(subject.folder), report, plan))
        text = report.plan.with_suffix(INSPECTED).read_text(encoding="utf-8", errors="replace")
        self.archive.add(f"engines/{subject}.inspector.json", text)
        self.archive.add(f"engines/{subject}.build.json", report.to_json())
        return f"built in {report.seconds:.1f} s, {report.megabytes:.1f} MB, {report.census.layers} layers"

    def _examine(self, built: Built, runs: list[Mapping[str, Any]]) -> str:
        verdict = examine(built.bundle, built.plan, self.device, ON_DEVICE)
        runs.extend(verdict["runs"])
        self.archive.add(f"engines/{built.subject}.exam.json", verdict)
        if verdict["missed"]:
            raise Failed("; ".join(verdict["missed"]))
        profiles = len({run["profile"] for run in runs})
        return f"{len(runs)} runs over {profiles} profiles, {_cosine(min(runs, key=_order))}"

    def _time(self, built: Built) -> str:
        with FeatureExtractor.load(built.subject.folder, "tensorrt", device=self.device) as extractor:
            manifest = extractor.manifest
            images = np.zeros((manifest.batches.best, *manifest.sizes.default, 3), np.uint8)
            plan, feed = extractor.opened, extractor.feed(images)
            calls = {graph: lambda graph=graph: plan.split(feed, graph) for graph in (False, True)}  # type: ignore[misc]
            measured = measure(calls, SECONDS, WARMUP, self.progress)
        entry = {("graph" if graph else "plain"): parts for graph, parts in measured.items()}
        self.timings[str(built.subject)] = {"batch": len(images), "size": list(images.shape[1:3]), **entry}
        plain, graph = (entry[name]["latency"]["p50"] for name in ("plain", "graph"))
        return f"median of {len(images)} images {plain:.3f} ms, {graph:.3f} ms with a CUDA graph"


def build(folder: Path, device: int, settings: BuildSettings, progress: Progress) -> tuple[BuildReport, StoredPlan]:
    """Build a bundle's engine without an exam, and return its report and its plan."""
    report = build_engine(BuildRequest(folder, settings, device, check=False), force=True, progress=progress)
    plans = {plan.key: plan for plan in list_plans(Bundle.read(folder))}
    return report, plans[report.key]


def judge_layers(report: BuildReport) -> str:
    """Judge the census of an engine's layers: as expected, fewer, or unknown."""
    if not report.findings:
        raise Skipped("nothing is expected of an engine in this precision.")
    sentences = {verdict: [f.sentence for f in report.findings if f.verdict == verdict] for verdict in (NO, UNKNOWN)}
    if sentences[NO]:
        raise Failed(f"{'; '.join(sentences[NO])}. Answers are not affected, but the engine may be slow.")
    if sentences[UNKNOWN]:
        raise Skipped(f"{'; '.join(sentences[UNKNOWN])}.")
    return "; ".join(finding.sentence for finding in report.findings)


def judge_path(runs: list[Mapping[str, Any]], path: str) -> str:
    """Judge the runs of an exam on one path."""
    mine = [run for run in runs if run["path"] == path]
    if not mine:
        took = ", ".join(sorted({run["path"] for run in runs}))
        raise Failed(f"no run took this path, only: {took}. CUDA graphs may be off because recording failed.")
    worst = min(mine, key=_order)
    height, width = worst["size"]
    where = f"profile {worst['profile']}, batch {worst['batch']} at {height}x{width}"
    if not worst["passed"]:
        wrong = sum(not run["passed"] for run in mine)
        raise Failed(f"{wrong} of {len(mine)} runs differ from the exam, e.g. {where}: {_cosine(worst)}")
    return f"{len(mine)} runs, {_cosine(worst)} ({where})"


def _order(run: Mapping[str, Any]) -> tuple[bool, float]:
    """Sort failed runs first, then by cosine."""
    return run["passed"], 0.0 if run["cosine_p1"] is None else run["cosine_p1"]


def _cosine(run: Mapping[str, Any]) -> str:
    cosine = run["cosine_p1"]
    return "heads alone, without a cosine" if cosine is None else f"least 1st-percentile patch cosine {cosine:.5f}"
