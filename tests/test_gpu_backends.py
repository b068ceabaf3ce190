"""ONNX Runtime's providers for GPUs, and what `auto` makes of a GPU, on machines that have none."""

import importlib
import shutil
import sys
import threading
import types
from dataclasses import replace

import numpy as np
import onnxruntime
import pytest

from phreg_deploy.bundle.bundle import Bundle
from phreg_deploy.bundle.profiles import profiles_of
from phreg_deploy.errors import BackendMissing, PhregError
from phreg_deploy.export.engine.build import BuildRequest, build_engine
from phreg_deploy.runtime import FeatureExtractor
from phreg_deploy.runtime.backends import registry as backends
from phreg_deploy.runtime.backends.onnxruntime_gpu import HEAVY, check_assignment
from phreg_deploy.runtime.backends.onnxruntime_options import provider_options
from phreg_deploy.runtime.backends.options import BackendOptions
from tests import fake_gpu
from tests.cli_helpers import invoke

GPU_NAMES = ("onnxruntime-cuda", "onnxruntime-tensorrt")


class Binding:
    """``IOBinding``: where each tensor is."""

    def __init__(self):
        self.inputs, self.outputs, self.waited = {}, {}, False

    def bind_input(self, name, device_type, device_id, element_type, shape, buffer_ptr):
        assert (device_type, device_id) == ("cuda", 0)
        self.inputs[name] = (np.dtype(element_type), tuple(shape), buffer_ptr)

    def bind_cpu_input(self, name, arr_on_cpu):
        self.inputs[name] = arr_on_cpu

    def bind_output(self, name, device_type, device_id, element_type, shape, buffer_ptr):
        assert (device_type, device_id) == ("cuda", 0)
        self.outputs[name] = (np.dtype(element_type), tuple(shape), buffer_ptr)

    def synchronize_outputs(self):
        self.waited = True


class Session:
    """A session of the GPU build, that computes on the processor. ``strays``: nodes that it leaves to the processor."""

    def __init__(self, library, path, options, providers):
        self.library, self.options, self.asked, self.bindings = library, options, providers, []
        self.recorded, self.busy = None, threading.Lock()
        self.real = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
        self.get_inputs, self.get_outputs, self.run = self.real.get_inputs, self.real.get_outputs, self.real.run

    def get_providers(self):
        names = [provider[0] for provider in self.asked]
        return ["CPUExecutionProvider"] if self.library.drops else [*names, "CPUExecutionProvider"]

    def get_provider_graph_assignment_info(self):
        assert self.options.get_session_config_entry("session.record_ep_graph_assignment_info") == "1"
        part = types.SimpleNamespace
        nodes = [part(op_type=kind, name=name) for name, kind in self.library.strays]
        there = part(op_type="MatMul", name="blocks.0.attn.qkv/MatMul")
        return [
            part(ep_name=self.asked[0][0], get_nodes=lambda: [there]),
            part(ep_name="CPUExecutionProvider", get_nodes=lambda: nodes),
        ]

    def io_binding(self):
        self.bindings.append(Binding())
        return self.bindings[-1]

    def run_with_iobinding(self, binding, options=None):
        """Refuse to replay a CUDA graph on another binding, or in two threads at once."""
        device, feed = self.library.device, {}
        graph = dict(self.asked[0][1]).get("enable_cuda_graph") == "1"
        if graph and (options is None or options.get_run_config_entry("gpu_graph_id") != "-1"):
            self.recorded = self.recorded or binding
            assert binding is self.recorded, "the graph is of other addresses"
        assert not graph or self.busy.acquire(blocking=False), "two threads are in a session with a CUDA graph"
        try:
            self._compute(binding, device, feed)
        finally:
            if graph:
                self.busy.release()

    def _compute(self, binding, device, feed):
        for name, place in binding.inputs.items():
            if not isinstance(place, np.ndarray):
                dtype, shape, pointer = place
                place = np.frombuffer(bytes(device.span(pointer, int(np.prod(shape)) * dtype.itemsize)), dtype).reshape(
                    shape
                )
            feed[name] = place
        for output, value in zip(self.real.get_outputs(), self.real.run(None, feed)):
            dtype, shape, pointer = binding.outputs[output.name]
            assert (value.dtype, value.shape) == (dtype, shape), "ONNX Runtime refuses another shape"
            device.span(pointer, value.nbytes)[:] = value.tobytes()


