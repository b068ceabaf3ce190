"""Repositories for Triton: by its own messages, by plain ONNX Runtime and OpenVINO, and in its server."""

import json
import shutil
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from phreg_deploy.bundle.bundle import Bundle
from phreg_deploy.errors import BackendMissing, PhregError
from phreg_deploy.model_repository import write_repository
from phreg_deploy.runtime import FeatureExtractor
from tests.plans import PLAN, store_plan
from tests.triton_server import infer, read_config, run_in_python, tritonserver


def images(count, size, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (count, *size, 3), np.uint8)


def declared(tensors, batched):
    """Names, numbers of types and shapes with the axis of the batch, as a configuration declares them."""
    return {tensor.name: (tensor.data_type, [*([-1] if batched else []), *tensor.dims]) for tensor in tensors}


def check_against_session(folder, config):
    """The graph has the names, types and shapes that the configuration declares; -1 is any."""
    onnxruntime = pytest.importorskip("onnxruntime")
    session = onnxruntime.InferenceSession(folder / "1" / config.default_model_filename)
    numbers = {"tensor(uint8)": 2, "tensor(float16)": 10, "tensor(float)": 11}
    batched = config.max_batch_size > 0
    for kind, tensors in (("input", session.get_inputs()), ("output", session.get_outputs())):
        said = declared(getattr(config, kind), batched)
        assert {tensor.name for tensor in tensors} == set(said)
        for tensor in tensors:
            number, dims = said[tensor.name]
            assert numbers[tensor.type] == number
            assert len(tensor.shape) == len(dims)
            for axis, (side, dim) in enumerate(zip(tensor.shape, dims)):
                assert dim == side or (dim == -1 and isinstance(side, str)), (tensor.name, axis)
    return session


@pytest.mark.parametrize(
    ("which", "most", "preferred"),
    [("bundle", 0, []), ("wide_bundle", 4, [2]), ("labels_bundle", 0, []), ("alone_bundle", 0, [])],
)
def test_every_model_is_declared_as_its_graph_is_and_answers_as_the_bundle(request, tmp_path, which, most, preferred):
    bundle = Bundle.read(request.getfixturevalue(which))
    written = write_repository(bundle, tmp_path / "models", instances=2)
    name = bundle.folder.name
    sizes = {"wide_bundle": [(48, 48), (64, 64), (96, 96)]}.get(which, [bundle.manifest.sizes.default])
    names = [name] if len(sizes) == 1 else [f"{name}-{h}x{w}" for h, w in sizes]
    assert [model["name"] for model in written.models] == names
    with FeatureExtractor.load(bundle.folder, "onnxruntime-cpu", threads=1) as extractor:
        for name, size in zip(names, sizes):
            config = read_config(tmp_path / "models" / name / "config.pbtxt")
            assert (config.name, config.backend, config.max_batch_size) == (name, "onnxruntime", most)
            assert list(config.dynamic_batching.preferred_batch_size) == preferred
            assert (config.HasField("dynamic_batching"), config.instance_group[0].count) == (most > 0, 2)
            session = check_against_session(tmp_path / "models" / name, config)
            for warm_up in config.model_warmup:
                dims = list(warm_up.inputs["image"].dims)
                assert dims == [*size, 3] if most else [1, *size, 3]
                assert 1 <= warm_up.batch_size <= max(most, 1)
            batch = images(max(1, most), size)
            got = session.run(None, {"image": batch})
            expected = extractor.run(batch)
            for output, answer in zip(session.get_outputs(), got):
                np.testing.assert_allclose(answer, expected[output.name], rtol=1e-4, atol=1e-4)


def test_sizes_can_be_chosen_and_fp16_and_openvino_are_declared(student, tmp_path, run_cli):
    openvino = pytest.importorskip("openvino")
    outcome = run_cli(
        "export", student, "-o", tmp_path / "models", "--format", "triton", "--triton-backend", "openvino",
        "--image-size", "48:64:96", "--batch", "1:2:4", "--precision", "fp16", "--json",
    )  # fmt: skip
    assert outcome.code == 0, outcome.err
    assert outcome.document["check"]["missed"] == []
    names = [model["name"] for model in outcome.document["repository"]["models"]]
    assert names == ["student-48x48", "student-64x64", "student-96x96"]
    config = read_config(tmp_path / "models" / names[2] / "config.pbtxt")
    # The backend fills batches up to the largest, which is therefore the best.
    assert (config.backend, config.max_batch_size, config.default_model_filename) == ("openvino", 2, "model.onnx")
    assert config.parameters["ENABLE_BATCH_PADDING"].string_value == "YES"
    outputs = {output.name: output.data_type for output in config.output}
    assert (outputs["features"], outputs["token_norm"]) == (10, 11)
    model = openvino.Core().read_model(tmp_path / "models" / names[2] / "1" / "model.onnx")
    model.reshape({"image": [2, 96, 96, 3]})
    answers = openvino.Core().compile_model(model, "CPU")({"image": images(2, (96, 96))})
    shapes = {port.any_name: value.shape for port, value in answers.items()}
    for output in config.output:
        assert shapes[output.name] == (2, *output.dims)
    facts = json.loads((tmp_path / "models" / "repository.json").read_text())
    assert (facts["backend"], facts["preprocess"]["crop_mode"]) == ("openvino", "squash")


