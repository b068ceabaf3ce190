"""Store and find the TensorRT plans of a bundle: ``engines/NAME.plan``, raw, each with a JSON sidecar.

A *plan* is the serialised file; TensorRT loads it as an *engine*. Plans are a cache: they can be built again from the
graph. A plan is executable code, so it is read only if its sha256 is the sidecar's, and a sidecar counts only if it
names the hash of this bundle's graph.
"""

from __future__ import annotations

import hashlib
import json
import platform
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from phreg_deploy.bundle.bundle import Bundle, file_digest
from phreg_deploy.bundle.manifest import GRAPH
from phreg_deploy.bundle.profiles import ProfileShapes, profiles_of
from phreg_deploy.errors import BackendMissing, PhregError, write_error
from phreg_deploy.files.atomic import write_atomic
from phreg_deploy.files.temporary import remove_dead
from phreg_deploy.json_files import read_json
from phreg_deploy.spec import Stored, plain

FOLDER = "engines"
# What TensorRT's inspector says of a plan, unread, for people and for other programs.
INSPECTED = ".inspector.json"
# Format of a sidecar.
FORMAT = 1
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
    that TensorRT was built for; the driver's if TensorRT does not tell.
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


@dataclass(frozen=True)
class StoredPlan:
    """A plan file and the content of its sidecar; ``report`` is the JSON of the build that wrote it."""

    path: Path
    key: PlanKey
    sha256: str
    profiles: list[ProfileShapes]
    report: dict[str, Any]

    def read(self) -> bytes:
        """Read the plan. Raises ``PhregError`` if the file is missing, or was changed since it was built."""
        command = f"Run: phreg-deploy build {self.path.parent.parent} --force"
        try:
            data = self.path.read_bytes()
        except OSError as error:
            raise PhregError(f"engine: {self.path} cannot be read ({error.strerror}). {command}") from None
        got = hashlib.sha256(data).hexdigest()
        if got != self.sha256:
            raise PhregError(
                f"engine: {self.path} has sha256 {got[:16]}…, expected {self.sha256[:16]}…: it was changed or damaged, "
                f"and is not run. {command}"
            )
        return data


def make_key(bundle: Bundle, gpu: str, architecture: int, tensorrt: str, cuda: int, settings: BuildSettings) -> PlanKey:
    """Return the key of the plan that ``settings`` give for this bundle on this GPU; arguments as in ``PlanKey``."""
    shapes = json.dumps(plain(profiles_of(bundle.manifest)), sort_keys=True)
    graph, precision = _graph_digest(bundle), bundle.manifest.precision
    profiles = hashlib.sha256(shapes.encode()).hexdigest()[:16]
    system = f"{platform.system().lower()}-{platform.machine()}"
    return PlanKey(graph, precision, profiles, gpu, architecture, tensorrt, cuda, system, settings)


def plan_path(bundle: Bundle, key: PlanKey) -> Path:
    """Return the file of the plan with this key."""
    return bundle.folder / FOLDER / f"{key.name}.plan"


def write_plan(bundle: Bundle, key: PlanKey, plan: bytes, inspected: str = "") -> StoredPlan:
    """Write a plan; it is not listed until ``write_sidecar`` has written its sidecar.

    ``inspected``: the JSON text of TensorRT's engine inspector, which is stored beside the plan.
    """
    path = plan_path(bundle, key)
    folder = path.parent
    try:
        folder.mkdir(exist_ok=True)
        path.with_suffix(".json").unlink(missing_ok=True)
    except OSError as error:
        raise write_error(error, folder) from error
    # A killed build leaves hundreds of megabytes.
    remove_dead(folder)
    write_atomic(path, plan)
    stored = StoredPlan(path, key, hashlib.sha256(plan).hexdigest(), profiles_of(bundle.manifest), {})
    if inspected:
        try:
            write_atomic(path.with_suffix(INSPECTED), inspected.encode())
        except BaseException:
            remove_plan(stored)
            raise
    return stored


def remove_plan(plan: StoredPlan) -> None:
    """Remove a plan that is not listed, and what belongs to it."""
    plan.path.unlink(missing_ok=True)
    plan.path.with_suffix(INSPECTED).unlink(missing_ok=True)