@pytest.fixture
def library(monkeypatch, device):
    """An ``onnxruntime`` with providers for GPUs."""
    made = types.SimpleNamespace(
        __version__="1.31.0",
        __file__="/nowhere/__init__.py",
        device=device,
        drops=False,
        strays=[],
        sessions=[],
        SessionOptions=onnxruntime.SessionOptions,
        RunOptions=onnxruntime.RunOptions,
        get_available_providers=lambda: ["TensorrtExecutionProvider", "CUDAExecutionProvider", "CPUExecutionProvider"],
    )

    def open_it(path, options, providers):
        made.sessions.append(Session(made, path, options, providers))
        return made.sessions[-1]

    made.InferenceSession = open_it
    monkeypatch.setitem(sys.modules, "onnxruntime", made)
    return made


@pytest.fixture
def copy(request, tmp_path):
    return lambda name: shutil.copytree(request.getfixturevalue(name), tmp_path / name)


def frames(seed=0, batch=1, size=(64, 64)):
    return np.random.default_rng(seed).integers(0, 256, (batch, *size, 3), dtype=np.uint8)


def as_if(folder, precision):
    """The bundle, said to be in another precision."""
    bundle = Bundle.read(folder)
    return Bundle(bundle.folder, replace(bundle.manifest, precision=precision))


# Providers that are not there


@pytest.mark.parametrize("name", GPU_NAMES)
def test_the_build_for_the_processor_names_the_other_one(bundle, name):
    if len(onnxruntime.get_available_providers()) > 2:
        pytest.skip("this is the GPU build")
    done = invoke("check", bundle, "--backend", name, "--json")
    done.refused(4, "was built without", "pip uninstall onnxruntime", "phreg-deploy[gpu]")


@pytest.mark.parametrize("name", GPU_NAMES)
def test_a_provider_that_was_dropped_silently_is_no_success(copy, library, name):
    library.drops = True
    with pytest.raises(
        BackendMissing, match=r"got CPUExecutionProvider: a library that it needs is missing.*phreg-deploy doctor"
    ):
        FeatureExtractor.load(copy("bundle"), name)


@pytest.mark.parametrize("name", GPU_NAMES)
def test_without_a_gpu_the_driver_is_named(copy, library, device, name):
    device.installed = 0
    with pytest.raises(BackendMissing, match="no usable NVIDIA driver or GPU"):
        FeatureExtractor.load(copy("bundle"), name)


@pytest.mark.parametrize("name", GPU_NAMES)
@pytest.mark.parametrize("kind", sorted(HEAVY))
def test_heavy_nodes_on_the_processor_are_no_success(copy, library, name, kind):
    library.strays = [("patch/Shape", "Shape"), ("blocks.0.mlp.act/Heavy", kind), ("blocks.1.mlp.act/Heavy", kind)]
    with pytest.raises(
        BackendMissing, match=rf"left 2 heavy nodes to the processor, e.g. blocks.0.mlp.act/Heavy \({kind}\)"
    ):
        FeatureExtractor.load(copy("bundle"), name)


def test_light_nodes_may_stay_on_the_processor(copy, library):
    library.strays = [("dense/Shape", "Shape"), ("dense/Concat", "Concat")]
    FeatureExtractor.load(copy("bundle"), "onnxruntime-cuda").close()


def test_what_onnxruntime_itself_says_of_its_nodes_is_understood(bundle):
    options = onnxruntime.SessionOptions()
    options.add_session_config_entry("session.record_ep_graph_assignment_info", "1")
    session = onnxruntime.InferenceSession(str(bundle / "model.onnx"), options, providers=["CPUExecutionProvider"])
    if not hasattr(session, "get_provider_graph_assignment_info"):
        pytest.skip(f"ONNX Runtime {onnxruntime.__version__} does not tell")
    with pytest.raises(BackendMissing, match=r"left \d\d+ heavy nodes to the processor"):
        check_assignment(session, "onnxruntime-cuda")


def test_a_graph_that_cannot_be_loaded_is_refused(copy, library, monkeypatch):
    def fail(*_, **__):
        raise RuntimeError("CUDA failure 2: out of memory\nat somewhere.cc")

    monkeypatch.setattr(library, "InferenceSession", fail)
    with pytest.raises(PhregError, match=r"cannot load .*model.onnx: CUDA failure 2: out of memory$"):
        FeatureExtractor.load(copy("bundle"), "onnxruntime-cuda")


