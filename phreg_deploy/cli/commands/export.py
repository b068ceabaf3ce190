"""``export``: write a student or a timm model as a bundle."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import click

from phreg_deploy.arguments import EIGHT_BITS, check_export, check_model
from phreg_deploy.bundle.bundle import Bundle, is_bundle
from phreg_deploy.cli.commands.build import run_build
from phreg_deploy.cli.console import Result
from phreg_deploy.cli.heads import SOURCES, check_head_options, head_options, read_heads
from phreg_deploy.cli.options import (
    checkpoint_option,
    device_number,
    force_option,
    images_option,
    output_options,
    public_key_option,
    readout_options,
    verify_first,
)
from phreg_deploy.cli.serving.triton import FORMAT, export_repository, triton_options
from phreg_deploy.cli.tables.calibrate import show_calibration
from phreg_deploy.cli.tables.export import show_bundle, show_parity
from phreg_deploy.errors import BackendMissing, GateFailed, PhregError
from phreg_deploy.extras import CALIBRATION, EXPORT, require
from phreg_deploy.files.atomic import check_target
from phreg_deploy.files.temporary import folder_beside
from phreg_deploy.images.photographs import list_images
from phreg_deploy.layers import check_layers
from phreg_deploy.student_record import model_path, read_readout

HEAD_OPTIONS = (*SOURCES, "upsample", "stride", "labels", "only_head")


@click.command()
@click.argument("model")
@click.option("-o", "--output", type=click.Path(path_type=Path), required=True, help="Folder of the bundle to write.")
@click.option(
    "--format",
    "formats",
    multiple=True,
    type=click.Choice(["onnx", "trt", FORMAT]),
    default=("onnx",),
    show_default=True,
    help="Repeatable.",
)
@checkpoint_option
@public_key_option
@click.option(
    "--precision", default="fp32", show_default=True, help="fp32, fp16, bf16, or int8 and fp8, which need --images."
)
@images_option(
    False,
    "Photographs like those of the deployment: int8 and fp8 are calibrated on them; with fp16 they show which values "
    "are too large for it.",
)
@click.option(
    "--keep-fp32",
    "keep_fp32",
    multiple=True,
    metavar="REGEX",
    help="Nodes that stay in FP32, e.g. 'blocks.11.mlp'. Repeatable.",
)
@click.option("--target", default="cpu", show_default=True, help="With --precision int8: cpu, or trt (no zero points).")
@click.option(
    "--image-size", help="518, 480x640, a list 224,480x640 or a range 224:518:1036; by default the model's own."
)
@click.option("--batch", default="1", show_default=True, help="One batch size, or a range 1:4:8.")
@click.option(
    "--crop",
    type=click.Choice(["squash", "center"]),
    default="squash",
    show_default=True,
    help="Resize the whole image, or use timm's centre crop.",
)
@click.option(
    "--layers",
    metavar="LIST",
    help="Serve further layers: numbers of blocks 3,6,9,12 (12 is the last of 12), fractions 1/4,1/2,3/4,1, or all.",
)
@click.option(
    "--layer-norm/--no-layer-norm",
    default=True,
    show_default=True,
    help="Apply the model's final norm to the features of --layers.",
)
@click.option(
    "--attention", is_flag=True, help="Serve the class token's attention over the patches in the last block too."
)
@readout_options("the student's")
@head_options
@click.option(
    "--random-weights", is_flag=True, help="Load no pretrained weights, for timing only; the manifest says so."
)
@click.option("--no-check", is_flag=True, help="Skip the parity check of the written bundle.")
@triton_options
@click.option("--bisect", is_flag=True, help="With --format trt: if parity fails, find the first block that diverges.")
@device_number
@force_option
@output_options
def export(
    output: Path,
    formats: tuple[str, ...],
    target: str,
    no_check: bool,
    bisect: bool,
    device: int,
    public_key: Path | None,
    as_json: bool,
    quiet: bool,
    **options: Any,
) -> None:
    """Write MODEL (a student's folder, or a timm name) as a bundle that is served without PyTorch.

    With --format triton, OUTPUT is a model repository for NVIDIA's Triton Inference Server, and MODEL may be a bundle.

    With --format trt, `phreg-deploy build` follows. Without a GPU and TensorRT the bundle is still written; the exit
    code is then 4, and the message is the command for the machine that has them.

    \b
    Examples:
      phreg-deploy export student -o student.bundle --format trt --precision fp16
      phreg-deploy export student -o student.bundle --format onnx --image-size 480x640 --batch 1:4:8
      phreg-deploy export vit_base_patch14_dinov2.lvd142m -o dino.bundle --layers 1/4,1/2,3/4,1 --attention
      phreg-deploy export vit_base_patch14_dinov2.lvd142m -o dino.bundle --image-size 224:518:1036 --precision fp16
      phreg-deploy export vit_base_patch16_clip_quickgelu_224.openai -o clip.bundle --readout value --project
      phreg-deploy export student.bundle --format triton -o models
    """
    result = Result(as_json, quiet)
    verify_first(options["model"].removeprefix("local-dir:"), public_key)
    if FORMAT in formats:
        if len(formats) > 1:
            raise PhregError("export: --format triton goes alone; export a bundle first, and give it as MODEL.")
        if not is_bundle(options["model"]):
            _check(output, target, options)

        def export_bundle(folder: Path, changed: dict[str, Any]) -> dict[str, Any]:
            return _write(folder, (), target, no_check, changed, result)

        export_repository(output, options, result, export_bundle)
        return
    _check(output, target, options)
    document = {"output": output, **_write(output, formats, target, no_check, options, result)}
    if "trt" in formats:
        document["engine"] = _build(output, result, bisect=bisect, device=device, check=not no_check)
    result.json(document)


def _write(
    output: Path, formats: tuple[str, ...], target: str, no_check: bool, options: dict[str, Any], result: Result
) -> dict[str, Any]:
    """Write the bundle, and check it unless ``no_check``; return the document of ``--json``."""
    options = {name: value for name, value in options.items() if name not in ("triton_backend", "instances")}
    document: dict[str, Any] = {}
    if options["precision"] in EIGHT_BITS:
        target = "trt" if "trt" in formats or options["precision"] == "fp8" else target
        document["calibration"] = _export_eight_bits(output, target, options, result)
    else:
        _export(output, options, result)
    bundle = Bundle.read(output)
    show_bundle(bundle, result)
    document["manifest"] = bundle.manifest.to_json()
    if not no_check:
        document["check"] = examine(output, result)
        if document["check"].get("missed"):
            missed = "; ".join(document["check"]["missed"])
            raise GateFailed(f"parity: {output}: {missed}.", {"output": output, **document})
    return document


def _check(output: Path, target: str, options: dict[str, Any]) -> None:
    """Check the options before anything slow is imported."""
    precision, images, model, checkpoint = (options[name] for name in ("precision", "images", "model", "checkpoint"))
    check_export(precision, options["keep_fp32"], images, options["image_size"], options["batch"], target)
    check_layers(options["layers"], options["layer_norm"])
    check_head_options(*(options[name] for name in HEAD_OPTIONS))
    if options["only_head"] and options["attention"]:
        raise PhregError("only-head: got --attention with --only-head, which serves heads alone; expected one of them.")
    check_model(model, checkpoint, options["random_weights"])
    read_readout(model, options["readout"], options["project"], options["random_weights"])
    if images is not None:
        list_images(images)
    check_target(output, options["force"], [model_path(model), checkpoint, images])
    calibration = {"calibration": CALIBRATION} if precision in EIGHT_BITS else {}
    require("`phreg-deploy export`", export=EXPORT, **calibration)


def _export(output: Path, options: dict[str, Any], result: Result) -> None:
    """Export to ``output``; with heads, to a temporary folder beside it first."""
    from phreg_deploy.export import export as export_model

    own = {name: options[name] for name in options if name not in HEAD_OPTIONS}
    if not options["heads"] and not options["classes"]:
        export_model(output=output, progress=result.progress, **own)
        return
    from phreg_deploy.heads import attach

    how = {name: options[name] for name in HEAD_OPTIONS if name not in SOURCES}
    with folder_beside(output) as folder:
        plain = folder / "plain.bundle"
        export_model(output=plain, progress=result.progress, **own)
        attach(plain, read_heads(*(options[name] for name in SOURCES)), output, **how, force=options["force"])


def _export_eight_bits(output: Path, target: str, options: dict[str, Any], result: Result) -> dict[str, Any]:
    """Export an FP32 bundle to a temporary folder beside the output, and calibrate it into the output."""
    from phreg_deploy.calibration import CalibrationRequest, calibrate

    force, images = options["force"], options["images"]
    settings: dict[str, Any] = {"mode": options["precision"], "target": target, "keep": options["keep_fp32"]}
    CalibrationRequest(output, images, **settings)  # refuses bad ones before a minute of tracing
    with folder_beside(output) as folder:
        full, whole = folder / "fp32.bundle", output
        plain = {"precision": "fp32", "images": None, "keep_fp32": (), "force": False, "only_head": False}
        _export(full, {**options, **plain}, result)
        if options["only_head"]:
            whole = folder / "eight-bits.bundle"
        report = calibrate(full, images, whole, **settings, force=force, progress=result.progress)
        if options["only_head"]:
            from phreg_deploy.heads import attach

            attach(whole, {}, output, only_head=True, force=force)
            report = replace(report, output=output)
    show_calibration(report, result)
    return report.to_json()


def _build(output: Path, result: Result, **options: Any) -> dict[str, Any]:
    """Build the engine; where that is not possible, name the command for the machine with the GPU."""
    try:
        return run_build(output, result, **options).to_json()
    except BackendMissing as error:
        raise BackendMissing(
            f"{error} The bundle is written and checked; only its engine is missing. Copy {output} to the machine with "
            f"the GPU and run there: phreg-deploy build {output.name}",
            {"bundle": str(output)},
        ) from None


def examine(output: Path, result: Result) -> dict[str, Any]:
    """Compare the written bundle's answers with its exam, if a runtime is installed."""
    from phreg_deploy.runtime.features import FeatureExtractor
    from phreg_deploy.runtime.parity import judge_exam, verdict

    try:
        extractor = FeatureExtractor.load(output, examine=False)
    except BackendMissing as error:
        result.say(f"Parity was not checked: {error}")
        return {"skipped": str(error)}
    except PhregError as error:
        raise GateFailed(f"export: the written bundle does not load: {error}") from error
    with extractor:
        parity, gates = judge_exam(extractor.bundle, extractor.run, extractor.backend, extractor.compute)
        show_parity(parity, extractor, result)
        return {"backend": extractor.backend, **verdict(parity, gates)}
