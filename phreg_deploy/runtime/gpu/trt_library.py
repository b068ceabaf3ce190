"""Finds TensorRT and turns what it logs into sentences. One code path for 10.3 to 11.x, on the names that all of them have."""

from __future__ import annotations

import importlib
from typing import Any

from phreg_deploy.errors import BackendMissing, PhregError
from phreg_deploy.extras import is_importable

OLDEST = (10, 3)  # JetPack 6.2's
KEPT = 40  # messages kept of a build or a load
EXTRA = 'Run: pip install "phreg-deploy[trt]" (on a Jetson TensorRT comes with JetPack: make the environment with --system-site-packages)'


def load_tensorrt(lean: bool = False) -> Any:
    """The module ``tensorrt``, or with ``lean`` also ``tensorrt_lean``, which runs version-compatible plans and builds none.

    Raises:
        BackendMissing: not installed, a library of it is missing, or older than 10.3.
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


def make_logger(trt: Any) -> Any:
    """A TensorRT logger that keeps warnings and errors instead of printing them.

    ``messages``: (severity in words, text) in order, the latest ``KEPT``; ``reason()``: the last error in one line.
    """

    class TrtLogger(trt.ILogger):  # type: ignore[misc]
        def __init__(self) -> None:
            trt.ILogger.__init__(self)
            self.messages: list[tuple[str, str]] = []

        def log(self, severity: Any, msg: str) -> None:
            if int(severity) <= int(trt.ILogger.Severity.WARNING):
                kind = "warning" if severity == trt.ILogger.Severity.WARNING else "error"
                self.messages = [*self.messages[1 - KEPT :], (kind, msg.strip())]

        def reason(self) -> str:
            errors = [text for kind, text in self.messages if kind == "error"]
            return errors[-1].splitlines()[0] if errors else "TensorRT gave no reason"

        def warnings(self) -> list[str]:
            return [text.splitlines()[0] for kind, text in self.messages if kind == "warning" and text]

    return TrtLogger()


def deserialise(trt: Any, plan: bytes, diary: Any, host_code: bool = False) -> tuple[Any, Any]:
    """A plan as ``(runtime, engine)``; the runtime must outlive the engine.

    Args:
        host_code: allow code of the host in the plan, which a version-compatible one carries its own runtime as.

    Raises:
        BackendMissing: no runtime can be made here. PhregError: the plan is refused.
    """
    try:
        runtime = trt.Runtime(diary)
    except (TypeError, RuntimeError) as error:  # older bindings where CUDA does not start
        raise BackendMissing(f"TensorRT: {trt.__version__} cannot start here: {error}; {diary.reason()}.") from None
    if host_code:
        runtime.engine_host_code_allowed = True
    engine = runtime.deserialize_cuda_engine(plan)
    if engine is None:
        raise PhregError(
            f"engine: TensorRT {trt.__version__} refuses the plan: {diary.reason()}. Build it again on this machine with `phreg-deploy build --force`."
        )
    return runtime, engine
