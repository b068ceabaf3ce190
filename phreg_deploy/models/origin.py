"""Which pretrained weights a model was made from, and under which licence timm publishes them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import timm

from phreg_deploy.student_record import read_record

KEYS = ("model", "license", "url", "hf_hub_id")


def find_origin(name: str, folder: Path | None, checkpoint: Path | None = None) -> dict[str, str | None]:
    """The base model of a timm name, or of a folder: a student's record or a timm folder's configuration says it.

    Args:
        name: as the user gave it. folder: the folder that it names, None for a timm name.
        checkpoint: weights that were given for a timm name; without a tag in the name, timm cannot state their licence.

    Returns:
        ``model``: the timm name with its tag; ``license``, ``url`` and ``hf_hub_id`` as timm states them, else None.
    """
    if folder is None:
        return _stated(name) if "." in name or checkpoint is None else unknown_origin(name)
    record = read_record(folder) or {}
    source = record.get("source")
    if isinstance(source, dict) and isinstance(source.get("model"), str):
        if set(KEYS) <= set(source):
            return {key: source[key] for key in KEYS}
        if timm.is_model(source["model"].split(".")[0]):  # a record from before licences were kept
            return find_origin(source["model"], None, Path(source["checkpoint"]) if source.get("checkpoint") else None)
    config: dict[str, Any] = json.loads((folder / "config.json").read_text())
    pretrained = config.get("pretrained_cfg")
    tag, license_ = (
        (pretrained.get(key) for key in ("tag", "license")) if isinstance(pretrained, dict) else (None, None)
    )
    found = _stated(f"{config['architecture']}.{tag}") if tag else unknown_origin(config["architecture"])
    return {**found, "license": found["license"] or license_}


def unknown_origin(name: str) -> dict[str, str | None]:
    """A model of which timm states nothing but its name."""
    return {**dict.fromkeys(KEYS), "model": name}


def _stated(name: str) -> dict[str, str | None]:
    """What timm states about the weights of a name; one without a tag stands for timm's default weights."""
    try:
        config = timm.get_pretrained_cfg(name)
    except RuntimeError:  # a tag that timm does not know
        config = None
    if config is None:
        return unknown_origin(name)
    url = config.url if isinstance(config.url, str) else None  # timm allows a pair
    full = f"{config.architecture}.{config.tag}" if config.tag else name
    return {"model": full, "license": config.license, "url": url or None, "hf_hub_id": config.hf_hub_id or None}
