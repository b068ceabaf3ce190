"""SINDER's repair: predicted directions, the loss on defective tokens, and the recipe from end to end."""

import json

import numpy as np
import pytest
import timm
import torch
from PIL import Image

from phreg_deploy.distill import distill, training
from phreg_deploy.distill.singular import neighbours
from phreg_deploy.distill.singular.directions import defect_directions
from phreg_deploy.distill.singular.neighbours import neighbour_loss
from phreg_deploy.models import hooks
from phreg_deploy.models.checkpoint import write_student
from phreg_deploy.models.loading import load_model
from phreg_deploy.models.weights import weights_digest
from tests.cli_helpers import interrupted, invoke
from tests.small_models import small

# Rows and columns of the planted defects; one is at the border.
PLACES = ((0, 3), (2, 5), (5, 1), (6, 6))
SIDE = 10


def plant_defect(model):
    """Let an MLP amplify one direction of its inputs, and give four tokens some of that direction.

    This is a singular defect: the direction is the MLP's leading singular vector.
    """
    generator = torch.Generator().manual_seed(3)
    direction = torch.randn(model.embed_dim, generator=generator)
    direction -= direction.mean()
    direction /= direction.norm()
    prefix = model.num_prefix_tokens
    with torch.no_grad():
        for row, column in PLACES:
            model.pos_embed[0, prefix + row * SIDE + column] += 5 * direction
        for block in model.blocks:
            block.attn.proj.weight *= 0.1
            block.mlp.fc2.weight *= 0.1
        block = model.blocks[0]
        block.norm2.weight.fill_(1)
        mlp = block.mlp
        mlp.fc1.weight[5], mlp.fc1.bias[5], mlp.fc2.weight[:, 5] = 3 * direction, -6.0, 8 * direction
    return model, direction


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    """Make a folder with ``model``, which has planted defects, and ``pictures``, 24 images."""
    root = tmp_path_factory.mktemp("inputs")
    (root / "model").mkdir()
    write_student(plant_defect(small("augreg", side=SIDE))[0], {"scores": {}}, root / "model")
    (root / "pictures").mkdir()
    rng = np.random.default_rng(0)
    for i in range(24):
        coarse = rng.integers(0, 256, (4, 4, 3), dtype=np.uint8)
        Image.fromarray(coarse).resize((176, 176), Image.Resampling.BICUBIC).save(root / "pictures" / f"{i:02}.png")
    return root


def distil(inputs, output, **changes):
    settings = {"recipe": "sinder", "epochs": 12, "batch": 4, "lr": 0.03, "views": 2, "precision": "fp32"}
    settings = {**settings, "holdout": 0.2, "model": str(inputs / "model"), **changes}
    return distill(images=inputs / "pictures", output=output, cache=inputs / "cache", **settings)


# --- directions


@pytest.mark.parametrize("centred", [False, True])
def test_directions_are_those_of_the_weights(centred):
    """Without activations, a block is linear but for its norms; its matrices then give the direction."""
    model = small("bare", act_layer=torch.nn.Identity, width=24)
    width, product, expected = 24, torch.eye(24, dtype=torch.float64), []
    projection = torch.eye(width).double() - (1 / width if centred else 0)
    for block in model.blocks:
        attn, mlp, eye = block.attn, block.mlp, torch.eye(width).double()
        one = attn.proj.weight @ attn.qkv.weight[2 * width :]
        two = mlp.fc2.weight @ mlp.fc1.weight
        for matrix, norm, scale in ((one, block.norm1, block.ls1), (two, block.norm2, block.ls2)):
            branch = scale.gamma[:, None] * matrix * norm.weight
            product = (eye + branch.detach().double() @ projection) @ product
        expected.append(torch.linalg.svd(product)[0][:, 0].float())
    directions = defect_directions(model, centred=centred)
    cosines = torch.cosine_similarity(directions, torch.stack(expected), dim=1).abs()
    torch.testing.assert_close(cosines, torch.ones(2), rtol=1e-4, atol=0)
    other = defect_directions(model, centred=not centred)
    assert torch.cosine_similarity(directions, other, dim=1).abs().min() < 0.999


@pytest.mark.parametrize("family", ["augreg", "eva", "eva02-base", "dinov2-giant", "rope-mixed", "sapiens2", "gated"])
def test_every_family_has_directions(family):
    model = small(family)
    directions, without = defect_directions(model), defect_directions(model, mlps=False)
    torch.testing.assert_close(directions.norm(dim=1), torch.ones(2))
    assert torch.cosine_similarity(directions, without, dim=1).abs().min() < 0.99


def test_the_planted_defect_is_predicted():
    model, direction = plant_defect(small("augreg", side=SIDE))
    assert torch.cosine_similarity(defect_directions(model)[0], direction, dim=0).abs() > 0.95


# --- loss


def slow_loss(tokens, direction):
    """The loss of one image, token by token; tokens (Hp, Wp, C) in float64."""
    height, width, _ = tokens.shape
    cosines = np.abs(tokens @ direction) / np.linalg.norm(tokens, axis=-1)
    bar = cosines.mean() + neighbours.DEVIATIONS * cosines.std(ddof=1)
    terms = []
    for row, column in np.argwhere(cosines > bar):
        weights, total = 0.0, np.zeros(tokens.shape[-1])
        for y in range(max(0, row - 1), min(height, row + 2)):
            for x in range(max(0, column - 1), min(width, column + 2)):
                kernel = (2 - abs(y - row)) * (2 - abs(x - column))
                weight = kernel * np.exp(-cosines[y, x] / 0.1)
                weights, total = weights + weight, total + weight * tokens[y, x]
        terms.append(np.linalg.norm(tokens[row, column] - total / weights))
    return (np.mean(terms) / np.linalg.norm(tokens, axis=-1).mean() if terms else 0.0), len(terms)


