"""Load a model from a timm name, a checkpoint file or a student's folder; refuse unsupported models with the reason."""

from __future__ import annotations

import difflib
import logging
import math
from pathlib import Path
from typing import Any

import timm
import torch
from huggingface_hub.errors import LocalEntryNotFoundError
from safetensors import SafetensorError
from safetensors.torch import load_file
from timm.data.config import resolve_model_data_config
from timm.models.eva import Eva
from timm.models.vision_transformer import VisionTransformer
from torch import nn

from phreg_deploy.arguments import check_model
from phreg_deploy.errors import PhregError
from phreg_deploy.hub.names import is_hub_name
from phreg_deploy.hub.reports import reported
from phreg_deploy.models.families import refused_model, refused_name
from phreg_deploy.models.hooks import ViT
from phreg_deploy.models.weights import check_declared, read_weights
from phreg_deploy.spec import ModelSpec, Preprocess, check_multiple

# What to do without a download.
FILE = "its weights as a file: --checkpoint FILE, or --base-checkpoint FILE for --base"
# What timm raises if it cannot build a model from a configuration.
BUILD_ERRORS = (
    ArithmeticError,
    AssertionError,
    AttributeError,
    LookupError,
    RuntimeError,
    TypeError,
    ValueError,
)


def load_model(
    name: str,
    *,
    checkpoint: Path | None = None,
    image_size: tuple[int, int] | None = None,
    random_weights: bool = False,
) -> ViT:
    """Load a supported model in float32, in evaluation mode, on the CPU.

    Args:
        name: a timm model name (``vit_small_patch14_dinov2.lvd142m``), a folder with ``config.json`` and
            ``model.safetensors``, ``local-dir:FOLDER``, or ``hf-hub:org/name[@revision]``.
        checkpoint: weights for a timm name: ``.safetensors``, or ``.pth`` read with ``weights_only=True``.
        image_size: (height, width) in pixels; timm resamples the position embedding.
        random_weights: keep timm's initialisation (seed 0); for timing only.

    Raises:
        PhregError: an unknown name or unsupported family; missing, corrupt or NaN weights.
    """
    folder = check_model(name, checkpoint, random_weights)
    logging.getLogger("timm").setLevel(logging.WARNING)
    if folder is not None:
        model = _from_folder(folder)
    else:
        if not is_hub_name(name):
            _check_name(name)
        model = _from_file(name, checkpoint) if checkpoint else _from_name(name, random_weights)
    check_supported(model, name)
    bad = [
        key
        for key, value in model.state_dict().items()
        if value.is_floating_point() and not torch.isfinite(value).all()
    ]
    if bad:
        raise PhregError(
            f"model: the weights of {name} hold NaN or infinite values, first in {bad[0]!r} ({len(bad)} tensors); "
            "expected finite weights."
        )
    if image_size is not None and tuple(image_size) != tuple(model.patch_embed.img_size):
        check_multiple(image_size, model.patch_embed.patch_size)
        model.set_input_size(img_size=tuple(image_size))
    return model.float().eval()


def model_spec(model: ViT) -> ModelSpec:
    """Describe a model's architecture for the manifest of a bundle."""
    return ModelSpec(
        architecture=model.pretrained_cfg.get("architecture") or type(model).__name__,
        family="eva" if isinstance(model, Eva) else "vit",
        patch=tuple(model.patch_embed.patch_size),
        grid=tuple(model.patch_embed.grid_size),
        width=model.embed_dim,
        depth=len(model.blocks),
        heads=model.blocks[0].attn.num_heads,
        class_token=model.cls_token is not None,
        registers=0 if model.reg_token is None else model.reg_token.shape[1],
        parameters=sum(p.numel() for p in model.parameters()),
    )


def model_preprocess(model: ViT, crop: str = "squash") -> Preprocess:
    """Preprocessing of timm's configuration for these weights, and the image turned upright by its EXIF orientation.

    Args:
        crop: "squash" resizes the whole image; "center" is timm's evaluation crop.

    Raises:
        PhregError: a mean, a deviation or a crop share in the model's ``config.json`` that is none.
    """
    config = resolve_model_data_config(model)
    for key in ("mean", "std"):
        got = config[key]
        if not (isinstance(got, list | tuple) and len(got) == 3 and all(_finite(value) for value in got)):
            raise PhregError(
                f"model: {key} in its configuration is {got!r}; expected three numbers, for red, green, blue."
            )
    if 0 in config["std"]:
        raise PhregError(f"model: std in its configuration is {config['std']!r}; expected numbers other than 0.")
    if not (_finite(config["crop_pct"]) and config["crop_pct"] > 0):
        raise PhregError(f"model: crop_pct in its configuration is {config['crop_pct']!r}; expected a number above 0.")
    pct = float(config["crop_pct"]) if crop == "center" else 1.0
    return Preprocess(
        tuple(config["mean"]), tuple(config["std"]), config["interpolation"], crop, pct, exif=True, fast=True
    )


