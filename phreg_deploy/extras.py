"""Check for optional modules, and name every missing one with the extra that installs it in one error."""

from __future__ import annotations

import importlib.util
import sys

from phreg_deploy.errors import BackendMissing

DISTILL = ("safetensors", "timm", "torch")
EXPORT = ("ml_dtypes", "onnx", "onnxscript", *DISTILL)
EVALUATE = ("safetensors", "scipy", "sklearn")
TEXT = ("open_clip", "torch")
HUB = ("huggingface_hub",)
# OpenSSL: model_signing imports it without asking for it.
SIGN = ("OpenSSL", "model_signing")
CALIBRATION = ("ml_dtypes", "onnx", "onnxruntime")


def is_importable(module: str) -> bool:
    """Whether a module is installed; it is not imported."""
    # None in ``sys.modules`` blocks a module.
    if module in sys.modules:
        return sys.modules[module] is not None
    return importlib.util.find_spec(module) is not None


def require(what: str, **extras: tuple[str, ...]) -> None:
    """Raise unless the modules of every extra are installed, e.g. ``require("distill", distill=DISTILL)``.

    Args:
        what: what needs the modules, e.g. ``"`phreg-deploy distill`"``.

    Raises:
        BackendMissing: names every missing module, and one command that installs all of them.
    """
    missing = {extra: [module for module in modules if not is_importable(module)] for extra, modules in extras.items()}
    modules = sorted({module for part in missing.values() for module in part})
    if modules:
        names = ", ".join(repr(module) for module in modules)
        several = len(modules) > 1
        raise BackendMissing(
            f"{what} needs the module{'s' * several} {names}, which {'are' if several else 'is'} not installed. "
            f'Run: pip install "phreg-deploy[{",".join(extra for extra, part in missing.items() if part)}]"'
        )
