"""Which room may import which, held as data; and a runtime that really runs where torch is not."""

import ast
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "phreg_deploy"
ROOMS = {p.name for p in PACKAGE.iterdir() if p.is_dir() and (p / "__init__.py").is_file()}

# room: what its files import at any depth, functions included; "" is the vocabulary, which everybody may import
MAY = {
    "": set(),
    "runtime": set(),
    "calibration": {"runtime"},
    "distill": set(),
    "export": {"calibration", "distill", "runtime"},
    "verify": {"calibration", "distill", "export", "runtime"},
    "demo": {"calibration", "distill", "export", "runtime", "verify"},
    "cli": {"calibration", "distill", "export", "runtime", "verify", "demo"},
}
# room: the rooms that it imports inside functions only, so that the heavy one is optional
LATE = {
    "verify": {"calibration", "distill", "export"},
    "cli": {"calibration", "distill", "export", "runtime", "verify", "demo"},
}
HEAVY = {"torch", "timm", "onnx", "onnxscript", "safetensors", "torchvision"}
HEAVY_ROOMS = {"distill", "export", "demo"}
LIGHT = {
    "export/__init__.py",
    "phreg_deploy/export/engine/builder.py",
    "phreg_deploy/export/engine/build.py",
    "phreg_deploy/export/engine/inspection.py",
    "phreg_deploy/export/engine/gemm.py",
}  # of a heavy room: they run on the device
ALSO = {"calibration": {"onnx"}, "verify": {"onnx"}}  # room: what it may import of HEAVY; never torch
BLOCKED = ("torch", "timm", "onnx", "onnxscript", "safetensors", "torchvision")
FILES = sorted(PACKAGE.rglob("*.py"))


def room_of(path: Path) -> str:
    parts = path.relative_to(PACKAGE).parts
    return parts[0] if len(parts) > 1 else ""


def imports(path: Path) -> list[tuple[str, bool]]:
    """Dotted names that a file imports, and whether the import waits inside a function."""
    tree, found = ast.parse(path.read_text()), []

    def walk(node: ast.AST, late: bool) -> None:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.Import):
                found.extend((alias.name, late) for alias in child.names)
            elif isinstance(child, ast.ImportFrom):
                assert child.level == 0, f"{path}: relative import"
                found.extend((f"{child.module}.{alias.name}", late) for alias in child.names)
            unread = isinstance(child, ast.If) and ast.unparse(child.test) == "TYPE_CHECKING"  # for mypy alone
            walk(child, late or unread or isinstance(child, ast.FunctionDef))

    walk(tree, False)
    return found


def rooms_imported(path: Path) -> set[tuple[str, bool]]:
    named = [(name.split("."), late) for name, late in imports(path)]
    return {
        (parts[1], late) for parts, late in named if parts[0] == "phreg_deploy" and len(parts) > 1 and parts[1] in ROOMS
    }


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_imports_run_one_way(path):
    room = room_of(path)
    assert room in MAY, f"{room} is a new room: say in MAY what it may import"
    if path.name == "__main__.py":
        assert {name for name, _ in rooms_imported(path)} == {"cli"}
        return
    for name, late in rooms_imported(path):
        assert name == room or name in MAY[room], f"{path.name} in {room or 'the vocabulary'} imports {name}"
        assert late or name not in LATE.get(room, ()), f"{path.name} imports {name} at its top"


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_heavy_modules_stay_in_heavy_rooms(path):
    for name, late in imports(path):
        heavy = name.split(".")[0] in HEAVY - ALSO.get(room_of(path), set())
        light = str(path.relative_to(PACKAGE)) in LIGHT
        fits = (room_of(path) in HEAVY_ROOMS and not light) or (late and room_of(path) == "cli")
        assert not heavy or fits, f"{path} imports {name}"


