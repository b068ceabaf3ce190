"""Options that several commands share."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click


class Finite(click.types.FloatParamType):
    """A finite number; click's own types accept NaN and infinity."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        number = super().convert(value, param, ctx)
        if not math.isfinite(number):
            self.fail(f"{value} is not a finite number.", param, ctx)
        return number


class Number(Finite, click.FloatRange):
    """A finite number within bounds."""


def output_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Add ``--json`` and ``--quiet``."""
    command = click.option(
        "--json", "as_json", is_flag=True, help="One JSON document as the last line of stdout; tables go to stderr."
    )(command)
    return click.option("--quiet", is_flag=True, callback=_report_downloads, help="No progress bars and no tables.")(
        command
    )


def _report_downloads(ctx: click.Context, _param: click.Parameter, quiet: bool) -> bool:
    """Let downloads of this command say what they wait for, unless it is quiet."""
    from phreg_deploy.hub.reports import shown_by
    from phreg_deploy.progress import Progress

    ctx.with_resource(shown_by(Progress(quiet)))
    return quiet


def images_option(required: bool, text: str) -> Callable[..., Any]:
    return click.option("--images", type=click.Path(path_type=Path), required=required, help=text)


def _known_backend(_ctx: click.Context, _param: click.Parameter, name: str) -> str:
    from phreg_deploy.runtime.backends.registry import check_name

    if name != "auto":
        check_name(name)
    return name


backend_option = click.option(
    "--backend",
    callback=_known_backend,
    default="auto",
    show_default=True,
    help="auto (the fastest that passes), onnxruntime-cpu, openvino, tensorrt, onnxruntime-cuda or "
    "onnxruntime-tensorrt.",
)
device_number = click.option(
    "--device", type=click.IntRange(0), default=0, show_default=True, help="Number of the GPU, where one is used."
)


mode_option = click.option(
    "--mode",
    type=click.Choice(["latency", "throughput"]),
    default="latency",
    show_default=True,
    help="Latency of one call, or throughput of calls from several threads; only openvino has throughput.",
)
compute_option = click.option(
    "--compute",
    type=click.Choice(["auto", "fp32", "bf16"]),
    default="auto",
    show_default=True,
    help="Precision of what is not in 8 bits; bf16 needs openvino.",
)
threads_option = click.option(
    "--threads", type=click.IntRange(1), help="For one inference; by default one per physical core."
)


def tuning_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Add the options of a backend: its name, device, threads, precision and mode."""
    for option in (mode_option, compute_option, threads_option, device_number, backend_option):
        command = option(command)
    return command


def readout_options(default: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Add the options of the readout; ``default`` says whose it is if they are not given."""

    def add(command: Callable[..., Any]) -> Callable[..., Any]:
        for option in (
            click.option(
                "--project/--no-project",
                default=None,
                help=f"Project features into the space of text, of a CLIP or SigLIP; by default {default}.",
            ),
            click.option(
                "--readout",
                metavar="NAME",
                help="final (tokens of the last block), value (as in MaskCLIP) or neighbour (as in NACLIP); "
                f"by default {default}.",
            ),
        ):
            command = option(command)
        return command

    return add


public_key_option = click.option(
    "--public-key",
    type=click.Path(path_type=Path),
    envvar="PHREG_PUBLIC_KEY",
    show_envvar=True,
    help="Refuse what the private key of this one has not signed; needs the extra sign.",
)


def verify_first(folder: Path | str, public_key: Path | None) -> None:
    """Verify the signature of a student or a bundle if there is a key; raises as ``signing.verify_signature``."""
    if public_key is not None:
        from phreg_deploy.signing import verify_signature

        verify_signature(folder, public_key)


force_option = click.option("--force", is_flag=True, help="Replace an output that exists.")
checkpoint_option = click.option(
    "--checkpoint",
    type=click.Path(path_type=Path),
    help="Weights for a timm name: .safetensors, or .pth read with weights_only.",
)
device_option = click.option("--device", default="auto", show_default=True, help="auto, cpu, cuda or cuda:N.")
devices_option = click.option(
    "--device", default="auto", show_default=True, help="auto, cpu, cuda, cuda:N, or several GPUs: cuda:0,cuda:1."
)
