"""Which folder may import which, and that the runtime and calibration run without torch."""

import ast
import json
from pathlib import Path

import numpy as np
import pytest

from tests.cli_helpers import ROOT, run_python

PACKAGE = ROOT / "phreg_deploy"
FILES = sorted(PACKAGE.rglob("*.py"))

# Folder -> the folders that its files may import, also inside functions. "" is the root, which all may import.
MAY = {
    # A name of a model or a bundle may stand for a repository on the hub.
    "": {"hub"},
    "hub": {"files"},
    "cards": {"files"},
    "files": set(),
    "images": set(),
    "artifacts": {"images"},
    "bundle": {"cards", "files", "hub"},
    "models": {"files", "hub", "images", "artifacts"},
    "sharing": {"bundle", "cards", "hub"},
    # What a signature is over; the library of signatures is imported late.
    "signing": {"bundle", "cards", "files", "hub"},
    "heads": {"files", "images", "models", "bundle", "onnx_graph"},
    "text": {"bundle", "heads"},
    "distill/neurons": {"artifacts", "models"},
    "distill/devices": {"models"},
    "distill/singular": {"models"},
    "distill": {
        "cards",
        "files",
        "images",
        "artifacts",
        "models",
        "distill/devices",
        "distill/neurons",
        "distill/singular",
    },
    "runtime/gpu": {"bundle", "images"},
    "runtime/trt": {"bundle", "runtime/gpu"},
    "runtime/gpu_images": {"images", "runtime/gpu"},
    "runtime/backends": {"bundle", "runtime/gpu", "runtime/trt"},
    "runtime": {
        "files",
        "images",
        "artifacts",
        "bundle",
        "signing",
        "runtime/gpu",
        "runtime/gpu_images",
        "runtime/backends",
    },
    "extraction/inputs": {"images"},
    "extraction": {"files", "images", "bundle", "runtime", "extraction/inputs"},
    "stream/sources": {"images"},
    "stream": {"images", "bundle", "runtime", "runtime/backends", "stream/sources"},
    "profiling/device": {"files", "runtime/gpu"},
    "profiling": {
        "images",
        "bundle",
        "runtime",
        "runtime/gpu",
        "runtime/backends",
        "export/engine",
        "profiling/device",
    },
    "doctor": {"runtime/gpu", "runtime/backends"},
    "onnx_graph": {"images", "bundle", "runtime/backends"},
    "calibration": {"files", "images", "bundle", "onnx_graph", "runtime", "runtime/backends"},
    "export": {"files", "images", "bundle", "models", "onnx_graph", "export/engine"},
    "export/engine": {"files", "bundle", "runtime", "runtime/gpu", "runtime/trt", "runtime/backends"},
    "evaluation/data": {"files", "images", "bundle", "heads", "models", "runtime"},
    "evaluation": {"files", "images", "artifacts", "bundle", "heads", "evaluation/data"},
    "verify": {
        "files",
        "images",
        "heads",
        "artifacts",
        "bundle",
        "models",
        "onnx_graph",
        "runtime",
        "runtime/gpu",
        "runtime/backends",
        "export/engine",
    },
    "pytest_plugin": {
        "files",
        "hub",
        "images",
        "heads",
        "artifacts",
        "bundle",
        "models",
        "runtime",
        "profiling",
        "evaluation",
        "evaluation/data",
    },
    "model_repository": {"files", "bundle", "onnx_graph", "runtime"},
    "serving/requests": {"images", "bundle", "runtime"},
    "serving": {"bundle", "runtime", "serving/requests"},
    "explorer": {"files", "images", "artifacts", "bundle", "runtime", "runtime/backends", "profiling", "verify"},
    "demo": {
        "files",
        "images",
        "artifacts",
        "models",
        "distill",
        "distill/neurons",
        "runtime",
        "calibration",
        "export",
        "verify",
        "explorer",
    },
    "selftest": {
        "files",
        "bundle",
        "runtime",
        "runtime/gpu",
        "runtime/trt",
        "runtime/backends",
        "profiling",
        "doctor",
        "demo",
        "calibration",
        "export",
        "export/engine",
    },
    "cli": {
        "cli/commands",
        "cli/exploring",
        "cli/probing",
        "cli/serving",
        "cli/sharing",
        "cli/signing",
        "cli/streaming",
        "cli/testing",
        "bundle",
        "heads",
        "hub",
        "runtime/backends",
        "signing",
        "distill/devices",
    },
}
MAY["cli/tables"] = set(MAY)
MAY["cli/testing"] = set(MAY)
MAY["cli/streaming"] = set(MAY)
MAY["cli/sharing"] = set(MAY)
MAY["cli/signing"] = set(MAY)
MAY["cli/serving"] = set(MAY) - {"cli/streaming"}
MAY["cli/probing"] = set(MAY) - {"cli/serving", "cli/sharing"} | {"cli/commands"}
MAY["cli/exploring"] = set(MAY) - {"cli/streaming", "cli/probing", "cli/serving", "cli/sharing"}
MAY["cli/commands"] = set(MAY) - {"cli/probing"}
# Folder -> the folders that it imports inside functions only, so that their dependencies are optional.
LATE = {
    "heads": {"models"},
    "evaluation/data": {"models", "runtime"},
    "export": {"export/engine"},
    "model_repository": {"onnx_graph", "runtime"},
    "verify": {"heads", "models", "onnx_graph", "export/engine"},
    "pytest_plugin": {"heads", "models"},
    "profiling": {"export/engine"},
    "selftest": {"demo", "calibration", "export"},
    "cli/commands": set(MAY)
    - {"", "files", "images", "bundle", "cli", "cli/commands", "cli/exploring", "cli/serving", "cli/tables"},
    "cli/streaming": set(MAY) - {"", "files", "images", "bundle", "cli", "cli/streaming"},
    "cli/serving": set(MAY) - {"", "files", "images", "bundle", "cli", "cli/serving", "cli/tables"},
    "cli/testing": set(MAY) - {"", "files", "images", "bundle", "cli", "cli/testing"},
    "cli/exploring": set(MAY) - {"", "files", "images", "bundle", "cli", "cli/exploring", "cli/tables"},
    "cli/sharing": set(MAY) - {"", "cli", "cli/sharing"},
    "cli/signing": set(MAY) - {"", "cli", "cli/signing"},
    "cli/probing": set(MAY) - {"", "files", "images", "bundle", "cli", "cli/commands", "cli/probing", "cli/tables"},
    "cli/tables": set(MAY) - {"", "files", "images", "bundle", "cli"},
    "cli": {"bundle", "heads", "hub", "runtime/backends", "signing", "distill/devices"},
}
HEAVY = {"torch", "timm", "onnx", "onnxscript", "safetensors", "torchvision", "open_clip"}
# Folder -> the heavy modules that it may import.
NEEDS = {
    "models": HEAVY,
    "distill/devices": HEAVY,
    "heads": {"safetensors", "onnx"},
    "text": {"torch", "open_clip", "safetensors"},
    "distill/neurons": HEAVY,
    "distill/singular": HEAVY,
    "distill": HEAVY,
    "export": HEAVY,
    "demo": HEAVY,
    "onnx_graph": {"onnx"},
    "calibration": {"onnx"},
    "verify": {"onnx"},
}
WITHOUT_TORCH = {
    "hub",
    "cards",
    "sharing",
    "signing",
    "runtime",
    "runtime/gpu",
    "runtime/gpu_images",
    "runtime/trt",
    "runtime/backends",
    "extraction",
    "extraction/inputs",
    "calibration",
    "export/engine",
    "profiling",
    "profiling/device",
    "doctor",
    "stream",
    "stream/sources",
    "serving",
    "serving/requests",
    "explorer",
}
TORCH_FOLDERS = {"models", "distill", "export", "demo", "text"}
# Largest share of the code's lines in one folder of the package, with its subfolders.
LARGEST_SHARE = 0.18
# Largest number of source files in a folder.
MOST_FILES = 12
BLOCKED = ("torch", "timm", "onnx", "onnxscript", "safetensors", "torchvision")


