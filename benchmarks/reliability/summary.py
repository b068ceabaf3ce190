"""Rows of the table in docs/reliability.md."""

from __future__ import annotations

from typing import Any

TITLES = {
    "left": "bundles, hashes as written",
    "corrected": "bundles, hashes corrected after the damage",
    "not verified": "bundles, `verify=False`",
    "students": "students: one damaged file, `inspect` and `export`",
    "checkpoints": "checkpoints, `.safetensors` and `.pth`: `artifacts`",
}
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
