"""TensorRT plans in a bundle: ``engines/NAME.plan``, raw, each with a JSON sidecar. A cache, never the source.

A plan is executable: it is read only when its hash is the sidecar's, and a sidecar is believed only for this bundle's graph.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import platform
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from phreg_deploy.bundle.bundle import Bundle, file_digest
from phreg_deploy.bundle.manifest import GRAPH, Manifest
from phreg_deploy.errors import BackendMissing, PhregError, write_error
from phreg_deploy.files.atomic import write_atomic
from phreg_deploy.files.temporary import remove_dead
from phreg_deploy.json_files import read_json
from phreg_deploy.spec import Stored

FOLDER = "engines"
FORMAT = 1  # of a sidecar
COMPATIBILITY = ("none", "version", "ampere+", "same-cc")


@dataclass(frozen=True)
class Shapes(Stored):
    """One optimization profile: input -> (smallest, best, largest) shape."""

    inputs: dict[str, Any]

    def holds(self, shapes: dict[str, tuple[int, ...]]) -> bool:
        """Whether inputs of these shapes run in this profile."""
        return all(name in self.inputs and _within(self.inputs[name], shape) for name, shape in shapes.items())


def _within(profile: Any, shape: tuple[int, ...]) -> bool:
    lowest, _, highest = profile
    return len(shape) == len(lowest) and all(a <= side <= b for a, side, b in zip(lowest, shape, highest))


@dataclass(frozen=True)
class BuildSettings(Stored):
    """How an engine is built.

    ``tf32``: let FP32 products drop to 10 bits of mantissa; parity wants it off. ``compatibility``: "none", "version" (plan
    for later TensorRT), "ampere+" or "same-cc" (plan for other GPUs). ``effort``: TensorRT's builder optimization level, 0-5.
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
class Key(Stored):
    """What a plan depends on. ``gpu``: the device's name; ``architecture``: compute capability times ten."""

    graph: str
    precision: str
    profiles: str
    gpu: str
    architecture: int
    tensorrt: str
    cuda: int  # major
    system: str
    settings: dict[str, Any] = field(default_factory=dict)

    @property
    def name(self) -> str:
        whole = hashlib.sha256(json.dumps(asdict(self), sort_keys=True).encode()).hexdigest()
        return f"{self.graph[:12]}-{whole[:8]}-sm{self.architecture}-trt{self.tensorrt}-cuda{self.cuda}"


@dataclass(frozen=True)
class Engine:
    """A plan that was found, with what its sidecar says."""

    path: Path
    key: Key
    sha256: str
    profiles: list[Shapes]
    report: dict[str, Any]

    def read(self) -> bytes:
        """The plan's bytes, hash checked.

        Raises:
            PhregError: missing or changed since it was built.
        """
        try:
            data = self.path.read_bytes()
        except OSError as error:
            raise PhregError(
                f"engine: {self.path} cannot be read ({error.strerror}). Run: phreg-deploy build {self.path.parent.parent} --force"
            ) from None
        got = hashlib.sha256(data).hexdigest()
        if got != self.sha256:
            raise PhregError(
                f"engine: {self.path} has sha256 {got[:16]}…, expected {self.sha256[:16]}…: it was changed or damaged, and is not run. "
                f"Run: phreg-deploy build {self.path.parent.parent} --force"
            )
        return data


