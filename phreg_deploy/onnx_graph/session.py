"""Open ONNX Runtime sessions on graphs in memory."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from onnx import ModelProto

from phreg_deploy.errors import BackendMissing, PhregError
from phreg_deploy.extras import CALIBRATION, require
from phreg_deploy.runtime.backends.instructions import EXACT

require("phreg_deploy.calibration", calibration=CALIBRATION)
try:
    import onnxruntime
except ImportError as error:
    raise BackendMissing(
        f"phreg_deploy.calibration: onnxruntime cannot be imported ({error}). Reinstall it: "
        "pip install --force-reinstall onnxruntime"
    ) from None

VERSION: str = onnxruntime.__version__


def open_session(model: ModelProto, optimized: Path | None = None, literal: bool = False) -> Any:
    """Open a CPU session of ``model`` that computes INT8 exactly on every processor.

    Args:
        optimized: file to write the optimized graph to.
        literal: compute every Q/DQ at its place, as graphs for TensorRT need: ONNX Runtime would move FP8 tensors
            through operators that it has no FP8 kernels for.

    Raises:
        PhregError: ONNX Runtime refuses the graph.
    """
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.add_session_config_entry(*EXACT)
    # The arena never shrinks: 1 GB for ViT-B at 518 px.
    options.enable_cpu_mem_arena = False
    if literal:
        options.add_session_config_entry("session.disable_quant_qdq", "1")
    if optimized is not None:
        options.optimized_model_filepath = str(optimized)
    try:
        return onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    # The binding's exceptions share no base but Exception.
    except Exception as error:
        reason = str(error).splitlines()[0]
        raise PhregError(f"calibrate: ONNX Runtime {VERSION} cannot load the graph: {reason}") from None
