"""``distill`` and ``export``: the commands that need PyTorch."""

from __future__ import annotations

import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import click

from phreg_deploy.arguments import EIGHT_BITS, check_distillation, check_export, check_model, check_resume
from phreg_deploy.bundle import Bundle
from phreg_deploy.cli.eight import run_calibration
from phreg_deploy.cli.options import (
    Result,
    checkpoint_option,
    device_number,
    devices_option,
    force_option,
    images_option,
    output_options,
)
from phreg_deploy.cli.scores import show_scores
from phreg_deploy.errors import BackendMissing, GateFailed, PhregError
from phreg_deploy.extras import CALIBRATION, DISTILL, EXPORT, require
from phreg_deploy.photographs import list_images
from phreg_deploy.record import model_path
from phreg_deploy.spec import parse_size
from phreg_deploy.whole import check_target


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
@click.option("--micro-batch", type=int, help="Images per forward and backward pass, for less memory; by default all.")
@click.option("--grad-checkpointing", is_flag=True, help="Recompute each block in the backward pass, for less memory.")
@click.option("--lr", type=float, help="Peak learning rate; by default the recipe's.")
@click.option("--unlock", type=click.Choice(["all", "paper"]), help="Weights that train; by default the recipe's.")
@click.option(
    "--strength", type=float, help="Activation of a transplanted neuron, as a share of what it had on outlier tokens."
)
@click.option("--int8-aware", is_flag=True, help="Distil through fake quantisation, the one that `calibrate` writes.")
@click.option("--views", default=10, show_default=True, help="Shifted and flipped views per teacher target.")
@click.option("--holdout", default=0.1, show_default=True, help="Share of the images, chosen by name, kept for scores.")
@click.option("--seed", default=0, show_default=True, type=click.IntRange(0, 2**32 - 1))
@devices_option
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
@click.option(
    "--precision", default="fp32", show_default=True, help="fp32, fp16, bf16, or int8 and fp8, which need --images."
)
@images_option(
    False,
    "Photographs like those of the deployment: int8 and fp8 are calibrated on them; they show what FP16 cannot hold.",
)
@click.option(
    "--keep-fp32",
    "keep",
    multiple=True,
    metavar="REGEX",
    help="Nodes that stay in FP32, e.g. 'blocks.11.mlp'. Repeatable.",
)
@click.option("--target", default="cpu", show_default=True, help="For --precision int8: cpu, or trt (no zero points).")
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
@click.option(
    "--bisect", is_flag=True, help="With --format trt: where parity fails, find the first block that diverges."
)
@device_number
@force_option
@output_options
def export(
    output: Path,
    formats: tuple[str, ...],
    images: Path | None,
    target: str,
    keep: tuple[str, ...],
    no_check: bool,
    bisect: bool,
    device: int,
    force: bool,
    as_json: bool,
    quiet: bool,
    **settings: Any,
) -> None:
    """Write MODEL (a student's folder, or a timm name) as a bundle that a runtime without PyTorch serves.

    --format trt goes on to `phreg-deploy build`. Without a GPU and TensorRT the bundle is written all the same, and the
    exit code is 4 with the command for the machine that has them.

    \b
    Examples:
      phreg-deploy export student -o student.bundle --format trt --precision fp16
      phreg-deploy export student -o student.bundle --format onnx --image-size 480x640 --batch 1:4:8
      phreg-deploy export vit_base_patch14_dinov2.lvd142m -o dino.bundle --image-size 224:518:1036 --precision fp16
    """
    result = Result(as_json, quiet)
    eight = settings["precision"] in EIGHT_BITS
    check_export(settings["precision"], keep, images, settings["image_size"], settings["batch"], target)
    check_model(settings["model"], settings["checkpoint"], settings["random_weights"])
    if images is not None:
        list_images(images)
    check_target(output, force, [model_path(settings["model"]), settings["checkpoint"], images])
    require("`phreg-deploy export`", export=EXPORT, **({"calibration": CALIBRATION} if eight else {}))
    from phreg_deploy.export.exporter import ExportRequest, export_bundle

    document: dict[str, Any] = {"output": output}
    if eight:
        assert images is not None  # check_export refused it
        target = "trt" if "trt" in formats or settings["precision"] == "fp8" else target
        document["calibration"] = _in_eight_bits(settings, images, output, target, keep, force, result)
        bundle = Bundle.read(output)
    else:
        request = ExportRequest(images=images, keep=keep, **settings)
        bundle = export_bundle(request, output, force=force, progress=result.progress)
    manifest = bundle.manifest
    size = sum(p.stat().st_size for p in bundle.folder.iterdir()) / 2**20
    result.say(f"Wrote {output}: {manifest.precision}, {manifest.sizes}, batch {manifest.batches}, {size:.1f} MB.")
    document["manifest"] = manifest.to_json()
    if not no_check:
        document["check"] = _examine(output, result)
    if document.get("check", {}).get("missed"):
        raise GateFailed(f"parity: {output}: {'; '.join(document['check']['missed'])}.", document)
    if "trt" in formats:
        from phreg_deploy.cli.build import run_build
        from phreg_deploy.export.engine import BuildRequest

        document["engine"] = run_build(
            BuildRequest(output, device=device, check=not no_check), False, bisect, result, exported=True
        )
    result.json(document)


def _in_eight_bits(
    settings: dict[str, Any],
    images: Path,
    output: Path,
    target: str,
    keep: tuple[str, ...],
    force: bool,
    result: Result,
) -> dict[str, Any]:
    """``export --precision int8`` or fp8: an FP32 bundle beside the output, calibrated into it, and gone again."""
    from phreg_deploy.calibration.calibrator import CalibrationRequest, check_request
    from phreg_deploy.export.exporter import ExportRequest, export_bundle

    asked = CalibrationRequest(
        output, images, mode=settings["precision"], target=target, keep=keep
    )  # checked before a minute of tracing
    check_request(asked)
    with tempfile.TemporaryDirectory(dir=output.parent, prefix=f".{output.name}.") as folder:
        full = Path(folder) / "fp32.bundle"
        export_bundle(ExportRequest(**{**settings, "precision": "fp32"}), full, progress=result.progress)
        return run_calibration(replace(asked, bundle=full), output, force, result)


def _examine(output: Path, result: Result) -> dict[str, Any]:
    """The written bundle against its own reference, where a runtime is installed."""
    from phreg_deploy.runtime.features import FeatureExtractor
    from phreg_deploy.runtime.parity import check_reference, gates_of, verdict, worst, writes_exams

    try:
        extractor = FeatureExtractor.load(output, examine=False)
    except BackendMissing as error:
        result.say(f"Parity was not checked: {error}")
        return {"skipped": str(error)}
    except PhregError as error:
        raise GateFailed(f"export: the written bundle does not load: {error}") from error
    with extractor:
        parity = worst([case["parity"] for case in check_reference(extractor)])
        other = "PyTorch" if extractor.manifest.quantisation is None else "ONNX Runtime's INT8"
        result.say(
            f"Parity with {other} on {extractor.backend}: 1st-percentile patch cosine {parity.cosine_p1:.8f}, relative L2 {parity.relative_l2:.2e}."
        )
        gates = gates_of(parity, extractor.precision, exam=True, again=writes_exams(extractor))
        return {"backend": extractor.backend, **verdict(parity, gates)}