def test_engines_are_copied_with_their_profiles(bundle, wide_bundle, tmp_path):
    copy = Bundle.read(shutil.copytree(bundle, tmp_path / "robot.bundle"))
    with pytest.raises(BackendMissing, match="phreg-deploy build"):
        write_repository(copy, tmp_path / "models", backend="tensorrt")
    store_plan(copy)
    store_plan(copy, gpu=("RTX", 89, "10.3.0", 12), plan=PLAN[::-1])
    write_repository(copy, tmp_path / "models", backend="tensorrt")
    config = read_config(tmp_path / "models" / "robot" / "config.pbtxt")
    assert dict(config.cc_model_filenames) == {"8.7": "model_cc87.plan", "8.9": "model_cc89.plan"}
    assert (tmp_path / "models" / "robot" / "1" / "model_cc87.plan").read_bytes() == PLAN
    (group,) = config.instance_group
    assert (group.kind, list(group.profile)) == (1, ["0"])
    with pytest.raises(PhregError, match="one --image-size"):
        write_repository(Bundle.read(wide_bundle), tmp_path / "others", backend="tensorrt")
    assert not (tmp_path / "others").exists()


REFUSED = [
    ("pairs_bundle", {}, "Export it with --batch 1:2:4"),
    ("wide_bundle", {"image_size": "48:64:96"}, "each becomes a model"),
    ("wide_bundle", {"image_size": "128"}, "48x48 to 96x96"),
    ("bundle", {"image_size": "72"}, "expected 64x64"),
    ("bundle", {"backend": "torch"}, "expected onnxruntime, openvino or tensorrt"),
    ("bundle", {"name": "../up"}, "expected letters"),
    ("bundle", {"instances": 0}, "expected 1 to 256"),
]


@pytest.mark.parametrize(("which", "options", "message"), REFUSED)
def test_what_triton_cannot_serve_is_refused(request, tmp_path, which, options, message):
    bundle = Bundle.read(request.getfixturevalue(which))
    with pytest.raises(PhregError, match=message):
        write_repository(bundle, tmp_path / "models", **options)
    assert list(tmp_path.iterdir()) == []


def test_the_command_takes_a_bundle_and_only_its_options(bundle, student, tmp_path, run_cli):
    words = ("export", bundle, "-o", tmp_path / "models", "--format", "triton")
    assert run_cli(*words).code == 0
    run_cli(*words, "--json").refused(2, "add --force")
    assert run_cli(*words, "--force").code == 0
    run_cli(*words, "--force", "--precision", "fp16", "--layers", "1", "--json").refused(2, "--precision, --layers")
    run_cli(*words, "--format", "onnx", "--json").refused(2, "goes alone")
    words = (
        "export",
        student,
        "-o",
        tmp_path / "other",
        "--format",
        "triton",
        "--triton-backend",
        "tensorrt",
        "--json",
    )
    run_cli(*words).refused(2, "--format trt")


def test_a_running_triton_serves_the_repository_in_batches(wide_bundle, bundle, tmp_path):
    """Its server checks and obeys the configuration; ONNX Runtime runs the graph in its Python backend."""
    pytest.importorskip("onnxruntime")
    repository = tmp_path / "models"
    write_repository(Bundle.read(wide_bundle), repository, name="wide", image_size="64")
    write_repository(Bundle.read(bundle), tmp_path / "second", name="alone")
    shutil.copytree(tmp_path / "second" / "alone", repository / "alone")
    run_in_python(repository)
    batch = images(24, (64, 64))
    with FeatureExtractor.load(wide_bundle, "onnxruntime-cpu", threads=1) as extractor:
        expected = extractor.dense(batch)
    with tritonserver(repository) as client, ThreadPoolExecutor(8) as pool:
        assert client.get("/v2/models/wide").json()["inputs"][0]["shape"] == [-1, 64, 64, 3]
        for number, got in enumerate(pool.map(lambda n: infer(client, "wide", batch[n : n + 1]), range(24))):
            assert isinstance(got, dict), got
            np.testing.assert_allclose(got["features"][0], expected.features[number], rtol=1e-4, atol=1e-4)
            np.testing.assert_allclose(got["cls"][0], expected.cls[number], rtol=1e-4, atol=1e-4)
        (said,) = client.get("/v2/models/wide/stats").json()["model_stats"]
        assert said["inference_count"] == 24 + 1 + 2, "the warm-up has a batch of 1 and one of 2"
        assert said["execution_count"] < 24, "no requests were batched"
        assert infer(client, "alone", batch[:1])["features"].shape == (1, 8, 8, 48)
        assert "batch-size must be <= 4" in infer(client, "wide", batch[:5])
        assert "unexpected shape" in infer(client, "wide", images(1, (72, 64)))
