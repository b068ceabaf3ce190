"""One tiny interface for every runtime: named arrays in, named arrays out. What was asked for is what runs."""

from __future__ import annotations

import importlib.util
from types import TracebackType
from typing import Protocol

import numpy as np

from phreg_deploy.bundle import Bundle
from phreg_deploy.errors import BackendMissing, PhregError

# name: (module, extra)
BACKENDS = {
    "onnxruntime-cpu": ("onnxruntime", "cpu"),
}
PLANNED = ("onnxruntime-cuda", "openvino", "tensorrt")


class Backend(Protocol):
    """A loaded graph. ``run`` may be called from several threads at once."""

    name: str

    def run(self, feed: dict[str, np.ndarray]) -> dict[str, np.ndarray]: ...

    def close(self) -> None: ...


def open_backend(bundle: Bundle, name: str = "auto", threads: int | None = None) -> Backend:
    """Load a bundle's graph.

    Args:
        name: "auto" or a key of ``BACKENDS``.
        threads: intra-op threads; None leaves the choice to the runtime (one per physical core).

    Raises:
        PhregError: an unknown name, or a graph that the runtime refuses. BackendMissing: not installed, or not usable.
    """
    chosen = _choose() if name == "auto" else name
    if chosen in PLANNED:
        raise BackendMissing(f"backend: {chosen} is not in this version; expected auto or {', '.join(BACKENDS)}.")
    if chosen not in BACKENDS:
        raise PhregError(f"backend: got {name!r}, expected auto, {', '.join(BACKENDS)}.")
    module, extra = BACKENDS[chosen]
    if importlib.util.find_spec(module) is None:
        raise BackendMissing(
            f'backend: {chosen} needs {module}, which is not installed. Run: pip install "phreg-deploy[{extra}]"'
        )
    from phreg_deploy.runtime.ort_backend import OrtBackend

    return OrtBackend(bundle, chosen, threads)


def _choose() -> str:
    for name, (module, _) in BACKENDS.items():
        if importlib.util.find_spec(module) is not None:
            return name
    raise BackendMissing('backend: no runtime is installed. Run: pip install "phreg-deploy[cpu]"')


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
