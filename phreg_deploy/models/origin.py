"""Find what a model was made from, with the licence that timm states, and identify what it computes."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import timm

from phreg_deploy.hub.names import is_hub_name
from phreg_deploy.models.hooks import ViT
from phreg_deploy.models.loading import model_arguments
from phreg_deploy.models.weights import weights_digest
from phreg_deploy.spec import Stored
from phreg_deploy.student_record import model_path, read_record

KEYS = ("model", "license", "url", "hf_hub_id")


def find_origin(name: str, folder: Path | None, checkpoint: Path | None = None) -> dict[str, str | None]:
    """Find the base model of a timm name, or of a folder by its record or its configuration.

    Args:
        name: a timm name or a folder.
        folder: the folder that ``name`` stands for, None for a timm name.
        checkpoint: weights for a timm name; timm states their licence only if the name has a tag.

    Returns:
        ``model``: the timm name with its tag; ``license``, ``url`` and ``hf_hub_id`` as timm states them, or None.
    """
    if folder is None and is_hub_name(name):
        folder = model_path(name)
    if folder is None:
        return _stated(name) if "." in name or checkpoint is None else unknown_origin(name)
    record = read_record(folder) or {}
    source = record.get("source")
    if isinstance(source, dict) and isinstance(source.get("model"), str):
        if set(KEYS) <= set(source):
            return {key: source[key] for key in KEYS}
        # Older records have no licence.
        if timm.is_model(source["model"].split(".")[0]):
            return find_origin(source["model"], None, Path(source["checkpoint"]) if source.get("checkpoint") else None)
    config: dict[str, Any] = json.loads((folder / "config.json").read_text())
    pretrained = config.get("pretrained_cfg")
    tag, license_ = (
        (pretrained.get(key) for key in ("tag", "license")) if isinstance(pretrained, dict) else (None, None)
    )
    origin = _stated(f"{config['architecture']}.{tag}") if tag else unknown_origin(config["architecture"])
    return {**origin, "license": origin["license"] or license_}


def unknown_origin(name: str) -> dict[str, str | None]:
    """The origin of a model of which only the name is known."""
    return {**dict.fromkeys(KEYS), "model": name}


def _stated(name: str) -> dict[str, str | None]:
    """What timm states about the weights of a name; a name without a tag stands for timm's default weights."""
    try:
        config = timm.get_pretrained_cfg(name)
    # timm does not know the tag.
    except RuntimeError:
        config = None
    if config is None:
        return unknown_origin(name)
    # timm allows a pair of URLs.
    url = config.url if isinstance(config.url, str) else None
    full = f"{config.architecture}.{config.tag}" if config.tag else name
    return {"model": full, "license": config.license, "url": url or None, "hf_hub_id": config.hf_hub_id or None}


@dataclass(frozen=True)
class ModelIdentity(Stored):
    """Everything that decides a model's features for given pixels.

    The weights alone do not decide them: another activation or number of heads gives other features. ``modules``:
    digest of the module tree with its settings, such as activations and epsilons. ``image_size``: (height, width).
    """

    architecture: str
    arguments: dict[str, str]
    heads: list[int]
    modules: str
    image_size: list[int]
    weights: str


def model_identity(model: ViT) -> ModelIdentity:
    """Identify a model. Reads every weight."""
    return ModelIdentity(
        architecture=str(model.pretrained_cfg.get("architecture")),
        arguments={k: getattr(v, "__qualname__", repr(v)) for k, v in sorted(model_arguments(model).items())},
        heads=[block.attn.num_heads for block in model.blocks],
        modules=hashlib.sha256(repr(model).encode()).hexdigest(),
        image_size=list(model.patch_embed.img_size),
        weights=weights_digest(model),
    )
