"""ONNX Runtime behind the backend interface."""

from __future__ import annotations

import numpy as np

from phreg_deploy.bundle import Bundle
from phreg_deploy.errors import BackendMissing, PhregError
from phreg_deploy.runtime.tuning import Tuning

PROVIDERS = {"onnxruntime-cpu": "CPUExecutionProvider"}


class OrtBackend:
    """An ``InferenceSession`` on exactly the execution provider that was asked for.

    Raises:
        BackendMissing: ONNX Runtime cannot be imported, or dropped the provider silently.
        PhregError: it refuses the graph, or was asked for bfloat16.
    """

    compute = "fp32"

    def __init__(self, bundle: Bundle, name: str, tuning: Tuning) -> None:
        if tuning.compute == "bf16":
            raise PhregError(f"compute: got bf16, but {name} computes in fp32; use --backend openvino, or fp32.")
        try:
            import onnxruntime
        except ImportError as error:
            raise BackendMissing(
                f"backend: onnxruntime cannot be imported ({error}). Reinstall it: pip install --force-reinstall onnxruntime"
            ) from None
        self.name = name
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3  # errors only; they also raise
        if tuning.threads:
            options.intra_op_num_threads = tuning.threads
        provider = PROVIDERS[name]
        try:
            self._session = onnxruntime.InferenceSession(str(bundle.graph), options, providers=[provider])
        except Exception as error:  # the binding's exceptions share no base but Exception
            first = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise PhregError(
                f"backend: ONNX Runtime {onnxruntime.__version__} cannot load {bundle.graph}: {first}"
            ) from None
        used = self._session.get_providers()
        if used[0] != provider:
            raise BackendMissing(f"backend: asked ONNX Runtime for {provider}, got {used[0]}.")
        self._names = [output.name for output in self._session.get_outputs()]

    def run(self, feed: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        return dict(zip(self._names, self._session.run(None, feed)))

    def close(self) -> None:
        self._session = None
