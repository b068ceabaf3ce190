"""Graphs with correct hashes and wrong content are refused when they are loaded, or at the first image."""

import copy

import numpy as np
import pytest

from phreg_deploy.errors import PhregError
from phreg_deploy.runtime import FeatureExtractor
from tests.bundle_changes import edit_graph, write_hashes


def open_bundle(folder):
    return FeatureExtractor.load(folder, "onnxruntime-cpu", threads=1)


def test_another_bundles_graph_with_a_correct_hash_is_refused(world):
    folder = world.copy("bundle")
    (folder / "model.onnx").write_bytes((world.wide_bundle / "model.onnx").read_bytes())
    with pytest.raises(PhregError, match=r"disagree on .*sizes"):
        open_bundle(write_hashes(folder))


def test_a_graph_without_metadata_is_refused(world):
    folder = write_hashes(world.copy("bundle", model=edit_graph(lambda m: m.ClearField("metadata_props"))))
    with pytest.raises(PhregError, match="does not say how it is fed"):
        open_bundle(folder)


def rename_output(model):
    name = next(o.name for o in model.graph.output if o.name == "token_norm")
    for node in model.graph.node:
        for i, output in enumerate(node.output):
            if output == name:
                node.output[i] = "renamed"
    next(o for o in model.graph.output if o.name == name).name = "renamed"


def drop_output(model):
    others = [o for o in model.graph.output if o.name != "cls"]
    del model.graph.output[:]
    model.graph.output.extend(others)


@pytest.mark.parametrize("backend", ["onnxruntime-cpu", "openvino"])
@pytest.mark.parametrize(("change", "name"), [(drop_output, "cls"), (rename_output, "token_norm")])
def test_a_graph_that_lacks_an_output_is_refused(world, change, name, backend):
    pytest.importorskip(backend.split("-")[0])
    folder = write_hashes(world.copy("bundle", model=edit_graph(change)))
    with pytest.raises(PhregError, match=f"expected {name} as well"):
        FeatureExtractor.load(folder, backend, threads=1)


def test_a_graph_with_outputs_of_another_shape_is_refused(world):
    """Two outputs exchange their names, so that both have another shape."""

    def exchange(model):
        names = {"cls": "token_norm", "token_norm": "cls"}
        for node in model.graph.node:
            for i, output in enumerate(node.output):
                node.output[i] = names.get(output, output)
            for i, used in enumerate(node.input):
                node.input[i] = names.get(used, used)
        shapes = {o.name: copy.deepcopy(o.type) for o in model.graph.output}
        for output in model.graph.output:
            output.type.CopyFrom(shapes[names.get(output.name, output.name)])

    folder = write_hashes(world.copy("bundle", model=edit_graph(exchange)))
    with open_bundle(folder) as extractor, pytest.raises(PhregError, match="the graph is not this bundle's"):
        extractor(np.zeros((64, 64, 3), np.uint8))


def test_a_graph_that_cannot_run_is_refused(world):
    """The graph reshapes to another size, so it loads and fails at the first image."""
    import onnx

    def break_reshape(model):
        for tensor in model.graph.initializer:
            if tensor.data_type == onnx.TensorProto.INT64 and len(tensor.dims) == 1 and tensor.dims[0] == 4:
                tensor.CopyFrom(onnx.numpy_helper.from_array(np.array([1, 7, 7, 7], np.int64), tensor.name))

    folder = write_hashes(world.copy("bundle", model=edit_graph(break_reshape)))
    with pytest.raises(PhregError, match=r"cannot (run|load) .*model.onnx"), open_bundle(folder) as extractor:
        extractor(np.zeros((64, 64, 3), np.uint8))
