"""Damage every file of bundles, students and checkpoints at random, and count what comes of it."""

from __future__ import annotations

import random
import shutil
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
from rich.progress import track

from benchmarks.reliability.subjects import Subjects
from benchmarks.reliability.watching import Judge, judge_all
from tests.cli_helpers import invoke
from tests.mutants import VALUES, Mutator, answers, json_change, verdict

# How the hashes in the manifest of a mutant are treated.
HASHES = ("left", "corrected", "not verified")
# Seeds that one call of `judge_all` judges.
CHUNK = 250


def damage_bundles(subjects: Subjects, count: int, start: int = 0) -> dict[str, Any]:
    """Judge ``count`` mutants, spread over four bundles and three treatments of their hashes.

    The outcomes: "refused" (a `PhregError`), "harmless" (served, the same features, class token, norms and rate),
    "caught by check", "silent" (served otherwise), and "traceback", "crash", "hang", "memory".
    """
    rows: dict[str, Counter[str]] = {hashes: Counter() for hashes in HASHES}
    bad: list[dict[str, Any]] = []
    each = count // (len(HASHES) * len(subjects.bundles))
    for name, folder in subjects.bundles.items():
        expected = answers(folder)
        for hashes in HASHES:
            first, start = start, start + each
            with _mutants(folder, expected, hashes) as judge:
                for outcome, seed, change in _judged(judge, range(first, start), f"{name}, hashes {hashes}"):
                    rows[hashes][outcome] += 1
                    if outcome not in ("refused", "harmless", "caught by check"):
                        bad.append({"bundle": name, "hashes": hashes, "seed": seed, "what": outcome, "change": change})
    return {"mutants": sum(sum(row.values()) for row in rows.values()), "outcomes": rows, "to look at": bad}


@contextmanager
def _mutants(folder: Path, expected: dict[str, Any], hashes: str) -> Iterator[Judge]:
    with TemporaryDirectory() as work:
        mutator = Mutator(folder, Path(work) / "mutant", flips=True, hashes=hashes != "left")

        def judge(seed: int) -> tuple[str, str]:
            mutant, change = mutator.make(seed)
            with np.errstate(all="ignore"):
                return verdict(mutant, expected, verify=hashes != "not verified"), change

        yield judge


def damage_students(subjects: Subjects, count: int, start: int = 0) -> dict[str, Any]:
    """Judge ``count`` students with one damaged file, by `inspect` and by `export`.

    "refused": both commands ended with exit code 2 to 4 and a message; "taken": one of them went through.
    """

    def change(folder: Path, draw: random.Random) -> str:
        path = draw.choice([p for p in sorted(folder.iterdir()) if p.is_file()])
        if path.suffix == ".json" and draw.random() < 0.7:
            return json_change(path, draw, VALUES)
        return flip_bytes(path, draw)

    def outcome(folder: Path) -> str:
        codes = [invoke("inspect", folder, "--json"), invoke("export", folder, "-o", f"{folder}.bundle", "--quiet")]
        shutil.rmtree(f"{folder}.bundle", ignore_errors=True)
        return _command_outcome([c.code for c in codes], [c.err for c in codes])

    return _files(subjects.student, count, start, change, outcome)


def damage_checkpoints(subjects: Subjects, count: int, start: int = 0) -> dict[str, Any]:
    """Judge ``count`` damaged checkpoints (.safetensors and .pth) by `artifacts --checkpoint` of a timm name."""
    import timm
    import torch
    from safetensors.torch import save_file

    source = subjects.folder / "checkpoints"
    if not source.exists():
        source.mkdir(parents=True)
        state = timm.create_model("test_vit", pretrained=False).state_dict()
        save_file(state, source / "weights.safetensors")
        torch.save(state, source / "weights.pth")

    def change(folder: Path, draw: random.Random) -> str:
        name = draw.choice(["weights.safetensors", "weights.pth"])
        done = flip_bytes(folder / name, draw)
        (folder / ("weights.pth" if name.endswith("safetensors") else "weights.safetensors")).unlink()
        return done

    def outcome(folder: Path) -> str:
        weights = next(folder.iterdir())
        done = invoke(
            "artifacts", "test_vit", "--checkpoint", weights, "--images", subjects.photos, "--quiet", "--json"
        )
        return _command_outcome([done.code], [done.err])

    return _files(source, count, start, change, outcome)


def _files(
    source: Path, count: int, start: int, change: Callable[[Path, random.Random], str], outcome: Callable[[Path], str]
) -> dict[str, Any]:
    counts: Counter[str] = Counter()
    bad = []
    with TemporaryDirectory() as work:
        folder = Path(work) / "mutant"

        def judge(seed: int) -> tuple[str, str]:
            shutil.rmtree(folder, ignore_errors=True)
            shutil.copytree(source, folder)
            done = change(folder, random.Random(seed))
            return outcome(folder), done

        for what, seed, done in _judged(judge, range(start, start + count), source.name):
            counts[what] += 1
            if what not in ("refused", "taken"):
                bad.append({"seed": seed, "what": what, "change": done})
    return {"mutants": count, "outcomes": counts, "to look at": bad}


def _command_outcome(codes: list[int], errors: list[str]) -> str:
    if any("Traceback" in error for error in errors) or not set(codes) <= {0, 2, 3, 4}:
        return f"traceback: {codes} {errors[-1][-300:]}"
    return "taken" if 0 in codes else "refused"


def _judged(judge: Judge, seeds: range, title: str) -> Iterator[tuple[str, int, str]]:
    chunks = [seeds[i : i + CHUNK] for i in range(0, len(seeds), CHUNK)]
    for chunk in track(chunks, title):
        for judged in judge_all(judge, chunk):
            # "silent: cls" and the like keep which output it was.
            yield judged.outcome, judged.seed, judged.change


def flip_bytes(path: Path, draw: random.Random) -> str:
    """Change 1 to 30 bytes of a file at random places, sometimes cut it off; return what was done."""
    data = bytearray(path.read_bytes())
    # Half of the places are in the first 4,000 bytes, where headers are.
    end = len(data) if draw.random() < 0.5 else min(4000, len(data))
    places = [draw.randrange(end) for _ in range(draw.choice([1, 1, 4, 30]))]
    for place in places:
        data[place] = draw.randrange(256)
    if draw.random() < 0.2:
        del data[draw.randrange(len(data)) :]
    path.write_bytes(bytes(data))
    return f"{path.name}: bytes {places[:3]}"
