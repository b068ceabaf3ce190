"""Plans in a bundle: a plan is found where it runs, refused with a reason elsewhere, and not run if it was changed."""

import dataclasses
import errno
import json
import os
import re
import shutil
from pathlib import Path

import pytest

from phreg_deploy.bundle.bundle import Bundle
from phreg_deploy.bundle.plans import (
    FOLDER,
    BuildSettings,
    PlanKey,
    find_plan,
    list_plans,
    make_key,
    prefer,
    write_plan,
    write_sidecar,
)
from phreg_deploy.bundle.profiles import ProfileShapes, profiles_of
from phreg_deploy.bundle.writing import write_manifest
from phreg_deploy.errors import BackendMissing, PhregError
from phreg_deploy.spec import Batches, Sizes
from tests.cli_helpers import leftovers

resource = pytest.importorskip("resource")
pytestmark = pytest.mark.usefixtures("torch")

ORIN = ("Orin", 87, "10.3.0", 12)
PLAN = bytes(range(256)) * 400
KEY = PlanKey("ab" * 32, "fp16", "0123456789abcdef", "Orin", 87, "10.3.0", 12, "linux-aarch64", BuildSettings())


@pytest.fixture
def fresh(world) -> Bundle:
    """A copy of the fixed bundle, without plans."""
    return Bundle.read(world.copy("bundle"))


def put(bundle, gpu=ORIN, plan=PLAN, **settings):
    return write_sidecar(
        bundle, write_plan(bundle, make_key(bundle, *gpu, BuildSettings(**settings)), plan), {"seconds": 1.5}
    )


def alter(stored, **changes):
    """Change a sidecar: values at its top, or with ``key`` in its key."""
    sidecar = stored.path.with_suffix(".json")
    data = json.loads(sidecar.read_text())
    data["key"].update(changes.pop("key", {}))
    sidecar.write_text(json.dumps({**data, **changes}))


def refusal(bundle, gpu=ORIN) -> str:
    with pytest.raises(BackendMissing) as caught:
        find_plan(bundle, *gpu)
    assert str(caught.value).endswith(f"Run on this machine: phreg-deploy build {bundle.folder}")
    return str(caught.value)


CHANGES = [
    {"graph": "ab" * 31 + "cd"},
    {"precision": "int8"},
    {"profiles": "f" * 16},
    {"gpu": "Nano"},
    {"architecture": 86},
    {"tensorrt": "10.3.1"},
    {"cuda": 13},
    {"system": "linux-x86_64"},
    {"settings": BuildSettings(tf32=True)},
    {"settings": BuildSettings(effort=4)},
    {"settings": BuildSettings(compatibility="version")},
]


@pytest.mark.parametrize("changes", CHANGES, ids=str)
def test_every_field_of_the_key_changes_the_name(changes):
    other = dataclasses.replace(KEY, **changes)
    assert other.name != KEY.name
    assert PlanKey.from_json(json.loads(json.dumps(other.to_json()))) == other
    assert PlanKey.from_json(json.loads(json.dumps(KEY.to_json()))).name == KEY.name, (
        "the name of a key does not change"
    )


def test_the_table_of_changes_names_every_field():
    assert {name for changes in CHANGES for name in changes} == {field.name for field in dataclasses.fields(PlanKey)}


@pytest.mark.parametrize("gpu", ["NVIDIA GeForce RTX 4090", "a/b\\c:d", "../../etc", "", "Grafikkarte ß\n"])
def test_names_are_safe_for_files(fresh, gpu):
    stored = put(fresh, (gpu, 89, "11.4.0.106", 13))
    assert re.fullmatch(r"[0-9a-f]{12}-[0-9a-f]{8}-sm89-trt11\.4\.0\.106-cuda13\.plan", stored.path.name)
    assert stored.path.parent == fresh.folder / FOLDER
    assert find_plan(fresh, gpu, 89, "11.4.0.106", 13).key.gpu == gpu


@pytest.mark.parametrize(("name", "value"), [("compatibility", "all"), ("effort", 6), ("effort", -1)])
def test_settings_out_of_bounds(name, value):
    with pytest.raises(PhregError, match=rf"{name}: got '?{value}'?, expected"):
        BuildSettings(**{name: value})


def test_a_stored_plan_is_found(fresh):
    assert list_plans(fresh) == []
    assert "holds no TensorRT engine" in refusal(fresh)
    stored = put(fresh)
    assert find_plan(fresh, *ORIN) == stored
    assert stored.read() == PLAN == stored.path.read_bytes(), "raw, as trtexec and Triton read it"
    assert {p.suffix for p in (fresh.folder / FOLDER).iterdir()} == {".plan", ".json"}
    assert leftovers(fresh.folder) == []
    assert put(fresh, plan=b"second").path == stored.path
    assert find_plan(fresh, *ORIN).read() == b"second"
    assert find_plan(fresh, *ORIN).report == {"seconds": 1.5, "serial": 1}
    assert find_plan(fresh, *ORIN).profiles == profiles_of(fresh.manifest)


