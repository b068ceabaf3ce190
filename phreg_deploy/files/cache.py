"""Find the folder of caches."""

from __future__ import annotations

import os
from pathlib import Path


def cache_folder() -> Path:
    """Return ``$XDG_CACHE_HOME/phreg-deploy``, or ``~/.cache/phreg-deploy``."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "phreg-deploy"