@pytest.mark.parametrize(("deviations", "least"), [(2.0, 1), (2.0, 3), (1.2, 5), (4.0, 1), (9.0, 1)])
def test_the_loss_is_that_of_a_slow_writing(monkeypatch, deviations, least):
    monkeypatch.setattr(neighbours, "DEVIATIONS", deviations)
    monkeypatch.setattr(neighbours, "LEAST", least)
    model = small("augreg", side=6, depth=3)
    images = torch.randn(4, 3, 96, 96, generator=torch.Generator().manual_seed(1))
    directions, streams = defect_directions(model), []
    with hooks.block_outputs(model, lambda _i, out: streams.append(out[:, 1:].detach().double().numpy())):
        hooks.forward(model, images)
    expected, blocks = [], []
    for i in range(4):
        losses = [slow_loss(s[i].reshape(6, 6, -1), d) for s, d in zip(streams, directions.double().numpy())]
        block = next((b for b, (_, count) in enumerate(losses) if count >= least), None)
        expected.append(0.0 if block is None else losses[block][0])
        blocks.append(block)
    loss = neighbour_loss(model, images, directions)
    assert loss.item() == pytest.approx(np.mean(expected), rel=1e-4)
    assert loss.requires_grad == any(block is not None for block in blocks)
    if loss.requires_grad:
        loss.backward()
        assert model.blocks[0].mlp.fc2.weight.grad.abs().max() > 1e-5
    if (deviations, least) == (2.0, 3):
        assert len(set(blocks)) > 1, "images differ in the block that counts"
    if deviations == 9.0:
        assert set(blocks) == {None}


def test_no_gradient_passes_through_the_neighbours():
    tokens = torch.randn(5, 5, 8, requires_grad=True)
    defective = torch.zeros(5, 5, dtype=torch.bool)
    defective[0, 2] = defective[3, 3] = True
    neighbours.distance(tokens, torch.rand(5, 5), defective).backward()
    assert (tokens.grad.norm(dim=-1) > 0).equal(defective)


# --- the recipe


def test_the_repair_removes_most_planted_defects_without_registers(inputs, tmp_path):
    record = distil(inputs, tmp_path / "student")
    assert record.scores.base.norm_outliers.rate == pytest.approx(len(PLACES) / SIDE**2, rel=0.2)
    assert record.scores.student.norm_outliers.rate < 0.2 * record.scores.base.norm_outliers.rate
    assert record.scores.student.fidelity.outliers > record.scores.base.fidelity.outliers
    assert record.history.loss[0] > 1
    assert record.history.loss[-1] < 0.2 * record.history.loss[0]
    model = timm.create_model(f"local-dir:{tmp_path / 'student'}", pretrained=True)
    assert model.reg_token is None
    assert record.registers == record.recipe.registers == 0
    stored = json.loads((tmp_path / "student" / "phreg.json").read_text())
    assert (stored["recipe"]["name"], stored["registers"], stored["views"]) == ("sinder", 0, 1)
    assert (stored["recipe"]["loss"], stored["recipe"]["unlock"]) == ("neighbours", "singular-values")
    assert stored["recipe"]["lr"] == stored["recipe"]["lr_end"] == 0.03, "the rate is constant"
    card = (tmp_path / "student" / "README.md").read_text()
    assert "distill --recipe sinder" in card
    assert "without register tokens" in card
    assert "0 register tokens" not in card
    done = invoke("export", tmp_path / "student", "-o", tmp_path / "student.bundle", "--format", "onnx", "--json")
    assert done.code == 0, done.err
    described = invoke("inspect", tmp_path / "student.bundle", "--json")
    assert described.code == 0, described.err
    assert invoke("inspect", tmp_path / "student", "--json").code == 0
    base = load_model(str(inputs / "model")).state_dict()
    after = load_model(str(tmp_path / "student")).state_dict()
    assert not torch.equal(after["blocks.0.mlp.fc2.weight"], base["blocks.0.mlp.fc2.weight"])
    assert torch.equal(after["blocks.0.mlp.fc2.bias"], base["blocks.0.mlp.fc2.bias"])


def test_the_repair_with_no_epochs_is_the_base(inputs, tmp_path):
    record = distil(inputs, tmp_path / "student", epochs=0)
    assert record.scores.student.norm_outliers.rate == record.scores.base.norm_outliers.rate > 0


def test_an_interrupted_repair_resumes_to_the_same_student(inputs, tmp_path):
    distil(inputs, tmp_path / "whole", epochs=2, average=0.5)
    with interrupted(training, "neighbour_loss", at=7):  # in the second epoch
        distil(inputs, tmp_path / "halves", epochs=2, average=0.5)
    distil(inputs, tmp_path / "halves", epochs=2, average=0.5, resume=True)
    whole, halves = (weights_digest(load_model(str(tmp_path / name))) for name in ("whole", "halves"))
    assert whole == halves
