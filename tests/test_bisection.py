"""Bisection names the half-block at which an FP16 bundle overflows, and its proposal repairs the bundle."""

import shutil
from dataclasses import replace

import numpy as np
import onnx
import pytest
from onnx import numpy_helper

from phreg_deploy.bundle.bundle import Bundle
from phreg_deploy.bundle.manifest import GRAPH
from phreg_deploy.bundle.writing import write_manifest, write_onnx_metadata
from phreg_deploy.errors import PhregError
from phreg_deploy.onnx_graph.mixed_precision import islands, narrow
from phreg_deploy.onnx_graph.session import open_session
from phreg_deploy.runtime import FeatureExtractor
from phreg_deploy.runtime.backends.options import BackendOptions
from phreg_deploy.runtime.parity import missed_gates, run_exam, worst
from phreg_deploy.verify.bisection import bisect
from tests.cli_helpers import invoke, leftovers

SCALE = 2.0**18
# Half-block that overflows -> the layer that is scaled up, and the next one, which is scaled down as much. Only values
# between them leave the range of FP16; in FP32 the outputs stay the same. An MLP cannot overflow this way: ONNX Runtime
# stores FP16 values on the processor but computes in FP32, so nothing overflows between the two products.
PLACES = {
    "blocks.1.attn": ("blocks.1.attn.qkv", "blocks.1.attn.proj"),
    "blocks.2.attn": ("blocks.2.attn.qkv", "blocks.2.attn.proj"),
}


def weight(graph, name):
    return next(i for i in graph.graph.initializer if i.name == f"{name}.weight")


def bias_of(graph, linear):
    """Return the constant that is added to a linear layer's product."""
    product = next(n for n in graph.graph.node if n.name == f"{linear}/MatMul")
    (adder,) = [n for n in graph.graph.node if product.output[0] in n.input]
    constants = {i.name: i for i in graph.graph.initializer}
    return next(constants[name] for name in adder.input if name in constants)


def scale(tensor, factor, columns=slice(None)):
    value = numpy_helper.to_array(tensor).copy()
    value[..., columns] *= np.float32(factor)
    tensor.CopyFrom(numpy_helper.from_array(value, tensor.name))


def overflow(graph, place):
    """Scale the values between two layers of a half-block up, and scale them back after it."""
    first, last = PLACES[place]
    values = slice(2 * weight(graph, last).dims[0], None)  # of q, k and v, those that are averaged, not compared
    scale(weight(graph, first), SCALE, values)
    scale(bias_of(graph, first), SCALE, values)
    scale(weight(graph, last), 1 / SCALE)


def write_fp16(bundle, folder, place=None, keep=(), precision="fp16"):
    """Write the bundle in FP16, overflowing in ``place``, without choosing what stays in FP32 by its values."""
    shutil.copytree(bundle, folder)
    (folder / "manifest.json").unlink()
    read = Bundle.read(bundle)
    graph = onnx.load(bundle / GRAPH)
    if place is not None:
        overflow(graph, place)
        case = read.cases()[0]
        (features,) = open_session(graph).run(["features"], {"image": case["image"]})
        np.testing.assert_allclose(features, case["features"], rtol=1e-3, atol=1e-4)
    kept = islands(narrow(graph, precision, None, keep), precision) if precision != "fp32" else []
    manifest = replace(read.manifest, precision=precision, float_parts=kept, files={})
    write_onnx_metadata(graph, manifest)
    (folder / GRAPH).write_bytes(graph.SerializeToString())
    write_manifest(folder, manifest)
    return folder


def find(folder):
    return bisect(Bundle.read(folder), "onnxruntime-cpu", BackendOptions(threads=1))


def missed(folder):
    with FeatureExtractor.load(folder, "onnxruntime-cpu", threads=1) as extractor:
        return missed_gates(
            worst([case.parity for case in run_exam(extractor.bundle, extractor.run)]), "fp16", exam=True
        )


@pytest.fixture(params=PLACES)
def place(request):
    return request.param


def test_the_half_block_that_overflows_is_named(bundle, tmp_path, place):
    folder = write_fp16(bundle, tmp_path / "broken", place)
    assert missed(folder)
    report = find(folder)
    assert report.first == place
    steps = {step.place: step for step in report.steps}
    assert list(steps) == [f"blocks.{i}.{half}" for i in range(3) for half in ("attn", "mlp")]
    assert steps[place].bad_values > 0
    before = list(steps)[: list(steps).index(place)]
    assert all(steps[p].bad_values == 0 and steps[p].cosine_p1 > 0.9999 for p in before)


