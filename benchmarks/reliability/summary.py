"""Rows of the tables in docs/reliability.md."""

from __future__ import annotations

from typing import Any

TITLES = {
    "left": "bundles, hashes as written",
    "corrected": "bundles, hashes corrected after the damage",
    "not verified": "bundles, `verify=False`",
    "students": "students: one damaged file, `inspect` and `export`",
    "checkpoints": "checkpoints, `.safetensors` and `.pth`: `artifacts`",
}
PARTS = ("new, its scores or card not yet", "a part of the new one")
SIGNALS = ("SIGKILL", "SIGINT", "SIGTERM")
KILLED = (
    "kills",
    "Ctrl-C, SIGTERM",
    "left: no output",
    "the old one",
    "the new one",
    "neither",
    "run again: as unharmed",
    "otherwise",
)
COLUMNS = ("damaged", "refused", "harmless or taken", "caught by `check`", "served otherwise", "traceback, crash, hang")


def outcomes(document: dict[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Columns and rows: how many mutants of each kind ended how."""
    counted = {**document["bundles"]["outcomes"]}
    counted |= {name: document[name]["outcomes"] for name in ("students", "checkpoints")}
    rows = []
    for name, counts in counted.items():
        silent = sum(n for what, n in counts.items() if what.startswith("silent"))
        whole = [counts.get("refused", 0), counts.get("harmless", 0) + counts.get("taken", 0)]
        whole += [counts.get("caught by check", 0), silent]
        total = sum(counts.values())
        rows.append([TITLES[name], *(str(n) for n in [total, *whole, total - sum(whole)])])
    return ["", *COLUMNS], rows


def kills(document: dict[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Columns and rows: what signals left of the output of each command, and how it ended when it was run again."""
    rows = []
    for command, counts in document["kills"]["outcomes"].items():
        sent = {name: sum(n for hit, n in counts["hit"].items() if hit.startswith(name)) for name in SIGNALS}
        left, again = counts["left"], counts["run again"]
        new = left.get("new", 0) + sum(left.get(name, 0) for name in PARTS)
        cells = [sent["SIGKILL"], sent["SIGINT"] + sent["SIGTERM"], left.get("absent", 0), left.get("old", 0), new]
        whole = again.get("as unharmed", 0)
        cells += [left.get("neither", 0), whole, sum(again.values()) - whole]
        rows.append([f"`{command}`", *map(str, cells)])
    return ["", *KILLED], rows


def disks(document: dict[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Columns and rows: how each command ended on a full or read-only disk, and beside a second one."""
    commands = document["disk"]["outcomes"]
    kinds = list(next(iter(commands.values())))
    rows = []
    for command, found in commands.items():
        cells = [", ".join(f"{n} {what}" for what, n in sorted(found[kind].items())) for kind in kinds]
        rows.append([f"`{command}`", *cells])
    return ["", *kinds], rows
