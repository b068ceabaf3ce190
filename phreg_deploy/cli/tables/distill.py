"""How ``distill`` prints what a student scored."""

from __future__ import annotations

from typing import Any

from phreg_deploy.cli.console import Result, percent


def show_scores(record: dict[str, Any], result: Result) -> None:
    """Base and student side by side."""
    scores = record["scores"]
    models = [name for name in ("base", "student", "int8") if name in scores]
    blank = [None] * (len(models) - 2)
    rows = [
        ["norm-outlier rate", *(percent(scores[m]["norm_outliers"]["rate"]) for m in models)],
        ["largest norm / median", *(scores[m]["norm_outliers"]["largest"] for m in models)],
        [
            "worst block's largest norm / median",
            *(max(b["largest"] for b in scores[m]["blocks"]) for m in models[:2]),
            *blank,
        ],
        ["cosine to denoised target, mean", *(scores[m]["fidelity"]["mean"] for m in models)],
        ["    1st percentile", *(scores[m]["fidelity"]["p1"] for m in models)],
        ["    over the base's outlier tokens", *(scores[m]["fidelity"]["outliers"] for m in models)],
        ["class token cosine", "1", scores.get("class_cosine"), *blank],
        ["top-1 agreement", "1", scores.get("top1_agreement"), *blank],
    ]
    if "int8" in scores:
        own = scores["int8"]["own"]
        rows.append(
            ["cosine to the student's own FP32", None, "1", f"{own['mean']:.4f}, 1st percentile {own['p1']:.4f}"]
        )
    kind = "held-out" if record["images"]["held_out"] else "training"
    result.table(
        f"Base and student on {scores['images']} of {scores['out_of']} {kind} images",
        ["", "base", "student", "student, fake INT8"][: 1 + len(models)],
        rows,
    )
