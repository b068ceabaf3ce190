"""``ServiceLimits``: what a service accepts, how long a request may take, and how images are batched."""

from __future__ import annotations

import math
from dataclasses import dataclass

from phreg_deploy.errors import PhregError

MEBI, MEGA = 1 << 20, 10**6
# Pillow decodes no larger images (``PIL.Image.MAX_IMAGE_PIXELS``).
MOST_MEGAPIXELS = 89


@dataclass(frozen=True)
class ServiceLimits:
    """Bounds of a service.

    ``mib``: size of a request, in MiB. ``megapixels``: of an image, before it is decoded. ``queue``: images per bundle
    that may wait beside the batch that runs; one more is refused with 503. ``seconds``: for a request, from the end of
    its headers to the last piece of its answer. ``batch``: images of several requests in one run; None takes the
    bundle's best batch. ``wait``: seconds for which an image waits for others. ``drain``: seconds from the signal to
    stop for which new requests are still answered (with 503), and ``stop``: seconds after which the service ends even
    if requests are unfinished.

    Raises:
        PhregError: a value out of bounds.
    """

    mib: float = 20.0
    megapixels: float = 50.0
    queue: int = 32
    seconds: float = 30.0
    batch: int | None = None
    wait: float = 0.002
    drain: float = 0.0
    stop: float = 30.0

    def __post_init__(self) -> None:
        for name, least, most in (
            ("mib", 0.001, 1024),
            ("megapixels", 0.001, MOST_MEGAPIXELS),
            ("queue", 0, 100_000),
            ("seconds", 0.001, 3600),
            ("batch", 1, 65536),
            ("wait", 0, 10),
            ("drain", 0, 3600),
            ("stop", 0, 3600),
        ):
            value = getattr(self, name)
            if value is not None and not (math.isfinite(value) and least <= value <= most):
                raise PhregError(f"serve: got {value} for {name}, expected {least} to {most}.")

    @property
    def bytes(self) -> int:
        """Largest body of a request."""
        return int(self.mib * MEBI)

    @property
    def pixels(self) -> int:
        """Most pixels of an image."""
        return int(self.megapixels * MEGA)
