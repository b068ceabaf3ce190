"""What every backend is: named arrays in, named arrays out. What was asked for is what runs."""

from __future__ import annotations

from collections.abc import Collection
from typing import Protocol

import numpy as np

from phreg_deploy.bundle.bundle import Bundle
from phreg_deploy.errors import PhregError


class Backend(Protocol):
    """A loaded graph. ``run`` may be called from several threads at once.

    ``compute``: "fp32" or "bf16", of what is not in 8 bits. ``remark``: what a user should know of how it computes here.
    """

    name: str
    compute: str
    remark: str

    def run(self, feed: dict[str, np.ndarray]) -> dict[str, np.ndarray]: ...

    def close(self) -> None: ...


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
