"""OpenVINO's CPU plugin, which reads the bundle's ONNX file."""

from __future__ import annotations

from collections.abc import Collection
from queue import Empty, SimpleQueue
from typing import Any

import numpy as np

from phreg_deploy.bundle.bundle import Bundle
from phreg_deploy.errors import PhregError, closed_error
from phreg_deploy.runtime.backends.interface import check_outputs, import_runtime, run_error
from phreg_deploy.runtime.backends.openvino_exact import fold_weights, saturates
from phreg_deploy.runtime.backends.options import BackendOptions

INTEGER = ("i8", "u8")
HINTS = {"fp32": "f32", "bf16": "bf16"}


class OpenVinoBackend:
    """A compiled model, and one inference request for each thread that calls it at the same time.

    The compute precision "auto" is float32. Around 8-bit layers it is bfloat16 where the processor has instructions for
    it: on a ViT-Tiny that leaves the fidelity of INT8 to FP32 unchanged. On a processor whose 8-bit kernels saturate,
    INT8 bundles are computed in float32 on their own grids, which is exact, and no faster than FP32.

    Raises:
        BackendMissing: OpenVINO cannot be imported.
        PhregError: it refuses the graph, the processor has no bfloat16, or a linear layer runs in float that the bundle
            has in 8 bits.
    """

    name = "openvino"

    def __init__(self, bundle: Bundle, options: BackendOptions) -> None:
        openvino = import_runtime("openvino")
        if bundle.manifest.precision == "fp8":
            raise PhregError("backend: openvino has no FP8; use tensorrt, or onnxruntime-cpu to check the bundle.")
        core = openvino.Core()
        emulated = bundle.manifest.precision == "int8" and saturates()
        self.remark = (
            "the 8-bit products saturate on this processor, so they are computed in float32" if emulated else ""
        )
        self.compute = _compute(core, bundle, options, emulated)
        self._bundle = bundle
        properties: dict[str, Any] = {
            "INFERENCE_PRECISION_HINT": HINTS[self.compute],
            "PERFORMANCE_HINT": options.mode.upper(),
        }
        if options.threads:
            properties["INFERENCE_NUM_THREADS"] = options.threads
        self._model = _compile(openvino, core, bundle, properties, emulated)
        self._names = _output_names([output.get_names() for output in self._model.outputs], bundle.manifest.outputs)
        check_outputs(bundle, self._names)
        self._idle: SimpleQueue[Any] = SimpleQueue()
        self.integer_layers, float_layers = census(self._model)
        if not emulated:
            _check_census(openvino, bundle, self.integer_layers, float_layers)

    def run(self, feed: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        # Another thread may close the backend at any moment; the model lives as long as this call.
        model, idle = self._model, self._idle
        if model is None:
            raise closed_error()
        try:
            request = idle.get_nowait()
        except Empty:  # other threads use every request
            request = model.create_infer_request()
        try:
            outputs = request.infer(feed)
            return {name: outputs[i] for i, name in enumerate(self._names)}
        except RuntimeError as error:
            raise run_error(self.name, self._bundle, error) from error
        finally:
            idle.put(request)

    def close(self) -> None:
        self._idle = SimpleQueue()
        self._model = None


def census(compiled: Any) -> tuple[set[str], set[str]]:
    """Names of the blocks' linear layers that run in 8 bits, and of those in float, from the optimised graph."""
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


def _compute(core: Any, bundle: Bundle, options: BackendOptions, emulated: bool) -> str:
    native = "BF16" in core.get_property("CPU", "OPTIMIZATION_CAPABILITIES")
    if options.compute == "auto":
        return "bf16" if native and bundle.manifest.precision == "int8" and not emulated else "fp32"
    if options.compute == "bf16" and not native:
        raise PhregError("compute: got bf16, which this processor has no instructions for; use fp32.")
    return options.compute


def _compile(openvino: Any, core: Any, bundle: Bundle, properties: dict[str, Any], emulated: bool) -> Any:
    try:
        model = core.read_model(str(bundle.graph))
        if emulated:
            fold_weights(model)
        return core.compile_model(model, "CPU", properties)
    except Exception as error:  # the binding raises RuntimeError with a stack of C++ lines
        reason = " ".join([line for line in str(error).splitlines() if line.strip()][-1:]).strip()
        raise PhregError(f"backend: OpenVINO {openvino.__version__} cannot load {bundle.graph}: {reason}") from None


def _output_names(outputs: list[set[str]], served: Collection[str]) -> list[str]:
    """The served name of each output, given all names of each.

    OpenVINO merges equal tensors, such as the last layer's features, and gives each of them the names of all.
    """
    named: list[str] = []
    for names in outputs:
        known = [name for name in sorted(names) if name in served or name.startswith("probe/")]
        named.append(next((name for name in known if name not in named), min(names)))
    return named


def _check_census(openvino: Any, bundle: Bundle, integer: set[str], floats: set[str]) -> None:
    """Raise unless every linear layer that the bundle has in 8 bits runs in 8 bits."""
    if bundle.manifest.quantisation is None:
        return
    strays = sorted(floats - set(bundle.manifest.quantisation["float_layers"]))
    if strays:
        raise PhregError(
            f"census: OpenVINO {openvino.__version__} runs {len(strays)} of {len(strays) + len(integer)} linear layers "
            f"that were meant to run in 8 bits in float, e.g. {strays[0]}. Use --backend onnxruntime-cpu, or the FP32 "
            "bundle."
        )