def folder_of(path: Path) -> str:
    return "/".join(path.relative_to(PACKAGE).parts[:-1])


def imports(path: Path) -> list[tuple[str, bool]]:
    """List the dotted names that a file imports, and whether each import is inside a function."""
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
    """Return the file of this package that a dotted name is, or is in."""
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
    folder = folder_of(path)
    assert folder in MAY, f"{folder} is a new folder; add it to MAY"
    if path.name == "__main__.py":
        assert {folder_of(module) for module, _ in modules_imported(path)} == {"cli"}
        return
    for module, late in modules_imported(path):
        name = folder_of(module)
        assert name in ("", folder) or name in MAY[folder], f"{path.name} in {folder or 'the root'} imports {name}"
        assert late or name not in LATE.get(folder, ()), f"{path.name} imports {name} at its top"


def test_the_rule_has_no_circle():
    """No folder may import itself through other folders."""
    below: dict[str, set[str]] = {}

    def folders_below(folder: str, path: tuple[str, ...] = ()) -> set[str]:
        assert folder not in path, f"a circle: {' -> '.join((*path, folder))}"
        if folder not in below:
            below[folder] = set().union(
                *({r} | folders_below(r, (*path, folder)) for r in MAY[folder] - {"cli"}), set()
            )
        return below[folder]

    for folder in MAY:
        folders_below(folder)


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
def test_heavy_modules_are_imported_in_their_folders_alone(path):
    allowed = NEEDS.get(folder_of(path), set())
    for name, _ in imports(path):
        top = name.split(".")[0]
        assert top not in HEAVY or top in allowed, f"{path} imports {name}"


