"""Open ONNX Runtime sessions on graphs in memory."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from onnx import ModelProto, TensorProto

from phreg_deploy.errors import BackendMissing, PhregError
from phreg_deploy.extras import CALIBRATION, require
from phreg_deploy.onnx_graph.external import Arrays, fits, take_apart
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


def open_session(
    model: ModelProto, optimized: Path | None = None, literal: bool = False, arrays: Arrays | None = None
) -> Any:
    """Open a CPU session of ``model`` that computes INT8 exactly on every processor.

    Args:
        optimized: file to write the optimized graph to; its constants go to another file beside it.
        literal: compute every Q/DQ at its place, as graphs for TensorRT need: ONNX Runtime would move FP8 tensors
            through operators that it has no FP8 kernels for.
        arrays: the values of constants that are not in the graph. They are read in place and not serialised.

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
        options.add_session_config_entry(
            "session.optimized_model_external_initializers_file_name", f"{optimized.name}.weights"
        )
    if not fits(model):
        model, more = take_apart(model)
        arrays = {**(arrays or {}), **more}
    outside = [t for t in model.graph.initializer if t.data_location == TensorProto.EXTERNAL]
    values = [_value((arrays or {})[tensor.name], tensor.data_type) for tensor in outside]
    if outside:
        options.add_external_initializers([tensor.name for tensor in outside], values)
    try:
        session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    # The binding's exceptions share no base but Exception.
    except Exception as error:
        reason = str(error).splitlines()[0]
        raise PhregError(f"calibrate: ONNX Runtime {VERSION} cannot load the graph: {reason}") from None
    # It does not own the memory of its constants.
    session.constants = values
    return session


def _value(array: np.ndarray, kind: int) -> Any:
    """Give ONNX Runtime an array as a constant, without a copy; numpy's own types lack some of ONNX's."""
    array = np.ascontiguousarray(array)
    if array.dtype.isbuiltin == 1:
        return onnxruntime.OrtValue.ortvalue_from_numpy(array)
    return onnxruntime.OrtValue.ortvalue_from_numpy_with_onnx_type(array.view(f"u{array.dtype.itemsize}"), kind)
