"""Small CLIPs and SigLIPs with random weights: open_clip's folder, and timm's folder with the same image tower."""

import json
from pathlib import Path

import open_clip
import timm
import torch
from timm.models.vision_transformer import checkpoint_filter_fn

from tests.small_models import save

JOINT, WIDTH, PATCH, SIDE = 32, 48, 16, 64
TEXT = {"context_length": 77, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 2}


def write_open_clip(model, settings: dict, folder: Path) -> Path:
    """Write a model in open_clip's own format."""
    folder.mkdir(parents=True)
    (folder / "open_clip_config.json").write_text(json.dumps({"model_cfg": settings, "preprocess_cfg": {}}))
    torch.save(model.state_dict(), folder / "open_clip_pytorch_model.bin")
    return folder


def spread(model, seed: int):
    """Give weights so large that every path matters."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if name.startswith("logit_"):
                continue
            if parameter.ndim == 1:
                parameter.copy_((1.0 if "ln_" in name and name.endswith("weight") else 0.0) + 0.2 * noise)
            elif "embedding" in name:
                parameter.copy_(0.5 * noise)
            else:
                parameter.copy_(noise / parameter[0].numel() ** 0.5)
    return model.eval()


def clip(folder: Path):
    """Write ``open_clip/`` and ``timm/`` with one set of weights; return open_clip's model."""
    settings = {
        "embed_dim": JOINT,
        "quick_gelu": True,
        "vision_cfg": {"image_size": SIDE, "layers": 2, "width": WIDTH, "head_width": 16, "patch_size": PATCH},
        "text_cfg": TEXT,
    }
    model = spread(open_clip.CLIP(**settings), 5)
    write_open_clip(model, settings, folder / "open_clip")
    tower = timm.create_model(
        "vit_base_patch16_clip_quickgelu_224", depth=2, embed_dim=WIDTH, num_heads=3, img_size=SIDE, num_classes=JOINT
    )
    tower.load_state_dict(checkpoint_filter_fn(model.state_dict(), tower))
    # timm would state the weights of its default tag.
    tower.pretrained_cfg["tag"] = ""
    save(tower.eval(), folder / "timm")
    return model


def siglip(folder: Path):
    """Write ``folder`` with a model of a bias, sigmoid's, and a tokeniser of transformers; return open_clip's model."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    text = {**TEXT, "context_length": 16, "vocab_size": 64, "hf_tokenizer_name": "in the folder"}
    text |= {"tokenizer_kwargs": {"clean": "canonicalize"}, "no_causal_mask": True, "pool_type": "last"}
    settings = {
        "embed_dim": JOINT,
        "vision_cfg": {"image_size": SIDE, "layers": 1, "width": WIDTH, "head_width": 16, "patch_size": PATCH},
        "text_cfg": {**text, "proj_bias": True},
        "init_logit_bias": -10.0,
        "init_logit_scale": 2.3,
    }
    model = spread(open_clip.CLIP(**settings), 6)
    write_open_clip(model, settings, folder)
    text = "[PAD] [UNK] itap of a my bad photo the large origami in video game art small car tree"
    words = text.split()
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.save(str(folder / "tokenizer.json"))
    facts = {"tokenizer_class": "PreTrainedTokenizerFast", "pad_token": "[PAD]", "unk_token": "[UNK]"}
    (folder / "tokenizer_config.json").write_text(json.dumps(facts))
    return model
