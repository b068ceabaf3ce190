"""Extractors in worker processes: pickled into spawned ones, and used again in forked ones."""

import multiprocessing
import os
import pickle
import subprocess
import sys
from concurrent.futures import ProcessPoolExecutor

import numpy as np
import pytest

from phreg_deploy.bundle.bundle import Bundle
from phreg_deploy.errors import PhregError
from phreg_deploy.runtime import FeatureExtractor
from phreg_deploy.runtime.backends.options import BackendOptions
from phreg_deploy.runtime.backends.registry import open_backend
from phreg_deploy.runtime.forking import ForkSafeBackend
from tests.cli_helpers import ROOT

FRAME = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
# How the child of a fork ended, for the exit code of its parent: a word is printed and gives 1.
DESCRIBE = """
OTHER_FEATURES = 3

def describe(status):
    if os.WIFSIGNALED(status):
        name = signal.Signals(os.WTERMSIG(status)).name
        return "the child hung until its alarm" if name == "SIGALRM" else f"the child died of {name}"
    code = os.waitstatus_to_exitcode(status)
    return "the child gave other features" if code == OTHER_FEATURES else f"the child ended with {code}" if code else 0
"""
FORKED = """
import os, signal, sys, threading
import numpy as np
from phreg_deploy.runtime import FeatureExtractor
frame = np.random.default_rng(0).integers(0, 256, (1, 64, 64, 3), dtype=np.uint8)
extractor = FeatureExtractor.load(sys.argv[1], sys.argv[2], mode=sys.argv[3], threads=2)
expected = extractor.dense(frame).features
extractor._fork_safe.lock.acquire()  # as another thread may have done
child = os.fork()
if child == 0:
    signal.alarm(120)
    found = []
    threads = [threading.Thread(target=lambda: found.append(extractor.dense(frame).features)) for _ in range(3)]
    [thread.start() for thread in threads]
    [thread.join() for thread in threads]
    errors = [float(np.abs(features - expected).max()) for features in found]
    same = len(found) == 3 and all(np.allclose(features, expected, atol=1e-5) for features in found)
    if not same:
        print(f"{len(found)} of 3 threads gave features, which differ by at most {errors}", file=sys.stderr, flush=True)
    extractor.close()
    os._exit(0 if same else OTHER_FEATURES)
extractor._fork_safe.lock.release()
_, status = os.waitpid(child, 0)
assert np.array_equal(extractor.dense(frame).features, expected), "the parent's features changed"
sys.exit(describe(status))
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system does not fork")
@pytest.mark.parametrize(
    ("backend", "mode"), [("onnxruntime-cpu", "latency"), ("openvino", "latency"), ("openvino", "throughput")]
)
def test_a_forked_child_opens_the_backend_again(bundle, backend, mode):
    pytest.importorskip({"onnxruntime-cpu": "onnxruntime"}.get(backend, backend))
    done = subprocess.run(
        [sys.executable, "-c", DESCRIBE + FORKED, str(bundle), backend, mode],
        capture_output=True,
        text=True,
        check=False,
        cwd=ROOT,
    )
    assert done.returncode == 0, done.stderr


EXITS = """
import os, signal, sys
from phreg_deploy.runtime import FeatureExtractor
extractor = FeatureExtractor.load(sys.argv[1], "openvino", threads=2)
child = os.fork()
if child == 0:
    signal.alarm(120)
    sys.exit(0)
_, status = os.waitpid(child, 0)
sys.exit(describe(status))
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system does not fork")
def test_a_forked_child_ends_without_freeing_the_parents_backend(bundle):
    pytest.importorskip("openvino")
    done = subprocess.run(
        [sys.executable, "-c", DESCRIBE + EXITS, str(bundle)], capture_output=True, text=True, check=False, cwd=ROOT
    )
    assert done.returncode == 0, done.stderr


class OnGpu:
    name, compute = "tensorrt", "fp32"


def test_a_backend_that_cannot_be_opened_after_a_fork_is_refused(bundle):
    backend = ForkSafeBackend(OnGpu())
    backend.forget()  # what a fork does in the child
    with pytest.raises(PhregError, match=r"forked after the extractor had opened tensorrt.*get_context\('spawn'\)"):
        backend.reopened()
    backend.close()
    with pytest.raises(PhregError, match="was closed"):
        backend.reopened()


def mean_feature(extractor):
    """Return the mean feature of a frame; this runs in a spawned process."""
    return os.getpid(), extractor.choice, extractor.color, float(extractor(FRAME).features.mean())


def test_an_extractor_is_pickled_by_its_path(bundle, monkeypatch):
    monkeypatch.chdir(bundle.parent)
    with FeatureExtractor.load(bundle.name, "onnxruntime-cpu", threads=1, color="bgr", exif=False) as extractor:
        data = pickle.dumps(extractor)
        assert len(data) < 1_000
        monkeypatch.chdir("/")
        with pickle.loads(data) as again:
            assert (again.color, again.preprocess, again.backend) == ("bgr", extractor.preprocess, "onnxruntime-cpu")
            assert np.array_equal(again(FRAME).features, extractor(FRAME).features)
        monkeypatch.chdir(ROOT)
        with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
            process, choice, color, mean = pool.submit(mean_feature, extractor).result()
        assert process != os.getpid()
        assert (choice, color) == ("onnxruntime-cpu: as asked", "bgr")
        assert mean == pytest.approx(float(extractor(FRAME).features.mean()), rel=1e-6)
    with pytest.raises(PhregError, match="was closed"):
        pickle.dumps(extractor)


def test_an_extractor_around_a_backend_of_the_callers_is_not_pickled(bundle):
    opened = Bundle.read(bundle)
    with FeatureExtractor(opened, open_backend(opened, "onnxruntime-cpu", BackendOptions(1))) as extractor:
        with pytest.raises(PhregError, match=r"only a FeatureExtractor from FeatureExtractor\.load can be pickled"):
            pickle.dumps(extractor)


class Described:
    """A data set whose workers extract, as PyTorch's DataLoader takes it."""

    def __init__(self, extractor):
        self.extractor = extractor

    def __len__(self):
        return 2

    def __getitem__(self, index):
        return self.extractor(np.roll(FRAME, index, axis=0)).features[0]


LOADED = """
import sys
import numpy as np
from torch.utils.data import DataLoader
from phreg_deploy.runtime import FeatureExtractor
from tests.test_processes import Described
if __name__ == "__main__":
    with FeatureExtractor.load(sys.argv[1], "onnxruntime-cpu", threads=1) as extractor:
        data = Described(extractor)
        expected = np.stack([data[0], data[1]])
        (batch,) = DataLoader(data, batch_size=2, num_workers=1, multiprocessing_context=sys.argv[2])
    np.testing.assert_allclose(batch.numpy(), expected, rtol=1e-5, atol=1e-6)
"""


@pytest.mark.usefixtures("torch")
@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_workers_of_a_data_loader_extract(bundle, method):
    """Run in a separate process, so that the other tests do not load what a DataLoader loads."""
    if method not in multiprocessing.get_all_start_methods():
        pytest.skip(f"this system does not {method}")
    asked = [sys.executable, "-c", LOADED, str(bundle), method]
    done = subprocess.run(asked, capture_output=True, text=True, check=False, cwd=ROOT, timeout=600)
    assert done.returncode == 0, done.stderr
