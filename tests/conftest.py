"""What all tests share: photographs, and what is made once for several tests and processes.

No fixture needs the network. Fixtures that need torch skip if it is not installed.
"""

import functools
import gc
import importlib
import os
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
    "tests.student_fixtures",
    "tests.gpu_fixtures",
    "tests.real_gpu_fixtures",
    "tests.example_fixtures",
    "tests.head_helpers",
    "tests.plugin_runs",
    "tests.browser_fixtures",
]


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
