"""The key of a plan: the GPU, TensorRT, CUDA, graph, profiles and settings that it was built for, and where it runs."""

import dataclasses
import json
import re
import shutil
from pathlib import Path

import pytest

from phreg_deploy.bundle.bundle import Bundle
from phreg_deploy.bundle.manifest import ENGINES
from phreg_deploy.bundle.plan_keys import BuildSettings, PlanKey, make_key
from phreg_deploy.bundle.plans import find_plan, list_plans
from phreg_deploy.errors import PhregError
from phreg_deploy.spec import Batches, Sizes
from tests.plans import ORIN, change_sidecar, store_plan, why_refused

pytestmark = pytest.mark.usefixtures("torch")

KEY = PlanKey("ab" * 32, "fp16", "0123456789abcdef", "Orin", 87, "10.3.0", 12, "linux-aarch64", BuildSettings())
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
def test_plan_names_are_safe_file_names(bundle_copy, gpu):
    stored = store_plan(bundle_copy, (gpu, 89, "11.4.0.106", 13))
    assert re.fullmatch(r"[0-9a-f]{12}-[0-9a-f]{8}-sm89-trt11\.4\.0\.106-cuda13\.plan", stored.path.name)
    assert stored.path.parent == bundle_copy.folder / ENGINES
    assert find_plan(bundle_copy, gpu, 89, "11.4.0.106", 13).key.gpu == gpu


@pytest.mark.parametrize(("name", "value"), [("compatibility", "all"), ("effort", 6), ("effort", -1)])
def test_settings_out_of_bounds_are_refused(name, value):
    with pytest.raises(PhregError, match=rf"{name}: got '?{value}'?, expected"):
        BuildSettings(**{name: value})


def test_a_plan_of_another_graph_does_not_count(world, bundle_copy):
    stored = store_plan(bundle_copy)
    change_sidecar(stored, key={"graph": "0" * 64})
    assert list_plans(bundle_copy) == []
    other = Bundle.read(world.wide_bundle)
    assert other.manifest.files["model.onnx"] != bundle_copy.manifest.files["model.onnx"]
    target = Path(shutil.copytree(other.folder, world.tmp / "wide"))
    store_plan(bundle_copy)
    shutil.copytree(bundle_copy.folder / ENGINES, target / ENGINES)
    assert "holds no TensorRT engine" in why_refused(Bundle.read(target))


@pytest.mark.parametrize(
    ("gpu", "words"),
    [
        (("AGX Thor", 110, "10.3.0", 12), "for Orin (SM 8.7), and this is AGX Thor (SM 11.0)"),
        (("Orin Nano", 87, "10.3.0", 12), "for Orin (SM 8.7), and this is Orin Nano (SM 8.7)"),
        (("Orin", 87, "10.16.2", 12), "with TensorRT 10.3.0, and this is 10.16.2"),
        (("Orin", 87, "10.3.0", 13), "with CUDA 12, and this is CUDA 13"),
    ],
)
def test_a_plan_for_something_else_is_refused_with_the_reason(bundle_copy, gpu, words):
    stored = store_plan(bundle_copy)
    assert why_refused(bundle_copy, gpu).startswith(f"engine: {stored.path.name} was built {words}. Run")


def test_a_plan_for_another_system_or_other_profiles_is_refused(bundle_copy, monkeypatch):
    store_plan(bundle_copy)
    other = dataclasses.replace(
        bundle_copy, manifest=dataclasses.replace(bundle_copy.manifest, batches=Batches(1, 2, 4))
    )
    assert "was built for other batches or sizes than the manifest's" in why_refused(other)
    monkeypatch.setattr("platform.machine", lambda: "riscv64")
    assert "and this is linux-riscv64" in why_refused(bundle_copy)


def test_all_reasons_are_given_and_the_nearest_plan_is_named(bundle_copy):
    store_plan(bundle_copy, ("H100", 90, "11.4.0", 13))
    nearer = store_plan(bundle_copy, ("Orin", 87, "10.16.2", 13))
    message = why_refused(bundle_copy, ("Orin", 87, "10.3.0", 12))
    assert nearer.path.name in message
    assert "TensorRT 10.16.2, and this is 10.3.0; with CUDA 13, and this is CUDA 12" in message


A2000, A10, A100, H100, T4 = ("A2000", 86), ("A10", 86), ("A100", 80), ("H100", 90), ("T4", 75)
# (compatibility, GPU and TensorRT of the build, those of this machine, whether the plan runs here)
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
def test_a_plan_runs_where_its_compatibility_says(bundle_copy, compatibility, built, here, runs):
    stored = store_plan(bundle_copy, (*built, 12), compatibility=compatibility)
    if runs:
        assert find_plan(bundle_copy, *here, 12) == stored
    else:
        why_refused(bundle_copy, (*here, 12))
    assert "with CUDA 12, and this is CUDA 13" in why_refused(bundle_copy, (*here, 13)), (
        "no plan runs with another major version of CUDA"
    )


def test_other_batches_or_sizes_give_another_key(bundle_copy):
    keys = [make_key(bundle_copy, *ORIN, BuildSettings())]
    for change in ({"batches": Batches(1, 1, 2)}, {"batches": Batches(1, 2, 2)}, {"sizes": Sizes.parse("72", (8, 8))}):
        other = dataclasses.replace(bundle_copy, manifest=dataclasses.replace(bundle_copy.manifest, **change))
        keys.append(make_key(other, *ORIN, BuildSettings()))
    assert len({key.profiles for key in keys}) == len({key.name for key in keys}) == 4
