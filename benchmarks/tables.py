"""Writes the tables of README and benchmarks/README.md from the JSON beside this file; a test compares them.

    python -m benchmarks.tables

A table stands between ``<!-- figures: NAME -->`` and ``<!-- end -->``.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
PAGES = (ROOT / "README.md", ROOT / "docs" / "figures.md", ROOT / "docs" / "int8.md")
MARK = re.compile(r"(<!-- figures: (?P<name>[\w-]+) -->\n).*?(<!-- end -->)", re.DOTALL)
Row = dict[str, Any]


def load(name: str) -> Any:
    return json.loads((HERE / f"{name}.json").read_text())


def table(columns: list[str], rows: list[list[str]]) -> str:
    lines = [columns, ["---"] * len(columns), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def three(value: float | None) -> str:
    """A cosine or a share: .967, and 1 for itself."""
    return "-" if value is None else "1" if value > 0.99995 else f"{value:.3f}".removeprefix("0")


def percent(value: float | None, digits: int = 1) -> str:
    return "-" if value is None else f"{100 * value:.{digits}f} %"


def _interval(low_high: list[float]) -> str:
    return f"{100 * low_high[0]:+.1f} to {100 * low_high[1]:+.1f}"


def quality(name: str) -> str:
    """Rows of ``quality.py``, one column a model."""
    rows = load(name)["rows"]
    columns = [f"{n} ({r['seeds']} seeds)" if r["seeds"] > 1 else n for n, r in rows.items()]

    def line(title: str, read: Callable[[Row], str]) -> list[str]:
        return [title, *(read(row) for row in rows.values())]

    return table(
        ["", *columns],
        [
            line("norm-outlier rate, CamVid val", lambda r: percent(r["norm_outliers"]["rate"], 3) if "norm_outliers" in r else "-"),
            line("largest norm / median", lambda r: f"{r['norm_outliers']['largest']:.2f}" if "norm_outliers" in r else "-"),
            line("cosine to the denoised target, mean", lambda r: three(r["fidelity"]["mean"])),
            line("1st percentile", lambda r: three(r["fidelity"]["p1"])),
            line("over the base's outlier tokens", lambda r: three(r["fidelity"]["chosen"])),
            line("class token cosine", lambda r: three(r.get("class_cosine"))),
            line("top-1 agreement", lambda r: three(r.get("top1_agreement"))),
            line("CamVid probe, accuracy on outlier tokens", lambda r: three(r["accuracy_outliers"])),
            line("CamVid probe, mean IoU", lambda r: percent(r["miou"])),
            line("95 % interval of the gain over base, points", lambda r: _interval(r["gain_interval"]) if r["gain"] else "-"),
            line("against base", lambda r: r["against_base"] if r["gain"] else "-"),
        ],
    )  # fmt: skip


def headline(name: str) -> str:
    """Rows of ``headline.py``: the base model in PyTorch beside the bundle that three commands make of it."""
    found = load(name)
    base, served, eight = found["base"], found["served"], found["eight_bit_instructions"]
    kind = f"with {', '.join(eight)}" if eight else "without 8-bit dot products"
    return table(
        [f"{found['model'].split('.')[0]} on {found['processor']} {kind}, {found['threads']} threads", "base, PyTorch FP32", f"INT8 bundle, {found['backend']}"],
        [
            ["milliseconds an image", f"{base['ms']:.1f}", f"{served['ms']:.1f}"],
            ["weights on disk", f"{base['megabytes']:.1f} MB", f"{served['megabytes']:.1f} MB"],
            ["norm-outlier rate", percent(base["norm_outliers"]["rate"], 2), percent(served["norm_outliers"]["rate"], 2)],
            ["cosine to the denoised target: mean", three(base["fidelity"]["mean"]), three(served["fidelity"]["mean"])],
            ["over the base's outlier tokens", three(base["fidelity"]["chosen"]), three(served["fidelity"]["chosen"])],
            ["CamVid probe, mean IoU", percent(base["miou"]), f"{percent(served['miou'])} ({served['against_base']})"],
        ],
    )  # fmt: skip


SHORT = (
    "PyTorch eager FP32", "torch.compile bf16", "ORT FP32, stock export", "ours OpenVINO FP32", "ours OpenVINO bf16",
    "NNCF on OpenVINO, default, bf16 rest", "ours ORT INT8, every linear layer",
    "ours OpenVINO INT8, every linear layer, bf16 rest",
)  # fmt: skip


def demo(_name: str) -> str:
    """``phreg-deploy demo --json``."""
    found = load("demo")
    columns = [
        f"on {found['scenes']} scenes that nothing was trained on",
        "base",
        "student",
        "served, ONNX Runtime",
        "served in INT8",
    ]
    return table(columns, [[str(cell or "") for cell in row] for row in found["table"]])


def speed(name: str) -> str:
    """Milliseconds of ``peers.json``, models with random weights; in README a part of the rows."""
    models = {title: found["ms"] for title, found in load("peers")["models"].items() if "fidelity" not in found}
    names = SHORT if name.endswith("short") else dict.fromkeys(key for ms in models.values() for key in ms)
    eager = "PyTorch eager FP32"
    cell = lambda ms, name: f"{ms[name]:.1f} ({ms[eager] / ms[name]:.2f}x)" if name in ms else "-"  # noqa: E731
    return table(["", *models], [[key, *(cell(ms, key) for ms in models.values())] for key in names])


def no_vnni(_name: str) -> str:
    """``int8_without_vnni.json``: agreement with FP32, and milliseconds where they were measured."""
    rows = load("int8_without_vnni")["rows"]
    return table(
        ["", "model", "cosine to own FP32: mean / 1st percentile", "ms", "measured on"],
        [
            [r["what"], r["model"], "1" if r["mean"] is None else f"{r['mean']:.4f} / {r['p1']:.4f}", "-" if r["ms"] is None else f"{r['ms']:.1f}", r["where"]]
            for r in rows
        ],
    )  # fmt: skip


def choices(_name: str) -> str:
    """``int8_choices.json``: one calibration on two kinds of processor."""
    found = load("int8_choices")
    same = lambda key: "the same" if found[key][0] == found[key][1] else f"{found[key][0]} / {found[key][1]}"  # noqa: E731
    p1 = found["fidelity"]["cosine_p1"]
    return table(
        ["", "AVX512-VNNI / AVX2"],
        [
            ["smoothing that was chosen", same("smoothing")],
            ["layers that were left in float", same("float_layers")],
            ["1st-percentile cosine of the report", f"{p1[0]:.5f} / {p1[1]:.5f}"],
            ["int8 weights that differ", f"{found['weights_that_differ']} of {found['weights']}, by at most {found['largest_weight_difference']}"],
        ],
    )  # fmt: skip


def gates(_name: str) -> str:
    """``gates.json``: the worst figure of each kind that a sound bundle gave, by precision, beside the bars."""
    found = load("gates")
    rows = []
    for precision, kinds in found["worst"].items():
        for kind, figures in kinds.items():
            bars = found["bars"][precision][kind]
            rows += [[precision, kind, name, f"{figures[name]:.6g}", f"{bar:g}"] for name, bar in bars.items()]
    return table(["precision", "compared on", "figure", "worst measured", "bar"], rows)


TABLES: dict[str, Callable[[str], str]] = {
    "students": quality, "students-deit": quality, "headline": headline, "headline-deit": headline, "speed": speed, "speed-short": speed, "demo": demo,
    "int8-without-vnni": no_vnni, "int8-choices": choices, "gates": gates,
}  # fmt: skip


def render(page: str) -> str:
    """The page with every table written anew."""
    return MARK.sub(lambda m: f"{m[1]}{TABLES[m['name']](m['name'].replace('-', '_'))}\n{m[3]}", page)


def main() -> None:
    for path in PAGES:
        path.write_text(render(path.read_text()))


if __name__ == "__main__":
    main()
