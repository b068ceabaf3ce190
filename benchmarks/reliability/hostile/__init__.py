"""Give every command input that is meant to do harm, one case after another, and judge what comes of it."""

from __future__ import annotations

import json
import os
import time
from collections import Counter
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from rich.progress import track

from benchmarks.reliability.hostile.archives import archive_cases
from benchmarks.reliability.hostile.bundles import bundle_cases
from benchmarks.reliability.hostile.case import Place
from benchmarks.reliability.hostile.images import image_cases
from benchmarks.reliability.hostile.models import head_cases, model_cases, name_cases
from benchmarks.reliability.hostile.uploads import judge_uploads
from benchmarks.reliability.subjects import Subjects
from benchmarks.reliability.watching import judge_all
from tests.cli_helpers import Outcome, invoke, leftovers

KINDS = ("images", "archives", "models", "heads", "bundles", "names", "uploads")
CASES = {
    **image_cases(),
    **archive_cases(),
    **model_cases(),
    **head_cases(),
    **bundle_cases(),
    **name_cases(),
}


def measure_hostile(subjects: Subjects, count: int) -> dict[str, Any]:
    """Judge the first ``count`` cases, each in a process of its own, and then what is sent to `serve`.

    Outcomes: "refused" (exit code 2 to 4 and a message, or a status from 400 to 499), "left out" (exit code 0, and the
    bad file is listed as skipped), "harmless" (exit code 0, and nothing of the input did anything), "taken" (exit code
    0 otherwise), "outside" (a file was written or ran outside of the output), "traceback", "memory", "hang", "crash".
    """
    # What children need is loaded before they are forked: a child's memory includes it.
    import timm  # noqa: F401
    import torch  # noqa: F401

    import phreg_deploy.export.exporter  # noqa: F401

    subjects.bundle, subjects.photos, subjects.base  # noqa: B018
    counts = {kind: Counter[str]() for kind in KINDS}
    bad, most_memory, most_seconds = [], 0.0, 0.0
    for name in track(list(CASES)[:count], "hostile"):
        found = judge_case(subjects, name)
        counts[CASES[name].kind][found["outcome"]] += 1
        most_memory, most_seconds = max(most_memory, found["mebibytes"]), max(most_seconds, found["seconds"])
        if found["outcome"] not in ("refused", "left out", "harmless"):
            bad.append({"case": name, **found})
    if count >= len(CASES):
        counts["uploads"], service, failed = judge_uploads(subjects)
        bad += failed
        most_memory = max(most_memory, service)
    return {
        "cases": sum(sum(c.values()) for c in counts.values()),
        "outcomes": counts,
        "largest MiB": round(most_memory),
        "longest seconds": round(most_seconds, 1),
        "to look at": bad,
    }


def judge_case(subjects: Subjects, name: str) -> dict[str, Any]:
    """Run one case of ``CASES`` in a forked process, in folders of its own."""
    case = CASES[name]
    with TemporaryDirectory() as work:
        place = Place(Path(work), subjects)
        place.inputs.mkdir(parents=True, exist_ok=True)
        command = case.make(place)
        before = _listing(place)

        def judge(_seed: int) -> tuple[str, str]:
            os.chdir(place.inputs)
            started = time.monotonic()
            done = invoke(*command)
            facts = {"seconds": time.monotonic() - started, "mebibytes": _largest()}
            return _verdict(done, place, before, case.harmless), json.dumps({**facts, "said": done.err[-300:]})

        (judged,) = judge_all(judge, [0])
    facts = json.loads(judged.change) if judged.change.startswith("{") else {"said": judged.change[-600:]}
    return {"seconds": 60.0 if judged.outcome == "hang" else 0.0, "mebibytes": 0.0, "outcome": judged.outcome, **facts}


def _verdict(done: Outcome, place: Place, before: set[str], harmless: bool) -> str:
    if _listing(place) != before or leftovers(place.root):
        return "outside"
    if "Traceback" in done.err or done.code not in (0, 2, 3, 4):
        return "traceback"
    if "Usage: " in done.err:
        # The case itself is wrong.
        return "usage"
    if done.code:
        return "refused" if "Error: " in done.err else "traceback"
    if harmless:
        return "harmless"
    return "left out" if done.out and done.document.get("skipped") else "taken"


def _listing(place: Place) -> set[str]:
    """Every path that is there, but for those of the output and the cache."""
    paths = (str(path) for path in place.root.rglob("*"))
    own = (str(place.output), str(place.root / "cache"))
    return {path for path in paths if not path.startswith(own)}


def _largest() -> float:
    """The largest resident MiB of this process so far."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM"):
            return int(line.split()[1]) / 1024
    return 0.0
