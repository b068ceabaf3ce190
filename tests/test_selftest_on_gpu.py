"""`phreg-deploy selftest --gpu` on the fake GPU: a sound one passes each check, a fault fails the check of its kind."""

import tempfile
import threading
import zipfile

import pytest

from phreg_deploy.errors import PhregError
from phreg_deploy.export import build
from phreg_deploy.progress import SILENT
from phreg_deploy.runtime.trt.buffers import TensorBuffers
from phreg_deploy.selftest import disputes, selftest
from phreg_deploy.selftest.archive import Archive
from phreg_deploy.selftest.checks import FAIL, PASS, SKIP, Failed, Sheet, Skipped
from phreg_deploy.selftest.engines import EngineChecks
from phreg_deploy.selftest.subjects import Subject
from tests.cli_helpers import invoke

PATHS = ("plain", "captured", "replayed", "device arrays", "misaligned frames")
THREADS = "two threads and a synchronising one"


@pytest.fixture(autouse=True)
def short(monkeypatch):
    """Measure for moments. The doctor's findings, which take seconds, are the subject of other tests."""
    for name, value in {"engines.SECONDS": 0.05, "engines.WARMUP": 0, "serving.ROUNDS": 6, "serving.WARM": 4}.items():
        monkeypatch.setattr(f"phreg_deploy.selftest.{name}", value)
    monkeypatch.setattr("phreg_deploy.selftest.runner.diagnose", lambda: [])


@pytest.fixture
def check(tensorrt, request, tmp_path, all_freed):
    """``check("fp16_bundle")`` checks fixtures' bundles: name -> check."""

    def run(*names, quick=True, frames=12):
        bundles = [request.getfixturevalue(name) for name in names]
        verdict = selftest(tmp_path / "out.zip", gpu=True, bundles=bundles, quick=quick, frames=frames)
        checks = {one.name: one for one in verdict.checks}
        assert len(checks) == len(verdict.checks)
        return checks

    return run


@pytest.fixture
def pair(device, tensorrt, bundle, fp16_bundle, copy_bundle):
    """The built engines of one model in FP32 and in FP16."""
    checks = EngineChecks(Sheet(), Archive(), 0, device.architecture, SILENT)
    folders = {"fp32": copy_bundle("bundle"), "fp16": copy_bundle("fp16_bundle")}
    return [checks.check(Subject("small", precision, folder, str)) for precision, folder in folders.items()]


def failed(checks):
    return {name for name, one in checks.items() if one.verdict == FAIL}


def named(*names, bundle="bundle 1 fp16"):
    return {f"{bundle}, {name}" for name in names}


def test_a_sound_gpu_passes_every_check(check):
    checks = check("wide_bundle", "fp16_bundle", "int8_trt_bundle", quick=False)
    assert failed(checks) == set()
    for number, precision in enumerate(("fp32", "fp16", "int8"), 1):
        for name in ("bundle", "engine", "exam", *PATHS, THREADS, "timing"):
            assert checks[f"bundle {number} {precision}, {name}"].verdict == PASS
    assert "over 2 profiles" in checks["bundle 1 fp32, exam"].detail
    assert checks["bundle 2 fp16, fused and 8-bit layers"].detail == "3 of 3 attentions are fused"
    assert checks["bundle 2 fp16, memory"].verdict == PASS
    for kind in ("version", "ampere+", "same-cc"):
        assert checks[f"bundle 2 fp16, --compat {kind}"].verdict == PASS
    assert checks["INT8 on Orin"].verdict == SKIP


def test_a_wrong_profile_is_found_on_every_path(check, tensorrt):
    tensorrt.wrong = lambda profile, _batch, _path: profile == 1
    checks = check("wide_bundle")
    assert failed(checks) == named("exam", *PATHS, bundle="bundle 1 fp32")
    assert "profile 1, batch 2" in checks["bundle 1 fp32, plain"].detail