def test_the_proposal_repairs_it(bundle, tmp_path, place):
    report = find(write_fp16(bundle, tmp_path / "broken", place))
    option, pattern = report.proposal.split(" ", 1)
    assert option == "--keep-fp32"
    repaired = write_fp16(bundle, tmp_path / "repaired", place, keep=[pattern.strip("'")])
    assert missed(repaired) == []
    assert find(repaired).first is None
    parts = Bundle.read(repaired).manifest.float_parts
    assert any(part.startswith(place) for part in parts)
    assert not any(part.startswith("blocks.0") for part in parts)


@pytest.mark.parametrize("precision", ["fp16", "fp32"])
def test_nothing_is_found_in_a_correct_bundle(bundle, tmp_path, precision):
    report = find(write_fp16(bundle, tmp_path / "healthy", precision=precision))
    assert (report.first, report.proposal) == (None, None)
    assert all(step.bad_values == 0 for step in report.steps)


def test_sizes_and_batches_are_those_of_the_exam(wide_bundle):
    report = find(wide_bundle)
    assert report.first is None
    assert len(report.steps) == 6


def test_nothing_is_left_behind_and_the_bundle_is_untouched(bundle, tmp_path, place):
    folder = write_fp16(bundle, tmp_path / "broken", place)
    before = {p: p.read_bytes() for p in folder.iterdir()}
    find(folder)
    assert {p: p.read_bytes() for p in folder.iterdir()} == before
    assert leftovers(tmp_path) == []


def test_check_bisects_where_the_gate_is_missed(bundle, tmp_path):
    folder = write_fp16(bundle, tmp_path / "broken", "blocks.1.attn")
    done = invoke("check", folder, "--backend", "onnxruntime-cpu", "--bisect", "--json")
    done.refused(3, "NaN or infinite")
    assert done.document["bisection"]["first"] == "blocks.1.attn"
    assert "The first that diverges is blocks.1.attn" in done.err
    assert r"--keep-fp32 '^blocks\.1\.attn'" in done.err


def test_a_graph_without_names_is_refused(bundle, tmp_path):
    folder = write_fp16(bundle, tmp_path / "nameless")
    graph = onnx.load(folder / GRAPH)
    for i, node in enumerate(graph.graph.node):
        node.name = f"n{i}"
    (folder / GRAPH).write_bytes(graph.SerializeToString())
    with pytest.raises(PhregError, match="names no blocks"):
        find(folder)


def test_answers_that_are_finite_and_wrong_are_found(bundle, monkeypatch):
    """The backend's outputs are finite but slightly wrong from one half-block on."""
    import phreg_deploy.verify.bisection as module

    class Off:
        def __init__(self, *asked):
            self.inner = open_backend(*asked)
            self.close = self.inner.close

        def run(self, feed):
            noise, outputs = np.random.default_rng(0), self.inner.run(feed)
            places = [name for name in outputs if name.startswith("probe/")]
            for name in places[places.index("probe/blocks.1.mlp") :]:
                outputs[name] = outputs[name] + 0.1 * noise.standard_normal(outputs[name].shape).astype(np.float32)
            return outputs

    open_backend = module.open_backend
    monkeypatch.setattr(module, "open_backend", Off)
    report = find(bundle)
    assert (report.first, report.proposal) == ("blocks.1.mlp", r"--keep-fp32 '^blocks\.1\.mlp'")
    assert all(step.bad_values == 0 for step in report.steps)


@pytest.mark.parametrize("backend", ["onnxruntime-cpu", "openvino"])
@pytest.mark.parametrize("which", ["bundle", "wide_bundle"])
def test_every_backend_of_the_processor_can_be_bisected_at_every_size(request, which, backend):
    pytest.importorskip({"openvino": "openvino"}.get(backend, "onnxruntime"))
    bundle = Bundle.read(request.getfixturevalue(which))
    report = bisect(bundle, backend, BackendOptions(threads=1))
    assert report.first is None
    assert len(report.steps) == 2 * bundle.manifest.model.depth
    assert all(step.cosine_p1 > 0.99999 and step.bad_values == 0 for step in report.steps)


def test_a_size_of_several_that_diverges_is_seen(wide_bundle, monkeypatch):
    """The backend is wrong only at the last size."""
    from phreg_deploy.runtime.backends.onnxruntime_backend import OrtBackend

    bundle = Bundle.read(wide_bundle)
    largest, real = bundle.cases()[-1]["image"].shape, OrtBackend.run

    def run(self, feed):
        wrong = feed["image"].shape == largest
        return {k: np.flip(v, -1) if wrong and k == "probe/blocks.1.attn" else v for k, v in real(self, feed).items()}

    monkeypatch.setattr(OrtBackend, "run", run)
    assert bisect(bundle, "onnxruntime-cpu", BackendOptions(threads=1)).first == "blocks.1.attn"