def test_the_newest_of_several_is_taken(fresh):
    first, second = put(fresh, plan=b"first"), put(fresh, plan=b"second", effort=5)
    os.utime(first.path, (2_000, 2_000))  # clocks and copies do not count
    os.utime(second.path, (1_000, 1_000))
    assert find_plan(fresh, *ORIN).read() == b"second"
    assert prefer(fresh, second) == second
    assert prefer(fresh, first).report["serial"] == 3
    assert find_plan(fresh, *ORIN).read() == b"first"
    assert prefer(fresh, second).report["serial"] == 4
    assert find_plan(fresh, *ORIN).read() == b"second"
    second.path.unlink()
    assert find_plan(fresh, *ORIN).read() == b"first", "a plan whose file is missing is not preferred"
    assert len(list_plans(fresh)) == 2


@pytest.mark.parametrize(
    "change", [lambda d: d[:-1], lambda d: d[:500] + bytes([d[500] ^ 1]) + d[501:], lambda d: b"", lambda d: d + b"\0"]
)
def test_a_changed_plan_is_not_run(fresh, change):
    stored = put(fresh)
    stored.path.write_bytes(change(PLAN))
    with pytest.raises(PhregError, match="was changed or damaged, and is not run") as caught:
        find_plan(fresh, *ORIN).read()
    assert str(caught.value).endswith(f"Run: phreg-deploy build {fresh.folder} --force")


def test_a_plan_that_is_gone(fresh):
    put(fresh).path.unlink()
    with pytest.raises(PhregError, match=r"cannot be read \(No such file") as caught:
        find_plan(fresh, *ORIN).read()
    assert str(caught.value).endswith(f"Run: phreg-deploy build {fresh.folder} --force")


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
def test_a_damaged_sidecar_does_not_count(fresh, damage):
    sidecar = put(fresh).path.with_suffix(".json")
    changed = damage(sidecar.read_text())
    sidecar.write_bytes(changed if isinstance(changed, bytes) else changed.encode())
    assert list_plans(fresh) == []
    assert "holds no TensorRT engine" in refusal(fresh)
    put(fresh)
    assert find_plan(fresh, *ORIN).read() == PLAN, "building again repairs it"


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
def test_a_sidecar_of_another_format_or_of_wrong_types_does_not_count(fresh, which):
    alter(put(fresh), **WRONG_TYPES[which])
    assert list_plans(fresh) == []
    assert "holds no TensorRT engine" in refusal(fresh, ("Thor", 110, "11.4.1", 13))


def test_a_plan_of_another_graph_does_not_count(world, fresh):
    stored = put(fresh)
    alter(stored, key={"graph": "0" * 64})
    assert list_plans(fresh) == []
    other = Bundle.read(world.wide_bundle)
    assert other.manifest.files["model.onnx"] != fresh.manifest.files["model.onnx"]
    target = Path(shutil.copytree(other.folder, world.tmp / "wide"))
    put(fresh)
    shutil.copytree(fresh.folder / FOLDER, target / FOLDER)
    assert "holds no TensorRT engine" in refusal(Bundle.read(target))


@pytest.mark.parametrize(
    ("gpu", "words"),
    [
        (("AGX Thor", 110, "10.3.0", 12), "for Orin (SM 8.7), and this is AGX Thor (SM 11.0)"),
        (("Orin Nano", 87, "10.3.0", 12), "for Orin (SM 8.7), and this is Orin Nano (SM 8.7)"),
        (("Orin", 87, "10.16.2", 12), "with TensorRT 10.3.0, and this is 10.16.2"),
        (("Orin", 87, "10.3.0", 13), "with CUDA 12, and this is CUDA 13"),
    ],
)
def test_a_plan_for_something_else_is_refused_with_the_reason(fresh, gpu, words):
    stored = put(fresh)
    assert refusal(fresh, gpu).startswith(f"engine: {stored.path.name} was built {words}. Run")


def test_a_plan_for_another_system_or_other_profiles_is_refused(fresh, monkeypatch):
    put(fresh)
    other = dataclasses.replace(fresh, manifest=dataclasses.replace(fresh.manifest, batches=Batches(1, 2, 4)))
    assert "was built for other batches or sizes than the manifest's" in refusal(other)
    monkeypatch.setattr("platform.machine", lambda: "riscv64")
    assert "and this is linux-riscv64" in refusal(fresh)


