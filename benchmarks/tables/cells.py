"""Read a JSON file of ``benchmarks``, and write figures as cells of a table."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parents[1]

Row = dict[str, Any]


def load(name: str) -> Any:
    return json.loads((HERE / f"{name}.json").read_text())


def table(columns: list[str], rows: list[list[str]]) -> str:
    lines = [columns, ["---"] * len(columns), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def three(value: float | None) -> str:
    """A cosine or share with three digits, as ".967"; "1" above .99995."""
    return "-" if value is None else "1" if value > 0.99995 else f"{value:.3f}".removeprefix("0")


def four(value: float) -> str:
    """A cosine with four digits, as ".9671"; "1" above .99995."""
    return "1" if value > 0.99995 else f"{value:.4f}".removeprefix("0")


def percent(value: float | None, digits: int = 1) -> str:
    return "-" if value is None else f"{100 * value:.{digits}f} %"


def interval(low_high: list[float]) -> str:
    return f"{100 * low_high[0]:+.1f} to {100 * low_high[1]:+.1f}"
