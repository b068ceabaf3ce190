"""``build``: build a bundle's TensorRT plan on the machine that will run it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from phreg_deploy.cli.console import Result
from phreg_deploy.cli.options import device_number, force_option, output_options
from phreg_deploy.cli.tables.build import show_build, show_steps
from phreg_deploy.errors import GateFailed, PhregError

if TYPE_CHECKING:
    from phreg_deploy.export.engine.report import BuildReport
    from phreg_deploy.runtime.backends.options import BackendOptions


@click.command()
@click.argument("bundle", type=click.Path(path_type=Path))
@device_number
@click.option(
    "--workspace",
    type=click.IntRange(1),
    metavar="MIB",
    help="Device memory that tactics may use at most; by default all of it.",
)
@click.option(
    "--compat",
    "compatibility",
    type=click.Choice(["none", "version", "ampere+", "same-cc"]),
    default="none",
    show_default=True,
    help="Build for later TensorRT versions, any GPU from Ampere on, or the same compute capability; each is slower.",
)
@click.option(
    "--effort", type=click.IntRange(0, 5), default=3, show_default=True, help="TensorRT's builder optimization level."
)
@click.option(
    "--tf32", is_flag=True, help="Compute FP32 products in TensorFloat-32: faster, and it fails the FP32 gate."
)
@click.option(
    "--timing-cache", type=click.Path(path_type=Path), help="File to read and write; by default one in the bundle."
)
@click.option(
    "--strict/--allow-unfused",
    default=False,
    show_default=True,
    help="Refuse or keep an engine with fewer fused attentions or 8-bit layers than expected.",
)
@click.option("--no-check", is_flag=True, help="Skip the parity check of the saved engine.")
@click.option(
    "--bisect", is_flag=True, help="Where parity fails, find the first block that diverges; needs onnx and onnxruntime."
)
@force_option
@output_options
def build(bundle: Path, no_check: bool, as_json: bool, quiet: bool, **options: Any) -> None:
    """Build the TensorRT engine of a BUNDLE for this machine's GPU. Needs no PyTorch and no onnx.

    The engine is stored in the bundle's engines/, one per GPU and TensorRT. It is read back, its fused attentions and
    8-bit layers are counted, and its answers are compared with the bundle's exam before it counts.

    \b
    Examples:
      phreg-deploy build student.bundle
      phreg-deploy build student.bundle --workspace 1024 --effort 5
      phreg-deploy build student.bundle --compat ampere+
    """
    result = Result(as_json, quiet)
    report = run_build(bundle, result, check=not no_check, **options)
    result.json({"bundle": bundle, **report.to_json()})


def run_build(bundle: Path, result: Result, *, bisect: bool, **options: Any) -> BuildReport:
    """Build and print, for ``build`` and ``export --format trt``; for ``options`` see ``phreg_deploy.export.build``."""
    from phreg_deploy.export import build as build_plan

    try:
        report = build_plan(bundle, progress=result.progress, **options)
    except GateFailed as error:
        if bisect and error.report.get("missed"):
            error.report["bisection"] = _bisect_build(bundle, options, result)
        raise
    show_build(report, str(bundle), result)
    return report


def _bisect_build(bundle: Path, options: dict[str, Any], result: Result) -> dict[str, Any]:
    """Bisect with a plan that is built in the same way."""
    from phreg_deploy.bundle.plan_keys import BuildSettings
    from phreg_deploy.runtime.backends.options import BackendOptions

    settings = BuildSettings(**{name: options[name] for name in ("tf32", "compatibility", "effort") if name in options})
    workspace = options.get("workspace")
    how = BackendOptions(device=options["device"])
    return tried_bisection(bundle, "tensorrt", how, result, settings=settings, workspace=workspace)


def tried_bisection(bundle: Path, backend: str, options: BackendOptions, result: Result, **how: Any) -> dict[str, Any]:
    """Call ``show_bisection``; its own failure must not hide the missed gate that it explains."""
    try:
        return show_bisection(bundle, backend, options, result, **how)
    except PhregError as why:
        result.say(f"Not bisected: {why}")
        return {"skipped": str(why)}


def show_bisection(bundle: Path, backend: str, options: BackendOptions, result: Result, **how: Any) -> dict[str, Any]:
    """Find where a backend's answers diverge from FP32, and print it; ``how`` see ``bisect``."""
    from phreg_deploy.bundle.bundle import Bundle
    from phreg_deploy.verify.bisection import bisect

    report = bisect(Bundle.read(bundle), backend, options, **how)
    show_steps(report, f"{bundle} on {backend} against FP32, after each half-block", result)
    return report.to_json()
