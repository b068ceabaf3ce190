"""Which room may import which, held as data by folder; and a runtime that really runs where torch is not."""

import ast
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "phreg_deploy"
FILES = sorted(PACKAGE.rglob("*.py"))

# Folder: the folders that its files import at any depth, functions included; "" is the root, which all may import.
MAY = {
    "": set(),
    "files": set(),
    "images": set(),
    "artifacts": {"images"},
    "bundle": {"files"},
    "models": {"files", "images", "artifacts"},
    "distill/neurons": {"artifacts", "models"},
    "distill": {"files", "images", "artifacts", "models", "distill/neurons"},
    "runtime/gpu": {"bundle", "images"},
    "runtime/backends": {"bundle", "runtime/gpu"},
    "runtime": {"files", "images", "artifacts", "bundle", "runtime/gpu", "runtime/backends"},
    "profiling": {"images", "bundle", "runtime", "runtime/gpu", "runtime/backends", "export/engine"},
    "doctor": {"runtime/gpu", "runtime/backends"},
    "onnx_graph": {"runtime/backends"},
    "calibration": {"files", "images", "bundle", "onnx_graph", "runtime", "runtime/backends"},
    "export": {"files", "images", "bundle", "models", "onnx_graph", "export/engine"},
    "export/engine": {"files", "bundle", "runtime", "runtime/gpu", "runtime/backends"},
    "verify": {"images", "artifacts", "bundle", "models", "onnx_graph", "runtime", "runtime/gpu", "runtime/backends", "export/engine"},
    "demo": {"files", "images", "artifacts", "models", "distill", "runtime", "calibration", "export", "verify"},
    "cli": {"cli/commands", "runtime/backends"},
}  # fmt: skip
MAY["cli/tables"] = set(MAY)
MAY["cli/commands"] = set(MAY)
# room: the rooms that it imports inside functions only, so that what they need is optional
LATE = {
    "export": {"export/engine"},
    "verify": {"models", "onnx_graph", "export/engine"},
    "profiling": {"export/engine"},
    "cli/commands": set(MAY) - {"", "files", "images", "bundle", "cli", "cli/commands", "cli/tables"},
    "cli/tables": set(MAY) - {"", "files", "images", "bundle", "cli"},
    "cli": {"runtime/backends"},
}
HEAVY = {"torch", "timm", "onnx", "onnxscript", "safetensors", "torchvision"}
NEEDS = {  # room: what it may import of these
    "models": HEAVY,
    "distill/neurons": HEAVY,
    "distill": HEAVY,
    "export": HEAVY,
    "demo": HEAVY,
    "onnx_graph": {"onnx"},
    "calibration": {"onnx"},
    "verify": {"onnx"},
}
TORCH_ROOMS = {"models", "distill", "export", "demo"}
LARGEST_SHARE, MOST_FILES = (
    0.18,
    12,
)  # of the code's lines in one room with its sub-rooms; of the source files in a folder
BLOCKED = ("torch", "timm", "onnx", "onnxscript", "safetensors", "torchvision")


def room_of(path: Path) -> str:
    return "/".join(path.relative_to(PACKAGE).parts[:-1])


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


def module_of(name: str) -> Path | None:
    """The file of this package that a dotted name stands for, or holds."""
    parts = name.split(".")
    if parts[0] != "phreg_deploy":
        return None
    for length in (len(parts), len(parts) - 1):
        place = PACKAGE.joinpath(*parts[1:length])
        for path in (place.with_suffix(".py"), place / "__init__.py"):
            if length > 1 and path.is_file():
                return path
    return None


def modules_imported(path: Path) -> set[tuple[Path, bool]]:
    return {(module, late) for name, late in imports(path) if (module := module_of(name)) is not None}


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_imports_run_one_way(path):
    room = room_of(path)
    assert room in MAY, f"{room} is a new room: say in MAY what it may import"
    if path.name == "__main__.py":
        assert {room_of(module) for module, _ in modules_imported(path)} == {"cli"}
        return
    for module, late in modules_imported(path):
        name = room_of(module)
        assert name in ("", room) or name in MAY[room], f"{path.name} in {room or 'the root'} imports {name}"
        assert late or name not in LATE.get(room, ()), f"{path.name} imports {name} at its top"


def test_no_rooms_import_each_other():
    """The rule itself has no circle: every room stands above all that it may import."""
    below: dict[str, set[str]] = {}

    def rooms_below(room: str, path: tuple[str, ...] = ()) -> set[str]:
        assert room not in path, f"a circle: {' -> '.join((*path, room))}"
        if room not in below:
            below[room] = set().union(*({r} | rooms_below(r, (*path, room)) for r in MAY[room] - {"cli"}), set())
        return below[room]

    for room in MAY:
        rooms_below(room)


def test_no_files_import_each_other():
    arrows = {path: {module for module, _ in modules_imported(path)} - {path} for path in FILES}
    done: set[Path] = set()

    def visit(path: Path, trail: tuple[Path, ...]) -> None:
        assert path not in trail, f"a circle: {[str(p.relative_to(PACKAGE)) for p in (*trail, path)]}"
        if path in done:
            return
        for other in arrows[path]:
            visit(other, (*trail, path))
        done.add(path)

    for path in FILES:
        visit(path, ())


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_heavy_modules_stay_in_heavy_rooms(path):
    allowed = NEEDS.get(room_of(path), set())
    for name, _ in imports(path):
        top = name.split(".")[0]
        assert top not in HEAVY or top in allowed, f"{path} imports {name}"


def test_what_runs_on_the_device_imports_no_torch_through_other_rooms():
    for room, may in MAY.items():
        if room in (
            "runtime",
            "runtime/gpu",
            "runtime/backends",
            "calibration",
            "export/engine",
            "profiling",
            "doctor",
        ):
            assert not may & TORCH_ROOMS, room


def test_the_rule_covers_every_room_and_names_no_ghost():
    assert set(MAY) == {room_of(p) for p in FILES}


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_files_are_small(path):
    assert len(path.read_text().splitlines()) <= 300


def test_rooms_are_small():
    lines = {path: len(path.read_text().splitlines()) for path in FILES}
    whole = sum(lines.values())
    for room in {room_of(path).split("/")[0] for path in FILES}:
        own = sum(n for path, n in lines.items() if room_of(path).split("/")[0] == room)
        assert own <= LARGEST_SHARE * whole, f"{room or 'the root'} has {own} of {whole} lines"
    for room in MAY:
        count = sum(room_of(path) == room for path in FILES)
        assert count <= MOST_FILES, f"{room or 'the root'} has {count} files"


def test_no_module_shadows_a_dependency():
    stems = {p.stem for p in FILES}
    assert not stems & {"onnx", "tensorrt", "torch", "timm", "utils", "onnxruntime", "openvino", "numpy", "click"}


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
from tests.cli_helpers import invoke
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