# What is refused by precision


@pytest.mark.parametrize(
    ("precision", "name", "words"),
    [
        ("bf16", "onnxruntime-cpu", "no bfloat16 on the processor; use --backend openvino"),
        ("int8", "onnxruntime-cuda", "no int8 kernels on CUDA.*slower than FP16. Use --backend tensorrt"),
        ("fp8", "onnxruntime-cuda", "no fp8 kernels on CUDA"),
        ("fp8", "onnxruntime-tensorrt", "not offered for fp8; use --backend tensorrt"),
    ],
)
def test_what_a_provider_has_no_kernels_for_is_refused(bundle, library, precision, name, words):
    with pytest.raises(PhregError, match=words):
        backends.open_backend(as_if(bundle, precision), name, BackendOptions())
    assert library.sessions == []


@pytest.mark.parametrize(
    ("precision", "name", "compute"),
    [
        ("fp32", "onnxruntime-cpu", "fp32"),
        ("fp16", "onnxruntime-cpu", "fp32"),
        ("fp16", "onnxruntime-cuda", "fp16"),
        ("bf16", "onnxruntime-cuda", "bf16"),
        ("int8", "onnxruntime-tensorrt", "fp32"),
        ("fp32", "onnxruntime-tensorrt", "fp32"),
    ],
)
def test_what_is_computed_in_is_said_and_nothing_else_taken(copy, library, precision, name, compute):
    folder = copy("bundle")
    if name == "onnxruntime-cpu":
        library.get_available_providers = lambda: ["CPUExecutionProvider"]
        library.InferenceSession = lambda path, options, providers: onnxruntime.InferenceSession(
            path, options, providers=providers
        )
    assert backends.open_backend(as_if(folder, precision), name, BackendOptions(compute="auto")).compute == compute
    other = "bf16" if compute == "fp32" else "fp32"
    with pytest.raises(PhregError, match=f"got {other}, but {name} computes in what the graph says, {compute}"):
        backends.open_backend(as_if(folder, precision), name, BackendOptions(compute=other))


# Settings


def test_cuda_is_asked_for_full_float32(copy, library):
    FeatureExtractor.load(copy("bundle"), "onnxruntime-cuda").close()
    (session,) = library.sessions
    ((name, options),) = session.asked
    assert name == "CUDAExecutionProvider"
    assert (options["use_tf32"], options["device_id"]) == ("0", "0")


@pytest.mark.parametrize(("name", "graph"), [("bundle", True), ("wide_bundle", False)])
def test_a_graph_is_asked_for_where_every_call_has_one_shape(copy, library, name, graph):
    FeatureExtractor.load(copy(name), "onnxruntime-cuda").close()
    assert ("enable_cuda_graph" in library.sessions[0].asked[0][1]) == graph


def test_tensorrt_keeps_its_engines_in_the_bundle(copy, library):
    folder = copy("wide_bundle")
    FeatureExtractor.load(folder, "onnxruntime-tensorrt").close()
    (name, options), (rest, _) = library.sessions[0].asked
    assert (name, rest) == ("TensorrtExecutionProvider", "CUDAExecutionProvider")
    assert options["trt_engine_cache_path"] == str(folder / "engines" / "onnxruntime")
    assert (folder / "engines" / "onnxruntime").is_dir()
    first = profiles_of(Bundle.read(folder).manifest)[0].inputs
    for i, kind in enumerate(("min", "opt", "max")):
        said = options[f"trt_profile_{kind}_shapes"].split(",")
        assert said[:2] == [f"{name}:{'x'.join(map(str, first[name][i]))}" for name in ("image", "pos_embed")]
        assert len(said) == 2 * len(profiles_of(Bundle.read(folder).manifest))
    Bundle.read(folder).verify()


def test_one_shape_needs_no_profile(copy):
    assert not any(
        key.startswith("trt_profile")
        for key in provider_options(Bundle.read(copy("bundle")), "onnxruntime-tensorrt", 0)
    )


def test_a_bundle_that_cannot_be_written_to_is_said(copy, library):
    folder = copy("bundle")
    (folder / "engines").write_text("no folder")
    with pytest.raises(PhregError, match="copy the bundle where you may write"):
        FeatureExtractor.load(folder, "onnxruntime-tensorrt")


