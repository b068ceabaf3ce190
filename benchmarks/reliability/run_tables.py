"""The tables of docs/reliability.md of hostile input, long runs and threads."""

from __future__ import annotations

from typing import Any

Table = tuple[list[str], list[list[str]]]
KINDS = {
    "images": "images: bombs, pipes, devices, PostScript, for `extract`, `artifacts`, `calibrate`, `distill`",
    "archives": "tar files: names that lead out, links, headers of gigabytes, chains, sizes below 0",
    "models": "checkpoints and students: pickles that run, bombs, pipes, sizes of millions",
    "heads": "heads: the same",
    "bundles": "bundles: names that lead out, pipes, devices, deep or huge JSON, pickles and bombs in the exam",
    "names": "names such as `hf-hub:../../x`, for `check`, `export`, `inspect`, `push`",
    "uploads": "requests to `serve`: the bombs, and forms and headers by the thousand",
}
RUNS = {"run": "frames by `run`", "stream": "frames by `Stream`", "loads": "bundles loaded, called and closed"}


def hostile(document: dict[str, Any]) -> Table:
    """How many cases of each kind ended how."""
    rows = []
    for kind, counts in document["hostile"]["outcomes"].items():
        refused, left_out, harmless = (counts.get(word, 0) for word in ("refused", "left out", "harmless"))
        total = sum(counts.values())
        rest = total - refused - left_out - harmless
        rows.append([KINDS[kind], *(str(n) for n in (total, refused, harmless + left_out, rest))])
    return ["", "cases", "refused", "harmless", "anything else"], rows


def long_runs(document: dict[str, Any]) -> Table:
    """Memory, handles and threads after the warm-up and at the end of each run."""
    rows = []
    for backend, run in document["long"]["runs"].items():
        for kind, usage in run.items():
            memory, per_step = usage["memory"], usage["memory"]["slope"] / 1000 * 1024
            rows.append(
                [
                    f"{backend}: {usage['steps']:,} {RUNS[kind]}",
                    f"{memory['first']:.1f} / {memory['last']:.1f} MiB",
                    f"{per_step:.2f} KiB",
                    " / ".join(map(str, usage["handles"])),
                    " / ".join(map(str, usage["threads"])),
                ]
            )
    return ["", "memory, first / last", "growth per step", "open files", "threads"], rows


def threads(document: dict[str, Any]) -> Table:
    """Calls by 8 threads, and extractors that were closed under them."""
    row = document["threads"]
    rows = []
    for name, calls in row["calls"].items():
        closed = row["closings"][name]
        other = sum(closed.values()) - closed["right"]
        rows.append(
            [name, str(calls["same"]), str(sum(calls.values()) - calls["same"]), str(closed["right"]), str(other)]
        )
    return ["", "calls, same bits", "other", "closings, right", "otherwise"], rows
