import numpy as np
import pytest
import torch
from timm.layers import get_act_layer

from phreg_deploy.distill.neurons.neuron import RegisterNeuron
from phreg_deploy.distill.neurons.search import find_register_neurons
from phreg_deploy.distill.neurons.transplant import (
    ZERO_TOLERANCE,
    _measure_inputs,
    _RowSample,
    silence,
    transplant,
    zero_below,
)
from phreg_deploy.errors import PhregError
from phreg_deploy.models import hooks
from phreg_deploy.models.registers import add_registers
from tests.small_models import plant, small


def batches(model, count=4):
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(8, 3, *model.patch_embed.img_size, generator=generator) for _ in range(count)]


def activations(model, images, unit, block=0):
    """Return the activations of one hidden unit over all images, ``(B, T)``."""
    values = []
    with torch.no_grad(), hooks.hidden_units(model, lambda i, h: values.append(h[..., unit]) if i == block else None):
        for batch in images:
            hooks.forward(model, batch)
    return torch.cat(values)


def norms(model, images):
    with torch.no_grad():
        return hooks.forward(model, images).norms.numpy()


@pytest.mark.parametrize("family", ["augreg", "dinov2", "clip-quickgelu", "deit3", "siglip"])
def test_a_planted_neuron_is_found_and_nothing_else(family):
    model = plant(small(family), block=1, unit=9)
    search = find_register_neurons(model, batches(model))
    assert [(n.block, n.unit) for n in search.neurons] == [(1, 9)]
    assert search.rate == pytest.approx(1 / 16, rel=0.1)
    assert "unit 9 of block 1" in search.summary


def test_a_model_without_outliers_is_reported_as_such():
    model = small("augreg")
    search = find_register_neurons(model, batches(model))
    assert search.neurons == []
    assert "Registers start at random" in search.summary


@pytest.mark.parametrize("family", ["augreg", "clip-quickgelu", "siglip"])
def test_the_transplanted_neuron_fires_for_the_register_alone(family):
    base = plant(small(family), block=0, unit=5)
    images = batches(base)
    search = find_register_neurons(base, images)
    student = add_registers(base, 2)
    transplant(student, search.neurons, images, strength=1.0)
    hidden = activations(student, images, 5)
    sink, start = int(student.cls_token is not None), student.num_prefix_tokens
    wanted = abs(search.neurons[0].activation)
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
        transplant(student, find_register_neurons(base, images).neurons, images, strength=strength)
        levels.append(float(activations(student, images, 5)[:, 1].mean()))
    assert levels[1] == pytest.approx(0.25 * levels[0], rel=0.05)


@pytest.mark.parametrize("family", ["eva02", "eva02-base", "dinov2-giant"])
def test_gated_units_are_rewritten_too(family):
    """SwiGLU, packed and split: the gate opens for the register alone, and the value is constant."""
    base = small(family)
    images = batches(base, 2)
    student = add_registers(base, 2)
    transplant(student, [RegisterNeuron(0, 3, -20.0, 0.1, 2.0)], images, strength=1.0)
    hidden = activations(student, images, 3)
    sink = int(student.cls_token is not None)
    assert hidden[:, sink].mean() == pytest.approx(-20, rel=0.15)  # a random model mixes images into its registers
    assert hidden[:, student.num_prefix_tokens :].abs().quantile(0.999) < 0.005


def test_the_control_silences_the_same_unit():
    base = plant(small("augreg"))
    student = add_registers(base, 0)
    silence(student, find_register_neurons(base, batches(base)).neurons)
    assert student.blocks[0].mlp.fc2.weight[:, 5].abs().max() == 0
    assert norms(student, batches(base)[0]).max() < 2 * np.median(norms(base, batches(base)[0]))


@pytest.mark.parametrize(
    ("name", "zero"),
    [("gelu", -4), ("gelu_tanh", -3.875), ("quick_gelu", -6.25), ("silu", -11.25), ("relu", 0), ("hard_swish", -3)],
)
def test_each_activation_has_an_input_that_gives_zero(name, zero):
    activation = get_act_layer(name)()
    assert zero_below(activation) == zero
    assert activation(torch.linspace(zero, -60, 1000)).abs().max() <= ZERO_TOLERANCE


def test_an_activation_that_is_never_zero_has_none():
    assert zero_below(get_act_layer("leaky_relu")()) is None
    assert zero_below(get_act_layer("elu")()) is None


