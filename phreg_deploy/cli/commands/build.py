"""``build``: a bundle's TensorRT engine, on the machine that will run it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from phreg_deploy.cli.console import Result
from phreg_deploy.cli.options import device_number, force_option, output_options
from phreg_deploy.errors import BackendMissing, GateFailed, PhregError

if TYPE_CHECKING:
    from phreg_deploy.export.engine.build import BuildRequest
    from phreg_deploy.runtime.backends.options import BackendOptions


@click.command()
@click.argument("bundle", type=click.Path(path_type=Path))
@device_number
@click.option(
    "--workspace",
    type=click.IntRange(1),
    metavar="MIB",
    help="Device memory at most that tactics may use; by default all of it.",
)
@click.option(
    "--compat",
    type=click.Choice(["none", "version", "ampere+", "same-cc"]),
    default="none",
    show_default=True,
    help="A plan for later TensorRT, for any GPU from Ampere on, or for the same compute capability; each is slower.",
)
@click.option(
    "--effort", type=click.IntRange(0, 5), default=3, show_default=True, help="TensorRT's builder optimization level."
)
@click.option(
    "--tf32", is_flag=True, help="Let FP32 products drop to TensorFloat-32: faster, and it fails the FP32 gate."
)
@click.option(
    "--timing-cache", type=click.Path(path_type=Path), help="File to read and write; by default one in the bundle."
)
@click.option(
    "--allow-unfused", is_flag=True, help="Keep an engine with fewer fused attentions or 8-bit layers than meant."
)
@click.option("--no-check", is_flag=True, help="Skip the parity check of the saved engine.")
@click.option(
    "--bisect", is_flag=True, help="Where parity fails, find the first block that diverges; needs onnx and onnxruntime."
)
@force_option
@output_options
def build(bundle: Path, bisect: bool, force: bool, as_json: bool, quiet: bool, **asked: Any) -> None:
    """Build the TensorRT engine of a BUNDLE for this machine's GPU. Needs no PyTorch and no onnx.

    The engine is kept in the bundle's engines/ for this GPU and TensorRT, beside others. It is read back, its fused
    attentions and 8-bit layers are counted, and the saved plan answers the bundle's exam before it counts.

    \b
    Examples:
      phreg-deploy build student.bundle
      phreg-deploy build student.bundle --workspace 1024 --effort 5
      phreg-deploy build student.bundle --compat ampere+
    """
    from phreg_deploy.bundle.plans import BuildSettings
    from phreg_deploy.export.engine.build import BuildRequest

    result = Result(as_json, quiet)
    settings = BuildSettings(asked["tf32"], asked["compat"], asked["effort"])
    request = BuildRequest(
        bundle,
        settings,
        asked["device"],
        asked["workspace"],
        asked["timing_cache"],
        not asked["no_check"],
        asked["allow_unfused"],
    )
    result.json({"bundle": bundle, **run_build(request, force, bisect, result)})


def run_build(
    request: BuildRequest, force: bool, bisect: bool, result: Result, exported: bool = False
) -> dict[str, Any]:
    """Build and print; what ``build`` and ``export --format trt`` share."""
    from phreg_deploy.export.engine.build import build_engine

    try:
        report = build_engine(request, force=force, progress=result.progress)
    except BackendMissing as error:
        if not exported:
            raise
        raise BackendMissing(
            f"{error} The bundle is written and checked; only its engine is missing. Copy {request.bundle} to the machine with the GPU and run "
            f"there: phreg-deploy build {request.bundle.name}",
            {"bundle": str(request.bundle)},
        ) from None
    except GateFailed as error:
        if bisect and error.report.get("missed"):
            error.report["bisection"] = tried_bisection(
                request.bundle,
                "tensorrt",
                request.device,
                result,
                settings=request.settings,
                workspace=request.workspace,
            )
        raise
    census = report["census"]
    result.table(
        f"Engine for {report['key']['gpu']} (SM {report['key']['architecture'] / 10:.1f}), TensorRT {report['key']['tensorrt']}",
        ["", ""],
        [
            ["fused attention", f"{len(census['fused_attention'])} blocks"],
            ["linear layers in 8 bits / in float", f"{len(census['eight_bit'])} / {len(census['float_linear'])}"],
            ["layers", census["layers"]],
            ["plan", f"{report['megabytes']:.1f} MB, built in {report['seconds']:.0f} s"],
            ["parity, 1st-percentile patch cosine", report.get("parity", {}).get("cosine_p1", "not checked")],
        ],
    )
    for line in [*report["short"], *report.get("missed", [])]:
        result.say(f"Missed: {line}.")
    result.say(
        f"{'It was there already' if report['cached'] else 'Wrote'}: {report['engine']}. Next: phreg-deploy profile {request.bundle} --backend tensorrt"
    )
    return report


def tried_bisection(bundle: Path, backend: str, device: int, result: Result, **how: Any) -> dict[str, Any]:
    """``show_bisection``, whose own failure must not hide the one that it is to explain."""
    try:
        return show_bisection(bundle, backend, device, result, **how)
    except PhregError as why:
        result.say(f"Not bisected: {why}")
        return {"skipped": str(why)}


def show_bisection(
    bundle: Path, backend: str, device: int, result: Result, tuning: BackendOptions | None = None, **how: Any
) -> dict[str, Any]:
    """Find where a backend's answers diverge from FP32, and print it; ``how`` see ``bisect``."""
    from phreg_deploy.bundle.bundle import Bundle
    from phreg_deploy.runtime.backends.options import BackendOptions as Plain
    from phreg_deploy.verify.bisection import bisect

    found = bisect(Bundle.read(bundle), backend, tuning or Plain(), device=device, **how).to_json()
    result.table(
        f"{bundle} on {backend} against FP32, after each half-block",
        ["after", "cosine p1", "relative L2", "not finite", "largest in FP32"],
        [
            [s["place"], f"{s['cosine_p1']:.8f}", f"{s['relative_l2']:.1e}", s["bad_values"], s["largest"]]
            for s in found["steps"]
        ],
    )
    if found["first"] is None:
        result.say("No half-block diverges beyond the gate.")
    else:
        result.say(
            f"The first that diverges is {found['first']}. Keep it in FP32: export or calibrate again with {found['proposal']}"
        )
    return found