def test_all_reasons_are_given_and_the_nearest_plan_is_named(fresh):
    put(fresh, ("H100", 90, "11.4.0", 13))
    nearer = put(fresh, ("Orin", 87, "10.16.2", 13))
    message = refusal(fresh, ("Orin", 87, "10.3.0", 12))
    assert nearer.path.name in message
    assert "TensorRT 10.16.2, and this is 10.3.0; with CUDA 13, and this is CUDA 12" in message


A2000, A10, A100, H100, T4 = ("A2000", 86), ("A10", 86), ("A100", 80), ("H100", 90), ("T4", 75)


# Compatibility, the GPU and TensorRT of the build, those of this machine, and whether the plan runs here.
COMPATIBLE = [
    ("none", (*A100, "10.3.0"), (*A100, "10.3.0"), True),
    ("none", (*A100, "10.3.0"), (*A100, "10.4.0"), False),
    ("none", (*A100, "10.3.0"), (*H100, "10.3.0"), False),
    ("version", (*A100, "10.3.0"), (*A100, "10.16.1"), True),
    ("version", (*A100, "10.9.0"), (*A100, "10.16.1"), True),
    ("version", (*A100, "10.3.0"), (*A100, "11.4.0.106"), False),
    ("version", (*A100, "10.16.1"), (*A100, "10.9.0"), False),
    ("version", (*A100, "11.0.0"), (*A100, "10.16.1"), False),
    ("version", (*A100, "10.3.0"), (*H100, "10.3.0"), False),
    ("ampere+", (*A100, "10.3.0"), (*H100, "10.3.0"), True),
    ("ampere+", (*H100, "10.3.0"), (*A100, "10.3.0"), True),
    ("ampere+", (*A100, "10.3.0"), (*T4, "10.3.0"), False),
    ("ampere+", (*T4, "10.3.0"), (*A100, "10.3.0"), False),
    ("ampere+", (*A100, "10.3.0"), (*H100, "10.4.0"), False),
    ("same-cc", (*A2000, "10.3.0"), (*A10, "10.3.0"), True),
    ("same-cc", (*A2000, "10.3.0"), (*A100, "10.3.0"), False),
    ("same-cc", (*A2000, "10.3.0"), (*A10, "10.4.0"), False),
    ("same-cc", (*A2000, "10.3.0"), (*A10, "10.2.0"), False),
]


@pytest.mark.parametrize(("compatibility", "built", "here", "runs"), COMPATIBLE)
def test_compatibility(fresh, compatibility, built, here, runs):
    stored = put(fresh, (*built, 12), compatibility=compatibility)
    if runs:
        assert find_plan(fresh, *here, 12) == stored
    else:
        refusal(fresh, (*here, 12))
    assert "with CUDA 12, and this is CUDA 13" in refusal(fresh, (*here, 13)), "nothing crosses CUDA's major version"


@pytest.mark.parametrize("number", [errno.EROFS, errno.EACCES, errno.ENOSPC])
@pytest.mark.parametrize("call", ["mkdir", "replace", "unlink"])
def test_a_folder_that_refuses(fresh, monkeypatch, call, number):
    """The calls fail here as the system would: permission bits do not stop root.

    ``unlink`` is the call that a read-only disk refuses in a second build.
    """
    if call == "unlink":
        put(fresh)
    owner = os if call == "replace" else Path
    real = getattr(owner, call)

    def failing(path, *arguments, **named):
        if (FOLDER in path.parts and ".writing-" not in path.name) or call == "replace":
            raise OSError(number, os.strerror(number))
        return real(path, *arguments, **named)

    monkeypatch.setattr(owner, call, failing)
    with pytest.raises(PhregError, match="disk is full" if number == errno.ENOSPC else "cannot be written to"):
        put(fresh, plan=b"second")
    monkeypatch.undo()
    assert leftovers(fresh.folder) == []
    if call != "unlink":
        assert list_plans(fresh) == []


@pytest.mark.parametrize("old", [False, True])
@pytest.mark.parametrize("size", [500, 50_000])
def test_a_full_disk_leaves_no_plan_that_counts(fresh, old, size):
    """A real limit: the plan (100 kB) does not fit, or the plan fits and its sidecar (500 bytes) does not."""
    if old:
        put(fresh, plan=b"old")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        with pytest.raises(PhregError, match=r"cannot be written \(File too large\)"):
            put(fresh, plan=PLAN if size > 500 else b"small")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert leftovers(fresh.folder) == []
    assert all(stored.read() == b"old" for stored in list_plans(fresh))
    if size == 500:
        plans = {p.read_bytes() for p in (fresh.folder / FOLDER).glob("*.plan")}
        assert b"small" not in plans, "a plan without its sidecar only fills the disk"


