import numpy as np
import pytest
import torch

from phreg_deploy.distill import taps
from phreg_deploy.distill.neurons import RegisterNeuron, survey
from phreg_deploy.distill.student import add_registers
from phreg_deploy.distill.transplant import silence, transplant
from tests.families import plant, small


def batches(model, count=4):
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(8, 3, *model.patch_embed.img_size, generator=generator) for _ in range(count)]


def activations(model, images, unit):
    """Of one hidden unit in the first block, over all images: ``(B, T)``."""
    kept = []
    with torch.no_grad(), taps.hidden_units(model, lambda i, h: kept.append(h[..., unit]) if i == 0 else None):
        for batch in images:
            taps.forward(model, batch)
    return torch.cat(kept)


def norms(model, images):
    with torch.no_grad():
        return taps.forward(model, images).norms.numpy()


@pytest.mark.parametrize("family", ["augreg", "dinov2", "clip-quickgelu", "deit3", "siglip"])
def test_a_planted_neuron_is_found_and_nothing_else(family):
    model = plant(small(family), block=1, unit=9)
    found = survey(model, batches(model))
    assert [(n.block, n.unit) for n in found.neurons] == [(1, 9)]
    assert found.rate == pytest.approx(1 / 16, rel=0.1)
    assert "unit 9 of block 1" in found.word


def test_a_model_without_outliers_gets_a_clear_word():
    model = small("augreg")
    found = survey(model, batches(model))
    assert found.neurons == []
    assert "Registers start at random" in found.word


@pytest.mark.parametrize("family", ["augreg", "clip-quickgelu", "siglip"])
def test_the_transplanted_neuron_fires_for_the_register_alone(family):
    base = plant(small(family), block=0, unit=5)
    images = batches(base)
    found = survey(base, images)
    student = add_registers(base, 2)
    transplant(student, found.neurons, images, strength=1.0)
    hidden = activations(student, images, 5)
    sink, start = int(student.cls_token is not None), student.num_prefix_tokens
    wanted = abs(found.neurons[0].activation)
    assert hidden[:, sink].mean() == pytest.approx(wanted, rel=0.05)
    assert hidden[:, sink].quantile(0.1) > 0.3 * wanted  # a random model mixes images into its registers
    assert hidden[:, start:].abs().quantile(0.999) < 0.01 * wanted
    assert norms(base, images[0]).max() > 2 * np.median(norms(base, images[0]))
    assert norms(student, images[0]).max() < 2 * np.median(norms(base, images[0]))


def test_strength_scales_the_registers_activation():
    base = plant(small("augreg"), block=0, unit=5)
    images, levels = batches(base), []
    for strength in (1.0, 0.25):
        student = add_registers(base, 2)
        transplant(student, survey(base, images).neurons, images, strength=strength)
        levels.append(float(activations(student, images, 5)[:, 1].mean()))
    assert levels[1] == pytest.approx(0.25 * levels[0], rel=0.05)


@pytest.mark.parametrize("family", ["eva02", "eva02-base", "dinov2-giant"])
def test_gated_units_are_rewritten_too(family):
    """SwiGLU, packed and split: the gate opens for the register, the value is a constant."""
    base = small(family)
    images = batches(base, 2)
    student = add_registers(base, 2)
    transplant(student, [RegisterNeuron(0, 3, -20.0, 0.1, 2.0)], images, strength=1.0)
    hidden = activations(student, images, 3)
    sink = int(student.cls_token is not None)
    assert hidden[:, sink].mean() == pytest.approx(-20, rel=0.1)
    assert hidden[:, student.num_prefix_tokens :].abs().quantile(0.99) < 0.5


def test_the_control_silences_the_same_unit():
    base = plant(small("augreg"))
    student = add_registers(base, 0)
    silence(student, survey(base, batches(base)).neurons)
    assert student.blocks[0].mlp.fc2.weight[:, 5].abs().max() == 0
    assert norms(student, batches(base)[0]).max() < 2 * np.median(norms(base, batches(base)[0]))
