"""The key of a TensorRT plan: everything it depends on, and on which machines it runs."""

from __future__ import annotations

import hashlib
import json
import platform
from dataclasses import dataclass
from typing import Any

from phreg_deploy.bundle.bundle import Bundle, file_digest
from phreg_deploy.bundle.manifest import GRAPH
from phreg_deploy.bundle.profiles import profiles_of
from phreg_deploy.errors import PhregError
from phreg_deploy.spec import Stored, plain

COMPATIBILITY = ("none", "version", "ampere+", "same-cc")


@dataclass(frozen=True)
class BuildSettings(Stored):
    """How a plan is built.

    ``tf32``: compute FP32 products with 10 bits of mantissa, which fails the FP32 parity gate. ``compatibility``:
    "none", "version" (for later TensorRT versions too), "ampere+" or "same-cc" (for other GPUs too). ``effort``:
    TensorRT's builder optimization level, 0-5.
    """

    tf32: bool = False
    compatibility: str = "none"
    effort: int = 3

    def __post_init__(self) -> None:
        if self.compatibility not in COMPATIBILITY:
            raise PhregError(f"compatibility: got {self.compatibility!r}, expected one of {', '.join(COMPATIBILITY)}.")
        if not 0 <= self.effort <= 5:
            raise PhregError(f"effort: got {self.effort}, expected 0 (quick) to 5 (thorough).")


@dataclass(frozen=True)
class PlanKey(Stored):
    """Everything a plan depends on.

    ``graph``: sha256 of ``model.onnx``. ``profiles``: digest of the optimization profiles. ``gpu``: the device's name
    and number of multiprocessors. ``architecture``: compute capability times ten. ``cuda``: the major version of CUDA
    that TensorRT was built for; the driver's if TensorRT does not say.
    """

    graph: str
    precision: str
    profiles: str
    gpu: str
    architecture: int
    tensorrt: str
    cuda: int
    system: str
    settings: BuildSettings

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> PlanKey:
        """Build the key and its settings; raises as ``Stored.from_json``, or ``KeyError`` without settings."""
        return super().from_json({**data, "settings": BuildSettings.from_json(data["settings"])})

    @property
    def name(self) -> str:
        """The plan's file name without suffix; every field of the key changes it."""
        digest = hashlib.sha256(json.dumps(self.to_json(), sort_keys=True).encode()).hexdigest()
        return f"{self.graph[:12]}-{digest[:8]}-sm{self.architecture}-trt{self.tensorrt}-cuda{self.cuda}"


def make_key(bundle: Bundle, gpu: str, architecture: int, tensorrt: str, cuda: int, settings: BuildSettings) -> PlanKey:
    """Return the key of the plan that ``settings`` give for this bundle on this GPU; arguments as in ``PlanKey``."""
    shapes = json.dumps(plain(profiles_of(bundle.manifest)), sort_keys=True)
    graph, precision = graph_digest(bundle), bundle.manifest.precision
    profiles = hashlib.sha256(shapes.encode()).hexdigest()[:16]
    system = f"{platform.system().lower()}-{platform.machine()}"
    return PlanKey(graph, precision, profiles, gpu, architecture, tensorrt, cuda, system, settings)


def graph_digest(bundle: Bundle) -> str:
    """Return the sha256 of a bundle's graph."""
    return bundle.manifest.files.get(GRAPH) or file_digest(bundle.graph)


def differences(key: PlanKey, here: PlanKey) -> list[str]:
    """Return the reasons why a plan with this key does not run here; empty if it does."""
    reasons = []
    if (key.gpu, key.architecture) != (here.gpu, here.architecture) and not _runs_on_other_gpu(key, here):
        built_for = f"{key.gpu} (SM {key.architecture / 10:.1f})"
        reasons.append(f"for {built_for}, and this is {here.gpu} (SM {here.architecture / 10:.1f})")
    if key.tensorrt != here.tensorrt and not _runs_on_later_tensorrt(key, here):
        reasons.append(f"with TensorRT {key.tensorrt}, and this is {here.tensorrt}")
    if key.cuda != here.cuda:
        reasons.append(f"with CUDA {key.cuda}, and this is CUDA {here.cuda}")
    if key.system != here.system:
        reasons.append(f"on {key.system}, and this is {here.system}")
    if key.profiles != here.profiles:
        reasons.append("for other batches or sizes than the manifest's")
    return reasons


def _runs_on_other_gpu(key: PlanKey, here: PlanKey) -> bool:
    if key.settings.compatibility == "ampere+":
        return here.architecture >= 80 and key.architecture >= 80
    return key.settings.compatibility == "same-cc" and key.architecture == here.architecture


def _runs_on_later_tensorrt(key: PlanKey, here: PlanKey) -> bool:
    """Apply NVIDIA's promise: a version-compatible plan runs in later releases of the same major version."""
    built, now = _version_numbers(key.tensorrt), _version_numbers(here.tensorrt)
    return key.settings.compatibility == "version" and now[:1] == built[:1] and now >= built


def _version_numbers(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in version.split(".") if part.isdigit())
