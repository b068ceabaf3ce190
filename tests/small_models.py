"""Small timm models, one for each supported family, with its architecture and options but few and narrow blocks."""

import functools

import timm
import torch
from timm.layers import Attention as PlainAttention

FAMILIES = {
    "augreg": ("vit_tiny_patch16_224", {}),
    "dino": ("vit_small_patch16_224", {}),
    "dinov2": ("vit_small_patch14_dinov2", {}),
    # Packed SwiGLU.
    "dinov2-giant": ("vit_giant_patch14_dinov2", {}),
    "deit3": ("deit3_small_patch16_224", {}),
    "clip-quickgelu": ("vit_base_patch16_clip_quickgelu_224", {}),
    "clip": ("vit_base_patch16_clip_224", {}),
    "mae": ("vit_base_patch16_224", {"global_pool": "avg"}),
    "siglip": ("vit_base_patch16_siglip_224", {}),
    "eva": ("eva_large_patch14_196", {}),
    # Rotary positions, SwiGLU.
    "eva02": ("eva02_tiny_patch14_224", {}),
    # Separate q, k and v; a norm inside the MLP.
    "eva02-base": ("eva02_base_patch14_224", {}),
}


class Attention(PlainAttention):
    """timm's attention with a gate, which its model functions do not offer by name."""

    __init__ = functools.partialmethod(PlainAttention.__init__, gated=True)


# Other options of timm that quantisation must handle.
VARIANTS = {
    "bare": (
        "vit_tiny_patch16_224",
        {"qkv_bias": False, "proj_bias": False, "qk_norm": True, "init_values": 0.1},
    ),
    "normed": (
        "vit_tiny_patch16_224",
        {"scale_attn_norm": True, "scale_mlp_norm": True, "class_token": False, "global_pool": "avg"},
    ),
    "gated": ("vit_tiny_patch16_224", {"attn_layer": Attention}),
}


def small(family: str, *, depth: int = 2, width: int = 48, heads: int = 3, seed: int = 0, side: int = 4, **more):
    """Make a family's model of ``side`` x ``side`` patches, with weights so large that every path matters."""
    name, options = {**FAMILIES, **VARIANTS}[family]
    patch = 14 if "patch14" in name else 16
    torch.manual_seed(seed)
    model = timm.create_model(
        name, depth=depth, embed_dim=width, num_heads=heads, img_size=patch * side, num_classes=7, **{**options, **more}
    )
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if "norm" in name and name.endswith("weight"):
                parameter.copy_(1 + 0.2 * noise)
            elif "gamma" in name:
                parameter.copy_(0.5 + 0.2 * noise)
            elif parameter.ndim == 1:
                parameter.copy_(0.2 * noise)
            elif "token" in name or "pos_embed" in name:
                parameter.copy_(0.5 * noise)
            else:
                fan_in = parameter[0].numel()
                parameter.copy_(noise / fan_in**0.5)
    return model.eval()


def plant(model, block: int = 0, unit: int = 5, level: float = 40.0):
    """Make a register neuron: a hidden unit that is active only at the first patch and adds a long vector there.

    The direction is fitted to the inputs of the block's MLP, and works in any block of any family.
    """
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        place = model.num_prefix_tokens if not model.no_embed_class else 0
        model.pos_embed[0, place] += 1.5 * torch.randn(model.embed_dim, generator=generator)
        mlp, inputs = model.blocks[block].mlp, []
        handle = mlp.register_forward_pre_hook(lambda _m, args: inputs.append(args[0].double()))
        model.forward_features(torch.randn(32, 3, *model.patch_embed.img_size, generator=generator))
        handle.remove()
        first = model.num_prefix_tokens
        here = inputs[0][:, first]
        others = torch.cat([inputs[0][:, :first], inputs[0][:, first + 1 :]], 1).flatten(0, 1)
        spread = torch.cov(others.T) + 0.05 * torch.eye(model.embed_dim, dtype=torch.float64)
        direction = torch.linalg.solve(spread, here.mean(0) - others.mean(0))
        low, high = float((others @ direction).max()), float((here @ direction).mean())
        gain = (level + 6) / (high - low)
        mlp.fc1.weight[unit] = (gain * direction).float()
        mlp.fc1.bias[unit] = level - gain * high
        mlp.fc2.weight[:, unit] *= 3 / mlp.fc2.weight[:, unit].norm()
    return model
