"""ONNX Runtime's module, session options and provider options, and the requests that it cannot serve."""

from __future__ import annotations

import ctypes
import re
import struct
from pathlib import Path
from typing import Any

from phreg_deploy.bundle.bundle import Bundle
from phreg_deploy.bundle.manifest import ENGINES, Manifest
from phreg_deploy.bundle.profiles import profiles_of
from phreg_deploy.errors import BackendMissing, PhregError
from phreg_deploy.runtime.backends.instructions import EXACT
from phreg_deploy.runtime.backends.interface import import_runtime
from phreg_deploy.runtime.backends.options import BackendOptions
from phreg_deploy.runtime.gpu.libraries import needed_libraries

PROVIDERS = {
    "onnxruntime-cpu": "CPUExecutionProvider",
    "onnxruntime-cuda": "CUDAExecutionProvider",
    "onnxruntime-tensorrt": "TensorrtExecutionProvider",
}
# The first release with https://github.com/microsoft/onnxruntime/pull/25765, which adds Gelu of opset 20 in bfloat16.
OLDEST_BF16 = (1, 23)


def compute_precision(manifest: Manifest, name: str) -> str:
    """The precision in which ONNX Runtime computes all layers that are not in 8 bits."""
    return manifest.precision if name != "onnxruntime-cpu" and manifest.precision in ("fp16", "bf16") else "fp32"


def load_onnxruntime(manifest: Manifest, name: str, options: BackendOptions) -> Any:
    """The module ``onnxruntime``, after every check that needs no session.

    Raises:
        BackendMissing: it cannot be imported, or was built without the provider.
        PhregError: a precision that the provider does not compute.
    """
    _check_precision(manifest.precision, name, options.compute, compute_precision(manifest, name))
    onnxruntime = import_runtime("onnxruntime")
    version = tuple(int(number) for number in re.findall(r"\d+", onnxruntime.__version__)[:2])
    if manifest.precision == "bf16" and name == "onnxruntime-cuda" and version < OLDEST_BF16:
        raise BackendMissing(
            f"backend: ONNX Runtime {onnxruntime.__version__} has no bfloat16 kernel of Gelu on CUDA; expected at "
            f'least {OLDEST_BF16[0]}.{OLDEST_BF16[1]}. Run: pip install --upgrade "phreg-deploy[gpu]", or export in '
            "fp16."
        )
    if PROVIDERS[name] not in onnxruntime.get_available_providers():
        raise BackendMissing(
            f"backend: this ONNX Runtime {onnxruntime.__version__} was built without {PROVIDERS[name]}. "
            'Run: pip uninstall onnxruntime, then pip install "phreg-deploy[gpu]"'
        )
    if name == "onnxruntime-tensorrt":
        _check_libraries(onnxruntime)
    return onnxruntime


def session_options(onnxruntime: Any, manifest: Manifest, name: str, threads: int | None) -> Any:
    """``SessionOptions`` for a bundle's graph."""
    options = onnxruntime.SessionOptions()
    # Only errors are logged; ONNX Runtime raises them too.
    options.log_severity_level = 3
    options.add_session_config_entry(*EXACT)
    if threads:
        options.intra_op_num_threads = threads
    if manifest.quantisation is not None and manifest.quantisation["target"] == "trt":
        # ONNX Runtime has FP8 kernels for Q/DQ alone, so it must not fuse them.
        options.add_session_config_entry("session.disable_quant_qdq", "1")
    if name != "onnxruntime-cpu":
        options.add_session_config_entry("session.record_ep_graph_assignment_info", "1")
    return options


def providers(bundle: Bundle, name: str, device: int, graphs: bool = True) -> list[Any]:
    """The execution providers of a session, each with its options on a GPU; ``graphs``: ask for a CUDA graph."""
    if name == "onnxruntime-cpu":
        return [PROVIDERS[name]]
    rest = [("CUDAExecutionProvider", {"device_id": str(device)})] if name == "onnxruntime-tensorrt" else []
    return [(PROVIDERS[name], provider_options(bundle, name, device, graphs)), *rest]


