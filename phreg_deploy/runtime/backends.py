"""One tiny interface for every runtime: named arrays in, named arrays out. What was asked for is what runs."""

from __future__ import annotations

import importlib.util
from types import TracebackType
from typing import Protocol

import numpy as np

from phreg_deploy.bundle import Bundle
from phreg_deploy.errors import BackendMissing, PhregError
from phreg_deploy.runtime.tuning import Tuning

# name: (module, extra)
BACKENDS = {
    "onnxruntime-cpu": ("onnxruntime", "cpu"),
    "openvino": ("openvino", "openvino"),
}
PLANNED = ("onnxruntime-cuda", "tensorrt")


class Backend(Protocol):
    """A loaded graph. ``run`` may be called from several threads at once. ``compute``: "fp32" or "bf16", of what is not in 8 bits."""

    name: str
    compute: str

    def run(self, feed: dict[str, np.ndarray]) -> dict[str, np.ndarray]: ...

    def close(self) -> None: ...


def open_backend(bundle: Bundle, name: str, tuning: Tuning) -> Backend:
    """Load a bundle's graph on one backend, a key of ``BACKENDS``.

    Raises:
        PhregError: an unknown name, or a graph that the runtime refuses. BackendMissing: not installed, or not usable.
    """
    if name in PLANNED:
        raise BackendMissing(f"backend: {name} is not in this version; expected auto or {', '.join(BACKENDS)}.")
    if name not in BACKENDS:
        raise PhregError(f"backend: got {name!r}, expected auto, {', '.join(BACKENDS)}.")
    module, extra = BACKENDS[name]
    if importlib.util.find_spec(module) is None:
        raise BackendMissing(
            f'backend: {name} needs {module}, which is not installed. Run: pip install "phreg-deploy[{extra}]"'
        )
    if name == "openvino":
        from phreg_deploy.runtime.openvino_backend import OpenVinoBackend

        return OpenVinoBackend(bundle, tuning)
    from phreg_deploy.runtime.ort_backend import OrtBackend

    return OrtBackend(bundle, name, tuning)


def installed() -> list[str]:
    """Backends whose module is there, in the order of ``BACKENDS``.

    Raises:
        BackendMissing: none is.
    """
    found = [name for name, (module, _) in BACKENDS.items() if importlib.util.find_spec(module) is not None]
    if not found:
        raise BackendMissing('backend: no runtime is installed. Run: pip install "phreg-deploy[cpu]"')
    return found


class Closing:
    """``with`` for anything that has ``close``."""

    def close(self) -> None:
        raise NotImplementedError

    def __enter__(self):  # type: ignore[no-untyped-def]  # noqa: ANN204
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
