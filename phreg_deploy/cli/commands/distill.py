"""``distill``: a registered student of a timm ViT."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from phreg_deploy.arguments import check_distillation, check_model, check_resume
from phreg_deploy.cli.console import Result
from phreg_deploy.cli.options import (
    checkpoint_option,
    device_option,
    force_option,
    images_option,
    output_options,
)
from phreg_deploy.cli.tables.distill import show_scores
from phreg_deploy.extras import DISTILL, require
from phreg_deploy.files.atomic import check_target
from phreg_deploy.images.photographs import list_images
from phreg_deploy.spec import parse_size
from phreg_deploy.student_record import model_path


@click.command()
@click.argument("model")
@images_option(True, "Folder of photographs, no labels needed; a thousand are enough.")
@click.option("-o", "--output", type=click.Path(path_type=Path), required=True, help="Folder of the student to write.")
@checkpoint_option
@click.option(
    "--recipe",
    default="transplant",
    show_default=True,
    help="transplant (register neurons moved, then all weights), random-registers (the same without the move, as a control) or ph-reg (the paper).",
)
@click.option(
    "--registers", type=int, help="Register tokens to add: by default 4, and 16 in ph-reg; 0 is the control without."
)
@click.option("--image-size", help="e.g. 518 or 480x640; by default the model's own.")
@click.option("--epochs", type=int, help="0 gives the training-free student; by default the recipe's.")
@click.option("--batch", type=int, help="Images per step; by default the recipe's.")
@click.option("--lr", type=float, help="Peak learning rate; by default the recipe's.")
@click.option("--unlock", type=click.Choice(["all", "paper"]), help="Weights that train; by default the recipe's.")
@click.option(
    "--strength", type=float, help="Activation of a transplanted neuron, as a share of what it had on outlier tokens."
)
@click.option("--int8-aware", is_flag=True, help="Distil through fake quantisation, the one that `calibrate` writes.")
@click.option("--views", default=10, show_default=True, help="Shifted and flipped views per teacher target.")
@click.option("--holdout", default=0.1, show_default=True, help="Share of the images, chosen by name, kept for scores.")
@click.option("--seed", default=0, show_default=True, type=click.IntRange(0, 2**32 - 1))
@device_option
@click.option("--precision", default="auto", show_default=True, help="auto, fp32 or bf16 autocast.")
@click.option(
    "--cache", type=click.Path(path_type=Path), help="Where teacher targets are kept; by default ~/.cache/phreg-deploy."
)
@click.option("--resume", is_flag=True, help="Go on with an interrupted run.")
@force_option
@output_options
def distill(
    model: str,
    images: Path,
    output: Path,
    image_size: str | None,
    cache: Path | None,
    resume: bool,
    force: bool,
    as_json: bool,
    quiet: bool,
    **settings: Any,
) -> None:
    """Add register tokens to MODEL and distil it against its own denoised features.

    MODEL is a timm name (vit_small_patch14_dinov2.lvd142m), or a folder with config.json and model.safetensors. The
    student is again a standard timm checkpoint: timm.create_model("local-dir:STUDENT", pretrained=True) loads it.

    --recipe ph-reg has the loss, the unlocked weights and the 16 registers of arXiv 2505.21501, on a smaller budget: 16
    epochs of your images, where the paper reports epoch 30 of 100 on far more. It also takes the paper's learning rate
    and batch for CLIP with every model, draws each image's views once instead of in each epoch, and crops the centre.

    \b
    Example:
      phreg-deploy distill vit_tiny_patch16_224.augreg_in21k_ft_in1k --checkpoint vit.safetensors --images photos/ -o student
    """
    result = Result(as_json, quiet)
    chosen = {key: value for key, value in settings.items() if value is not None}
    size = parse_size(image_size) if image_size else None
    check_distillation(chosen)
    check_model(model, settings["checkpoint"])
    list_images(images)
    check_target(output, force, [model_path(model), images, settings["checkpoint"]])
    check_resume(output.with_name(output.name + ".partial"), resume, force)
    require("`phreg-deploy distill`", distill=DISTILL)
    from phreg_deploy.distill.distillation import Request
    from phreg_deploy.distill.distillation import distill as run

    request = Request(model=model, images=images, image_size=size, **chosen)
    record = run(request, output, cache=cache, resume=resume, force=force, progress=result.progress)
    if "missing" in record["scores"]:  # said with --quiet too: figures that were asked for are not there
        click.echo(
            f"Warning: {output} is written but has no scores ({record['scores']['missing']}). Its artifact rates: phreg-deploy artifacts {output} --images {images}",
            err=True,
        )
    else:
        show_scores(record, result)
    result.say(
        f"Wrote {output} in {record['seconds']['total']:.0f} s. Next: phreg-deploy export {output} -o {output}.bundle --format onnx"
    )
    result.json({"output": output, **record})
