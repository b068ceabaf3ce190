"""Store and find the TensorRT plans of a bundle: ``engines/NAME.plan``, raw, each with a JSON sidecar.

A *plan* is the serialised file; TensorRT loads it as an *engine*. Plans are a cache: they can be built again from the
graph. A plan is executable code, so it is read only if its sha256 is the sidecar's, and a sidecar counts only if it
names the hash of this bundle's graph.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from phreg_deploy.bundle.bundle import Bundle, file_digest
from phreg_deploy.bundle.manifest import ENGINES
from phreg_deploy.bundle.plan_keys import BuildSettings, PlanKey, differences, graph_digest, make_key
from phreg_deploy.bundle.profiles import ProfileShapes, profiles_of
from phreg_deploy.errors import BackendMissing, PhregError, write_error
from phreg_deploy.files.atomic import draft_file, write_atomic
from phreg_deploy.files.temporary import remove_dead
from phreg_deploy.json_files import read_json
from phreg_deploy.spec import plain

# What TensorRT's inspector says of a plan, unread, for people and for other programs.
INSPECTED = ".inspector.json"
# Format of a sidecar.
FORMAT = 1


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


def plan_path(bundle: Bundle, key: PlanKey) -> Path:
    """Return the file of the plan with this key."""
    return bundle.folder / ENGINES / f"{key.name}.plan"


@contextmanager
def draft_plan(bundle: Bundle, key: PlanKey, plan: bytes) -> Iterator[StoredPlan]:
    """Write a plan under a temporary name, for a block that examines it and may keep it by ``keep_plan``.

    The bundle's plan with the same key, if there is one, stays as it is until then. Raises ``PhregError`` if the system
    refuses to write.
    """
    path = plan_path(bundle, key)
    try:
        path.parent.mkdir(exist_ok=True)
    except OSError as error:
        raise write_error(error, path.parent) from error
    # A killed build leaves hundreds of megabytes.
    remove_dead(path.parent)
    with draft_file(path, plan) as draft:
        yield StoredPlan(draft, key, hashlib.sha256(plan).hexdigest(), profiles_of(bundle.manifest), {})


def keep_plan(bundle: Bundle, draft: StoredPlan, report: dict[str, Any], inspected: str = "") -> StoredPlan:
    """Give a draft its name and its sidecar. From now on ``find_plan`` prefers this plan to the others that fit.

    ``inspected``: the JSON text of TensorRT's engine inspector, which is stored beside the plan. While the files get
    their names, the sidecar fits the old plan and the new one, so a killed process leaves one of them.
    """
    plans = list_plans(bundle)
    stored = _numbered(plans, replace(draft, path=plan_path(bundle, draft.key)), report)
    sidecar, text = stored.path.with_suffix(".json"), stored.path.with_suffix(INSPECTED)
    old = next((plan for plan in plans if plan.path == stored.path), None)
    with (
        draft_file(text, inspected.encode()) as new_text,
        draft_file(sidecar, _sidecar(stored, old)) as for_both,
        draft_file(sidecar, _sidecar(stored)) as new_sidecar,
    ):
        if old is None:
            # One that does not count.
            sidecar.unlink(missing_ok=True)
        else:
            os.replace(for_both, sidecar)
        os.replace(draft.path, stored.path)
        if inspected:
            os.replace(new_text, text)
        else:
            text.unlink(missing_ok=True)
        os.replace(new_sidecar, sidecar)
    return stored


def _numbered(plans: Iterable[StoredPlan], plan: StoredPlan, report: dict[str, Any]) -> StoredPlan:
    """Add the ``serial`` number, counted up over all ``plans``: file times differ between devices and copies."""
    others = (other for other in plans if other.key != plan.key)
    return replace(plan, report={**report, "serial": 1 + max(map(_serial, others), default=0)})


def _sidecar(plan: StoredPlan, old: StoredPlan | None = None) -> bytes:
    content = {"format": FORMAT, "key": plan.key.to_json(), **_facts(plan)}
    if old is not None:
        content["replaces"] = _facts(old)
    return (json.dumps(content, indent=1, sort_keys=True) + "\n").encode()


def _facts(plan: StoredPlan) -> dict[str, Any]:
    return {"sha256": plan.sha256, "profiles": plain(plan.profiles), "report": plan.report}


def prefer(bundle: Bundle, plan: StoredPlan) -> StoredPlan:
    """Make ``find_plan`` prefer this plan to the others that fit."""
    plans = list_plans(bundle)
    if all(_serial(other) <= _serial(plan) for other in plans):
        return plan
    preferred = _numbered(plans, plan, plan.report)
    write_atomic(plan.path.with_suffix(".json"), _sidecar(preferred))
    return preferred


def _serial(plan: StoredPlan) -> int:
    serial = plan.report.get("serial", 0)
    return serial if type(serial) is int else 0


def list_plans(bundle: Bundle) -> list[StoredPlan]:
    """Return every plan in the bundle that has a readable sidecar and was built from this bundle's graph."""
    graph, plans = graph_digest(bundle), []
    for sidecar in sorted((bundle.folder / ENGINES).glob("*.json")):
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

    Raises ``KeyError``, ``TypeError``, ``ValueError`` or ``PhregError`` if it is none of ours.
    """
    data, plan = read_json(path), path.with_suffix(".plan")
    if data["format"] != FORMAT:
        raise ValueError(f"{path}: format {data['format']}, expected {FORMAT}")
    if "replaces" in data and file_digest(plan) == data["replaces"]["sha256"]:
        # A build was killed before it replaced the plan.
        data |= data["replaces"]
    key, profiles = PlanKey.from_json(data["key"]), [ProfileShapes.from_json(p) for p in data["profiles"]]
    texts = (key.graph, key.precision, key.profiles, key.gpu, key.tensorrt, key.system, data["sha256"])
    numbers = (key.architecture, key.cuda)
    if not all(isinstance(text, str) for text in texts) or not all(type(number) is int for number in numbers):
        raise TypeError(f"{path}: a field of another type")
    if not profiles or not all(isinstance(d, dict) for d in (data["report"], *(p.inputs for p in profiles))):
        raise TypeError(f"{path}: no object")
    if any(len(low) != len(high) for p in profiles for low, _, high in p.inputs.values()):
        raise TypeError(f"{path}: no profile")
    return StoredPlan(plan, key, data["sha256"], profiles, data["report"])


def find_plan(bundle: Bundle, gpu: str, architecture: int, tensorrt: str, cuda: int) -> StoredPlan:
    """Return the newest plan that runs on this GPU, built with any settings.

    Raises ``BackendMissing`` if there is none; the message says why, and which command builds one.
    """
    plans = list_plans(bundle)
    here = make_key(bundle, gpu, architecture, tensorrt, cuda, BuildSettings())
    fitting = [plan for plan in plans if not differences(plan.key, here)]
    if fitting:
        return max(fitting, key=lambda plan: (plan.path.exists(), _serial(plan)))
    command = f"Run on this machine: phreg-deploy build {bundle.folder}"
    if not plans:
        raise BackendMissing(f"engine: {bundle.folder} holds no TensorRT engine for its graph. {command}")
    nearest = min(plans, key=lambda plan: len(differences(plan.key, here)))
    reasons = "; ".join(differences(nearest.key, here))
    raise BackendMissing(f"engine: {nearest.path.name} was built {reasons}. {command}")
