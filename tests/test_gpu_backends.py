"""ONNX Runtime's providers for GPUs: what is refused, and how sessions are set up, on a fake GPU."""

from dataclasses import replace

import onnxruntime
import pytest

from phreg_deploy.bundle.bundle import Bundle
from phreg_deploy.bundle.profiles import profiles_of
from phreg_deploy.errors import BackendMissing, PhregError
from phreg_deploy.runtime import FeatureExtractor
from phreg_deploy.runtime.backends import registry as backends
from phreg_deploy.runtime.backends.onnxruntime_gpu import HEAVY, check_assignment
from phreg_deploy.runtime.backends.onnxruntime_options import provider_options
from phreg_deploy.runtime.backends.options import BackendOptions
from tests.cli_helpers import invoke

GPU_NAMES = ("onnxruntime-cuda", "onnxruntime-tensorrt")


def with_precision(folder, precision):
    """Return the bundle with another precision in its manifest."""
    bundle = Bundle.read(folder)
    return Bundle(bundle.folder, replace(bundle.manifest, precision=precision))


@pytest.mark.parametrize("name", GPU_NAMES)
def test_the_build_for_the_processor_names_the_build_for_gpus(bundle, name):
    if len(onnxruntime.get_available_providers()) > 2:
        pytest.skip("this is the GPU build")
    done = invoke("check", bundle, "--backend", name, "--json")
    done.refused(4, "was built without", "pip uninstall onnxruntime", "phreg-deploy[gpu]")


@pytest.mark.parametrize("name", GPU_NAMES)
def test_a_provider_that_was_dropped_silently_is_an_error(copy_bundle, onnxruntime_gpu, name):
    onnxruntime_gpu.drops_providers = True
    with pytest.raises(
        BackendMissing, match=r"got CPUExecutionProvider: a library that it needs is missing.*phreg-deploy doctor"
    ):
        FeatureExtractor.load(copy_bundle("bundle"), name)


@pytest.mark.parametrize("name", GPU_NAMES)
def test_without_a_gpu_the_driver_is_named(copy_bundle, onnxruntime_gpu, device, name):
    device.installed = 0
    with pytest.raises(BackendMissing, match="no usable NVIDIA driver or GPU"):
        FeatureExtractor.load(copy_bundle("bundle"), name)


@pytest.mark.parametrize("name", GPU_NAMES)
@pytest.mark.parametrize("kind", sorted(HEAVY))
def test_heavy_nodes_on_the_processor_are_an_error(copy_bundle, onnxruntime_gpu, name, kind):
    onnxruntime_gpu.nodes_on_cpu = [
        ("patch/Shape", "Shape"),
        ("blocks.0.mlp.act/Heavy", kind),
        ("blocks.1.mlp.act/Heavy", kind),
    ]
    with pytest.raises(
        BackendMissing, match=rf"left 2 heavy nodes to the processor, e.g. blocks.0.mlp.act/Heavy \({kind}\)"
    ):
        FeatureExtractor.load(copy_bundle("bundle"), name)


def test_light_nodes_may_stay_on_the_processor(copy_bundle, onnxruntime_gpu):
    onnxruntime_gpu.nodes_on_cpu = [("dense/Shape", "Shape"), ("dense/Concat", "Concat")]
    FeatureExtractor.load(copy_bundle("bundle"), "onnxruntime-cuda").close()


def test_the_real_assignment_of_nodes_can_be_read(bundle):
    options = onnxruntime.SessionOptions()
    options.add_session_config_entry("session.record_ep_graph_assignment_info", "1")
    session = onnxruntime.InferenceSession(str(bundle / "model.onnx"), options, providers=["CPUExecutionProvider"])
    if not hasattr(session, "get_provider_graph_assignment_info"):
        pytest.skip(f"ONNX Runtime {onnxruntime.__version__} does not tell")
    with pytest.raises(BackendMissing, match=r"left \d\d+ heavy nodes to the processor"):
        check_assignment(session, "onnxruntime-cuda")


def test_a_graph_that_cannot_be_loaded_is_refused(copy_bundle, onnxruntime_gpu, monkeypatch):
    def fail(*_, **__):
        raise RuntimeError("CUDA failure 2: out of memory\nat somewhere.cc")

    monkeypatch.setattr(onnxruntime_gpu, "InferenceSession", fail)
    with pytest.raises(PhregError, match=r"cannot load .*model.onnx: CUDA failure 2: out of memory$"):
        FeatureExtractor.load(copy_bundle("bundle"), "onnxruntime-cuda")