def test_folders_for_the_device_import_no_torch_indirectly():
    for folder, may in MAY.items():
        if folder in WITHOUT_TORCH:
            assert not may & TORCH_FOLDERS, folder


def test_the_rule_covers_every_folder_and_no_other():
    assert set(MAY) == {folder_of(p) for p in FILES}


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_files_are_small(path):
    assert len(path.read_text().splitlines()) <= 300


def test_folders_are_small():
    lines = {path: len(path.read_text().splitlines()) for path in FILES}
    whole = sum(lines.values())
    for folder in {folder_of(path).split("/")[0] for path in FILES}:
        own = sum(n for path, n in lines.items() if folder_of(path).split("/")[0] == folder)
        assert own <= LARGEST_SHARE * whole, f"{folder or 'the root'} has {own} of {whole} lines"
    for folder in MAY:
        count = sum(folder_of(path) == folder for path in FILES)
        assert count <= MOST_FILES, f"{folder or 'the root'} has {count} files"


def test_no_module_shadows_a_dependency():
    stems = {p.stem for p in FILES}
    assert not stems & {"onnx", "tensorrt", "torch", "timm", "utils", "onnxruntime", "openvino", "numpy", "click"}


@pytest.mark.parametrize("name", ["calibration", "export", "runtime"])
def test_folders_are_linked_from_the_root(name):
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
def test_the_runtime_serves_without_torch(request, which, backend, photos):
    from phreg_deploy.runtime import FeatureExtractor

    pytest.importorskip({"onnxruntime-cpu": "onnxruntime"}.get(backend, backend))
    folder, image = request.getfixturevalue(which), photos / "frame-03.jpg"
    said = json.loads(run_python(SERVE, folder, image, ",".join(BLOCKED), backend))
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


def test_calibration_runs_without_torch(bundle, photos, tmp_path):
    words = ["calibrate", bundle, "--images", photos, "-o", tmp_path / "int8", "--json"]
    blocked = ",".join(name for name in BLOCKED if name != "onnx")
    said = json.loads(run_python(CALIBRATE, blocked, *words).splitlines()[-1])
    assert (said["code"], said["missed"], said["heavy"]) == (0, [], []), said
    assert (tmp_path / "int8" / "calibration.json").is_file()