def test_a_wrong_graph_is_found(check, tensorrt):
    tensorrt.wrong = lambda _profile, _batch, path: path == "replayed"
    checks = check("fp16_bundle")
    assert named("exam", "captured", "replayed") <= failed(checks)
    assert checks["bundle 1 fp16, plain"].verdict == PASS


def test_a_stale_replay_is_found(check, tensorrt):
    """Each launch of a graph after its first answers what the call before answered."""
    kept, calls = {}, []

    def answer(name, values):
        stale = calls[-2:] == ["replayed", "replayed"]
        kept[name] = kept[name] if stale and name in kept else values
        return kept[name]

    tensorrt.answer, tensorrt.wrong = answer, lambda _profile, _batch, path: calls.append(path)
    checks = check("fp16_bundle")
    assert named("exam", "replayed") <= failed(checks)
    assert all(checks[name].verdict == PASS for name in named("plain", "captured"))


def test_frames_read_from_a_rounded_address_are_found(check, monkeypatch):
    whole = TensorBuffers.fetch
    monkeypatch.setattr(TensorBuffers, "fetch", lambda self, name, source: whole(self, name, source - source % 256))
    assert failed(check("fp16_bundle")) == named("exam", "misaligned frames")


def test_arrays_on_the_gpu_that_are_not_read_are_found(check, monkeypatch):
    monkeypatch.setattr(TensorBuffers, "fetch", lambda *_: None)
    assert failed(check("fp16_bundle")) == named("exam", "device arrays", "misaligned frames", THREADS)


def test_wrong_answers_of_threads_are_found(check, tensorrt):
    tensorrt.wrong = lambda *_: threading.current_thread().name == "selftest"
    checks = check("fp16_bundle")
    assert failed(checks) == named(THREADS)
    assert "of 36 answers were wrong, first: frame 0: features differs" in checks[named(THREADS).pop()].detail


def test_lost_memory_of_the_gpu_is_found(check, tensorrt, device):
    lost = []

    def answer(_name, values):
        lost.append(device.memory.allocate(1 << 20, 0))
        return values

    tensorrt.answer = answer
    checks = check("fp16_bundle")
    for pointer in lost:
        device.free(pointer)
    assert failed(checks) == named("memory")
    assert "memory grew over 12 frames: GPU +36.0 MiB" in checks["bundle 1 fp16, memory"].detail


def test_unfused_attention_and_float_layers_are_found(check, tensorrt, device):
    tensorrt.unfused_blocks, tensorrt.float_layers, device.architecture = {1}, {"blocks.1.mlp.fc2"}, 87
    checks = check("int8_trt_bundle")
    assert failed(checks) == {*named("fused and 8-bit layers", bundle="bundle 1 int8"), "INT8 on Orin"}
    assert "2 of 3 attentions are fused; 1 of 12 linear" in checks["bundle 1 int8, fused and 8-bit layers"].detail


def test_int8_on_orin_passes_or_names_the_issue_of_tensorrt(check, tensorrt, device, monkeypatch):
    device.architecture = 87
    assert check("int8_trt_bundle")["INT8 on Orin"].detail == "12 of 12 linear layers run in 8 bits"
    tensorrt.refused_node = "blocks.0.mlp.fc1/MatMul"
    monkeypatch.setattr("phreg_deploy.selftest.archive.check_archive", lambda *_: None)
    checks = check("int8_trt_bundle")
    assert failed(checks) == {"bundle 1 int8, engine", "INT8 on Orin"}
    assert "TensorRT/issues/4832" in checks["bundle 1 int8, engine"].detail


def test_a_wrong_compatible_engine_is_found(check, tensorrt):
    tensorrt.wrong = lambda *_: tensorrt.builds[-1].hardware_compatibility_level.name == "AMPERE_PLUS"
    assert failed(check("fp16_bundle", quick=False)) == named("--compat ampere+")