@pytest.mark.parametrize(
    ("precision", "name", "words"),
    [
        ("bf16", "onnxruntime-cpu", "no bfloat16 on the processor; use --backend openvino"),
        ("int8", "onnxruntime-cuda", "no int8 kernels on CUDA.*slower than FP16. Use --backend tensorrt"),
        ("fp8", "onnxruntime-cuda", "no fp8 kernels on CUDA"),
        ("fp8", "onnxruntime-tensorrt", "not offered for fp8; use --backend tensorrt"),
    ],
)
def test_precisions_without_kernels_are_refused(bundle, onnxruntime_gpu, precision, name, words):
    with pytest.raises(PhregError, match=words):
        backends.open_backend(with_precision(bundle, precision), name, BackendOptions())
    assert onnxruntime_gpu.sessions == []


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
def test_the_precision_of_the_graph_is_reported_and_another_is_refused(
    copy_bundle, onnxruntime_gpu, precision, name, compute
):
    folder = copy_bundle("bundle")
    if name == "onnxruntime-cpu":
        onnxruntime_gpu.get_available_providers = lambda: ["CPUExecutionProvider"]
        onnxruntime_gpu.InferenceSession = lambda path, options, providers: onnxruntime.InferenceSession(
            path, options, providers=providers
        )
    assert (
        backends.open_backend(with_precision(folder, precision), name, BackendOptions(compute="auto")).compute
        == compute
    )
    other = "bf16" if compute == "fp32" else "fp32"
    with pytest.raises(PhregError, match=f"got {other}, but {name} computes in what the graph says, {compute}"):
        backends.open_backend(with_precision(folder, precision), name, BackendOptions(compute=other))


def test_cuda_computes_in_full_float32(copy_bundle, onnxruntime_gpu):
    FeatureExtractor.load(copy_bundle("bundle"), "onnxruntime-cuda").close()
    (session,) = onnxruntime_gpu.sessions
    ((name, options),) = session.asked
    assert name == "CUDAExecutionProvider"
    assert (options["use_tf32"], options["device_id"]) == ("0", "0")


@pytest.mark.parametrize(("name", "graph"), [("bundle", True), ("wide_bundle", False)])
def test_a_cuda_graph_is_used_if_every_call_has_one_shape(copy_bundle, onnxruntime_gpu, name, graph):
    FeatureExtractor.load(copy_bundle(name), "onnxruntime-cuda").close()
    assert ("enable_cuda_graph" in onnxruntime_gpu.sessions[0].asked[0][1]) == graph


def test_tensorrt_keeps_its_engines_in_the_bundle(copy_bundle, onnxruntime_gpu):
    folder = copy_bundle("wide_bundle")
    FeatureExtractor.load(folder, "onnxruntime-tensorrt").close()
    (name, options), (rest, _) = onnxruntime_gpu.sessions[0].asked
    assert (name, rest) == ("TensorrtExecutionProvider", "CUDAExecutionProvider")
    assert options["trt_engine_cache_path"] == str(folder / "engines" / "onnxruntime")
    assert (folder / "engines" / "onnxruntime").is_dir()
    first = profiles_of(Bundle.read(folder).manifest)[0].inputs
    for i, kind in enumerate(("min", "opt", "max")):
        said = options[f"trt_profile_{kind}_shapes"].split(",")
        assert said[:2] == [f"{name}:{'x'.join(map(str, first[name][i]))}" for name in ("image", "pos_embed")]
        assert len(said) == 2 * len(profiles_of(Bundle.read(folder).manifest))
    Bundle.read(folder).verify()


def test_one_shape_needs_no_profile(copy_bundle):
    assert not any(
        key.startswith("trt_profile")
        for key in provider_options(Bundle.read(copy_bundle("bundle")), "onnxruntime-tensorrt", 0)
    )


def test_a_bundle_that_cannot_be_written_to_is_refused(copy_bundle, onnxruntime_gpu):
    folder = copy_bundle("bundle")
    (folder / "engines").write_text("no folder")
    with pytest.raises(PhregError, match="copy the bundle where you may write"):
        FeatureExtractor.load(folder, "onnxruntime-tensorrt")
