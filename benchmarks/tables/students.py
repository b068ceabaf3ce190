"""Tables of what registers do: scores of students, the headline and the demo."""

from __future__ import annotations

from collections.abc import Callable

from benchmarks.tables.cells import Row, interval, load, percent, table, three

# Titles of the runs in ``present_recipe.json``, by how they start; a run of each but the first is optional.
RUNS = {
    "transplant": "default recipe",
    "40 epochs": "default recipe, 40 epochs",
    "batches of 8 for 24 epochs": "default recipe, batches of 8, 24 epochs",
    "16 registers": "default recipe, 16 registers",
    "averaged weights": "default recipe, weights averaged (.99)",
    "random-registers": "random-registers",
    "no registers": "no registers",
    "sinder": "sinder, no registers, 4 epochs",
    "singular values": "singular values on targets, no registers",
}


def quality(name: str) -> str:
    """The rows of ``quality.py`` as columns, one for each model."""
    rows = load(name)["rows"]
    columns = [f"{n} ({r['seeds']} seeds)" if r["seeds"] > 1 else n for n, r in rows.items()]

    def line(title: str, read: Callable[[Row], str]) -> list[str]:
        return [title, *(read(row) for row in rows.values())]

    def outliers(row: Row, read: Callable[[Row], str]) -> str:
        return read(row["norm_outliers"]) if "norm_outliers" in row else "-"

    def gain(row: Row, text: str) -> str:
        return text if row["gain"] else "-"

    return table(
        ["", *columns],
        [
            line("norm-outlier rate, CamVid val", lambda r: outliers(r, lambda o: percent(o["rate"], 3))),
            line("largest norm / median", lambda r: outliers(r, lambda o: f"{o['largest']:.2f}")),
            line("cosine to the denoised target, mean", lambda r: three(r["fidelity"]["mean"])),
            line("1st percentile", lambda r: three(r["fidelity"]["p1"])),
            line("over the base's outlier tokens", lambda r: three(r["fidelity"]["chosen"])),
            line("class token cosine", lambda r: three(r.get("class_cosine"))),
            line("top-1 agreement", lambda r: three(r.get("top1_agreement"))),
            line("CamVid probe, accuracy on outlier tokens", lambda r: three(r["accuracy_outliers"])),
            line("CamVid probe, mean IoU", lambda r: percent(r["miou"])),
            line("95 % interval of the gain over base, points", lambda r: gain(r, interval(r["gain_interval"]))),
            line("against base", lambda r: gain(r, r["against_base"])),
        ],
    )


def headline(name: str) -> str:
    """Rows of ``headline.py``: the base model in PyTorch beside the bundle that three commands make of it."""
    report = load(name)
    base, served, instructions = report["base"], report["served"], report["eight_bit_instructions"]
    kind = f"with {', '.join(instructions)}" if instructions else "without 8-bit dot products"
    model = report["model"].split(".")[0]
    title = f"{model} on {report['processor']} {kind}, {report['threads']} threads"
    models = (base, served)
    verdicts = ("", f" ({served['against_base']})")
    return table(
        [title, "base, PyTorch FP32", f"INT8 bundle, {report['backend']}"],
        [
            ["milliseconds an image", *(f"{m['ms']:.1f}" for m in models)],
            ["weights on disk", *(f"{m['megabytes']:.1f} MB" for m in models)],
            ["norm-outlier rate", *(percent(m["norm_outliers"]["rate"], 2) for m in models)],
            ["cosine to the denoised target: mean", *(three(m["fidelity"]["mean"]) for m in models)],
            ["over the base's outlier tokens", *(three(m["fidelity"]["chosen"]) for m in models)],
            ["CamVid probe, mean IoU", *(percent(m["miou"]) + verdict for m, verdict in zip(models, verdicts))],
        ],
    )


def demo(_name: str) -> str:
    """``phreg-deploy demo --json``."""
    report = load("demo")
    columns = [
        f"on {report['scenes']} scenes that nothing was trained on",
        "base",
        "student",
        "served, ONNX Runtime",
        "served in INT8",
    ]
    return table(columns, [[str(cell or "") for cell in row] for row in report["table"]])


def present_recipe(name: str) -> str:
    """The scores in ``phreg.json``: of each model the base, the students of all seeds, and the controls'."""
    figures: dict[str, Callable[[Row], str]] = {
        "norm-outlier rate": lambda run: percent(run["student"]["norm_outliers"]["rate"], 3),
        "largest norm / median": lambda run: f"{run['student']['norm_outliers']['largest']:.2f}",
        "cosine to the denoised target, mean": lambda run: three(run["student"]["fidelity"]["mean"]),
        "1st percentile": lambda run: three(run["student"]["fidelity"]["p1"]),
        "over the base's outlier tokens": lambda run: three(run["student"]["fidelity"]["outliers"]),
        "class token cosine": lambda run: three(run["class_cosine"]),
        "top-1 agreement": lambda run: three(run["top1_agreement"]),
    }
    rows = []
    for model, record in load(name).items():
        scores = record["scores"]
        named = {"transplant, seed 0": scores, **record["further_runs"]}
        of_kind = {t: [run for key, run in named.items() if key.startswith(f"{k}, seed")] for k, t in RUNS.items()}
        base = {"student": scores["base"], "class_cosine": 1.0, "top1_agreement": 1.0}
        for title, runs in {f"**{model}**, base": [base], **of_kind}.items():
            if runs:
                rows.append([title, *(" / ".join(text(run) for run in runs) for text in figures.values())])
    return table(["", *figures], rows)


def sinder_direction(name: str) -> str:
    """The outliers' direction beside SINDER's prediction, one row for each model."""
    columns = ["|cosine| with the outliers' direction", "after block"]
    kinds = ["attention and MLP", "attention", "both, centred"]
    rules = ["as released", "in the recipe"]
    shares = ["outliers at the border", *(f"photographs flagged, {rule}" for rule in rules)]

    def line(row: Row) -> list[str]:
        cosines = [three(row["cosine"][kind]) for kind in kinds]
        found = [row["outliers_at_border"], *(row["flagged"][rule] for rule in rules)]
        return [
            row["model"],
            str(row["block"]),
            *cosines,
            three(row["random"]),
            *(percent(share, 0) for share in found),
        ]

    columns = [column.replace("|", "\\|") for column in [*columns, *kinds, "at random", *shares]]
    return table(columns, [line(row) for row in load(name)["models"]])