def test_engines_for_other_gpus_are_refused_on_a_jetson(check, copy_bundle, tensorrt, device, monkeypatch):
    for module in ("selftest.disputes", "export.engine.build"):
        monkeypatch.setattr(f"phreg_deploy.{module}.is_jetson", lambda: True)
    checks = check("fp16_bundle", quick=False)
    assert checks["bundle 1 fp16, --compat version"].verdict == PASS
    assert {checks[name].verdict for name in named("--compat ampere+", "--compat same-cc")} == {SKIP}
    folder = copy_bundle("bundle")
    for kind in ("ampere+", "same-cc"):
        with pytest.raises(PhregError, match="excludes on JetPack"):
            build(folder, compatibility=kind)


def test_engines_for_ampere_are_refused_on_older_gpus(copy_bundle, tensorrt, device):
    device.architecture = 75
    with pytest.raises(PhregError, match=r"got ampere\+ on NVIDIA Fake \(SM 7.5\), expected a GPU of SM 8.0"):
        build(copy_bundle("bundle"), compatibility="ampere+")


def test_the_first_cast_is_compared_with_fp32(pair, tensorrt):
    """The fake GPU has no bfloat16, so FP16 stands in its place."""
    fp32, fp16 = pair
    assert "cosine 1.0000" in disputes.check_first_cast(fp16, fp32, 0)
    with pytest.raises(Skipped):
        disputes.check_first_cast(None, fp32, 0)
    tensorrt.answer = lambda _name, values: -values if values.dtype == "float16" else values
    with pytest.raises(Failed, match="on black, white and graded pictures is -"):
        disputes.check_first_cast(fp16, fp32, 0)


def test_onnxruntime_on_cuda_passes_with_and_without_its_graph(onnxruntime_gpu, fp16_bundle):
    assert "3 exams with a CUDA graph" in disputes.check_onnxruntime(fp16_bundle, 0)
    onnxruntime_gpu.refuses_graphs = True
    said = disputes.check_onnxruntime(fp16_bundle, 0)
    assert "3 exams without a CUDA graph" in said
    assert "ONNX Runtime takes no CUDA graph of this bundle" in said
    assert "enable_cuda_graph" not in onnxruntime_gpu.sessions[-1].asked[0][1]


def test_wrong_answers_of_onnxruntime_are_found(onnxruntime_gpu, fp16_bundle, device, monkeypatch):
    from phreg_deploy.runtime.gpu.ort_graph import Staging

    right = Staging.run
    monkeypatch.setattr(Staging, "run", lambda self, feed: {k: 0 * v for k, v in right(self, feed).items()})
    with pytest.raises(Failed, match="call 1: "):
        disputes.check_onnxruntime(fp16_bundle, 0)


def test_an_old_onnxruntime_without_bfloat16_is_left_out(onnxruntime_gpu, bundle, monkeypatch):
    from phreg_deploy.bundle.bundle import Bundle
    from phreg_deploy.runtime.backends.onnxruntime_options import load_onnxruntime
    from phreg_deploy.runtime.backends.options import BackendOptions

    onnxruntime_gpu.__version__ = "1.22.1"
    manifest = Bundle.read(bundle).manifest
    object.__setattr__(manifest, "precision", "bf16")
    with pytest.raises(PhregError, match=r"1.22.1 has no bfloat16 kernel of Gelu on CUDA; expected at least 1.23"):
        load_onnxruntime(manifest, "onnxruntime-cuda", BackendOptions())


SANITIZER = """#!{python}
import runpy, sys
sys.path.insert(0, {root!r})
if {found}:
    print("========= Invalid __global__ write of size 4 bytes")
    print("========= ERROR SUMMARY: 1 error")
    sys.exit(86)
from unittest import mock
import pytest
from tests import fake_gpu
device = fake_gpu.Device()
with pytest.MonkeyPatch.context() as patch:
    fake_gpu.install(patch, device, fake_gpu.FakeTensorRT(device))
    at = sys.argv.index("-m")
    assert sys.argv[1:at - 1] == ["--tool", "memcheck", "--leak-check", "full", "--error-exitcode", "86"]
    sys.argv = sys.argv[at + 1:]
    runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
assert device.undefined == [] and device.live() == {{}}
print("========= ERROR SUMMARY: 0 errors")
"""


