"""One tiny interface for every runtime: named arrays in, named arrays out. What was asked for is what runs."""

from __future__ import annotations

from collections.abc import Collection
from typing import Protocol

import numpy as np

from phreg_deploy.bundle import Bundle
from phreg_deploy.errors import BackendMissing, PhregError
from phreg_deploy.runtime.presence import driver_present, found
from phreg_deploy.runtime.tuning import Tuning

# name: (module, extra)
BACKENDS = {
    "onnxruntime-cpu": ("onnxruntime", "cpu"),
    "openvino": ("openvino", "openvino"),
    "tensorrt": ("tensorrt", "trt"),
    "onnxruntime-cuda": ("onnxruntime", "gpu"),
    "onnxruntime-tensorrt": ("onnxruntime", "gpu"),
}
GPU = ("tensorrt", "onnxruntime-cuda", "onnxruntime-tensorrt")


class Backend(Protocol):
    """A loaded graph. ``run`` may be called from several threads at once.

    ``compute``: "fp32" or "bf16", of what is not in 8 bits. ``remark``: what a user should know of how it computes here.
    """

    name: str
    compute: str
    remark: str

    def run(self, feed: dict[str, np.ndarray]) -> dict[str, np.ndarray]: ...

    def close(self) -> None: ...


def open_backend(bundle: Bundle, name: str, tuning: Tuning, device: int = 0) -> Backend:
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
    if not there(name):
        raise BackendMissing(
            f'backend: {name} needs {module}, which is not installed. Run: pip install "phreg-deploy[{extra}]"'
        )
    if name == "openvino":
        from phreg_deploy.runtime.openvino_backend import OpenVinoBackend

        return OpenVinoBackend(bundle, tuning)
    if name == "tensorrt":
        from phreg_deploy.runtime.tensorrt_backend import TensorRtBackend

        return TensorRtBackend(bundle, tuning, device)
    from phreg_deploy.runtime.ort_backend import OrtBackend

    return OrtBackend(bundle, name, tuning, device)


def check_outputs(bundle: Bundle, names: Collection[str]) -> None:
    """Raise ``PhregError`` unless a loaded graph has every output that the manifest names."""
    missing = [name for name in bundle.manifest.outputs if name not in names]
    if missing:
        raise PhregError(
            f"backend: {bundle.graph} has the outputs {', '.join(sorted(names))}, expected {', '.join(missing)} as well; copy or export the bundle again."
        )


def run_error(name: str, bundle: Bundle, error: Exception) -> PhregError:
    """What a runtime raised when it ran, in one line."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return PhregError(
        f"backend: {name} cannot run {bundle.graph}: {lines[-1] if lines else type(error).__name__}. Copy or export the bundle again."
    )


def check_name(name: str) -> None:
    """Raise ``PhregError`` unless ``name`` is a backend's."""
    if name not in BACKENDS:
        raise PhregError(f"backend: got {name!r}, expected auto, {', '.join(BACKENDS)}.")


def there(name: str) -> bool:
    """Whether a backend's module can be found; nothing is imported."""
    modules = (BACKENDS[name][0], *(["tensorrt_lean"] if name == "tensorrt" else []))
    return any(found(module) for module in modules)


def installed() -> list[str]:
    """Backends whose module is there, in the order of ``BACKENDS``; those on a GPU only where there is a driver.

    ONNX Runtime's TensorRT provider builds engines while it loads, so that it runs only where it is asked for.

    Raises:
        BackendMissing: none is.
    """
    gpu = driver_present()
    found = [name for name in BACKENDS if there(name) and (gpu or name not in GPU) and name != "onnxruntime-tensorrt"]
    if not found:
        raise BackendMissing('backend: no runtime is installed. Run: pip install "phreg-deploy[cpu]"')
    return found