@pytest.mark.parametrize("name", sorted(LIGHT))
def test_what_runs_on_the_device_imports_nothing_heavy_through_its_own_room(name):
    rooms = {
        ".".join(parts.split(".")[:3]) for parts, _ in imports(PACKAGE / name) if parts.startswith("phreg_deploy.")
    }
    heavy = {"phreg_deploy.distill", "phreg_deploy.demo", "phreg_deploy.calibration"}
    own = {f"phreg_deploy.{light.removesuffix('.py').replace('/', '.')}" for light in LIGHT}
    assert not {r for r in rooms if r.startswith(tuple(heavy))}
    assert {r for r in rooms if r.startswith("phreg_deploy.export")} <= own


def test_the_rule_covers_every_room_and_names_no_ghost():
    assert set(MAY) - {""} <= ROOMS
    assert set(MAY) - {""} == {room_of(p) for p in FILES} - {""}


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_files_are_small(path):
    assert len(path.read_text().splitlines()) <= 300


def test_no_module_shadows_a_dependency():
    stems = {p.stem for p in FILES}
    assert not stems & {"onnx", "tensorrt", "profile", "torch", "timm", "utils", "onnxruntime", "numpy", "click"}


@pytest.mark.parametrize("name", ["calibration", "export", "runtime"])
def test_rooms_are_linked_from_the_root(name):
    link = ROOT / name
    assert link.is_symlink()
    assert not link.readlink().is_absolute()
    assert link.resolve() == PACKAGE / name


SERVE = """
import json, sys
for name in sys.argv[3].split(","):
    sys.modules[name] = None
import phreg_deploy.runtime
from phreg_deploy.runtime import FeatureExtractor
with FeatureExtractor.load(sys.argv[1], sys.argv[4], threads=1) as extractor:
    dense = extractor(sys.argv[2])
    print(json.dumps({
        "shape": dense.features.shape, "first": dense.features[0, 0, 0].tolist(), "backend": extractor.backend,
        "rate": float(dense.artifact_rate[0]), "cls": dense.cls.shape,
        "heavy": [n for n in sys.argv[3].split(",") if sys.modules.get(n) is not None],
    }))
"""


@pytest.mark.parametrize("backend", ["onnxruntime-cpu", "openvino"])
@pytest.mark.parametrize("which", ["bundle", "wide_bundle"])
def test_the_runtime_serves_where_torch_is_not(request, which, backend, photos):
    from phreg_deploy.runtime import FeatureExtractor

    pytest.importorskip({"onnxruntime-cpu": "onnxruntime"}.get(backend, backend))
    folder, image = request.getfixturevalue(which), photos / "frame-03.jpg"
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", SERVE, str(folder), str(image), ",".join(BLOCKED), backend],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    said = json.loads(done.stdout)
    assert said["shape"] == [1, 8, 8, 48]
    assert said["cls"] == [1, 48]
    assert said["backend"] == backend
    assert said["heavy"] == []
    with FeatureExtractor.load(folder, backend, threads=1) as extractor:
        dense = extractor(image)
    np.testing.assert_allclose(said["first"], dense.features[0, 0, 0], rtol=1e-5, atol=1e-6)
    assert said["rate"] == pytest.approx(float(dense.artifact_rate[0]))


CALIBRATE = """
import json, sys
for name in sys.argv[1].split(","):
    sys.modules[name] = None
from tests.world import invoke
done = invoke(*sys.argv[2:])
heavy = [n for n in sys.argv[1].split(",") if sys.modules.get(n) is not None]
print(json.dumps({"code": done.code, "err": done.err[-500:], "missed": done.document["missed"], "heavy": heavy}))
"""


def test_calibration_runs_where_torch_is_not(bundle, photos, tmp_path):
    words = ["calibrate", bundle, "--images", photos, "-o", tmp_path / "eight", "--json"]
    blocked = ",".join(name for name in BLOCKED if name != "onnx")
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", CALIBRATE, blocked, *(str(word) for word in words)],
        capture_output=True,
        text=True,
        check=False,
        cwd=ROOT,
    )
    assert done.returncode == 0, done.stderr
    said = json.loads(done.stdout.splitlines()[-1])
    assert (said["code"], said["missed"], said["heavy"]) == (0, [], []), said
    assert (tmp_path / "eight" / "calibration.json").is_file()
