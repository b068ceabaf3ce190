"""ONNX Runtime on the processor."""

from __future__ import annotations

from typing import Any

import numpy as np

from phreg_deploy.bundle.bundle import Bundle
from phreg_deploy.errors import BackendMissing, PhregError, closed_error
from phreg_deploy.runtime.backends.interface import check_outputs, run_error
from phreg_deploy.runtime.backends.onnxruntime_options import (
    PROVIDERS,
    compute_precision,
    load_onnxruntime,
    providers,
    session_options,
)
from phreg_deploy.runtime.backends.options import BackendOptions


class OrtBackend:
    """An ``InferenceSession`` on exactly the execution provider that ``name`` stands for.

    Raises:
        BackendMissing: ONNX Runtime cannot be imported, or has no such provider.
        PhregError: it refuses the graph, or the graph is not in the precision of ``options``.
    """

    remark = ""

    def __init__(self, bundle: Bundle, name: str, options: BackendOptions) -> None:
        self._open(load_onnxruntime(bundle.manifest, name, options), bundle, name, options)

    def _open(self, onnxruntime: Any, bundle: Bundle, name: str, options: BackendOptions, graphs: bool = True) -> None:
        self.name, self.compute = name, compute_precision(bundle.manifest, name)
        self._bundle, self._session = bundle, open_session(onnxruntime, bundle, name, options, graphs)
        self._names = [output.name for output in self._session.get_outputs()]
        check_outputs(bundle, self._names)

    def run(self, feed: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        # Another thread may close the backend at any moment; the session lives as long as this call.
        session = self._session
        if session is None:
            raise closed_error()
        try:
            return dict(zip(self._names, session.run(None, feed)))
        except Exception as error:  # the binding's exceptions have no other base
            raise run_error(self.name, self._bundle, error) from error

    def close(self) -> None:
        self._session = None


def open_session(onnxruntime: Any, bundle: Bundle, name: str, options: BackendOptions, graphs: bool = True) -> Any:
    """Load a bundle's graph; ``graphs``: ask for a CUDA graph where the shapes are fixed.

    Raises:
        BackendMissing: ONNX Runtime dropped the provider without an error.
        PhregError: it refuses the graph.
    """
    settings = session_options(onnxruntime, bundle.manifest, name, options.threads)
    chain = providers(bundle, name, options.device, graphs)
    try:
        session = onnxruntime.InferenceSession(str(bundle.graph), settings, providers=chain)
    except Exception as error:  # the binding's exceptions have no other base
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise PhregError(
            f"backend: ONNX Runtime {onnxruntime.__version__} cannot load {bundle.graph}: {reason}"
        ) from None
    used = session.get_providers()[0]
    if used != PROVIDERS[name]:
        raise BackendMissing(
            f"backend: asked ONNX Runtime for {PROVIDERS[name]}, got {used}: a library that it needs is missing. "
            "`phreg-deploy doctor` names it."
        )
    return session
