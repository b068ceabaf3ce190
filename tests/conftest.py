"""Photographs, a small model with a planted register neuron, its student and its bundles; each is made once.

No fixture needs the network. Fixtures that need torch skip if it is not installed.
"""

import functools
import gc
import importlib
import os
import pickle
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
from filelock import FileLock
from PIL import Image

from tests.cli_helpers import ROOT, invoke, photograph

os.environ.update(HF_HUB_OFFLINE="1", OMP_NUM_THREADS="1", COLUMNS="140")

pytest_plugins = [
    "pytester",
    "tests.gpu_fixtures",
    "tests.real_gpu_fixtures",
    "tests.example_fixtures",
    "tests.head_helpers",
    "tests.plugin_runs",
    "tests.browser_fixtures",
]

SIDE, PATCH, WIDTH, DEPTH = 64, 8, 48, 3
NEURON = (1, 17)  # block and hidden unit of the planted register neuron


def pytest_collection_finish():
    """Leave what is loaded by now out of every later garbage collection, which would walk through it in vain."""
    gc.collect()
    gc.freeze()


@pytest.hookimpl(tryfirst=True)
def pytest_pyfunc_call(pyfuncitem):
    """Run a test marked ``fresh_process`` in a new Python: a process that has trained cannot train in forked ones."""
    if pyfuncitem.get_closest_marker("fresh_process") is None or "PHREG_FRESH_PROCESS" in os.environ:
        return None
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    done = subprocess.run(
        [sys.executable, "-m", "pytest", pyfuncitem.nodeid],
        env={**environment, "PHREG_FRESH_PROCESS": "1"},
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-6000:]
    return True


@pytest.fixture(scope="session")
def run_cli():
    return invoke


@pytest.fixture(scope="session", autouse=True)
def home(tmp_path_factory):
    """Keep the cache of teacher targets in a folder of this test session."""
    folder = tmp_path_factory.mktemp("home")
    with mock.patch.dict(os.environ, XDG_CACHE_HOME=str(folder)):
        yield folder / "phreg-deploy"


@pytest.fixture(scope="session")
def made_once(tmp_path_factory):
    """``made_once(name, make)`` returns the folder ``name``, which ``make(folder)`` writes once in a test session.

    The workers of pytest-xdist share it: the first that asks makes it, and the others wait. Tests only read it. With
    ``PHREG_MADE=FOLDER`` the folders stay there for later sessions, also those of an environment without torch.
    """
    root = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        root = root.parent
    root = Path(os.environ.get("PHREG_MADE") or root / "made-once")
    root.mkdir(exist_ok=True)

    def made(name: str, make: Callable[[Path], object]) -> Path:
        folder, done = root / name, root / f"{name}.done"
        with FileLock(root / f"{name}.lock"):
            if not done.exists():
                shutil.rmtree(folder, ignore_errors=True)
                make(folder)
                done.touch()
        return folder

    return made


@pytest.fixture(scope="session", autouse=True)
def torchlib_parsed_once():
    """Parse the functions of onnxscript's library once, not in every export: that is a quarter of an export's time."""
    if "torch" not in sys.modules:
        yield
        return
    try:
        from onnxscript import TracedOnnxFunction as traced
    except ImportError:  # the extra "export" is not installed
        yield
        return
    with mock.patch.object(traced, "function_ir", property(functools.cache(traced.function_ir.fget))):
        yield


@pytest.fixture(scope="session")
def torch():
    torch = pytest.importorskip("torch")
    pytest.importorskip("timm")
    torch.set_num_threads(1)
    return torch


@pytest.fixture(scope="session")
def photos(made_once) -> Path:
    """24 photographs, JPEG and PNG, of many sizes."""

    def make(folder: Path) -> None:
        folder.mkdir()
        for i in range(24):
            picture = photograph(i, 70 + 7 * (i % 5), 66 + 11 * (i % 4))
            picture.save(folder / f"frame-{i:02d}.{'jpg' if i % 2 else 'png'}")

    return made_once("photos", make)


