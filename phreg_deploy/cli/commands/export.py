"""``export``: a student or a timm model as a bundle."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import click

from phreg_deploy.arguments import EIGHT_BITS, check_export, check_model
from phreg_deploy.bundle.bundle import Bundle
from phreg_deploy.cli.console import Result
from phreg_deploy.cli.options import (
    checkpoint_option,
    device_number,
    force_option,
    images_option,
    output_options,
)
from phreg_deploy.cli.tables.calibrate import show_calibration
from phreg_deploy.errors import BackendMissing, GateFailed, PhregError
from phreg_deploy.extras import CALIBRATION, EXPORT, require
from phreg_deploy.files.atomic import check_target
from phreg_deploy.images.photographs import list_images
from phreg_deploy.student_record import model_path


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
        from phreg_deploy.cli.commands.build import run_build
        from phreg_deploy.export.engine.build import BuildRequest

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
    from phreg_deploy.calibration import CalibrationRequest, calibrate
    from phreg_deploy.export.exporter import ExportRequest, export_bundle

    options: dict[str, Any] = {"mode": settings["precision"], "target": target, "keep": keep}
    CalibrationRequest(output, images, **options)  # checks them before a minute of tracing
    with tempfile.TemporaryDirectory(dir=output.parent, prefix=f".{output.name}.") as folder:
        full = Path(folder) / "fp32.bundle"
        export_bundle(ExportRequest(**{**settings, "precision": "fp32"}), full, progress=result.progress)
        report = calibrate(full, images, output, **options, force=force, progress=result.progress)
    show_calibration(report, result)
    return report.to_json()


def _examine(output: Path, result: Result) -> dict[str, Any]:
    """The written bundle against its own reference, where a runtime is installed."""
    from phreg_deploy.runtime.features import FeatureExtractor
    from phreg_deploy.runtime.parity import gates_of, run_exam, verdict, worst, writes_exams

    try:
        extractor = FeatureExtractor.load(output, examine=False)
    except BackendMissing as error:
        result.say(f"Parity was not checked: {error}")
        return {"skipped": str(error)}
    except PhregError as error:
        raise GateFailed(f"export: the written bundle does not load: {error}") from error
    with extractor:
        parity = worst([case.parity for case in run_exam(extractor.bundle, extractor.run)])
        other = "PyTorch" if extractor.manifest.quantisation is None else "ONNX Runtime's INT8"
        result.say(
            f"Parity with {other} on {extractor.backend}: 1st-percentile patch cosine {parity.cosine_p1:.8f}, relative L2 {parity.relative_l2:.2e}."
        )
        gates = gates_of(
            parity, extractor.precision, exam=True, again=writes_exams(extractor.manifest, extractor.backend)
        )
        return {"backend": extractor.backend, **verdict(parity, gates)}