# Arrays on the GPU


@pytest.fixture
def on_cuda(copy, library):
    return FeatureExtractor.load(copy("wide_bundle"), "onnxruntime-cuda")


def same(got, wanted):
    for name in wanted:
        np.testing.assert_allclose(got[name], wanted[name], rtol=1e-5, atol=1e-6, err_msg=name)


@pytest.mark.parametrize(("batch", "size"), [(1, (64, 64)), (3, (48, 96))])
def test_an_array_on_the_gpu_is_bound_where_it_lies(on_cuda, library, device, batch, size):
    image = frames(0, batch, size)
    array = fake_gpu.Array(device, image)
    got = on_cuda.run(array)
    binding = library.sessions[0].bindings[-1]
    assert binding.inputs["image"][2] == array.pointer
    assert binding.waited
    same({name: value.numpy() for name, value in got.items()}, on_cuda.run(image))
    assert library.sessions[0].bindings == [binding], "an array on the host is not bound"


def test_the_callers_outputs_are_written(on_cuda, device):
    image = frames()
    wanted = on_cuda.run(image)
    out = {name: fake_gpu.Array(device, np.zeros_like(value)) for name, value in wanted.items()}
    got = on_cuda.run(fake_gpu.Array(device, image), out=out)
    same({name: value.read() for name, value in out.items()}, wanted)
    assert {name: value.pointer for name, value in got.items()} == {name: value.pointer for name, value in out.items()}
    same({name: value.numpy() for name, value in got.items()}, wanted)


@pytest.mark.parametrize("value", [np.zeros((1, 8, 8, 48), np.float16), np.zeros((2, 8, 8, 48), np.float32)])
def test_outputs_of_another_kind_are_refused(on_cuda, device, value):
    with pytest.raises(PhregError, match=r"out: got features as .*, expected float32 \(1, 8, 8, 48\)"):
        on_cuda.run(fake_gpu.Array(device, frames()), out={"features": fake_gpu.Array(device, value)})


def test_an_array_that_is_still_being_filled_is_waited_for(on_cuda, device):
    stream, image = int(device.runtime.cudaStreamCreateWithFlags(1)[1]), frames()
    array = fake_gpu.Array(device, np.zeros_like(image), stream=stream)
    device.queue(device.streams[stream], lambda: array.write(image))
    same({name: value.numpy() for name, value in on_cuda.run(array).items()}, on_cuda.run(image))


def test_an_output_that_is_still_being_read_is_waited_for(on_cuda, device):
    stream, image = int(device.runtime.cudaStreamCreateWithFlags(1)[1]), frames()
    wanted = on_cuda.run(image)
    memory, read = fake_gpu.Array(device, np.full_like(wanted["features"], 5), stream=stream), []
    device.queue(device.streams[stream], lambda: read.append(memory.read()))
    on_cuda.run(fake_gpu.Array(device, image), out={"features": memory})
    assert (read[0] == 5).all()


def test_a_stream_of_the_callers_is_refused(on_cuda, device):
    with pytest.raises(PhregError, match="runs on a stream of its own; use tensorrt"):
        on_cuda.run(fake_gpu.Array(device, frames()), stream=7)


@pytest.mark.parametrize("name", ["onnxruntime-cpu", "openvino"])
def test_backends_of_the_processor_read_the_host_alone(bundle, device, name):
    pytest.importorskip(name.split("-")[0])
    with FeatureExtractor.load(bundle, name) as extractor:
        with pytest.raises(PhregError, match="host memory only"):
            extractor.run(fake_gpu.Array(device, frames()))


# One shape, staged


def test_staged_answers_are_those_of_the_processor(copy, library, device):
    with FeatureExtractor.load(copy("bundle"), "onnxruntime-cuda") as extractor:
        session = library.sessions[0]
        for seed in range(4):
            image = frames(seed)
            wanted = dict(zip((o.name for o in session.get_outputs()), session.run(None, {"image": image})))
            same(extractor.run(image), wanted)
            on_gpu = extractor.run(fake_gpu.Array(device, image))
            same({name: value.numpy() for name, value in on_gpu.items()}, wanted)