def write_sidecar(bundle: Bundle, plan: StoredPlan, report: dict[str, Any]) -> StoredPlan:
    """Write a plan's sidecar. From now on ``find_plan`` prefers this plan to the others that fit.

    The report gets a ``serial`` number, counted up in the bundle, because file times differ between devices and copies.
    """
    serial = 1 + max((_serial(other) for other in list_plans(bundle)), default=0)
    numbered = replace(plan, report={**report, "serial": serial})
    sidecar = {
        "format": FORMAT,
        "key": plan.key.to_json(),
        "sha256": plan.sha256,
        "profiles": plain(plan.profiles),
        "report": numbered.report,
    }
    path = plan.path.with_suffix(".json")
    try:
        write_atomic(path, (json.dumps(sidecar, indent=1, sort_keys=True) + "\n").encode())
    except PhregError:
        # Without a sidecar nothing reads the plan: free its hundreds of megabytes.
        if not path.exists():
            remove_plan(plan)
        raise
    return numbered


def prefer(bundle: Bundle, plan: StoredPlan) -> StoredPlan:
    """Make ``find_plan`` prefer this plan to the others that fit."""
    if all(_serial(other) <= _serial(plan) for other in list_plans(bundle)):
        return plan
    return write_sidecar(bundle, plan, plan.report)


def _serial(plan: StoredPlan) -> int:
    serial = plan.report.get("serial", 0)
    return serial if type(serial) is int else 0


def list_plans(bundle: Bundle) -> list[StoredPlan]:
    """Return every plan in the bundle that has a readable sidecar and was built from this bundle's graph."""
    graph, plans = _graph_digest(bundle), []
    for sidecar in sorted((bundle.folder / FOLDER).glob("*.json")):
        if sidecar.name.endswith(INSPECTED):
            continue
        try:
            plan = _read_sidecar(sidecar)
        except (OSError, ValueError, KeyError, TypeError, PhregError):
            # It is not a sidecar of ours, or damaged: the plan is built again.
            continue
        if plan.key.graph == graph:
            plans.append(plan)
    return plans


def _read_sidecar(path: Path) -> StoredPlan:
    """Read a sidecar and check the type of every field.

    Raises ``KeyError``, ``TypeError``, ``ValueError`` or ``PhregError`` if ``write_sidecar`` did not write it.
    """
    data = read_json(path)
    if data["format"] != FORMAT:
        raise ValueError(f"{path}: format {data['format']}, expected {FORMAT}")
    key, profiles = PlanKey.from_json(data["key"]), [ProfileShapes.from_json(p) for p in data["profiles"]]
    texts = (key.graph, key.precision, key.profiles, key.gpu, key.tensorrt, key.system, data["sha256"])
    numbers = (key.architecture, key.cuda)
    if not all(isinstance(text, str) for text in texts) or not all(type(number) is int for number in numbers):
        raise TypeError(f"{path}: a field of another type")
    if not profiles or not all(isinstance(d, dict) for d in (data["report"], *(p.inputs for p in profiles))):
        raise TypeError(f"{path}: no object")
    if any(len(low) != len(high) for p in profiles for low, _, high in p.inputs.values()):
        raise TypeError(f"{path}: no profile")
    return StoredPlan(path.with_suffix(".plan"), key, data["sha256"], profiles, data["report"])


def _graph_digest(bundle: Bundle) -> str:
    return bundle.manifest.files.get(GRAPH) or file_digest(bundle.graph)


def find_plan(bundle: Bundle, gpu: str, architecture: int, tensorrt: str, cuda: int) -> StoredPlan:
    """Return the newest plan that runs on this GPU, built with any settings.

    Raises ``BackendMissing`` if there is none; the message says why, and which command builds one.
    """
    plans = list_plans(bundle)
    here = make_key(bundle, gpu, architecture, tensorrt, cuda, BuildSettings())
    fitting = [plan for plan in plans if not _differences(plan.key, here)]
    if fitting:
        return max(fitting, key=lambda plan: (plan.path.exists(), _serial(plan)))
    command = f"Run on this machine: phreg-deploy build {bundle.folder}"
    if not plans:
        raise BackendMissing(f"engine: {bundle.folder} holds no TensorRT engine for its graph. {command}")
    nearest = min(plans, key=lambda plan: len(_differences(plan.key, here)))
    reasons = "; ".join(_differences(nearest.key, here))
    raise BackendMissing(f"engine: {nearest.path.name} was built {reasons}. {command}")


def _differences(key: PlanKey, here: PlanKey) -> list[str]:
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
