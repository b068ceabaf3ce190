"""Options of ``evaluate`` and ``probe``: the truth, the split, the training, and where features are computed."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from phreg_deploy.cli.options import Finite, backend_option, device_option, images_option, readout_options

_PATH = click.Path(path_type=Path)


def data_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Add every option but those of the models and of the output."""
    options = (
        images_option(True, "Folder of images."),
        click.option("--masks", type=_PATH, help="Folder of masks at the images' paths: PNG, palette or 8-bit grey."),
        click.option("--depth", type=_PATH, help="Folder of depth instead: 16-bit PNG or .npy."),
        click.option("--classes", type=_PATH, help="Text file with one class name a line, from class 0 on."),
        click.option(
            "--ignore",
            type=click.IntRange(0, 255),
            default=255,
            show_default=True,
            help="Pixel value that means no class.",
        ),
        click.option(
            "--first-class",
            type=click.IntRange(0, 254),
            default=0,
            show_default=True,
            help="Value of the first class; smaller ones mean no class (ADE20K: 1).",
        ),
        click.option(
            "--depth-scale", type=Finite(), default=0.001, show_default=True, help="Metres for each unit of a PNG."
        ),
        click.option(
            "--split",
            default="auto",
            show_default=True,
            help="folders (train/ and val/), hash (of the groups' names), auto (folders where both are there, else "
            "hash), or two files of names, TRAIN.txt,VAL.txt.",
        ),
        click.option(
            "--group",
            default="prefix",
            show_default=True,
            help="Images that stay on one side of the split: prefix (the name without its last number, as of a "
            "video's frames), image, folder, or a regular expression whose first group names it.",
        ),
        click.option("--share", type=Finite(), default=0.25, show_default=True, help="Share of the groups to test on."),
        click.option(
            "--protocol",
            help="logistic (default), ridge (default of --depth), dinov2 (slow) or ovss: docs/evaluate.md.",
        ),
        click.option("--decay", type=Finite(), default=1e-4, show_default=True, help="Weight decay on the mean loss."),
        click.option(
            "--patches",
            type=click.IntRange(100),
            default=100_000,
            show_default=True,
            help="Patches to train on at most.",
        ),
        click.option(
            "--seed", type=click.IntRange(0), default=0, show_default=True, help="Seed of the draws of patches."
        ),
        click.option("--image-size", help="e.g. 518 or 480x640; by default each model's or bundle's own."),
        click.option(
            "--layers", help="Layers as for `export`, joined along the channels; by default the last one's features."
        ),
        click.option("--cache/--no-cache", "keep", default=True, show_default=True, help="Keep features on disk."),
        readout_options("the student's"),
        device_option,
        backend_option,
    )
    for option in reversed(options):
        command = option(command)
    return command
