"""Store small plans in a bundle, change their sidecars, and read why none is found."""

import json

import pytest

from phreg_deploy.bundle.plan_keys import BuildSettings, make_key
from phreg_deploy.bundle.plans import draft_plan, find_plan, keep_plan
from phreg_deploy.errors import BackendMissing

# Name, compute capability times ten, TensorRT, and CUDA of a Jetson.
ORIN = ("Orin", 87, "10.3.0", 12)
PLAN = bytes(range(256)) * 400


def store_plan(bundle, gpu=ORIN, plan=PLAN, report=None, **settings):
    """Store a plan and its sidecar in a bundle, as if it were built on ``gpu`` with ``settings``."""
    key = make_key(bundle, *gpu, BuildSettings(**settings))
    with draft_plan(bundle, key, plan) as draft:
        return keep_plan(bundle, draft, report or {"seconds": 1.5})


def change_sidecar(stored, **changes):
    """Change top-level values of a sidecar, and with ``key={...}`` values of its key."""
    sidecar = stored.path.with_suffix(".json")
    data = json.loads(sidecar.read_text())
    data["key"].update(changes.pop("key", {}))
    sidecar.write_text(json.dumps({**data, **changes}))


def why_refused(bundle, gpu=ORIN) -> str:
    """Assert that no plan is found for ``gpu``, and that the message ends with the command; return the message."""
    with pytest.raises(BackendMissing) as caught:
        find_plan(bundle, *gpu)
    assert str(caught.value).endswith(f"Run on this machine: phreg-deploy build {bundle.folder}")
    return str(caught.value)
