"""Tables of ``evaluate`` and ``probe``: figures, comparisons with the base, and IoU by class."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from phreg_deploy.cli.console import Result

if TYPE_CHECKING:
    from phreg_deploy.evaluation.report import Evaluation, Subject

# Columns by figure; shares are shown in percent.
SHARES = {
    "miou": "mean IoU",
    "pixel_accuracy": "pixel accuracy",
    "patch_miou": "mean IoU, patches",
    "patch_accuracy": "patch accuracy",
    "outlier_accuracy": "on base's outliers",
}
DEPTH = {"rmse": "RMSE", "abs_rel": "AbsRel", "delta_1": "delta < 1.25"}


def show_evaluation(evaluation: Evaluation, result: Result) -> None:
    """Print the figures of every model, their comparison with the base, and the IoU of every class."""
    segments = evaluation.task == "segmentation"
    columns = SHARES if segments else DEPTH
    title = f"Linear probe ({evaluation.protocol}), {evaluation.train} images to train on, {evaluation.val} to test on"
    if evaluation.protocol == "ovss":
        columns = {figure: name for figure, name in SHARES.items() if figure in ("miou", "pixel_accuracy")}
        title = f"Text prompts ({evaluation.protocol}), {evaluation.val} images"
    rows = [[s.name, _size(s), *(_cell(s, figure, segments) for figure in columns)] for s in evaluation.subjects]
    result.table(title, ["", "input", *columns.values()], rows)
    compared = [_compared(s, segments) for s in evaluation.subjects if s.against_base is not None]
    if compared:
        base = evaluation.subjects[0].name
        result.table(f"Against {base}, 95 % intervals", ["", "figure", "gain", "interval", "verdict"], compared)
    if evaluation.classes is not None:
        result.table(
            "IoU by class",
            ["class", *(subject.name for subject in evaluation.subjects)],
            [
                [name, *(_percent(s.class_iou[k] if s.class_iou else None) for s in evaluation.subjects)]
                for k, name in enumerate(evaluation.classes)
            ],
        )
    _say_conditions(evaluation, result)


def _say_conditions(evaluation: Evaluation, result: Result) -> None:
    few = evaluation.resampled == "images" and evaluation.val_groups < evaluation.val
    note = " With so few groups the intervals cover other images of the same groups alone." if few else ""
    seeds = evaluation.settings.get("seeds")
    resampled = f"Intervals resample {evaluation.units} {evaluation.resampled}"
    if seeds is None:
        settings = evaluation.settings
        result.say(
            f"Short side {settings['short_side']}, windows of {settings['window']}, stride {settings['stride']}, scale "
            f"{settings['scale']:g}, names embedded by {settings['text']['model']}. {resampled}.{note}"
        )
    else:
        result.say(f"Split {evaluation.split}. {resampled} and the {seeds} training{'s' * (seeds > 1)}.{note}")
    if evaluation.outliers is not None and evaluation.task == "segmentation":
        result.say(f"{evaluation.subjects[0].name} has {evaluation.outliers} outlier tokens on the images to test on.")
    for subject in evaluation.subjects:
        if not subject.converged:
            iterations = ", ".join(map(str, subject.iterations))
            result.say(
                f"{subject.name}: the solver was stopped before it converged (iterations {iterations}); more of them "
                "would change the figures a little."
            )
    spent = f"{evaluation.seconds['wall']:.0f} s, {evaluation.seconds['cpu']:.0f} s of CPU time"
    size = f" Features in {evaluation.cache}: {evaluation.cache_bytes / 1e6:.0f} MB." if evaluation.cache else ""
    result.say(f"Took {spent}.{size}")


def _size(subject: Subject) -> str:
    return f"{subject.size[0]}x{subject.size[1]}"


def _cell(subject: Subject, figure: str, percent: bool) -> str:
    value, bounds = subject.figures[figure], subject.intervals[figure]
    if value is None or bounds is None:
        return "-"
    show = _percent if percent else _number
    return f"{show(value)} [{show(bounds[0])}, {show(bounds[1])}]"


def _compared(subject: Subject, percent: bool) -> list[Any]:
    found = subject.against_base
    assert found is not None
    show = (lambda value: f"{100 * value:+.2f} points") if percent else (lambda value: f"{value:+.4g}")
    bounds = f"{show(found.interval[0])} to {show(found.interval[1])}"
    return [subject.name, {**SHARES, **DEPTH}[found.figure], show(found.gain), bounds, found.verdict]


def _percent(share: float | None) -> str:
    return "-" if share is None else f"{100 * share:.1f}"


def _number(value: float) -> str:
    return f"{value:.3g}"
