"""Load a text tower by open_clip, and embed names with it. S names, T templates, D channels."""

from __future__ import annotations

import logging
import pickle
import textwrap
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import torch
from safetensors import SafetensorError

from phreg_deploy.bundle.bundle import Bundle, is_bundle
from phreg_deploy.errors import BackendMissing, PhregError
from phreg_deploy.heads.class_embeddings import ClassEmbeddings
from phreg_deploy.progress import Progress
from phreg_deploy.student_record import model_path, read_record
from phreg_deploy.text.model_names import OPEN_CLIP, vision_names

CONFIG = "open_clip_config.json"
# open_clip and what it calls raise these for bad names, files and downloads.
REFUSALS = (
    RuntimeError,
    OSError,
    EOFError,
    ValueError,
    LookupError,
    TypeError,
    AttributeError,
    AssertionError,
    pickle.UnpicklingError,
    SafetensorError,
)


def embed_names(
    classes: Sequence[tuple[str, ...]],
    model: str,
    pretrained: str | None,
    checkpoint: Path | None,
    templates: tuple[str, ...],
    progress: Progress,
) -> ClassEmbeddings:
    """Embed the synonyms of each class; arguments and errors as of ``phreg_deploy.text.embed_classes``."""
    name, tag, weights, vision = find_model(model, pretrained, checkpoint)
    tower, tokenizer = _load(name, weights)
    names = [synonym for synonyms in classes for synonym in synonyms]
    rows = []
    with progress.task("classes", len(names)) as advance, torch.inference_mode():
        for text in names:
            sentences = tokenizer([template.replace("{}", text) for template in templates])
            mean = tower.encode_text(sentences, normalize=True).float().mean(0)
            rows.append((mean / mean.norm()).cpu().numpy())
            advance()
    bias = getattr(tower, "logit_bias", None)
    return ClassEmbeddings(
        embeddings=np.stack(rows).astype(np.float32),
        names=tuple(names),
        classes=tuple(k for k, synonyms in enumerate(classes) for _ in synonyms),
        scale=float(tower.logit_scale.detach().exp()),
        bias=None if bias is None else float(bias.detach()),
        model=Path(model).resolve().name if name.startswith("local-dir:") else name,
        pretrained=tag or ("" if checkpoint is None else checkpoint.name),
        vision=vision,
        templates=templates,
    )


def find_model(
    model: str, pretrained: str | None, checkpoint: Path | None
) -> tuple[str, str | None, str | None, tuple[str, ...]]:
    """Return open_clip's name, its tag, the tag or file of the weights, and timm names of the image tower.

    Raises:
        PhregError: an unknown model or tag, no weights or twice, or activations that the weights were not trained with.
    """
    if pretrained is not None and checkpoint is not None:
        raise PhregError("classes: got --pretrained and --checkpoint, expected one of them.")
    folder = model_path(model)
    if folder.is_dir() and not (folder / CONFIG).is_file():
        model = _origin(folder)
    if Path(model).is_dir():
        if pretrained is not None or checkpoint is not None:
            raise PhregError(f"classes: {model} has its own weights; leave out --pretrained and --checkpoint.")
        return f"local-dir:{model}", None, None, ()
    if model in OPEN_CLIP:
        architecture, tag = OPEN_CLIP[model]
        if pretrained is not None:
            raise PhregError(f"classes: {model} has the tag {tag} in open_clip; leave out --pretrained.")
        if checkpoint is None:
            return architecture, tag, tag, vision_names(architecture, tag)
        return architecture, None, _file(checkpoint), (model,)
    if model not in open_clip.list_models():
        raise PhregError(_unknown(model))
    if checkpoint is not None:
        return model, None, _file(checkpoint), vision_names(model, None)
    tags = open_clip.list_pretrained_tags_by_model(model)
    if pretrained is None or pretrained not in tags:
        got = "no weights" if pretrained is None else f"the tag {pretrained!r}"
        tell = f"--pretrained with one of {', '.join(tags)}, or " if tags else ""
        raise PhregError(f"classes: got {model} with {got}, expected {tell}--checkpoint FILE.")
    quick = bool((open_clip.get_pretrained_cfg(model, pretrained) or {}).get("quick_gelu", False))
    if quick != bool(open_clip.get_model_config(model).get("quick_gelu", False)):
        other = f"{model}-quickgelu" if quick else model.removesuffix("-quickgelu")
        raise PhregError(
            f"model: the weights {pretrained} of {model} were trained {'with' if quick else 'without'} QuickGELU; "
            f"expected --model {other}."
        )
    return model, pretrained, pretrained, vision_names(model, pretrained)


def _origin(folder: Path) -> str:
    """Return the timm name, with its tag, that a student or bundle came from, if its text tower is known."""
    if is_bundle(folder):
        source: Any = Bundle.read(folder).manifest.source
    else:
        source = (read_record(folder) or {}).get("source")
    name = source.get("model") if isinstance(source, dict) else None
    if name not in OPEN_CLIP:
        came = f" and came from {name}, whose text tower is not known" if name else ""
        raise PhregError(
            f"model: {folder} has no {CONFIG}{came}; expected a folder in open_clip's format, an open_clip "
            "architecture, or a timm name with its tag."
        )
    return str(name)


def _unknown(model: str) -> str:
    stem = model.partition(".")[0]
    close = [name for name in OPEN_CLIP if name.partition(".")[0] == stem]
    quick = [name for name in OPEN_CLIP if name.replace("_quickgelu", "") == model]
    if quick:
        return f"model: {model} loads weights that were trained with QuickGELU; expected --model {quick[0]}."
    if close:
        return f"model: got {model}, expected {stem} with its tag, one of {', '.join(close)}."
    return (
        f"model: got {model!r}, expected an open_clip architecture with --pretrained or --checkpoint, such as "
        "ViT-B-16, a folder in open_clip's format, or one of the timm names whose text tower is known: "
        f"{', '.join(OPEN_CLIP)}."
    )


def _file(checkpoint: Path) -> str:
    if not checkpoint.is_file():
        raise PhregError(f"checkpoint: there is no file {checkpoint}; expected weights of open_clip's whole model.")
    return str(checkpoint)


def _load(name: str, weights: str | None) -> tuple[Any, Any]:
    """Return the model in evaluation mode, and its tokenizer."""
    level = logging.root.manager.disable
    logging.disable(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            tower = open_clip.create_model(name, pretrained=weights, pretrained_text=False, require_pretrained=True)
            return tower.eval(), open_clip.get_tokenizer(name)
    except ImportError as error:
        raise BackendMissing(
            f'classes: the tokens of {name} need {error.name or error}. Run: pip install "phreg-deploy[text]"'
        ) from None
    except REFUSALS as error:
        first = next(iter(str(error).strip().splitlines()), "")
        text = textwrap.shorten(first, 300, placeholder=" ...") or type(error).__name__
        raise PhregError(
            f"classes: open_clip cannot load {name}{'' if weights is None else f' with {weights}'} ({text}). Weights "
            "and tokens of a tag are downloaded; without a network give --checkpoint FILE, or a folder in open_clip's "
            "format."
        ) from None
    finally:
        logging.disable(level)
