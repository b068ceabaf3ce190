"""``distill`` and ``export``: the commands that need PyTorch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from phreg_deploy.cli.options import (
    Result,
    checkpoint_option,
    device_option,
    force_option,
    images_option,
    output_options,
    percent,
)
from phreg_deploy.errors import BackendMissing, GateFailed, PhregError


@click.command()
@click.argument("model")
@images_option(True, "Folder of photographs, no labels needed; a thousand are enough.")
@click.option("-o", "--output", type=click.Path(path_type=Path), required=True, help="Folder of the student to write.")
@checkpoint_option
@click.option(
    "--recipe",
    default="transplant",
    show_default=True,
    help="transplant (register neurons moved, then all weights) or ph-reg (the paper).",
)
@click.option("--registers", default=4, show_default=True, help="Register tokens to add; 0 is the control without.")
@click.option("--image-size", help="e.g. 518 or 480x640; by default the model's own.")
@click.option("--epochs", type=int, help="0 gives the training-free student; by default the recipe's.")
@click.option("--batch", type=int, help="Images per step; by default the recipe's.")
@click.option("--lr", type=float, help="Peak learning rate; by default the recipe's.")
@click.option("--unlock", type=click.Choice(["all", "paper"]), help="Weights that train; by default the recipe's.")
@click.option(
    "--strength", type=float, help="Activation of a transplanted neuron, as a share of what it had on outlier tokens."
)
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

    \b
    Example:
      phreg-deploy distill vit_tiny_patch16_224.augreg_in21k_ft_in1k --checkpoint vit.safetensors --images photos/ -o student
    """
    from phreg_deploy.distill.distillation import Request
    from phreg_deploy.distill.distillation import distill as run
    from phreg_deploy.spec import parse_size

    result = Result(as_json, quiet)
    chosen = {key: value for key, value in settings.items() if value is not None}
    request = Request(model=model, images=images, image_size=parse_size(image_size) if image_size else None, **chosen)
    record = run(request, output, cache=cache, resume=resume, force=force, progress=result.progress)
    scores = record["scores"]
    rows = [
        ["norm-outlier rate", *(percent(scores[m]["norm_outliers"]["rate"]) for m in ("base", "student"))],
        ["largest norm / median", *(scores[m]["norm_outliers"]["largest"] for m in ("base", "student"))],
        [
            "worst block's largest norm / median",
            *(max(b["largest"] for b in scores[m]["blocks"]) for m in ("base", "student")),
        ],
        ["cosine to denoised target, mean", *(scores[m]["fidelity"]["mean"] for m in ("base", "student"))],
        ["    1st percentile", *(scores[m]["fidelity"]["p1"] for m in ("base", "student"))],
        ["    over the base's outlier tokens", *(scores[m]["fidelity"]["outliers"] for m in ("base", "student"))],
        ["class token cosine", "1", scores.get("class_cosine")],
        ["top-1 agreement", "1", scores.get("top1_agreement")],
    ]
    kind = "held-out" if record["images"]["held_out"] else "training"
    result.table(f"Base and student on {scores['images']} {kind} images", ["", "base", "student"], rows)
    result.say(
        f"Wrote {output} in {record['seconds']['total']:.0f} s. Next: phreg-deploy export {output} -o {output}.bundle --format onnx"
    )
    result.json({"output": output, **record})


@click.command()
@click.argument("model")
@click.option("-o", "--output", type=click.Path(path_type=Path), required=True, help="Folder of the bundle to write.")
@click.option(
    "--format",
    "formats",
    multiple=True,
    type=click.Choice(["onnx", "trt"]),
    default=("onnx",),
    show_default=True,
    help="Repeatable.",
)
@checkpoint_option
@click.option("--precision", default="fp32", show_default=True, help="fp32 or fp16.")
@click.option(
    "--image-size", help="518, 480x640, a list 224,480x640 or a range 224:518:1036; by default the model's own."
)
@click.option("--batch", default="1", show_default=True, help="One batch size, or a range 1:4:8.")
@click.option(
    "--crop",
    type=click.Choice(["squash", "center"]),
    default="squash",
    show_default=True,
    help="The whole image resized, or timm's centre crop.",
)
@click.option(
    "--random-weights", is_flag=True, help="Without pretrained weights, for timing only; marked so in the manifest."
)
@click.option("--no-check", is_flag=True, help="Skip the parity check of the written bundle.")
@force_option
@output_options
def export(
    output: Path, formats: tuple[str, ...], no_check: bool, force: bool, as_json: bool, quiet: bool, **settings: Any
) -> None:
    """Write MODEL (a student's folder, or a timm name) as a bundle that a runtime without PyTorch serves.

    \b
    Examples:
      phreg-deploy export student -o student.bundle --format onnx --image-size 480x640 --batch 1:4:8
      phreg-deploy export vit_base_patch14_dinov2.lvd142m -o dino.bundle --image-size 224:518:1036 --precision fp16
    """
    from phreg_deploy.export.exporter import ExportRequest, export_bundle

    if "trt" in formats:
        raise BackendMissing(
            "export: --format trt is not in this version. Use --format onnx; the bundle's model.onnx is what an engine is built from."
        )
    result = Result(as_json, quiet)
    bundle = export_bundle(ExportRequest(**settings), output, force=force, progress=result.progress)
    manifest = bundle.manifest
    size = sum(p.stat().st_size for p in bundle.folder.iterdir()) / 2**20
    result.say(f"Wrote {output}: {manifest.precision}, {manifest.sizes}, batch {manifest.batches}, {size:.1f} MB.")
    document: dict[str, Any] = {"output": output, "manifest": manifest.to_json()}
    if not no_check:
        document["check"] = _examine(output, result)
    if document.get("check", {}).get("missed"):
        raise GateFailed(f"parity: {output}: {'; '.join(document['check']['missed'])}.", document)
    result.json(document)


def _examine(output: Path, result: Result) -> dict[str, Any]:
    """The written bundle against its own reference, where a runtime is installed."""
    from phreg_deploy.runtime.features import FeatureExtractor
    from phreg_deploy.runtime.parity import check_reference, judge, worst

    try:
        extractor = FeatureExtractor.load(output)
    except BackendMissing as error:
        result.say(f"Parity was not checked: {error}")
        return {"skipped": str(error)}
    except PhregError as error:
        raise GateFailed(f"export: the written bundle does not load: {error}") from error
    with extractor:
        parity = worst([case["parity"] for case in check_reference(extractor)])
        result.say(
            f"Parity with PyTorch on {extractor.backend}: 1st-percentile patch cosine {parity.cosine_p1:.8f}, relative L2 {parity.relative_l2:.2e}."
        )
        return {
            "backend": extractor.backend,
            "parity": parity.to_json(),
            "missed": judge(parity, extractor.manifest.precision, exam=True),
        }
