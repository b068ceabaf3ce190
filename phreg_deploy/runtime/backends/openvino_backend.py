"""OpenVINO's CPU plugin behind the backend interface; it reads the bundle's ONNX file as it is."""

from __future__ import annotations

from queue import SimpleQueue
from typing import Any

import numpy as np

from phreg_deploy.bundle.bundle import Bundle
from phreg_deploy.errors import BackendMissing, PhregError
from phreg_deploy.runtime.backends.interface import check_outputs, run_error
from phreg_deploy.runtime.backends.openvino_exact import fold_weights, saturates
from phreg_deploy.runtime.backends.options import BackendOptions

INTEGER = ("i8", "u8")


class OpenVinoBackend:
    """A compiled model and as many inference requests as threads have called it at once.

    The compute precision "auto" is float32, and bfloat16 around 8-bit layers where the processor has instructions for
    it: measured on a ViT-Tiny, bfloat16 there leaves INT8's fidelity to FP32 as it was. On a processor whose 8-bit kernels
    saturate, INT8 bundles are computed in float32 on their own grids, which is exact and no faster than FP32.

    Raises:
        BackendMissing: OpenVINO cannot be imported. PhregError: it refuses the graph, the processor has no bfloat16, or
            a linear layer that was meant to run in 8 bits runs in float.
    """

    name = "openvino"

    def __init__(self, bundle: Bundle, tuning: BackendOptions) -> None:
        try:
            import openvino
        except ImportError as error:
            raise BackendMissing(
                f"backend: openvino cannot be imported ({error}). Reinstall it: pip install --force-reinstall openvino"
            ) from None
        if bundle.manifest.precision == "fp8":
            raise PhregError("backend: openvino has no FP8; use tensorrt, or onnxruntime-cpu to check the bundle.")
        core = openvino.Core()
        emulated = bundle.manifest.precision == "int8" and saturates()
        self.remark = (
            "the 8-bit products saturate on this processor, so they are computed in float32" if emulated else ""
        )
        self.compute = _compute(core, bundle, tuning, emulated)
        options: dict[str, Any] = {
            "INFERENCE_PRECISION_HINT": {"fp32": "f32", "bf16": "bf16"}[self.compute],
            "PERFORMANCE_HINT": tuning.mode.upper(),
        }
        if tuning.threads:
            options["INFERENCE_NUM_THREADS"] = tuning.threads
        try:
            model = core.read_model(str(bundle.graph))
            if emulated:
                fold_weights(model)
            self._model: Any = core.compile_model(model, "CPU", options)
        except Exception as error:  # the binding raises RuntimeError with a stack of C++ lines
            reason = " ".join([line for line in str(error).splitlines() if line.strip()][-1:]).strip()
            raise PhregError(f"backend: OpenVINO {openvino.__version__} cannot load {bundle.graph}: {reason}") from None
        served = set(
            bundle.manifest.outputs
        )  # an output that OpenVINO merged with another tensor has the names of both
        self._names = [_name(output.get_names(), served) for output in self._model.outputs]
        self._bundle = bundle
        check_outputs(bundle, self._names)
        self._idle: SimpleQueue[Any] = SimpleQueue()
        self.integer_layers, floats = census(self._model)
        meant = bundle.manifest.quantisation
        unmeant = [] if meant is None or emulated else sorted(floats - set(meant["float_layers"]))
        if unmeant:
            raise PhregError(
                f"census: OpenVINO {openvino.__version__} runs {len(unmeant)} of {len(unmeant) + len(self.integer_layers)} linear layers that were meant "
                f"to run in 8 bits in float, e.g. {unmeant[0]}. Use --backend onnxruntime-cpu, or the FP32 bundle."
            )

    def run(self, feed: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        try:
            request = self._idle.get_nowait()
        except Exception:  # queue.Empty: every request is at work in another thread
            request = self._model.create_infer_request()
        try:
            outputs = request.infer(feed)
            return {name: outputs[i] for i, name in enumerate(self._names)}
        except RuntimeError as error:
            raise run_error(self.name, self._bundle, error) from error
        finally:
            self._idle.put(request)

    def close(self) -> None:
        self._idle = SimpleQueue()
        self._model = None


def _name(names: set[str], served: set[str]) -> str:
    return next((name for name in sorted(names) if name in served or name.startswith("probe/")), min(names))


def _compute(core: Any, bundle: Bundle, tuning: BackendOptions, emulated: bool) -> str:
    native = "BF16" in core.get_property("CPU", "OPTIMIZATION_CAPABILITIES")
    if tuning.compute == "auto":
        return "bf16" if native and bundle.manifest.precision == "int8" and not emulated else "fp32"
    if tuning.compute == "bf16" and not native:
        raise PhregError("compute: got bf16, which this processor has no instructions for; use fp32.")
    return tuning.compute


def census(compiled: Any) -> tuple[set[str], set[str]]:
    """Names of the blocks' linear layers that run in 8 bits, and in float, read back from the optimized graph."""
    integer: set[str] = set()
    floats: set[str] = set()
    for operator in compiled.get_runtime_model().get_ops():
        facts = operator.get_rt_info()
        if str(facts["layerType"].astype(str)) != "FullyConnected":
            continue
        names = str(facts["originalLayersNames"].astype(str)).split(",")
        own = next((n for n in names if n.startswith("blocks.") and ("/MatMul" in n or n.endswith("/Add"))), None)
        if own is None:
            continue
        layer = own.split("/")[0]
        (integer if str(facts["runtimePrecision"].astype(str)) in INTEGER else floats).add(layer)
    return integer, floats - integer
