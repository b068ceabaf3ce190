"""TensorRT plans in a bundle are found again, and are not run if they were changed, damaged or half-written."""

import dataclasses
import errno
import json
import os
from pathlib import Path

import pytest

from phreg_deploy.bundle.bundle import Bundle
from phreg_deploy.bundle.manifest import ENGINES
from phreg_deploy.bundle.plans import find_plan, list_plans, prefer
from phreg_deploy.bundle.profiles import profiles_of
from phreg_deploy.bundle.writing import write_manifest
from phreg_deploy.errors import PhregError
from tests.cli_helpers import leftovers
from tests.plans import ORIN, PLAN, change_sidecar, store_plan, why_refused

resource = pytest.importorskip("resource")
pytestmark = pytest.mark.usefixtures("torch")


def test_a_stored_plan_is_found(bundle_copy):
    assert list_plans(bundle_copy) == []
    assert "holds no TensorRT engine" in why_refused(bundle_copy)
    stored = store_plan(bundle_copy)
    assert find_plan(bundle_copy, *ORIN) == stored
    assert stored.read() == PLAN == stored.path.read_bytes(), (
        "the file is the plan alone, as trtexec and Triton read it"
    )
    assert {p.suffix for p in (bundle_copy.folder / ENGINES).iterdir()} == {".plan", ".json"}
    assert leftovers(bundle_copy.folder) == []
    assert store_plan(bundle_copy, plan=b"second").path == stored.path
    assert find_plan(bundle_copy, *ORIN).read() == b"second"
    assert find_plan(bundle_copy, *ORIN).report == {"seconds": 1.5, "serial": 1}
    assert find_plan(bundle_copy, *ORIN).profiles == profiles_of(bundle_copy.manifest)


def test_the_newest_of_several_is_taken(bundle_copy):
    first, second = store_plan(bundle_copy, plan=b"first"), store_plan(bundle_copy, plan=b"second", effort=5)
    os.utime(first.path, (2_000, 2_000))  # the times of files do not matter
    os.utime(second.path, (1_000, 1_000))
    assert find_plan(bundle_copy, *ORIN).read() == b"second"
    assert prefer(bundle_copy, second) == second
    assert prefer(bundle_copy, first).report["serial"] == 3
    assert find_plan(bundle_copy, *ORIN).read() == b"first"
    assert prefer(bundle_copy, second).report["serial"] == 4
    assert find_plan(bundle_copy, *ORIN).read() == b"second"
    second.path.unlink()
    assert find_plan(bundle_copy, *ORIN).read() == b"first", "a plan whose file is missing is not preferred"
    assert len(list_plans(bundle_copy)) == 2


@pytest.mark.parametrize(
    "change", [lambda d: d[:-1], lambda d: d[:500] + bytes([d[500] ^ 1]) + d[501:], lambda d: b"", lambda d: d + b"\0"]
)
def test_a_changed_plan_is_not_run(bundle_copy, change):
    stored = store_plan(bundle_copy)
    stored.path.write_bytes(change(PLAN))
    with pytest.raises(PhregError, match="was changed or damaged, and is not run") as caught:
        find_plan(bundle_copy, *ORIN).read()
    assert str(caught.value).endswith(f"Run: phreg-deploy build {bundle_copy.folder} --force")


def test_a_plan_whose_file_is_missing_is_refused(bundle_copy):
    store_plan(bundle_copy).path.unlink()
    with pytest.raises(PhregError, match=r"cannot be read \(No such file") as caught:
        find_plan(bundle_copy, *ORIN).read()
    assert str(caught.value).endswith(f"Run: phreg-deploy build {bundle_copy.folder} --force")


