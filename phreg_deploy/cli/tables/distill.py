"""Tables of ``distill``: the scores of base model and student."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from phreg_deploy.cli.console import Result, echo, percent

if TYPE_CHECKING:
    from phreg_deploy.distill.record import StudentRecord, StudentScores


def show_record(record: StudentRecord, output: Path, images: Path, result: Result) -> None:
    """Print the scores of a student, or warn that it has none; and the next command."""
    if record.scores is None:
        # Shown with --quiet too, since expected figures are missing.
        echo(
            f"Warning: {output} is written but has no scores ({record.missing_scores}). The same command with --resume "
            "tries again without training. The artifact rates alone: "
            f"phreg-deploy artifacts {output} --images {images}",
            err=True,
        )
    else:
        _show_scores(record.scores, "held-out" if record.images.held_out else "training", result)
    result.say(
        f"Wrote {output} in {record.seconds.total:.0f} s. Next: phreg-deploy export {output} -o {output}.bundle "
        "--format onnx"
    )


def _show_scores(scores: StudentScores, kind: str, result: Result) -> None:
    models = [model for model in (scores.base, scores.student, scores.int8) if model]
    blank = [None] * (len(models) - 2)
    worst_blocks = [max(block["largest"] for block in model.blocks) for model in models if model.blocks]
    rows: list[list[Any]] = [
        ["norm-outlier rate", *(percent(model.norm_outliers.rate) for model in models)],
        ["largest norm / median", *(model.norm_outliers.largest for model in models)],
        ["worst block's largest norm / median", *worst_blocks, *blank],
        ["cosine to denoised target, mean", *(model.fidelity.mean for model in models)],
        ["    1st percentile", *(model.fidelity.p1 for model in models)],
        ["    over the base's outlier tokens", *(model.fidelity.outliers for model in models)],
        ["class token cosine", "1", scores.class_cosine, *blank],
        ["top-1 agreement", "1", scores.top1_agreement, *blank],
    ]
    own = scores.int8.own if scores.int8 else None
    if own:
        quantised = f"{own['mean']:.4f}, 1st percentile {own['p1']:.4f}"
        rows.append(["cosine to the student's own FP32", None, "1", quantised])
    title = f"Base and student on {scores.images} of {scores.out_of} {kind} images"
    result.table(title, ["", "base", "student", "student, fake INT8"][: 1 + len(models)], rows)