@pytest.fixture(scope="session")
def odd_images(tmp_path_factory) -> Path:
    """One file of each odd kind: five colour modes that can be read, and three files that cannot."""
    folder, picture = tmp_path_factory.mktemp("odd"), photograph(100, 90, 80)
    picture.convert("L").save(folder / "grey.png")
    picture.convert("CMYK").save(folder / "cmyk.jpg")
    picture.convert("RGBA").save(folder / "rgba.png")
    picture.convert("P", palette=Image.Palette.ADAPTIVE).save(folder / "palette.png")
    deep = np.asarray(picture.convert("L")).astype(np.uint16) * 257
    Image.fromarray(deep).save(folder / "grey16.png")
    picture.save(folder / "whole.jpg")
    data = (folder / "whole.jpg").read_bytes()
    (folder / "truncated.jpg").write_bytes(data[: len(data) // 2])
    (folder / "empty.png").write_bytes(b"")
    (folder / "text.jpg").write_text("not an image\n")
    return folder


def plant(model: Any, torch: Any) -> None:
    """Give ``model`` seeded weights of normal scale, and a register neuron that makes the four corner tokens outliers.

    A vector in the position embedding marks the corners. The neuron detects it and adds one large vector.
    """
    draw = torch.Generator().manual_seed(7)
    block, unit = NEURON
    with torch.no_grad():
        for name, value in model.named_parameters():
            noise = torch.randn(value.shape, generator=draw)
            if "norm" in name:
                value.copy_(0.1 * noise + (1.0 if name.endswith("weight") else 0.0))
            elif value.ndim > 1 and name.endswith("weight"):
                value.copy_(noise / value[0].numel() ** 0.5)
            else:
                value.copy_(0.3 * noise if "embed" in name or "token" in name else 0.05 * noise)
        mark = torch.randn(WIDTH, generator=draw)
        mark = (mark - mark.mean()) / (mark - mark.mean()).norm()
        last = SIDE // PATCH - 1
        for row, column in ((0, 0), (0, last), (last, 0), (last, last)):
            model.pos_embed[0, 1 + row * (last + 1) + column] += 9 * mark
        mlp = model.blocks[block].mlp
        mlp.fc1.weight[unit] = 60 * mark
        mlp.fc1.bias[unit] = -60 * 3.5
        wrote = torch.randn(WIDTH, generator=draw)
        mlp.fc2.weight[:, unit] = 2 * wrote / wrote.norm()


@pytest.fixture(scope="session")
def base(made_once, torch) -> Path:
    """A folder that stock timm loads: a ViT of 64 px, patch 8, width 48, 3 blocks, 5 classes."""
    import timm
    from timm.models import save_for_hf

    def make(folder: Path) -> None:
        shape = {"img_size": SIDE, "patch_size": PATCH, "embed_dim": WIDTH, "depth": DEPTH, "num_heads": 3}
        model = timm.create_model("vit_tiny_patch16_224", num_classes=5, **shape)
        plant(model, torch)
        save_for_hf(model, str(folder), model_args=shape, safe_serialization=True)

    return made_once("base", make)


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory, torch) -> Path:
    """Random weights in safetensors for timm's ``vit_tiny_patch16_224`` at its native 224 px."""
    import timm
    from safetensors.torch import save_file

    torch.manual_seed(3)
    path = tmp_path_factory.mktemp("weights") / "vit_tiny.safetensors"
    save_file(timm.create_model("vit_tiny_patch16_224", pretrained=False).state_dict(), path)
    return path


@pytest.fixture(scope="session")
def distilled(student) -> tuple[Path, Any]:
    """A student of one epoch, and its record."""
    return student, pickle.loads(student.with_name("record.pickle").read_bytes())


@pytest.fixture(scope="session")
def student(request, made_once, photos) -> Path:
    def make(folder: Path) -> None:
        base = request.getfixturevalue("base")
        from phreg_deploy.distill import distill

        record = distill(str(base), photos, folder, epochs=1, batch=8, views=6, device="cpu", precision="fp32")
        folder.with_name("record.pickle").write_bytes(pickle.dumps(record))

    return made_once("student", make)


@pytest.fixture(scope="session")
def exported(request, made_once):
    """``exported(name, **settings)`` returns the folder of a bundle of the student, which needs torch to be made."""

    def made(name: str, **settings: str) -> Path:
        def make(folder: Path) -> None:
            request.getfixturevalue("torch")
            from phreg_deploy.export.exporter import ExportRequest, export_bundle

            export_bundle(ExportRequest(str(request.getfixturevalue("student")), **settings), folder)

        return made_once(name, make)

    return made


@pytest.fixture(scope="session")
def bundle(exported) -> Path:
    """The student at 64 x 64, one image at a time."""
    return exported("fixed")


@pytest.fixture(scope="session")
def wide_bundle(exported) -> Path:
    """The student from 48 to 96 pixels a side, one to four images."""
    return exported("wide", image_size="48:64:96", batch="1:2:4")


@pytest.fixture(scope="session")
def int8_bundle(made_once, bundle, photos) -> Path:
    """The fixed bundle in INT8, as ``calibrate`` writes it by default."""
    from phreg_deploy.calibration import calibrate

    return made_once("int8", lambda folder: calibrate(bundle, photos, folder))


@pytest.fixture(scope="session")
def wide_int8_bundle(made_once, wide_bundle, photos) -> Path:
    """The bundle of many sizes and batches in INT8, with a given smoothing instead of a search."""
    from phreg_deploy.calibration import calibrate
    from phreg_deploy.quantisation import Smoothing

    return made_once("wide-int8", lambda folder: calibrate(wide_bundle, photos, folder, smoothing=Smoothing()))


@pytest.fixture(scope="session")
def clip_models(made_once, torch) -> Path:
    """``open_clip`` and ``timm``: a small CLIP with random weights, whole for open_clip and as timm's image tower."""
    pytest.importorskip("open_clip")
    from tests.text_models import clip

    def make(folder: Path) -> None:
        folder.mkdir()
        clip(folder)

    return made_once("clip-models", make)


@pytest.fixture(scope="session")
def clip_bundle(made_once, clip_models) -> Path:
    """The image tower at 64 x 64, projected into the space of text."""
    from phreg_deploy.export import export

    return made_once("clip-bundle", lambda folder: export(str(clip_models / "timm"), folder, project=True))


@pytest.fixture(scope="session")
def traces():
    """Cache of traced graphs: (sizes, batches, weights) -> graph and program."""
    return {}


@pytest.fixture
def traced_once(torch, traces, monkeypatch):
    """Trace a student once per size in a session, for tests that do not test the tracing itself."""
    exporter = importlib.import_module("phreg_deploy.export.exporter")

    def once(module, sizes, batches, trace=exporter.trace):
        key = (sizes, batches, module.projection.sum().item())
        if key not in traces:
            traced = trace(module, sizes, batches)
            traces[key] = traced.model.SerializeToString(), traced.program
        data, program = traces[key]
        return exporter.Traced(exporter.onnx.load_from_string(data), program)

    monkeypatch.setattr(exporter, "trace", once)


@pytest.fixture
def world(request, tmp_path):
    """Every fixture as an attribute, made at first use, and the test's ``out`` and ``tmp``; for tables of cases."""

    class World:
        tmp, out = tmp_path, tmp_path / "out"

        def __getattr__(self, name: str) -> Any:
            return request.getfixturevalue(name)

        def copy(self, name: str, **files: Any) -> Path:
            """Copy a fixture's folder; replace files by their stem with other bytes, or remove them (None)."""
            folder = Path(shutil.copytree(getattr(self, name), tmp_path / f"copy-of-{name}"))
            for stem, change in files.items():
                (path,) = folder.glob(f"{stem}.*")
                if change is None:
                    path.unlink()
                    continue
                path.write_bytes(change(path.read_bytes()) if callable(change) else change)
            return folder

    return World()


@pytest.fixture
def bundle_copy(world):
    """A copy of the fixed bundle, as a ``Bundle``."""
    from phreg_deploy.bundle.bundle import Bundle

    return Bundle.read(world.copy("bundle"))