def provider_options(bundle: Bundle, name: str, device: int, graphs: bool = True) -> dict[str, str]:
    """Options of a GPU's provider. TensorFloat-32 is off, as in engines, since parity is with FP32."""
    if name == "onnxruntime-cuda":
        graph = {"enable_cuda_graph": "1"} if graphs and replayable(bundle, name) else {}
        return {"device_id": str(device), "use_tf32": "0", **graph}
    precision, cache = bundle.manifest.precision, bundle.folder / ENGINES / "onnxruntime"
    try:
        cache.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise PhregError(
            f"engine cache: {cache} cannot be made ({error.strerror}); copy the bundle where you may write."
        ) from None
    # An INT8 network is weakly typed: without FP16 too, TensorRT would compute its FP16 layers in FP32.
    options = {
        "device_id": str(device),
        "trt_engine_cache_enable": "1",
        "trt_engine_cache_path": str(cache),
        "trt_timing_cache_enable": "1",
        "trt_timing_cache_path": str(cache),
        "trt_fp16_enable": str(int(precision in ("int8", "fp16"))),
        "trt_int8_enable": str(int(precision == "int8")),
    }
    if bundle.manifest.sizes.dynamic or bundle.manifest.batches.dynamic:
        profiles = profiles_of(bundle.manifest)
        for i, kind in enumerate(("min", "opt", "max")):
            options[f"trt_profile_{kind}_shapes"] = ",".join(
                f"{tensor}:{'x'.join(str(side) for side in shapes[i])}"
                for profile in profiles
                for tensor, shapes in profile.inputs.items()
            )
    return options


def replayable(bundle: Bundle, name: str) -> bool:
    """Whether every call has the same shapes, so that a CUDA graph can be replayed."""
    return name == "onnxruntime-cuda" and not bundle.manifest.sizes.dynamic and not bundle.manifest.batches.dynamic


def _check_precision(precision: str, name: str, wanted: str, compute: str) -> None:
    """Raise for a precision that a provider does not compute."""
    if wanted not in ("auto", compute):
        raise PhregError(
            f"compute: got {wanted}, but {name} computes in what the graph says, {compute}; "
            f"use --backend openvino, or export in {wanted}."
        )
    if precision == "bf16" and name == "onnxruntime-cpu":
        raise BackendMissing(
            "backend: ONNX Runtime has no bfloat16 on the processor; use --backend openvino, a GPU, or "
            "--precision fp16."
        )
    if precision in ("int8", "fp8") and name == "onnxruntime-cuda":
        raise PhregError(
            f"backend: ONNX Runtime has no {precision} kernels on CUDA and would compute in float, slower than FP16. "
            "Use --backend tensorrt, or an FP16 bundle."
        )
    if precision in ("bf16", "fp8") and name == "onnxruntime-tensorrt":
        raise PhregError(
            f"backend: ONNX Runtime's TensorRT provider is not offered for {precision}; use --backend tensorrt."
        )


def _check_libraries(onnxruntime: Any) -> None:
    """Raise unless the major version of TensorRT that this ONNX Runtime links is installed."""
    provider = Path(onnxruntime.__file__).parent / "capi" / "libonnxruntime_providers_tensorrt.so"
    try:
        linked = [library for library in needed_libraries(provider) if library.startswith("libnv")]
    except (OSError, ValueError, struct.error):
        # Not an ELF file: on other systems the session itself reports what is missing.
        return
    for library in linked:
        try:
            ctypes.CDLL(library)
        except OSError:
            raise BackendMissing(
                f"backend: ONNX Runtime {onnxruntime.__version__}'s TensorRT provider links {library}, which is not "
                "here. Install that major version of TensorRT, or use --backend tensorrt with the one that you have."
            ) from None
