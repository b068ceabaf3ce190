"""Outlier tokens that are too short: units that cancel what all tokens share are found, moved, and trained away."""

import numpy as np
import pytest
import torch
from PIL import Image

from phreg_deploy.distill.neurons.search import find_register_neurons
from tests.cli_helpers import invoke
from tests.planted_models import Markers, plant_unit, read_block
from tests.small_models import save, small

UNITS = [(1, 12), (2, 19)]
SIDE = 128


@pytest.fixture(scope="module")
def planted():
    """A model whose tokens share most of their length, which two units cancel at their markers; and the markers."""
    model = small("augreg", depth=5, width=96, side=8)
    markers = Markers(model, len(UNITS), images=96)
    # Pixels as a file holds them: within -1 and 1.
    markers.batches = [(0.3 * batch).clamp(-1, 1) for batch in markers.batches]
    _, outputs = read_block(model, markers.batches, 0)
    shared = torch.randn(outputs.shape[-1], generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        model.blocks[0].attn.proj.bias += 4 * outputs.norm(dim=-1).median() * shared / shared.norm()
    for kind, (block, unit) in enumerate(UNITS):
        plant_unit(model, markers.batches, markers.shows == kind, block, unit, 0.8, shortens=True)
    return model, markers


def write_images(batches, folder):
    """Write the images with a margin that timm's centre crop of 90 % cuts off."""
    whole = round(SIDE / 0.9)
    margin = (whole - SIDE) // 2
    folder.mkdir()
    for i, image in enumerate(torch.cat(batches)):
        canvas = np.full((whole, whole, 3), 128, np.uint8)
        pixels = (image.permute(1, 2, 0) * 0.5 + 0.5).mul(255).round().byte().numpy()
        canvas[margin : margin + SIDE, margin : margin + SIDE] = pixels
        Image.fromarray(canvas).save(folder / f"{i:03d}.png")


def test_exactly_the_units_that_shorten_tokens_are_found(planted):
    model, markers = planted
    _, last = read_block(model, markers.batches, 4)
    norms = last.norm(dim=-1)
    assert norms[markers.shows >= 0].median() < 0.75 * norms.median(), "the planted tokens are not short"
    search = find_register_neurons(model, markers.batches)
    assert [(n.block, n.unit) for n in search.neurons] == UNITS
    assert search.remaining < 0.1 * search.rate


def test_distill_removes_short_tokens(planted, tmp_path):
    model, markers = planted
    write_images(markers.batches, tmp_path / "images")
    source = save(model, tmp_path / "model")
    done = invoke(
        "distill", source, "--images", tmp_path / "images", "-o", tmp_path / "student", "--epochs", 4, "--json"
    )
    assert done.code == 0, done.err
    assert [(n["block"], n["unit"]) for n in done.document["register_neurons"]] == UNITS
    base, student = (done.document["scores"][name] for name in ("base", "student"))
    assert base["norm_outliers"]["lower"] > 0.005
    assert (base["norm_outliers"]["upper"], student["norm_outliers"]["rate"]) == (0, 0)
    assert student["fidelity"]["outliers"] > base["fidelity"]["outliers"] + 0.2
