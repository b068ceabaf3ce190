"""Write the model card of a student from its record, ``phreg.json``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from phreg_deploy.cards.metadata import CARD, PLACE, TASK, front_matter, licence_sentence, origin, results, table
from phreg_deploy.files.atomic import write_atomic

PICTURE = "before-after.png"
LOAD = """## Load it

```python
import timm

model = timm.create_model("local-dir:{place}", pretrained=True)
tokens = model.forward_features(images)[:, model.num_prefix_tokens :]  # patch tokens; registers are prefix tokens
```

`timm` alone is enough. For dense features without PyTorch, export it with phreg-deploy:

```bash
phreg-deploy export {place} -o student.bundle
```
"""


def student_card(record: dict[str, Any], picture: bool = False) -> str:
    """Return the card of a student.

    Args:
        record: the content of ``phreg.json``.
        picture: whether ``before-after.png`` is beside it.
    """
    source, scores = record["source"], record["scores"]
    base, registers = str(source["model"]), record["registers"]
    title = f"{base} with {registers} register tokens" if registers else f"{base}, trained on without register tokens"
    change = f"with {registers} register tokens that were added after its pretraining" if registers else "trained on"
    measured = None if "missing" in scores else scores
    metadata = {
        **origin(source, "finetune"),
        "library_name": "timm",
        "pipeline_tag": TASK,
        "tags": ["phreg-deploy", "timm", "register-tokens", "dense-features", "vision-transformer"],
        "model-index": measured and _results(title, measured, record),
    }
    intro = (
        f"`{base}` {change}, without labels, by "
        f"`phreg-deploy distill --recipe {record['recipe']['name']}`. The scores below say how far its patch "
        "tokens are free of the high-norm outliers of the base model."
    )
    parts = [
        f"# {title}\n\n{intro}\n",
        f"![Photographs; features and token norms of the base model and of this one]({PICTURE})\n" if picture else "",
        LOAD.format(place=PLACE),
        f"## Scores\n\n{_scores(measured, record)}\n" if measured else f"## Scores\n\nNone: {scores['missing']}.\n",
        f"## How it was made\n\n{_facts(record)}\n",
        f"## Licence\n\n{licence_sentence(source)}\n",
    ]
    return front_matter(metadata) + "\n" + "\n".join(part for part in parts if part)


def write_student_card(record: dict[str, Any], folder: Path) -> None:
    """Write or replace ``README.md`` in a student's folder; arguments as of ``student_card``."""
    write_atomic(folder / CARD, student_card(record, picture=(folder / PICTURE).is_file()).encode())


def _images(scores: dict[str, Any], record: dict[str, Any]) -> str:
    kind = "held-out" if record["images"]["held_out"] else "training"
    return f"{scores['images']} of {scores['out_of']} {kind} photographs"


def _results(title: str, scores: dict[str, Any], record: dict[str, Any]) -> list[dict[str, Any]] | None:
    outliers, fidelity = scores["student"]["norm_outliers"], scores["student"]["fidelity"]
    figures = {
        "norm_outlier_rate": ("share of patch tokens with an outlying norm", outliers["rate"]),
        "target_cosine": ("cosine to the denoised target, mean", fidelity["mean"]),
        "target_cosine_p1": ("cosine to the denoised target, 1st percentile", fidelity["p1"]),
        "target_cosine_outliers": ("the same over the base's outlier tokens", fidelity["outliers"]),
        "class_cosine": ("cosine of class tokens to the base's", scores.get("class_cosine")),
    }
    return results(title, _images(scores, record), figures)


def _scores(scores: dict[str, Any], record: dict[str, Any]) -> str:
    models = [scores["base"], scores["student"]]

    def row(name: str, key: str, part: str, form: str) -> list[str]:
        values = [model[key][part] for model in models]
        return [name, *("-" if value is None else format(value, form) for value in values)]

    rows = [
        row("norm-outlier rate", "norm_outliers", "rate", ".3%"),
        row("largest norm / median", "norm_outliers", "largest", ".2f"),
        row("cosine to the denoised target, mean", "fidelity", "mean", ".4f"),
        row("1st percentile", "fidelity", "p1", ".4f"),
        row("over the base's outlier tokens", "fidelity", "outliers", ".4f"),
    ]
    below = f"On {_images(scores, record)}; the denoised target is the mean over {scores['views']} views of the base."
    return table(["", "base", "this model"], rows) + f"\n\n{below}"


def _facts(record: dict[str, Any]) -> str:
    source, recipe, images = record["source"], record["recipe"], record["images"]
    moved = [n for n in record["register_neurons"] if not n.get("left")]
    height, width = record["image_size"]
    views = f"{record['views']} view{'s' if record['views'] != 1 else ''}"
    rows = [
        ["base model", f"`{source['model']}`, weights sha256 `{source['weights_sha256']}`"],
        ["recipe", f"{recipe['name']}, {recipe['epochs']} epochs, seed {record['seed']}, {views}"],
        ["registers", f"{record['registers']}; {len(moved)} register neurons were moved"],
        ["image size", f"{height} x {width}"],
        ["photographs", f"{images['trained']}, digest `{images['digest']}`; no labels"],
        ["versions", ", ".join(f"{name} {version}" for name, version in sorted(record["versions"].items()))],
    ]
    return table(["", ""], rows)
