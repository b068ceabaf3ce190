"""Write the metadata at the top of a model card.

The format: https://huggingface.co/docs/hub/model-cards. JSON is YAML too, so each value is written as JSON, and a card
needs no further package. The tests read it back with ``huggingface_hub.ModelCard``.
"""

from __future__ import annotations

import json
from typing import Any

CARD = "README.md"
# Stands for the folder itself; `push` replaces it by the name on the hub.
PLACE = "path/to/this/folder"
TASK = "image-feature-extraction"
# Licences that the hub knows, of those that timm states; another one is "other" with its name.
KNOWN = ("apache-2.0", "mit", "cc-by-nc-4.0", "cc0-1.0", "apple-amlr", "apple-ascl")


def front_matter(values: dict[str, Any]) -> str:
    """Return the metadata between two lines of ``---``; keys without a value are left out."""
    lines = [f"{key}: {json.dumps(value, ensure_ascii=False)}" for key, value in values.items() if value is not None]
    return "\n".join(["---", *lines, "---", ""])


def origin(source: dict[str, Any], relation: str) -> dict[str, Any]:
    """Return the metadata of a base model: its name on the hub, and its licence.

    Args:
        source: ``model``, ``license`` and ``hf_hub_id``, as a record or a manifest holds them.
        relation: what was made of it: "finetune" or "quantized".
    """
    licence, hub = source.get("license"), source.get("hf_hub_id")
    known = licence is None or licence in KNOWN
    link = source.get("url") or (f"https://huggingface.co/{hub}" if hub else None)
    return {
        "license": (licence or "unknown") if known else "other",
        "license_name": None if known else licence,
        "license_link": None if known else link,
        "base_model": hub,
        "base_model_relation": relation if hub else None,
    }


def results(name: str, images: str, figures: dict[str, tuple[str, float | None]]) -> list[dict[str, Any]] | None:
    """Return figures as the hub's ``model-index``; None if there are none.

    Args:
        images: what they were measured on.
        figures: kind -> (name, value); those without a value are left out.
    """
    metrics = [
        {"type": kind, "name": label, "value": value} for kind, (label, value) in figures.items() if value is not None
    ]
    dataset = {"name": images, "type": "own-photographs"}
    measured = {"task": {"type": TASK, "name": "Dense features"}, "dataset": dataset, "metrics": metrics}
    return [{"name": name, "results": [measured]}] if metrics else None


def table(head: list[str], rows: list[list[str]]) -> str:
    """Return a table in Markdown."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)


def licence_sentence(source: dict[str, Any]) -> str:
    """Say whose licence the weights have."""
    base, licence = source.get("model"), source.get("license")
    if licence is None:
        return f"timm states no licence for the weights of `{base}`: find it before you share them."
    return f"The weights are derived from `{base}`, whose licence timm states as `{licence}`."