DAMAGE = [
    lambda text: text[: len(text) // 2],
    lambda text: "",
    lambda text: "[]",
    lambda text: "null",
    lambda text: "[1, 2",
    lambda text: text.replace('"sha256"', '"sha1"'),
    lambda text: text.replace('"graph"', '"grape"'),
    lambda text: text.replace('"architecture": 87,', ""),
    lambda text: text.replace('"cuda"', '"cuda": 12, "more"'),
    lambda text: json.dumps({**json.loads(text), "key": "all"}),
    lambda text: text.encode("utf-16"),
    lambda text: json.dumps({**json.loads(text), "profiles": [{}]}),
]


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_sidecar_does_not_count(bundle_copy, damage):
    sidecar = store_plan(bundle_copy).path.with_suffix(".json")
    changed = damage(sidecar.read_text())
    sidecar.write_bytes(changed if isinstance(changed, bytes) else changed.encode())
    assert list_plans(bundle_copy) == []
    assert "holds no TensorRT engine" in why_refused(bundle_copy)
    store_plan(bundle_copy)
    assert find_plan(bundle_copy, *ORIN).read() == PLAN, "building again repairs it"


WRONG_TYPES = {
    "format": {"format": 2},
    "settings": {"key": {"settings": None}},
    "compatibility": {"key": {"settings": {"compatibility": []}}},
    "architecture": {"key": {"architecture": "8.7"}},
    "sha256": {"sha256": None},
    "profiles": {"profiles": [{"inputs": None}]},
    "gpu": {"key": {"gpu": None}},
    "tensorrt": {"key": {"tensorrt": 10.3, "settings": {"compatibility": "version"}}},
    "report": {"report": None},
}


@pytest.mark.parametrize("which", WRONG_TYPES)
def test_a_sidecar_of_another_format_or_of_wrong_types_does_not_count(bundle_copy, which):
    change_sidecar(store_plan(bundle_copy), **WRONG_TYPES[which])
    assert list_plans(bundle_copy) == []
    assert "holds no TensorRT engine" in why_refused(bundle_copy, ("Thor", 110, "11.4.1", 13))


@pytest.mark.parametrize("number", [errno.EROFS, errno.EACCES, errno.ENOSPC])
@pytest.mark.parametrize("call", ["mkdir", "replace", "unlink"])
def test_a_folder_that_cannot_be_written_keeps_its_plans(bundle_copy, monkeypatch, call, number):
    """Patched calls fail as the system would, because permissions do not stop root.

    On a read-only disk, a second build fails at ``unlink``.
    """
    if call == "unlink":
        store_plan(bundle_copy)
    owner = os if call == "replace" else Path
    real = getattr(owner, call)

    def failing(path, *arguments, **named):
        if (ENGINES in path.parts and ".writing-" not in path.name) or call == "replace":
            raise OSError(number, os.strerror(number))
        return real(path, *arguments, **named)

    monkeypatch.setattr(owner, call, failing)
    with pytest.raises(PhregError, match="disk is full" if number == errno.ENOSPC else "cannot be written to"):
        store_plan(bundle_copy, plan=b"second")
    monkeypatch.undo()
    assert leftovers(bundle_copy.folder) == []
    if call != "unlink":
        assert list_plans(bundle_copy) == []


@pytest.mark.parametrize("old", [False, True])
@pytest.mark.parametrize("size", [500, 50_000])
def test_a_full_disk_leaves_no_plan_that_counts(bundle_copy, old, size):
    """The system limits file sizes: the plan of 100 kB is too large, or the sidecar is larger than 500 bytes."""
    if old:
        store_plan(bundle_copy, plan=b"old")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        with pytest.raises(PhregError, match=r"cannot be written \(File too large\)"):
            store_plan(bundle_copy, plan=PLAN if size > 500 else b"small")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert leftovers(bundle_copy.folder) == []
    assert all(stored.read() == b"old" for stored in list_plans(bundle_copy))
    if size == 500:
        plans = {p.read_bytes() for p in (bundle_copy.folder / ENGINES).glob("*.plan")}
        assert b"small" not in plans, "a plan without its sidecar is removed"


def test_a_killed_process_leaves_the_old_plan_or_the_new_one(bundle_copy, monkeypatch):
    """At every change of a name there is a plan that runs, with its own report; the next build ends as unharmed."""
    first, real, found = store_plan(bundle_copy, plan=b"old"), os.replace, []

    class Killed(BaseException):
        pass

    def killing(at):
        steps = []

        def replace(source, target):
            for when in (-1, 1):
                if when == 1:
                    real(source, target)
                steps.append(when)
                if len(steps) == at:
                    raise Killed

        return replace

    for at in range(1, 7):
        with monkeypatch.context() as patch:
            patch.setattr(os, "replace", killing(at))
            with pytest.raises(Killed):
                store_plan(bundle_copy, plan=b"new", report={"seconds": 2.5})
        stored = find_plan(bundle_copy, *ORIN)
        found.append((stored.read(), stored.report["seconds"]))
        assert leftovers(bundle_copy.folder) == []
        store_plan(bundle_copy, plan=b"old")
        assert find_plan(bundle_copy, *ORIN) == first
        assert "replaces" not in first.path.with_suffix(".json").read_text()
    assert found == [(b"old", 1.5)] * 3 + [(b"new", 2.5)] * 3


def test_a_file_in_place_of_the_folder_is_refused_and_kept(bundle_copy):
    (bundle_copy.folder / ENGINES).write_text("mine")
    with pytest.raises(PhregError, match="cannot be written"):
        store_plan(bundle_copy)
    assert (bundle_copy.folder / ENGINES).read_text() == "mine"


def test_the_manifest_does_not_list_plans(bundle_copy):
    before = (bundle_copy.folder / "manifest.json").read_bytes()
    store_plan(bundle_copy).path.write_bytes(b"changed")
    again = Bundle.read(bundle_copy.folder)
    again.verify()
    assert not [name for name in again.manifest.files if ENGINES in name]
    assert (bundle_copy.folder / "manifest.json").read_bytes() == before


def test_a_new_manifest_does_not_list_the_plans_in_its_folder(bundle_copy):
    store_plan(bundle_copy)
    (bundle_copy.folder / "manifest.json").unlink()
    write_manifest(bundle_copy.folder, bundle_copy.manifest)
    again = Bundle.read(bundle_copy.folder)
    again.verify()
    assert again.manifest.files == bundle_copy.manifest.files
    assert find_plan(again, *ORIN).read() == PLAN


def test_plans_are_found_without_the_graphs_hash_in_the_manifest(bundle_copy):
    """Another program may have written such a manifest."""
    files = {name: digest for name, digest in bundle_copy.manifest.files.items() if name != "model.onnx"}
    bundle = dataclasses.replace(bundle_copy, manifest=dataclasses.replace(bundle_copy.manifest, files=files))
    stored = store_plan(bundle)
    assert find_plan(bundle, *ORIN) == stored
