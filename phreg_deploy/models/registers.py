"""Add register tokens to a ViT by editing its state dict; stock timm can still build the result."""

from __future__ import annotations

from typing import Any

import timm
import torch

from phreg_deploy.arguments import check_distillation
from phreg_deploy.errors import PhregError
from phreg_deploy.models.hooks import ViT
from phreg_deploy.models.loading import model_arguments, model_spec


def add_registers(model: ViT, registers: int, seed: int = 0) -> ViT:
    """Copy ``model`` with ``registers`` more register tokens, drawn from N(0, 1/C) (arXiv 2505.21501 appendix).

    The new ones come first, then those that the architecture has (DINOv3, ``reg4`` variants). With 0 registers the copy
    gives the same features, to rounding. The position embedding of class token and registers moves into them, as in
    timm's own conversion of DINOv2; timm then builds the model with ``no_embed_class``.

    Raises:
        PhregError: registers were added to the model before.
    """
    spec = model_spec(model)
    if spec.registers and spec.registers != _native_registers(model):
        raise PhregError(
            f"model: {spec.architecture} already has {spec.registers} register tokens; distil the variant without, or "
            "export this one unchanged."
        )
    check_distillation({"registers": registers})
    state = dict(model.state_dict())
    positions, parts = state.get("pos_embed"), [name for name in ("cls_token", "reg_token") if name in state]
    if positions is not None and positions.shape[1] > model.patch_embed.num_patches:
        for name in parts:
            count = state[name].shape[1]
            state[name], positions = state[name] + positions[:, :count], positions[:, count:]
        state["pos_embed"] = positions
    if registers:
        generator = torch.Generator().manual_seed(seed)
        added = torch.randn(1, registers, spec.width, generator=generator) / spec.width**0.5
        state["reg_token"] = torch.cat([added, *([state["reg_token"]] if spec.registers else [])], dim=1)
    student = rebuild(model, **_register_arguments(model, spec.registers + registers))
    student.load_state_dict(state, strict=True)
    return student.eval()


def rebuild(model: ViT, **changes: Any) -> ViT:
    """Build a model of the same architecture and configuration with some arguments changed; no weights are copied."""
    arguments = {
        **model_arguments(model),
        "num_classes": model.num_classes,
        "img_size": tuple(model.patch_embed.img_size),
        **changes,
    }
    return timm.create_model(
        model.pretrained_cfg["architecture"], pretrained=False, pretrained_cfg=dict(model.pretrained_cfg), **arguments
    )


def _register_arguments(model: ViT, registers: int) -> dict[str, Any]:
    name = "num_reg_tokens" if model_spec(model).family == "eva" else "reg_tokens"
    return {name: registers, "no_embed_class": True}


def _native_registers(model: ViT) -> int:
    """How many register tokens timm's model of this name has by itself."""
    with torch.device("meta"):
        stock = timm.create_model(model.pretrained_cfg["architecture"], pretrained=False)
    return model_spec(stock).registers