def test_threads_take_turns_on_what_is_staged(copy, library):
    with FeatureExtractor.load(copy("bundle"), "onnxruntime-cuda") as extractor:
        work = [frames(seed) for seed in range(6)]
        wanted, failed = [extractor.run(image) for image in work], []

        def serve(i):
            try:
                for _ in range(10):
                    same(extractor.run(work[i]), wanted[i])
            except BaseException as error:
                failed.append(error)

        threads = [threading.Thread(target=serve, args=(i,)) for i in range(6)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert failed == []


def test_closing_frees_what_is_staged(copy, library, device):
    extractor = FeatureExtractor.load(copy("bundle"), "onnxruntime-cuda")
    extractor.run(frames())
    assert device.live()
    extractor.close()
    assert device.live() == {}


@pytest.mark.parametrize(
    ("call", "at"), [("cudaStreamCreateWithFlags", 1), ("cudaMalloc", 1), ("cudaMalloc", 4), ("cudaMallocHost", 2)]
)
def test_staging_that_does_not_fit_leaves_nothing(copy, library, device, call, at):
    device.fail_call(call, at)
    with pytest.raises(PhregError, match=f"out of memory in {call}"):
        FeatureExtractor.load(copy("bundle"), "onnxruntime-cuda")
    assert device.live() == {}


# auto


@pytest.fixture
def driver(monkeypatch):
    """Say whether there is a driver."""
    return lambda there: monkeypatch.setattr(backends, "driver_present", lambda: there)


def test_without_a_driver_no_gpu_is_tried(bundle, driver, device, monkeypatch):
    driver(False)
    fake_gpu.install(monkeypatch, device, fake_gpu.FakeTensorRT(device))
    assert not set(backends.installed()) & set(backends.GPU)
    with FeatureExtractor.load(bundle) as extractor:
        assert "tensorrt" not in extractor.choice
        assert "cuda" not in extractor.choice
    assert device.calls == []


def test_with_a_driver_every_backend_is_tried_but_the_one_that_builds(driver, device, monkeypatch):
    driver(True)
    fake_gpu.install(monkeypatch, device, fake_gpu.FakeTensorRT(device))
    found = backends.installed()
    assert {"tensorrt", "onnxruntime-cuda", "onnxruntime-cpu"} <= set(found)
    assert "onnxruntime-tensorrt" not in found


def test_auto_says_why_a_gpu_was_not_taken(bundle, driver, device, monkeypatch):
    driver(True)
    fake_gpu.install(monkeypatch, device, fake_gpu.FakeTensorRT(device))
    with FeatureExtractor.load(bundle) as extractor:
        assert extractor.backend in ("onnxruntime-cpu", "openvino")
        assert f"phreg-deploy build {bundle}" in extractor.choice
        assert "onnxruntime-cuda does not serve it" in extractor.choice
    assert device.live() == {}


def test_auto_takes_the_gpu_where_it_is_the_fastest(copy, driver, device, monkeypatch):
    driver(True)
    tensorrt = fake_gpu.FakeTensorRT(device)
    fake_gpu.install(monkeypatch, device, tensorrt)
    folder = copy("bundle")
    build_engine(BuildRequest(folder))
    choice = importlib.import_module("phreg_deploy.runtime.auto")
    times = {"tensorrt": 1.0}

    def measure(candidate, feed, rivals):
        candidate.milliseconds = times.get(candidate.name, 9.0)
        return candidate.milliseconds

    monkeypatch.setattr(choice, "_measure", measure)
    with FeatureExtractor.load(folder) as extractor:
        assert extractor.backend == "tensorrt"
        assert extractor.choice.startswith("tensorrt: ")
        assert "tensorrt (fp32) 1.0 ms" in extractor.choice
    times["tensorrt"] = 99.0
    with FeatureExtractor.load(folder) as extractor:
        assert extractor.backend != "tensorrt"
    assert device.live() == {}, "what was tried and not taken is closed"


def test_auto_does_not_take_an_engine_that_fails_the_exam(copy, driver, device, monkeypatch):
    driver(True)
    tensorrt = fake_gpu.FakeTensorRT(device)
    fake_gpu.install(monkeypatch, device, tensorrt)
    folder, tensorrt.zeroed_weights = copy("bundle"), "blocks.1.mlp.fc1.weight"
    build_engine(BuildRequest(folder, check=False))
    with FeatureExtractor.load(folder) as extractor:
        assert extractor.backend != "tensorrt"
        assert "tensorrt fails the exam (1st-percentile patch cosine" in extractor.choice
    assert device.live() == {}
