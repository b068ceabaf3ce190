"""Export a model as a bundle, and build the bundle's TensorRT plan.

``export`` needs the extra ``export`` (torch, timm, onnx, onnxscript). ``build`` needs the extra ``trt`` and a GPU.
Importing this module imports none of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from phreg_deploy.progress import SILENT, Progress

if TYPE_CHECKING:
    from phreg_deploy.bundle.bundle import Bundle
    from phreg_deploy.export.engine.report import BuildReport

__all__ = ["build", "export"]


def export(
    model: str,
    output: Path | str,
    *,
    checkpoint: Path | None = None,
    precision: str = "fp32",
    image_size: str | None = None,
    batch: str = "1",
    crop: str = "squash",
    images: Path | None = None,
    keep_fp32: Sequence[str] = (),
    layers: str | None = None,
    layer_norm: bool = True,
    attention: bool = False,
    readout: str | None = None,
    project: bool | None = None,
    random_weights: bool = False,
    force: bool = False,
    progress: Progress = SILENT,
) -> Bundle:
    """Write a model as a bundle: an ONNX graph, its manifest, and an exam with the answers of PyTorch.

    Args:
        model: a timm name, or the folder of a student.
        output: the folder to write.
        checkpoint: weights for a timm name, ``.safetensors`` or ``.pth``.
        precision: "fp32", "fp16" or "bf16". For 8 bits, calibrate an fp32 bundle.
        image_size: "518", "480x640" (height x width), a list "224,480x640" or a range "224:518:1036"; None for the
            model's own size.
        batch: "1", or a range "1:4:8" (lowest, best, highest).
        crop: "squash" resizes the whole image, "center" is timm's centre crop.
        images: folder of photographs; values on them decide what stays in FP32 with "fp16".
        keep_fp32: regular expressions; nodes with matching names stay in FP32.
        layers: further layers to serve, by numbers of blocks "3,6,9,12" (12: the last of 12), fractions "1/4,1/2,3/4,1"
            or "all"; adds the outputs ``features.3``, ``token_norm.3`` and, with a class token, ``cls.3``.
        layer_norm: apply the model's final norm to their features and class tokens, as DINOv2's heads expect.
        attention: add the output ``attention`` ``(B, heads, Hp, Wp)``, the class token's in the last block.
        readout: "final", "value" or "neighbour" (``phreg_deploy.readout``); None for what a student was distilled for,
            else "final".
        project: serve features in the space of text, of a CLIP; None as for ``readout``.
        random_weights: do not load pretrained weights; for timing only.
        force: replace an output that exists.

    Raises:
        BackendMissing: the extra ``export`` is not installed.
        PhregError: bad input, an output that exists, a size that is not a multiple of the patch, a layer that the model
            lacks, ``attention`` of a model without class token, or ``project`` of a model without projection.
    """
    from phreg_deploy.arguments import EIGHT_BITS, FLOATS, check_export, check_model
    from phreg_deploy.errors import PhregError
    from phreg_deploy.files.atomic import check_target
    from phreg_deploy.layers import check_layers
    from phreg_deploy.student_record import model_path, read_readout

    if precision in EIGHT_BITS:
        raise PhregError(
            f"precision: got {precision}, which `phreg-deploy calibrate` makes from an fp32 bundle; expected "
            f"{', '.join(FLOATS)}."
        )
    check_export(precision, tuple(keep_fp32), images, image_size, batch)
    check_layers(layers, layer_norm)
    check_model(model, checkpoint, random_weights)
    asked = read_readout(model, readout, project, random_weights)
    asked.check_outputs((), 0, attention)
    check_target(Path(output), force, [model_path(model), checkpoint, images])
    from phreg_deploy.export.exporter import ExportRequest, export_bundle

    request = ExportRequest(
        model,
        checkpoint,
        precision,
        image_size,
        batch,
        crop,
        random_weights,
        images,
        tuple(keep_fp32),
        layers,
        layer_norm,
        attention,
        asked,
    )
    return export_bundle(request, Path(output), force=force, progress=progress)


def build(
    bundle: Path | str,
    *,
    device: int = 0,
    tf32: bool = False,
    compatibility: str = "none",
    effort: int = 3,
    workspace: int | None = None,
    timing_cache: Path | None = None,
    check: bool = True,
    strict: bool = False,
    force: bool = False,
    progress: Progress = SILENT,
) -> BuildReport:
    """Build the TensorRT plan of a bundle for this machine's GPU, unless the bundle holds it already.

    The saved plan is read back, its layers are counted, and its answers are compared with the bundle's exam. A plan
    that fails is removed.

    Args:
        bundle: a folder that ``export`` or ``calibrate`` wrote.
        device: number of the GPU.
        tf32: compute FP32 products in TensorFloat-32: faster, and it fails the FP32 gates.
        compatibility: "none", "version" (later TensorRT), "ampere+" or "same-cc" (other GPUs); each is slower.
        effort: TensorRT's builder optimization level, 0 to 5.
        workspace: MiB of device memory that tactics may use at most; None for the whole device.
        timing_cache: file to read and write; None for one in the bundle.
        check: compare the answers with the exam.
        strict: refuse a plan with fewer fused attentions or 8-bit layers than expected, and one whose layers TensorRT's
            inspector does not show; otherwise ``shortfalls`` and ``doubts`` of the report name them.
        force: build again if the plan is there; also keep a plan that misses a gate.

    Raises:
        BackendMissing: there is no TensorRT or no GPU here.
        GateFailed: the answers miss a gate, or with ``strict`` the layers are not as expected.
        PhregError: a bad bundle or argument, or TensorRT refuses the graph; the message names the node.
    """
    from phreg_deploy.bundle.plan_keys import BuildSettings

    settings = BuildSettings(tf32, compatibility, effort)
    from phreg_deploy.export.engine.build import BuildRequest, build_engine

    request = BuildRequest(Path(bundle), settings, device, workspace, timing_cache, check, strict)
    return build_engine(request, force=force, progress=progress)
