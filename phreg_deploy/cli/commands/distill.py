"""The command ``distill``: add registers to a timm ViT and distil it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from phreg_deploy.cli.console import Result
from phreg_deploy.cli.options import (
    checkpoint_option,
    devices_option,
    force_option,
    images_option,
    output_options,
    readout_options,
)
from phreg_deploy.cli.tables.distill import show_record


@click.command()
@click.argument("model")
@images_option(True, "Folder of photographs, no labels needed; a thousand are enough.")
@click.option("-o", "--output", type=click.Path(path_type=Path), required=True, help="Folder of the student to write.")
@checkpoint_option
@click.option(
    "--recipe",
    default="transplant",
    show_default=True,
    help="transplant (moves register neurons, then trains all weights), ph-reg (the paper), ph-reg-clip (the paper for "
    "CLIP), random-registers (transplant without the move, as a control) or sinder (SINDER's repair without registers, "
    "as a control).",
)
@click.option(
    "--registers",
    type=int,
    help="Register tokens to add: by default 4, in ph-reg 16, in sinder 0; 0 adds none, as a control.",
)
@click.option("--image-size", help="e.g. 518 or 480x640; by default the model's own.")
@click.option("--epochs", type=int, help="0 gives the training-free student; by default the recipe's.")
@click.option("--batch", type=int, help="Images per step; by default the recipe's.")
@click.option("--micro-batch", type=int, help="Images per forward and backward pass, for less memory; by default all.")
@click.option("--grad-checkpointing", is_flag=True, help="Recompute each block in the backward pass, for less memory.")
@click.option("--lr", type=float, help="Peak learning rate; by default the recipe's.")
@click.option("--average", type=float, help="Decay of a moving average of the weights, e.g. 0.99; by default none.")
@readout_options("the recipe's")
@click.option(
    "--layers",
    metavar="LIST",
    help="Train further layers too, for heads that read them: 3,6,9,12, fractions 1/4,1/2,3/4,1, or all.",
)
@click.option(
    "--unlock",
    type=click.Choice(["all", "paper", "paper-clip", "singular-values"]),
    help="Weights that train; by default the recipe's.",
)
@click.option(
    "--strength", type=float, help="Activation of a transplanted neuron, as a share of that on outlier tokens."
)
@click.option("--int8-aware", is_flag=True, help="Distil through the quantisation that `calibrate` writes.")
@click.option("--views", default=10, show_default=True, help="Shifted and flipped views per teacher target.")
@click.option("--holdout", default=0.1, show_default=True, help="Share of the images, chosen by name, kept for scores.")
@click.option("--seed", default=0, show_default=True, type=click.IntRange(0, 2**32 - 1))
@devices_option
@click.option("--precision", default="auto", show_default=True, help="auto, fp32 or bf16 autocast.")
@click.option(
    "--cache", type=click.Path(path_type=Path), help="Folder of teacher targets; by default ~/.cache/phreg-deploy."
)
@click.option("--workers", type=int, help="Threads that read targets; by default one per core, at most four.")
@click.option("--resume", is_flag=True, help="Continue an interrupted run.")
@force_option
@output_options
def distill(output: Path, images: Path, as_json: bool, quiet: bool, **settings: Any) -> None:
    """Add register tokens to MODEL and distil it against its own denoised features.

    MODEL is a timm name (vit_small_patch14_dinov2.lvd142m), or a folder with config.json and model.safetensors. The
    student is again a standard timm checkpoint: timm.create_model("local-dir:STUDENT", pretrained=True) loads it.

    --recipe ph-reg has the loss, the unlocked weights and the 16 registers of arXiv 2505.21501 on a smaller budget: 16
    epochs of your images, where the paper reports epoch 30 of 100 on far more. It also uses the paper's learning rate
    and batch for CLIP with every model, draws each image's views once instead of in each epoch, and crops the centre.

    --recipe ph-reg-clip is the same for CLIP: targets are read out as in NACLIP, the student as in MaskCLIP
    (--readout value), both in the space of text, and the last two blocks train. Train at 448 px, as the paper does.

    --recipe sinder has the loss of the code released with SINDER (arXiv 2407.16826), trains singular values alone and
    adds no registers. It lasts 16 epochs at a lower rate, and two choices of its search for defective tokens differ.
    Its loss reads no targets, so --views is not used.

    torchrun starts several processes that share the work: one per GPU, or several on a CPU.

    \b
    Examples:
      phreg-deploy distill vit_tiny_patch16_224 --checkpoint vit.safetensors --images photos/ -o student
      torchrun --nproc-per-node 4 -m phreg_deploy distill vit_tiny_patch16_224 --images photos/ -o student
      phreg-deploy distill vit_base_patch16_clip_quickgelu_224.openai --recipe ph-reg-clip --image-size 448 \\
        --images photos/ -o clip-student
    """
    from phreg_deploy.distill import distill as run
    from phreg_deploy.distill.devices.launch import find_launch

    result = Result(as_json, quiet)
    record = run(images=images, output=output, progress=result.progress, **settings)
    if find_launch().first:
        show_record(record, output, images, result)
        result.json({"output": output, **record.to_json()})
