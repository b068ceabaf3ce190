"""The protocols of backends: named arrays in, named arrays out, and what some backends can do besides."""

from __future__ import annotations

import importlib
from collections.abc import Collection, Mapping
from typing import Any, Protocol, runtime_checkable

import numpy as np

from phreg_deploy.bundle.bundle import Bundle
from phreg_deploy.errors import BackendMissing, PhregError
from phreg_deploy.runtime.gpu.arrays import DeviceArray
from phreg_deploy.runtime.gpu.cuda import Cuda

Feed = dict[str, np.ndarray]


class Backend(Protocol):
    """A loaded graph. Several threads may call ``run`` at once.

    ``compute``: the precision of all layers that are not in 8 bits. ``remark``: what the user must know, or "".
    """

    name: str
    compute: str
    remark: str

    def run(self, feed: Feed) -> Feed: ...

    def close(self) -> None: ...


@runtime_checkable
class DeviceBackend(Protocol):
    """A backend on a GPU, which also runs on arrays in the GPU's memory."""

    cuda: Cuda

    def run_device(
        self, image: DeviceArray, others: Feed, stream: int | None = None, out: Mapping[str, DeviceArray] | None = None
    ) -> dict[str, DeviceArray]: ...

    def run_to_host(self, image: DeviceArray, others: Feed) -> Feed: ...


@runtime_checkable
class ProfiledBackend(Protocol):
    """A backend that measures the parts and layers of an inference."""

    def split(self, feed: Feed, graph: bool = True) -> dict[str, float]:
        """Milliseconds of each part of one inference, with or without a CUDA graph."""

    def layers(self, feed: Feed, rounds: int = 10) -> dict[str, float]:
        """Mean milliseconds of each layer."""

    def reserve(self, contexts: int) -> int:
        """Make contexts until there are so many, which take turns; return how many there are."""

    def device_memory(self) -> dict[str, int]:
        """Bytes of ``activations`` in each context, and the number of ``contexts``."""


def import_runtime(module: str) -> Any:
    """Import a runtime's module. Raises ``BackendMissing`` where that fails."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise BackendMissing(
            f"backend: {module} cannot be imported ({error}). Reinstall it: pip install --force-reinstall {module}"
        ) from None


def check_outputs(bundle: Bundle, names: Collection[str]) -> None:
    """Raise ``PhregError`` unless a loaded graph has every output that the manifest names."""
    missing = [name for name in bundle.manifest.outputs if name not in names]
    if missing:
        raise PhregError(
            f"backend: {bundle.graph} has the outputs {', '.join(sorted(names))}, expected {', '.join(missing)} as "
            "well; copy or export the bundle again."
        )


def run_error(name: str, bundle: Bundle, error: Exception) -> PhregError:
    """The error that a runtime raised in an inference, as one line."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    reason = lines[-1] if lines else type(error).__name__
    return PhregError(f"backend: {name} cannot run {bundle.graph}: {reason}. Copy or export the bundle again.")
