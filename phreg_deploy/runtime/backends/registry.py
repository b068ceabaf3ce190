"""The backends by name: which are installed, and how each is opened."""

from __future__ import annotations

from phreg_deploy.bundle.bundle import Bundle
from phreg_deploy.errors import BackendMissing, PhregError
from phreg_deploy.extras import is_importable
from phreg_deploy.runtime.backends.interface import Backend
from phreg_deploy.runtime.backends.options import BackendOptions
from phreg_deploy.runtime.gpu.driver import driver_present

# name: (module, extra)
BACKENDS = {
    "onnxruntime-cpu": ("onnxruntime", "cpu"),
    "openvino": ("openvino", "openvino"),
    "tensorrt": ("tensorrt", "trt"),
    "onnxruntime-cuda": ("onnxruntime", "gpu"),
    "onnxruntime-tensorrt": ("onnxruntime", "gpu"),
}
GPU = ("tensorrt", "onnxruntime-cuda", "onnxruntime-tensorrt")


def open_backend(bundle: Bundle, name: str, tuning: BackendOptions, device: int = 0) -> Backend:
    """Load a bundle's graph on one backend, a key of ``BACKENDS``.

    Raises:
        PhregError: an unknown name, or a graph that the runtime refuses. BackendMissing: not installed, or not usable.
    """
    check_name(name)
    if tuning.mode == "throughput" and name != "openvino":
        raise PhregError(
            f"mode: got throughput, which {name} does not have; only openvino splits the processor between calls. "
            'Use --backend openvino (pip install "phreg-deploy[openvino]"), or --mode latency.'
        )
    module, extra = BACKENDS[name]
    if not is_installed(name):
        raise BackendMissing(
            f'backend: {name} needs {module}, which is not installed. Run: pip install "phreg-deploy[{extra}]"'
        )
    if name == "openvino":
        from phreg_deploy.runtime.backends.openvino_backend import OpenVinoBackend

        return OpenVinoBackend(bundle, tuning)
    if name == "tensorrt":
        from phreg_deploy.runtime.backends.tensorrt_backend import TensorRtBackend

        return TensorRtBackend(bundle, tuning, device)
    from phreg_deploy.runtime.backends.onnxruntime_backend import OrtBackend

    return OrtBackend(bundle, name, tuning, device)


def check_name(name: str) -> None:
    """Raise ``PhregError`` unless ``name`` is a backend's."""
    if name not in BACKENDS:
        raise PhregError(f"backend: got {name!r}, expected auto, {', '.join(BACKENDS)}.")


def is_installed(name: str) -> bool:
    """Whether a backend's module can be found; nothing is imported."""
    modules = (BACKENDS[name][0], *(["tensorrt_lean"] if name == "tensorrt" else []))
    return any(is_importable(module) for module in modules)


def installed() -> list[str]:
    """Backends whose module is there, in the order of ``BACKENDS``; those on a GPU only where there is a driver.

    ONNX Runtime's TensorRT provider builds engines while it loads, so that it runs only where it is asked for.

    Raises:
        BackendMissing: none is.
    """
    gpu = driver_present()
    found = [
        name for name in BACKENDS if is_installed(name) and (gpu or name not in GPU) and name != "onnxruntime-tensorrt"
    ]
    if not found:
        raise BackendMissing('backend: no runtime is installed. Run: pip install "phreg-deploy[cpu]"')
    return found
