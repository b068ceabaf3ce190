"""Embed class names by the text tower of a CLIP or SigLIP, through open_clip.

Needs the extra ``text`` (open_clip, torch, transformers for SigLIP's tokens). Importing this module imports none.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from phreg_deploy.extras import TEXT, require
from phreg_deploy.heads.class_embeddings import check_output
from phreg_deploy.progress import SILENT, Progress
from phreg_deploy.text.names import check_names, read_names
from phreg_deploy.text.templates import read_templates

if TYPE_CHECKING:
    from phreg_deploy.heads import ClassEmbeddings

__all__ = ["embed_classes"]


def embed_classes(
    names: Path | str | Iterable[str],
    model: str,
    output: Path | str | None = None,
    *,
    pretrained: str | None = None,
    checkpoint: Path | None = None,
    templates: str = "80",
    force: bool = False,
    progress: Progress = SILENT,
) -> ClassEmbeddings:
    """Embed class names, each as the mean over templates, and write ``classes.npz`` if ``output`` is given.

    As in the code of CLIP and of open-vocabulary segmentation: each sentence's embedding is normalised to unit length,
    the mean over the templates is normalised again.

    Args:
        names: a file with one class a line, or the lines. Commas separate a class's synonyms; the first is its name.
        model: an open_clip architecture such as ``ViT-B-16``, a folder in open_clip's format (``open_clip_config.json``
            with its weights), a timm name with its tag such as ``vit_base_patch16_clip_224.laion2b``, or a student or
            bundle that came from one.
        pretrained: the tag of open_clip's weights for an architecture; they are downloaded.
        checkpoint: a file of an architecture's weights instead.
        templates: "80", "7", or a file of sentences with ``{}`` in place of the name.
        force: replace a file that exists.

    Raises:
        PhregError: bad names or templates, an unknown model, weights that do not fit, or an output that exists.
        BackendMissing: open_clip or PyTorch is not installed, or transformers where the model's tokens need it.
    """
    if output is not None:
        check_output(output, force)
    classes = read_names(Path(names)) if isinstance(names, (str, Path)) else check_names(list(names), "the names")
    require("embedding class names", text=TEXT)
    sentences = read_templates(templates)
    from phreg_deploy.text.embedding import embed_names

    embedded = embed_names(classes, model, pretrained, checkpoint, sentences, progress)
    if output is not None:
        embedded.write(output, force)
    return embedded
