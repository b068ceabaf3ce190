"""The command ``classes``: embed class names by a text tower."""

from __future__ import annotations

from pathlib import Path

import click

from phreg_deploy.cli.console import Result
from phreg_deploy.cli.options import force_option, output_options


@click.command()
@click.argument("names", type=click.Path(path_type=Path))
@click.option(
    "--model",
    required=True,
    help="An open_clip architecture (ViT-B-16), a folder in its format, a timm name with its tag, or a student or "
    "bundle of one.",
)
@click.option("--pretrained", metavar="TAG", help="open_clip's tag of an architecture's weights; they are downloaded.")
@click.option("--checkpoint", type=click.Path(path_type=Path), help="A file of an architecture's weights instead.")
@click.option(
    "--templates",
    default="80",
    show_default=True,
    help="80 (CLIP's for ImageNet), 7 (the best of them), or a file of sentences with {} in place of the name.",
)
@click.option("-o", "--output", type=click.Path(path_type=Path), required=True, help="The .npz file to write.")
@force_option
@output_options
def classes(
    names: Path,
    model: str,
    pretrained: str | None,
    checkpoint: Path | None,
    templates: str,
    output: Path,
    force: bool,
    as_json: bool,
    quiet: bool,
) -> None:
    """Embed the class names in the file NAMES by the text tower of a CLIP or SigLIP.

    NAMES has one class a line, commas between its synonyms. `attach --classes` serves the classes, and `evaluate
    --protocol ovss --text` measures them.

    \b
    Examples:
      phreg-deploy classes names.txt --model ViT-B-16 --pretrained laion2b_s34b_b88k -o classes.npz
      phreg-deploy classes names.txt --model vit_base_patch16_clip_quickgelu_224.openai --templates 7 -o classes.npz
    """
    from phreg_deploy.text import embed_classes

    result = Result(as_json, quiet)
    embedded = embed_classes(
        names,
        model,
        output,
        pretrained=pretrained,
        checkpoint=checkpoint,
        templates=templates,
        force=force,
        progress=result.progress,
    )
    count, width = embedded.embeddings.shape
    kinds = embedded.class_names
    result.say(
        f"Wrote {output}: {len(kinds)} classes, {count} names, {width} channels, {len(embedded.templates)} templates, "
        f"scale {embedded.scale:.4g}{'' if embedded.bias is None else f', bias {embedded.bias:.4g}'}."
    )
    result.json(
        {
            "output": output,
            "classes": kinds,
            "names": count,
            "width": width,
            "templates": len(embedded.templates),
            "scale": embedded.scale,
            "bias": embedded.bias,
            "model": embedded.model,
            "pretrained": embedded.pretrained,
            "vision": embedded.vision,
        }
    )
