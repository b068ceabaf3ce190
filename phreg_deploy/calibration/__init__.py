"""Calibrate an FP32 bundle to INT8 or FP8 on images. Needs no PyTorch, and imports onnx only in the call."""

from __future__ import annotations

from pathlib import Path

from phreg_deploy.bundle.bundle import Bundle
from phreg_deploy.calibration.report import CalibrationReport
from phreg_deploy.calibration.request import CalibrationRequest
from phreg_deploy.extras import CALIBRATION, require
from phreg_deploy.files.atomic import check_target
from phreg_deploy.images.photographs import list_images
from phreg_deploy.progress import SILENT, Progress
from phreg_deploy.quantisation import Smoothing

__all__ = ["CalibrationReport", "CalibrationRequest", "calibrate"]


def calibrate(
    bundle: Path | str,
    images: Path | str,
    output: Path | str,
    *,
    mode: str = "int8",
    target: str | None = None,
    float_macs: float = 0.1,
    cosine_p1: float | None = None,
    smoothing: Smoothing | None = None,
    keep: tuple[str, ...] = (),
    force: bool = False,
    progress: Progress = SILENT,
) -> CalibrationReport:
    """Write an INT8 or FP8 bundle to ``output``, and report how close its features are to FP32.

    Args:
        bundle: folder of the FP32 bundle.
        images: folder of photographs like those of the deployment; at least 8, at most 352 are used.
        mode: "int8" or "fp8".
        target: "cpu" (ONNX Runtime, OpenVINO) or "trt" (TensorRT); by default "trt" for FP8, otherwise "cpu".
        float_macs: share of the linear layers' multiply-accumulates that may stay in float, 0 to 1.
        cosine_p1: least 1st-percentile patch cosine; by default the mode's own.
        smoothing: a fixed setting; by default INT8's is chosen on the images.
        keep: with target "trt", regular expressions on the names of nodes that stay in FP32.
        force: replace an existing output, and write the bundle even if it misses a bar; its manifest says so.

    Raises:
        PhregError: bad input, or an INT8 layer that would run in float.
        BackendMissing: onnx, onnxruntime or ml_dtypes is not installed.
        GateFailed: the features miss a bar and ``force`` is not set; nothing is written.
    """
    bundle, images, output = Path(bundle), Path(images), Path(output)
    target = target or ("trt" if mode == "fp8" else "cpu")
    request = CalibrationRequest(bundle, images, mode, target, float_macs, cosine_p1, smoothing, keep)
    list_images(images)
    check_target(output, force, [bundle, images])
    require("phreg_deploy.calibration", calibration=CALIBRATION)
    advice = "Calibrate the bundle that has features too, then take them out: `phreg-deploy attach INT8 --only-head`."
    Bundle.read(bundle).manifest.need_features("calibrate", advice)
    from phreg_deploy.calibration.calibrator import run_calibration

    return run_calibration(request, output, force, progress)