def profiles_of(manifest: Manifest) -> list[Shapes]:
    """The optimization profiles of a bundle: one for a fixed or ranging size, one per size of a list.

    Each covers the bundle's whole range of batches and is tuned for the best one. Where the smallest batch is not the best,
    it has a profile of its own before them: tactics that are right for a full batch cost a single frame its latency.
    """
    batches, patch, width = manifest.batches, manifest.model.patch, manifest.model.width
    sizes = manifest.sizes.sizes
    triples = [sizes] if manifest.sizes.mode == "range" else [(size,) * 3 for size in sizes]
    found = []
    full = (batches.lowest, batches.best, batches.highest)
    alone = [(batches.lowest,) * 3] if batches.lowest < batches.best else []
    for numbers, triple in itertools.product([*alone, full], triples):
        inputs: dict[str, Any] = {"image": [[b, *size, 3] for b, size in zip(numbers, triple)]}
        if "pos_embed" in manifest.inputs:
            inputs["pos_embed"] = [[1, (h // patch[0]) * (w // patch[1]), width] for h, w in triple]
        found.append(Shapes(inputs))
    return found


def make_key(bundle: Bundle, gpu: str, architecture: int, tensorrt: str, cuda: int, settings: BuildSettings) -> Key:
    shapes = json.dumps([profile.to_json() for profile in profiles_of(bundle.manifest)], sort_keys=True)
    return Key(
        _graph_digest(bundle), bundle.manifest.precision, hashlib.sha256(shapes.encode()).hexdigest()[:16],
        gpu, architecture, tensorrt, cuda, f"{platform.system().lower()}-{platform.machine()}", settings.to_json(),
    )  # fmt: skip


def write_plan(bundle: Bundle, key: Key, plan: bytes) -> Engine:
    """Write a plan, which counts for nothing until ``write_sidecar`` has written its sidecar."""
    folder = bundle.folder / FOLDER
    path = folder / f"{key.name}.plan"
    try:
        folder.mkdir(exist_ok=True)
        path.with_suffix(".json").unlink(missing_ok=True)
    except OSError as error:
        raise write_error(error, folder) from error
    remove_dead(folder)  # a killed build's plan is hundreds of megabytes
    write_atomic(path, plan)
    return Engine(path, key, hashlib.sha256(plan).hexdigest(), profiles_of(bundle.manifest), {})


def write_sidecar(bundle: Bundle, engine: Engine, report: dict[str, Any]) -> Engine:
    """Write an engine's sidecar: from now on it is the one that is taken of several that fit.

    ``serial`` in the report says so, counted up in the bundle: clocks of devices, and copies, do not tell which is newer.
    """
    serial = 1 + max((_serial(other) for other in list_engines(bundle)), default=0)
    told = replace(engine, report={**report, "serial": serial})
    sidecar = {
        "format": FORMAT, "key": asdict(engine.key), "sha256": engine.sha256, "profiles": [p.to_json() for p in engine.profiles],
        "report": told.report,
    }  # fmt: skip
    text = json.dumps(sidecar, indent=1, sort_keys=True) + "\n"
    try:
        write_atomic(engine.path.with_suffix(".json"), text.encode())
    except PhregError:
        if not engine.path.with_suffix(".json").exists():
            engine.path.unlink(missing_ok=True)  # hundreds of megabytes that nothing would ever read
        raise
    return told


def prefer(bundle: Bundle, engine: Engine) -> Engine:
    """Make an engine the one that is taken of several that fit."""
    if all(_serial(other) <= _serial(engine) for other in list_engines(bundle)):
        return engine
    return write_sidecar(bundle, engine, engine.report)


def _serial(engine: Engine) -> int:
    serial = engine.report.get("serial", 0)
    return serial if type(serial) is int else 0


def list_engines(bundle: Bundle) -> list[Engine]:
    """Every engine in the bundle whose sidecar can be read and is of this bundle's graph."""
    graph, found = _graph_digest(bundle), []
    for sidecar in sorted((bundle.folder / FOLDER).glob("*.json")):
        try:
            engine = _read_sidecar(sidecar)
        except (OSError, ValueError, KeyError, TypeError, PhregError):
            continue  # not a sidecar of ours: the engine is built again
        if engine.key.graph == graph:
            found.append(engine)
    return found


def _read_sidecar(path: Path) -> Engine:
    """Raises ``KeyError``, ``TypeError``, ``ValueError`` or ``PhregError`` unless it is a sidecar of ours, to the last type."""
    data = read_json(path)
    if data["format"] != FORMAT:
        raise ValueError(f"{path}: format {data['format']}, expected {FORMAT}")
    key, profiles = Key.from_json(data["key"]), [Shapes.from_json(p) for p in data["profiles"]]
    words = (key.graph, key.precision, key.profiles, key.gpu, key.tensorrt, key.system, data["sha256"])
    numbers = (key.architecture, key.cuda)
    if not all(isinstance(w, str) for w in words) or not all(type(n) is int for n in numbers):
        raise TypeError(f"{path}: a fact of another type")
    BuildSettings.from_json(key.settings)
    if not profiles or not all(isinstance(d, dict) for d in (data["report"], *(p.inputs for p in profiles))):
        raise TypeError(f"{path}: no object")
    if any(len(low) != len(high) for p in profiles for low, _, high in p.inputs.values()):
        raise TypeError(f"{path}: no profile")
    return Engine(path.with_suffix(".plan"), key, data["sha256"], profiles, data["report"])


def _graph_digest(bundle: Bundle) -> str:
    return bundle.manifest.files.get(GRAPH) or file_digest(bundle.graph)


def find_engine(bundle: Bundle, gpu: str, architecture: int, tensorrt: str, cuda: int) -> Engine:
    """The engine that runs here, of whatever settings; the newest of several.

    Raises:
        BackendMissing: none was built, or only for something else, in words and with the command that mends it.
    """
    engines = list_engines(bundle)
    here = make_key(bundle, gpu, architecture, tensorrt, cuda, BuildSettings())
    fitting = [e for e in engines if not _differences(e.key, here)]
    if fitting:
        return max(fitting, key=lambda e: (e.path.exists(), _serial(e)))
    command = f"Run on this machine: phreg-deploy build {bundle.folder}"
    if not engines:
        raise BackendMissing(f"engine: {bundle.folder} holds no TensorRT engine for its graph. {command}")
    nearest = min(engines, key=lambda e: len(_differences(e.key, here)))
    raise BackendMissing(
        f"engine: {nearest.path.name} was built {'; '.join(_differences(nearest.key, here))}. {command}"
    )


def _differences(key: Key, here: Key) -> list[str]:
    """Why a plan does not run here, as far as its key tells."""
    compatibility = key.settings.get("compatibility", "none")
    found = []
    ampere = compatibility == "ampere+" and here.architecture >= 80 and key.architecture >= 80
    same = compatibility == "same-cc" and key.architecture == here.architecture
    if not ampere and not same and (key.gpu, key.architecture) != (here.gpu, here.architecture):
        found.append(
            f"for {key.gpu} (SM {key.architecture / 10:.1f}), and this is {here.gpu} (SM {here.architecture / 10:.1f})"
        )
    there, now = _numbers(key.tensorrt), _numbers(here.tensorrt)  # NVIDIA promises newer ones of the same major version
    later = compatibility == "version" and now[:1] == there[:1] and now >= there
    if key.tensorrt != here.tensorrt and not later:
        found.append(f"with TensorRT {key.tensorrt}, and this is {here.tensorrt}")
    if key.cuda != here.cuda:
        found.append(f"with CUDA {key.cuda}, and this is CUDA {here.cuda}")
    if key.system != here.system:
        found.append(f"on {key.system}, and this is {here.system}")
    if key.profiles != here.profiles:
        found.append("for other batches or sizes than the manifest's")
    return found


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in version.split(".") if part.isdigit())