@pytest.mark.parametrize("found", [False, True])
def test_the_verdict_of_compute_sanitizer_is_reported(check, tmp_path, monkeypatch, found):
    """The tool that stands in for it runs the same process, on the fake GPU."""
    import sys

    from tests.cli_helpers import ROOT

    tool = tmp_path / "bin" / "compute-sanitizer"
    tool.parent.mkdir()
    tool.write_text(SANITIZER.format(python=sys.executable, root=str(ROOT), found=found))
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", str(tool.parent))
    one = check("fp16_bundle")["bundle 1 fp16, compute-sanitizer"]
    assert one.verdict == (FAIL if found else PASS), one.detail
    assert ("found errors: ERROR SUMMARY: 1 error" if found else "ERROR SUMMARY: 0 errors") in one.detail
    with zipfile.ZipFile(tmp_path / "out.zip") as archive:
        assert "ERROR SUMMARY" in archive.read("compute-sanitizer.txt").decode()


def test_the_archive_names_no_user_and_no_folder(check, tmp_path, monkeypatch):
    monkeypatch.setattr("getpass.getuser", lambda: "gwendolyn")
    monkeypatch.setattr("socket.gethostname", lambda: "desk-of-gwendolyn")
    monkeypatch.setattr("phreg_deploy.selftest.engines.judge_layers", lambda _: _fail(tmp_path))
    check("fp16_bundle")
    with zipfile.ZipFile(tmp_path / "out.zip") as archive:
        texts = {name: archive.read(name).decode() for name in archive.namelist()}
    engine = "engines/bundle 1 fp16"
    wanted = {"verdict.json", "verdict.txt", "machine.json", "doctor.json", "timings.json", "log.txt"}
    assert set(texts) == wanted | {f"{engine}.{kind}.json" for kind in ("inspector", "build", "exam")}
    for name, text in texts.items():
        for word in ("gwendolyn", str(tmp_path), tempfile.gettempdir() + "/"):
            assert word not in text, name
    assert "the fake is slower than a GPU" in texts["log.txt"], "TensorRT's own messages"
    assert "/notes.txt is read by USER on HOST" in texts["verdict.txt"]
    assert "_gemm_mha_v2" in texts[f"{engine}.inspector.json"]
    assert "blocks.0.attn/MatMul" in texts[f"{engine}.inspector.json"]


def _fail(folder):
    raise Failed(f"{folder}/my secret/notes.txt is read by gwendolyn on desk-of-gwendolyn")


def test_the_command_makes_its_own_bundles_and_prints_a_line_for_each_check(tensorrt, base, tmp_path, monkeypatch):
    """A smaller model takes the place of the one in the package."""
    monkeypatch.setattr("phreg_deploy.selftest.subjects.packaged_model", lambda: base)
    monkeypatch.setattr("phreg_deploy.selftest.runner.ON_GPU", ("fp32", "int8"))
    done = invoke("selftest", "--gpu", "--quick", "--frames", "4", "-o", tmp_path / "a.zip")
    assert done.code == 0, done.out
    for line in (
        "small int8, bundle: calibrated on 8 scenes",
        "small int8, replayed: ",
        "small fp32, memory: 4 frames",
    ):
        assert f"PASS  {line}" in done.out
    last = done.out.splitlines()[-1]
    assert last.startswith("PASS: ")
    assert "0 failed" in last


def test_a_failure_is_exit_code_3(check, tensorrt, fp16_bundle, tmp_path):
    words = ["selftest", "--gpu", "--frames", "4", "--bundle", fp16_bundle, "-o", tmp_path / "a.zip", "--json"]
    tensorrt.wrong = lambda *_: True
    done = invoke(*words)
    done.refused(3, "FAIL: ", "bundle 1 fp16, exam: ", "Send ")
    assert done.document["passed"] is False
    assert {one["verdict"] for one in done.document["checks"]} == {PASS, FAIL, SKIP}
