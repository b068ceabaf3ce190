"""Import TensorRT, keep its log messages, and deserialise plans, with names that 10.3 to 11.x all have."""

from __future__ import annotations

import contextlib
import importlib
import importlib.metadata
import logging
from typing import Any

from phreg_deploy.errors import BackendMissing, PhregError
from phreg_deploy.extras import is_importable

# The version in JetPack 6.2.
OLDEST = (10, 3)
# Major versions of CUDA that wheels of TensorRT were or may be built for, the newest first.
WHEELS = (14, 13, 12, 11)
# Hears every message of TensorRT but the verbose ones, all as DEBUG, so that none is printed unless you ask for it.
log = logging.getLogger("phreg_deploy.tensorrt")
# Messages that are kept of a build or a load.
KEPT = 40
EXTRA = (
    'Run: pip install "phreg-deploy[trt]" (on a Jetson TensorRT comes with JetPack: make the environment with '
    "--system-site-packages)"
)


def load_tensorrt(lean: bool = False) -> Any:
    """Import ``tensorrt``, or with ``lean`` also ``tensorrt_lean``, which only runs version-compatible plans.

    Raises:
        BackendMissing: TensorRT is not installed, lacks a library, or is older than 10.3.
    """
    for name in ("tensorrt", *(["tensorrt_lean"] if lean else [])):
        if not is_importable(name):
            continue
        try:
            trt = importlib.import_module(name)
        except (ImportError, OSError) as error:
            raise BackendMissing(
                f"TensorRT: the module {name} is there, but cannot be imported: {error}. {EXTRA}"
            ) from None
        if version_of(trt) < OLDEST:
            raise BackendMissing(f"TensorRT: got {trt.__version__}, expected at least {OLDEST[0]}.{OLDEST[1]}. {EXTRA}")
        return trt
    raise BackendMissing(f"TensorRT: it is not installed. {EXTRA}")


def version_of(trt: Any) -> tuple[int, ...]:
    return tuple(int(part) for part in trt.__version__.split(".")[:3] if part.isdigit())


def wheel_cuda(trt: Any) -> int | None:
    """The major version of CUDA that TensorRT's wheel was built for; None where TensorRT is not from a wheel."""
    kind = "tensorrt-lean" if "lean" in trt.__name__ else "tensorrt"
    for major in WHEELS:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            importlib.metadata.version(f"{kind}-cu{major}-bindings")
            return major
    return None


def mend_wheel(wheel: int, driver: int) -> str:
    """The command that replaces TensorRT of CUDA ``wheel`` by the one of CUDA ``driver``."""
    parts = " ".join(f"tensorrt{part}" for part in ("", f"-cu{wheel}", f"-cu{wheel}-bindings", f"-cu{wheel}-libs"))
    return f'pip uninstall -y {parts}; pip install "tensorrt-cu{driver}>={OLDEST[0]}.{OLDEST[1]}"'


def plan_cuda(trt: Any, driver: int) -> int:
    """The major version of CUDA that plans depend on here: that of TensorRT's wheel, or else the driver's.

    Args:
        driver: the CUDA version that the driver supports, e.g. 12080.

    Raises:
        BackendMissing: TensorRT was built for a newer major version than the driver's.
    """
    wheel, major = wheel_cuda(trt), driver // 1000
    if wheel is not None and wheel > major:
        raise BackendMissing(
            f"TensorRT: {trt.__version__} is built for CUDA {wheel}, and the driver is of CUDA {major}. Update the "
            f"driver, or run: {mend_wheel(wheel, major)}"
        )
    return wheel or major


def make_logger(trt: Any) -> Any:
    """Make a TensorRT logger that keeps warnings and errors instead of printing them.

    ``messages``: ("warning" or "error", text) in order, the latest ``KEPT``; ``reason()``: the last
    error's first line.
    """

    class TrtLogger(trt.ILogger):  # type: ignore[misc]
        def __init__(self) -> None:
            trt.ILogger.__init__(self)
            self.messages: list[tuple[str, str]] = []

        def log(self, severity: Any, msg: str) -> None:
            if int(severity) <= int(trt.ILogger.Severity.INFO):
                log.debug("%s: %s", severity.name, msg)
            if int(severity) <= int(trt.ILogger.Severity.WARNING):
                kind = "warning" if severity == trt.ILogger.Severity.WARNING else "error"
                self.messages = [*self.messages[1 - KEPT :], (kind, msg.strip())]

        def reason(self) -> str:
            errors = [text for kind, text in self.messages if kind == "error"]
            return errors[-1].splitlines()[0] if errors else "TensorRT gave no reason"

        def warnings(self) -> list[str]:
            return [text.splitlines()[0] for kind, text in self.messages if kind == "warning" and text]

    return TrtLogger()


def deserialise(trt: Any, plan: bytes, logger: Any, host_code: bool = False) -> tuple[Any, Any]:
    """Load a plan as ``(runtime, engine)``; the runtime must outlive the engine.

    Args:
        host_code: allow host code in the plan; a version-compatible plan carries its own runtime as host code.

    Raises:
        BackendMissing: TensorRT cannot start here.
        PhregError: TensorRT refuses the plan.
    """
    try:
        runtime = trt.Runtime(logger)
    except (TypeError, RuntimeError) as error:
        # Older bindings raise these if CUDA does not start.
        raise BackendMissing(f"TensorRT: {trt.__version__} cannot start here: {error}; {logger.reason()}.") from None
    if host_code:
        runtime.engine_host_code_allowed = True
    engine = runtime.deserialize_cuda_engine(plan)
    if engine is None:
        raise PhregError(
            f"engine: TensorRT {trt.__version__} refuses the plan: {logger.reason()}. Build it again on this machine "
            "with `phreg-deploy build --force`."
        )
    return runtime, engine
