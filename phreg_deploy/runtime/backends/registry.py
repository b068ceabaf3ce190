"""Find the installed backends, and open one by name."""

from __future__ import annotations

from phreg_deploy.bundle.bundle import Bundle
from phreg_deploy.errors import BackendMissing, PhregError
from phreg_deploy.extras import is_importable
from phreg_deploy.runtime.backends.interface import Backend
from phreg_deploy.runtime.backends.options import BackendOptions
from phreg_deploy.runtime.gpu.driver import driver_present

# Name: module, and the extra of this package that installs it.
BACKENDS = {
    "onnxruntime-cpu": ("onnxruntime", "cpu"),
    "openvino": ("openvino", "openvino"),
    "tensorrt": ("tensorrt", "trt"),
    "onnxruntime-cuda": ("onnxruntime", "gpu"),
    "onnxruntime-tensorrt": ("onnxruntime", "gpu"),
}
GPU = ("tensorrt", "onnxruntime-cuda", "onnxruntime-tensorrt")


def open_backend(bundle: Bundle, name: str, options: BackendOptions) -> Backend:
    """Load a bundle's graph on one backend, a key of ``BACKENDS``.

    Raises:
        PhregError: an unknown name, or a graph that the runtime refuses. BackendMissing: not installed, or not usable.
    """
    check_name(name)
    if options.mode == "throughput" and name != "openvino":
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

        return OpenVinoBackend(bundle, options)
    if name == "tensorrt":
        from phreg_deploy.runtime.backends.tensorrt_backend import TensorRtBackend

        return TensorRtBackend(bundle, options)
    if name in GPU:
        from phreg_deploy.runtime.backends.onnxruntime_gpu import OrtGpuBackend

        return OrtGpuBackend(bundle, name, options)
    from phreg_deploy.runtime.backends.onnxruntime_backend import OrtBackend

    return OrtBackend(bundle, name, options)


def check_name(name: str) -> None:
    """Raise ``PhregError`` unless ``name`` is a key of ``BACKENDS``."""
    if name not in BACKENDS:
        raise PhregError(f"backend: got {name!r}, expected auto, {', '.join(BACKENDS)}.")


def is_installed(name: str) -> bool:
    """Whether a backend's module is installed; checks without importing it."""
    modules = (BACKENDS[name][0], *(["tensorrt_lean"] if name == "tensorrt" else []))
    return any(is_importable(module) for module in modules)


def installed() -> list[str]:
    """The installed backends that ``auto`` tries, in the order of ``BACKENDS``; GPU backends only if there is a driver.

    ``onnxruntime-tensorrt`` is left out, because it builds engines while it loads: it runs on request only.

    Raises:
        BackendMissing: no backend is installed.
    """
    tried = [name for name in BACKENDS if name != "onnxruntime-tensorrt" and (name not in GPU or driver_present())]
    names = [name for name in tried if is_installed(name)]
    if not names:
        raise BackendMissing('backend: no runtime is installed. Run: pip install "phreg-deploy[cpu]"')
    return names
