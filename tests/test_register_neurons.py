"""The search finds exactly the planted register neurons, in models and of kinds that it was not written for."""

import pytest
import torch

from phreg_deploy.artifacts.outliers import NormBand
from phreg_deploy.distill.neurons.search import REMAINING, find_register_neurons
from tests.planted_models import Markers, plant_unit
from tests.small_models import small

DEPTH = 5
# Name -> family, number of units, and how far they lengthen a token.
KINDS = {
    "one unit": ("augreg", 1, 6),
    "four units": ("augreg", 4, 6),
    "eight units": ("augreg", 8, 6),
    "sixteen units": ("augreg", 16, 6),
    "weak": ("augreg", 4, 1.7),
    "strong": ("augreg", 4, 40),
    "LayerScale": ("deit3", 4, 6),
    "SwiGLU": ("dinov2-giant", 4, 6),
    "QuickGELU": ("clip-quickgelu", 4, 6),
    "no class token": ("siglip", 4, 6),
    "rotary, split SwiGLU": ("eva02", 4, 6),
}


def planted(family, count, factor):
    """A model with ``count`` units in its first three blocks, each with a marker of its own, and the units' names."""
    model = small(family, depth=DEPTH, width=96, side=8)
    markers = Markers(model, count)
    units = sorted((k % 3, 5 + 7 * k) for k in range(count))
    for kind, (block, unit) in enumerate(units):
        plant_unit(model, markers.batches, markers.shows == kind, block, unit, factor)
    return model, markers, units


@pytest.mark.parametrize("kind", KINDS)
def test_exactly_the_planted_units_are_found(kind):
    model, markers, units = planted(*KINDS[kind])
    search = find_register_neurons(model, markers.batches)
    found = [(n.block, n.unit) for n in search.neurons]
    assert found == units
    assert search.rate == pytest.approx(float((markers.shows >= 0).float().mean()), rel=0.2)
    assert search.remaining <= REMAINING * search.rate


def test_a_unit_that_reads_what_an_earlier_one_wrote_is_left_alone():
    """It writes three times as much, and falls silent with the unit that it reads."""
    model, markers, units = planted("augreg", 1, 6)
    plant_unit(model, markers.batches, markers.shows == 0, 2, 40, factor=20)
    prefix, fired = model.num_prefix_tokens, []
    with torch.no_grad():
        column = model.blocks[0].mlp.fc2.weight[:, 5].clone()
        # The reader's direction is the other unit's vector alone.
        row = model.blocks[2].mlp.fc1.weight[40]
        row.copy_(row.norm() * column / column.norm())
        handle = model.blocks[2].mlp.fc1.register_forward_hook(
            lambda _m, _args, out: fired.append(out[:, prefix:, 40].flatten())
        )
        model.blocks[2].mlp.fc1.bias[40] = 0
        model.forward_features(markers.batches[0])
        shown = markers.shows[: len(markers.batches[0])].flatten() == 0
        high, low = fired[0][shown].mean(), fired[0][~shown].max()
        assert high > low
        gain = 20 / (high - low)
        row *= gain
        model.blocks[2].mlp.fc1.bias[40] = 8 - gain * high
        handle.remove()
    search = find_register_neurons(model, markers.batches)
    assert [(n.block, n.unit) for n in search.neurons] == units
    assert search.block >= 2


@pytest.mark.parametrize("family", ["augreg", "deit3", "clip-quickgelu", "siglip", "eva02"])
def test_none_are_found_where_none_are_planted(family):
    model = small(family, depth=DEPTH, width=96, side=8)
    search = find_register_neurons(model, Markers(model, 4).batches)
    assert search.neurons == []
    assert "Registers start at random" in search.summary


def test_outliers_that_the_patch_embedding_makes_have_no_neurons():
    """The markers are outliers before the first block, so no unit makes them."""
    model = small("augreg", depth=DEPTH, width=96, side=8)
    markers = Markers(model, 4, contrast=6)
    search = find_register_neurons(model, markers.batches)
    assert search.rate > 0.03
    assert search.neurons == []
    assert "does not remove them" in search.summary


def test_short_tokens_are_outliers_too():
    band = NormBand.of(torch.linspace(8, 12, 1000).numpy())
    assert band.median == pytest.approx(10, rel=0.01)
    assert band.outside(torch.tensor([10.0, 3.0, 30.0]).numpy()).tolist() == [False, True, True]