def _finite(value: object) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)


def model_arguments(model: ViT) -> dict[str, Any]:
    """The keyword arguments with which timm builds this model again."""
    return dict(getattr(model, "_model_args", {}))


def classifies(model: ViT) -> bool:
    """Whether the model's head gives class scores. A CLIP's head does not: it projects into the space of text."""
    return (
        model.num_classes > 1
        and isinstance(model.head, nn.Linear)
        and "clip" not in str(model.pretrained_cfg.get("architecture"))
    )


def check_supported(model: ViT, name: str) -> None:
    """Raise ``PhregError`` with the reason if ``model`` can take no registers or serves no dense features."""
    reason = refused_model(model)
    if reason:
        raise PhregError(
            f"model: {name} ({type(model).__name__}) is not supported: {reason}. Expected a plain timm "
            "VisionTransformer (DINO, DINOv2, AugReg, DeiT-III, CLIP, MAE, SigLIP) or Eva (EVA02, DINOv3, Perception "
            "Encoder)."
        )


def _check_name(name: str) -> None:
    base = name.split(".")[0]
    if not timm.is_model(base):
        close = difflib.get_close_matches(base, timm.list_models(), n=4, cutoff=0.4)
        hint = f" The closest names are {', '.join(close)}." if close else ""
        raise PhregError(
            f"model: {name!r} is neither a timm model nor a folder.{hint} All names: "
            "python -c \"import timm; print(timm.list_models('vit*'))\""
        )
    reason = refused_name(base)
    # Refuse before anything is downloaded.
    if reason:
        raise PhregError(f"model: {name} is not supported: {reason}. Expected a plain timm VisionTransformer or Eva.")


def _create(name: str, **arguments: Any) -> ViT:
    try:
        return timm.create_model(name, **arguments)
    except LocalEntryNotFoundError:  # no network; a ValueError before huggingface_hub 1.0
        raise
    except BUILD_ERRORS as error:
        raise PhregError(f"model: timm cannot build {name}: {' '.join(str(error).split())[:400]}") from error


def _from_name(name: str, random_weights: bool) -> ViT:
    if random_weights:
        torch.manual_seed(0)
        return _create(name, pretrained=False)
    try:
        config = None if is_hub_name(name) else timm.get_pretrained_cfg(name, allow_unregistered=True)
    # timm does not know the tag.
    except RuntimeError:
        config = None
    if not is_hub_name(name) and (config is None or not config.has_weights):
        tags = timm.list_pretrained(f"{name.split('.')[0]}*")
        known = "timm knows no pretrained weights for it."
        if tags:
            known = f"Pretrained weights exist as {', '.join(tags[:6])}."
        raise PhregError(f"model: timm has no pretrained weights named {name!r}. {known} Or give {FILE}.")
    try:
        with reported(name):
            return _create(name, pretrained=True)
    except PhregError:
        raise
    # The hub client raises many types of its own if there is no network.
    except Exception as error:
        raise PhregError(
            f"model: the pretrained weights of {name} cannot be downloaded ({type(error).__name__}). Check the "
            f"network, or give {FILE}."
        ) from error


def _from_folder(folder: Path) -> ViT:
    try:
        state = load_file(folder / "model.safetensors")
    except SafetensorError as error:
        raise PhregError(
            f"model: {folder / 'model.safetensors'} is corrupt or truncated ({error}); copy or distil the student "
            "again."
        ) from None
    check_declared(folder, state)
    return _create(f"local-dir:{folder}", pretrained=True)


def _from_file(name: str, path: Path) -> ViT:
    state = read_weights(path)
    classes = {k: state[k].shape[0] for k in ("head.weight", "head.bias") if k in state}
    model = _create(name, pretrained=False, num_classes=next(iter(classes.values()), 0))
    module = timm.models.eva if isinstance(model, Eva) else timm.models.vision_transformer
    try:
        plain = type(model) in (VisionTransformer, Eva)
        model.load_state_dict(module.checkpoint_filter_fn(state, model) if plain else state)
    except (RuntimeError, KeyError, IndexError, AttributeError) as error:
        reason = " ".join(line.strip() for line in str(error).splitlines()[:3])[:400]
        raise PhregError(f"checkpoint: the weights in {path} do not fit {name}: {reason}") from error
    return model