def test_a_file_in_place_of_the_folder(fresh):
    (fresh.folder / FOLDER).write_text("mine")
    with pytest.raises(PhregError, match="cannot be written"):
        put(fresh)
    assert (fresh.folder / FOLDER).read_text() == "mine"


def test_profiles_of_a_fixed_bundle(fresh):
    assert [p.inputs for p in profiles_of(fresh.manifest)] == [{"image": [[1, 64, 64, 3]] * 3}]


def test_profiles_of_a_range(world):
    manifest = Bundle.read(world.wide_bundle).manifest
    single, profile = profiles_of(manifest)
    # A single frame has a profile of its own.
    assert single.inputs["image"] == [[1, 48, 48, 3], [1, 64, 64, 3], [1, 96, 96, 3]]
    assert profile.inputs == {
        "image": [[1, 48, 48, 3], [2, 64, 64, 3], [4, 96, 96, 3]],
        "pos_embed": [[1, 36, 48], [1, 64, 48], [1, 144, 48]],
    }
    assert profile.holds({"image": (4, 48, 96, 3), "pos_embed": (1, 72, 48)})
    for shapes in ({"image": (5, 64, 64, 3)}, {"image": (1, 40, 64, 3)}, {"image": (1, 64, 104, 3)}):
        assert not profile.holds({"pos_embed": (1, 64, 48), **shapes}), shapes
    assert not profile.holds({"image": (1, 64, 64, 3), "pos_embed": (1, 145, 48)})


def test_profiles_of_a_list(world):
    manifest = Bundle.read(world.wide_bundle).manifest
    sizes = Sizes.parse("48x96,64", (8, 8))
    listed = dataclasses.replace(manifest, sizes=sizes, batches=Batches(1, 3, 8))
    *single, first, second = profiles_of(listed)
    assert [p.inputs["image"][1] for p in single] == [[1, 48, 96, 3], [1, 64, 64, 3]]
    assert first.inputs == {
        "image": [[1, 48, 96, 3], [3, 48, 96, 3], [8, 48, 96, 3]],
        "pos_embed": [[1, 72, 48]] * 3,
    }
    assert second.inputs["image"][1] == [3, 64, 64, 3]
    assert first.holds({"image": (8, 48, 96, 3)})
    assert not first.holds({"image": (8, 64, 64, 3)})
    assert ProfileShapes.from_json(json.loads(json.dumps(first.to_json()))) == first


@pytest.mark.parametrize("shapes", [{"image": (1, 64)}, {"image": (1, 64, 64, 3, 1)}, {"imago": (1, 64, 64, 3)}])
def test_a_shape_of_another_rank_or_name_is_not_held(fresh, shapes):
    assert not profiles_of(fresh.manifest)[0].holds(shapes)


def test_profiles_are_in_the_key(fresh):
    keys = [make_key(fresh, *ORIN, BuildSettings())]
    for change in ({"batches": Batches(1, 1, 2)}, {"batches": Batches(1, 2, 2)}, {"sizes": Sizes.parse("72", (8, 8))}):
        other = dataclasses.replace(fresh, manifest=dataclasses.replace(fresh.manifest, **change))
        keys.append(make_key(other, *ORIN, BuildSettings()))
    assert len({key.profiles for key in keys}) == len({key.name for key in keys}) == 4


def test_plans_are_not_in_the_manifest(fresh):
    before = (fresh.folder / "manifest.json").read_bytes()
    put(fresh).path.write_bytes(b"changed")
    again = Bundle.read(fresh.folder)
    again.verify()
    assert not [name for name in again.manifest.files if FOLDER in name]
    assert (fresh.folder / "manifest.json").read_bytes() == before


def test_the_manifest_of_a_folder_that_holds_plans(fresh):
    put(fresh)
    (fresh.folder / "manifest.json").unlink()
    write_manifest(fresh.folder, fresh.manifest)
    again = Bundle.read(fresh.folder)
    again.verify()
    assert again.manifest.files == fresh.manifest.files
    assert find_plan(again, *ORIN).read() == PLAN


def test_a_manifest_that_does_not_give_the_graphs_hash(fresh):
    """Another program, or a person, may have written it: plans are still stored and found."""
    files = {name: digest for name, digest in fresh.manifest.files.items() if name != "model.onnx"}
    bundle = dataclasses.replace(fresh, manifest=dataclasses.replace(fresh.manifest, files=files))
    stored = put(bundle)
    assert find_plan(bundle, *ORIN) == stored
