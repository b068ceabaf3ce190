"""ONNX Runtime sessions on graphs that are in memory."""

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
        f"phreg_deploy.calibration: onnxruntime cannot be imported ({error}). Reinstall it: pip install --force-reinstall onnxruntime"
    ) from None

VERSION: str = onnxruntime.__version__


def open_session(model: ModelProto, optimized: Path | None = None, literal: bool = False) -> Any:
    """A CPU session of ``model``, exact on every processor; its optimized graph is written to ``optimized`` where asked.

    Args:
        literal: compute every Q/DQ where it stands. It is how graphs for TensorRT are emulated: ONNX Runtime would move
            FP8 tensors through operators that it has no FP8 kernels for.

    Raises:
        PhregError: ONNX Runtime refuses the graph.
    """
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.add_session_config_entry(*EXACT)
    options.enable_cpu_mem_arena = (
        False  # it keeps what it once took, and grows by doubling: a gigabyte for ViT-B at 518 px
    )
    if literal:
        options.add_session_config_entry("session.disable_quant_qdq", "1")
    if optimized is not None:
        options.optimized_model_filepath = str(optimized)
    try:
        return onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    except Exception as error:  # the binding's exceptions share no base but Exception
        raise PhregError(
            f"calibrate: ONNX Runtime {onnxruntime.__version__} cannot load the graph: {str(error).splitlines()[0]}"
        ) from None
