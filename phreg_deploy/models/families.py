"""Judge a model by its name, before anything is downloaded, and by its structure: supported, or refused with a reason.

Every reason ends with what to use instead.
"""

from __future__ import annotations

import timm
from timm.models.eva import Eva, EvaBlock
from timm.models.vision_transformer import Block, VisionTransformer
from torch import nn

from phreg_deploy.models.hooks import ViT

# timm's modules that build a plain VisionTransformer or Eva.
MODULES = ("vision_transformer", "eva", "deit")

_BIAS = "its blocks add a relative position bias, which a register token has no entry in; use "
# timm's modules of other Vision Transformers.
OTHERS = {
    "beit": f"{_BIAS}beit3_base_patch16_224 or eva02_base_patch14_224",
    "vision_transformer_relpos": f"{_BIAS}vit_base_patch16_rope_224",
    "vision_transformer_sam": f"{_BIAS}vit_base_patch14_dinov2",
    "naflexvit": "it reads lists of patches and their places, not images; use the same weights in a plain ViT, "
    "exported for a range of sizes, e.g. vit_base_patch16_siglip_256 (tag v2_webli) or vit_base_patch16_radio_v3",
    "vision_transformer_hybrid": "a convolutional network makes its patches; use vit_base_patch16_224",
    "vitamin": "a convolutional network makes its patches; use vit_base_patch16_clip_224",
    "swin_transformer": "it pools windows and merges patches: there is no token that could serve as a register; use "
    "vit_base_patch16_224",
}
OTHERS.update(dict.fromkeys(("swin_transformer_v2", "swin_transformer_v2_cr"), OTHERS["swin_transformer"]))

_SIDE = "its attention and its MLP run side by side, and the graph computes one after the other; use "
_AFTER = "its norms stand after attention and MLP, so no norm makes its tokens comparable; use "
BLOCKS = {
    "ParallelScalingBlock": f"{_SIDE}vit_base_patch16_224",
    "DiffParallelScalingBlock": f"{_SIDE}vit_base_patch16_224",
    "ParallelThingsBlock": f"{_SIDE}vit_base_patch16_224",
    "ResPostBlock": f"{_AFTER}vit_base_patch16_224",
    "EvaBlockPostNorm": f"{_AFTER}eva02_large_patch14_clip_224",
}
# timm's rotary embeddings that a runtime can compute, and timm's names of them.
ROTARY = {
    "RotaryEmbeddingCat": "cat",
    "RotaryEmbeddingDinoV3": "dinov3",
    "RotaryEmbeddingMixed": "mixed",
    "RotaryEmbeddingMRope": "mrope",
}
_PLAIN = "use a plain timm VisionTransformer or Eva, e.g. vit_base_patch14_dinov2"
_DISTILLED = (
    "its second prefix token is a trained distillation token, which is neither class nor register token; use "
    "deit3_base_patch16_224 or deit_base_patch16_224"
)


def refused_name(name: str) -> str | None:
    """Return why timm's model of this name is not supported, as far as the name tells, or None."""
    base = name.split(".")[0]
    module = timm.models.model_entrypoint(base).__module__.rsplit(".", 1)[-1]
    if module in OTHERS:
        return OTHERS[module]
    if module not in MODULES:
        return f"it is of another family ({module}); {_PLAIN}"
    return _DISTILLED if "distilled" in base else None


def refused_model(model: ViT) -> str | None:
    """Return why a model can take no registers or serves no dense features, or None if it is supported."""
    module = type(model).__module__.rsplit(".", 1)[-1]
    if "Distilled" in type(model).__name__:
        return _DISTILLED
    if type(model) not in (VisionTransformer, Eva):
        return OTHERS.get(module, f"it is of another family; {_PLAIN}")
    plain = EvaBlock if isinstance(model, Eva) else Block
    odd = next((type(block).__name__ for block in model.blocks if type(block) is not plain), None)
    if odd:
        return BLOCKS.get(odd, f"its blocks are {odd}, not the pre-norm block of a plain ViT; {_PLAIN}")
    if getattr(model, "pool_include_prefix", False):
        return (
            "its pooling reads the prefix tokens, so registers would leak into the pooled feature; use it built with "
            "pool_include_prefix=False"
        )
    embed = model.patch_embed
    if type(embed).__name__ == "HybridEmbed":
        return OTHERS["vision_transformer_hybrid"]
    if type(embed).__name__ != "PatchEmbed" or not isinstance(embed.proj, nn.Conv2d):
        return f"its patch embedding is {type(embed).__name__}, not one strided convolution; {_PLAIN}"
    if embed.proj.in_channels != 3:
        return f"it reads {embed.proj.in_channels} channels, not RGB; use it built with in_chans=3"
    attention = type(model.blocks[0].attn).__name__
    if attention == "DiffAttention":
        return (
            "its attention subtracts two softmaxes, which no runtime fuses and no 8-bit graph is written for; use "
            "vit_betwixt_patch16_reg4_gap_256"
        )
    if attention not in ("Attention", "EvaAttention", "AttentionRope"):
        return f"its attention is {attention}; {_PLAIN}"
    return _refused_rotary(model)


def _refused_rotary(model: ViT) -> str | None:
    """Return why the position embedding cannot be computed without torch, or None if it can, or if there is none."""
    rope = getattr(model, "rope", None)
    if rope is None:
        return None
    if type(rope).__name__ not in ROTARY:
        return f"its rotary embedding is {type(rope).__name__}, expected one of {', '.join(ROTARY)}; {_PLAIN}"
    if getattr(rope, "in_pixels", False) or getattr(rope, "grid_type", "index") != "index":
        return f"its rotary embedding does not count patches from one end; {_PLAIN}"
    if getattr(rope, "normalize_coords", "separate") != "separate":
        return f"its rotary embedding normalises both axes by one side ({rope.normalize_coords}); {_PLAIN}"
    return None
