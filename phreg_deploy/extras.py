"""Optional modules: which extra brings them, and the one error that names all that are missing."""

from __future__ import annotations

import importlib.util
import sys

from phreg_deploy.errors import BackendMissing

DISTILL = ("safetensors", "timm", "torch")
EXPORT = ("ml_dtypes", "onnx", "onnxscript", *DISTILL)
CALIBRATION = ("ml_dtypes", "onnx", "onnxruntime")


def is_importable(module: str) -> bool:
    """Whether a module is there, without importing it."""
    if module in sys.modules:  # which find_spec would ask for its origin; None stands for "blocked"
        return sys.modules[module] is not None
    return importlib.util.find_spec(module) is not None


def require(what: str, **extras: tuple[str, ...]) -> None:
    """Raise unless the modules of every extra are there, e.g. ``require("distill", distill=DISTILL)``.

    Args:
        what: what needs them, e.g. ``"`phreg-deploy distill`"``.

    Raises:
        BackendMissing: it names every missing module, and one line that installs all of them.
    """
    lacking = {extra: [module for module in modules if not is_importable(module)] for extra, modules in extras.items()}
    modules = sorted({module for part in lacking.values() for module in part})
    if modules:
        names = ", ".join(repr(module) for module in modules)
        several = len(modules) > 1
        raise BackendMissing(
            f"{what} needs the module{'s' * several} {names}, which {'are' if several else 'is'} not installed. "
            f'Run: pip install "phreg-deploy[{",".join(extra for extra, part in lacking.items() if part)}]"'
        )
