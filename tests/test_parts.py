"""Graphs that are run part by part: the same answers as in one piece, from whichever block on."""

import numpy as np
import onnx
import pytest

from phreg_deploy.onnx_graph.parts import Walk, block_starts, take_part
from phreg_deploy.onnx_graph.session import open_session
from tests.quantised_graphs import features, traced


@pytest.mark.parametrize("family", ["dinov2", "eva02-base"])
@pytest.mark.parametrize("eight", [False, True])
def test_the_parts_together_are_the_graph(family, eight):
    here = traced(family)
    graph = here.eight_bits("cpu") if eight else here.graph
    starts = block_starts(graph)
    assert len(starts) == here.depth
    feed = here.feeds[0][0]
    walk = Walk(graph, [feed], None)
    for end in (*starts, None):
        walk.step(end)
    answers = walk.states[0]
    assert set(answers) == {value.name for value in graph.graph.output}
    whole = open_session(graph)
    for name, expected in zip(answers, whole.run(list(answers), feed)):
        np.testing.assert_allclose(answers[name], expected, rtol=1e-5, atol=1e-5)


def test_the_rest_of_another_graph_goes_on_from_a_block():
    here = traced("dinov2")
    one = here.eight_bits("cpu", frozenset({"blocks.1.mlp.fc1"}))
    walk = Walk(here.eight_bits("cpu"), [feed for feed, _ in here.feeds], None)
    walk.step(block_starts(one)[1])
    for answer, images in zip(walk.rest(one, walk.at, None), here.images):
        expected = features(open_session(one), images)
        np.testing.assert_allclose(answer["features"].reshape(expected.shape), expected, rtol=1e-5, atol=1e-5)


def test_a_part_holds_its_own_constants_alone():
    graph = traced("dinov2").graph
    start = block_starts(graph)[1]
    part = take_part(graph, start)
    onnx.checker.check_model(part)
    names = {tensor.name for tensor in part.graph.initializer}
    assert any(name.startswith("blocks.1.") for name in names)
    assert not any(name.startswith("blocks.0.mlp") for name in names)


def test_graphs_of_no_block_have_no_start():
    graph = onnx.ModelProto()
    graph.CopyFrom(traced("dinov2").graph)
    for place, node in enumerate(graph.graph.node):
        node.name = f"node_{place}"
    assert block_starts(graph) == []