NEURON = RegisterNeuron(0, 3, 20.0, 0.1, 2.0)


def test_units_without_bias_are_left_with_the_reason():
    base = small("bare")
    student = add_registers(base, 2)
    with pytest.raises(
        PhregError, match=r"none of the 1 register neurons .*unit 3 of block 0: its MLP has no bias.*random-registers"
    ):
        transplant(student, [NEURON], batches(base, 1))
    before = student.blocks[0].mlp.fc1.weight.clone()
    student.blocks[1].mlp.fc1.bias = torch.nn.Parameter(torch.zeros(192))
    left = transplant(student, [NEURON, RegisterNeuron(1, 3, 20.0, 0.1, 2.0)], batches(base, 1))
    assert list(left) == [NEURON]
    assert torch.equal(student.blocks[0].mlp.fc1.weight, before)
    assert activations(student, batches(base, 1), 3, block=1)[:, 1].mean() == pytest.approx(1.4, abs=0.2)  # 0.07 of 20


def test_a_register_that_looks_like_another_token_takes_no_neuron():
    """The register is a copy of the class token, so no direction separates them."""
    base = small("augreg")
    student = add_registers(base, 1)
    with torch.no_grad():
        student.reg_token.copy_(student.cls_token)
    before = student.blocks[0].mlp.fc1.weight.clone()
    with pytest.raises(PhregError, match=r"does not tell the register from other tokens: .*1\.\d\d of the way"):
        transplant(student, [NEURON], batches(base, 1))
    assert torch.equal(student.blocks[0].mlp.fc1.weight, before)


def test_the_share_is_measured_behind_an_inner_norm():
    """The norm bounds what one unit writes, so the share follows from the input of ``fc2``."""
    model = plant(small("normed"), block=1, unit=9)
    images = batches(model)
    (neuron,) = find_register_neurons(model, images).neurons
    inputs, outputs = [], []
    handle = model.blocks[1].mlp.fc2.register_forward_pre_hook(lambda _m, args: inputs.append(args[0][..., 9]))
    with torch.no_grad(), hooks.block_outputs(model, lambda i, y: outputs.append(y) if i == 1 else None):
        for batch in images:
            hooks.forward(model, batch)
    handle.remove()
    inputs, outputs = torch.cat(inputs), torch.cat(outputs)
    deviation = outputs[:, 0] - outputs[:, 1:].mean((0, 1))
    written = (inputs[:, 0] - inputs[:, 1:].mean())[:, None] * model.blocks[1].mlp.fc2.weight[:, 9]
    share = (written * deviation).sum(-1) / deviation.square().sum(-1)
    assert neuron.share == pytest.approx(float(share.mean()), rel=0.01)
    assert 0.5 < neuron.share < 1


def test_statistics_stream_over_batches_and_sample_in_bounded_memory(monkeypatch):
    base = small("augreg")
    student, images = add_registers(base, 2), batches(base)
    rows = []
    handle = student.blocks[1].mlp.register_forward_pre_hook(lambda _m, i: rows.append(i[0].detach().double()))
    inputs = _measure_inputs(student, 1, images, lambda _n: None)
    handle.remove()
    z = torch.cat(rows)
    others = torch.cat([z[:, :1], z[:, 3:]], 1).flatten(0, 1)
    torch.testing.assert_close(inputs.register, z[:, 1].mean(0))
    torch.testing.assert_close(inputs.mean, others.mean(0))
    torch.testing.assert_close(inputs.covariance, torch.cov(others.T, correction=0))
    # Few enough rows: all of them are in the sample.
    torch.testing.assert_close(inputs.sample, others)
    monkeypatch.setattr("phreg_deploy.distill.neurons.transplant.SAMPLES", 100)
    assert len(_measure_inputs(student, 1, images, lambda _n: None).sample) == 100


def test_a_sample_is_bounded_even_and_repeats_itself():
    samples = [_RowSample(1, 500), _RowSample(1, 500)]
    for sample in samples:
        for start in range(0, 20000, 250):
            sample.add(torch.arange(start, start + 250.0)[:, None])
            assert len(sample.rows) <= 500
    assert torch.equal(samples[0].rows, samples[1].rows)
    assert len(samples[0].rows.unique()) == 500
    assert samples[0].rows.mean() == pytest.approx(10000, rel=0.1)
