import copy

import pytest
import torch
from torch import nn

from phreg_deploy.export.folding import (
    CENTRE,
    fold_attention_scale,
    fold_layer_scale,
    fold_normalisation,
    patch_positions,
    prefix_tokens,
)
from tests.small_models import small


@pytest.mark.parametrize("bias", [True, False])
def test_normalisation_moves_into_the_patch_projection(bias):
    torch.manual_seed(0)
    projection = nn.Conv2d(3, 8, 4, 4, bias=bias)
    mean, std = (0.48, 0.45, 0.41), (0.27, 0.26, 0.28)
    image = torch.randint(0, 256, (2, 8, 12, 3))
    normal = (image.permute(0, 3, 1, 2).double() / 255 - torch.tensor(mean).view(1, 3, 1, 1)) / torch.tensor(std).view(
        1, 3, 1, 1
    )
    expected = copy.deepcopy(projection).double()(normal).flatten(2).transpose(1, 2)
    weight, offset = fold_normalisation(projection, mean, std)
    rows = (image - CENTRE).reshape(2, 2, 4, 3, 4, 3).permute(0, 1, 3, 2, 4, 5).reshape(2, 6, -1).double()
    torch.testing.assert_close(rows @ weight.double() + offset.double(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("bias", [True, False])
def test_layer_scale_moves_into_the_linear_layer_before_it(bias):
    torch.manual_seed(0)
    linear, gamma, x = nn.Linear(6, 5, bias=bias), torch.randn(5), torch.randn(3, 6)
    expected = gamma * linear(x)
    fold_layer_scale(linear, gamma)
    torch.testing.assert_close(linear(x), expected)


def test_no_layer_scale_changes_nothing():
    linear = nn.Linear(6, 5)
    before = linear.weight.clone()
    fold_layer_scale(linear, None)
    assert torch.equal(linear.weight, before)


def test_the_attention_scale_moves_into_the_queries():
    torch.manual_seed(0)
    weight, bias, x = torch.randn(12, 4), torch.randn(12), torch.randn(3, 4)
    q, k, _ = (x @ weight.T + bias).chunk(3, dim=-1)
    expected = (q * 0.5) @ k.T
    fold_attention_scale(weight, bias, 4, 0.5)
    q, k, _ = (x @ weight.T + bias).chunk(3, dim=-1)
    torch.testing.assert_close(q @ k.T, expected)


@pytest.mark.parametrize("family", ["augreg", "deit3", "clip", "siglip", "eva"])
def test_class_token_and_positions_become_constants(family):
    """The constants and the patches together equal timm's ``_pos_embed`` of the same patches."""
    model = small(family)
    patches = torch.randn(1, 16, 48)
    with torch.no_grad():
        expected = model._pos_embed(patches)
    expected = expected[0] if isinstance(expected, tuple) else expected
    prefix = prefix_tokens(model)
    body = patches + patch_positions(model)
    got = body if prefix is None else torch.cat([prefix, body], dim=1)
    torch.testing.assert_close(got, expected)
