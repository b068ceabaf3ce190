"""Work is distributed over several devices in one process; the tests name the CPU more than once."""

import copy
import functools
import threading
import time
from dataclasses import replace

import numpy as np
import pytest
import torch

from phreg_deploy.distill import distill, teacher, training
from phreg_deploy.distill.devices import processes
from phreg_deploy.distill.devices.replicas import AHEAD, Replicas
from phreg_deploy.distill.recipes import RECIPES
from phreg_deploy.distill.teacher import Teacher
from phreg_deploy.errors import BackendMissing, PhregError
from phreg_deploy.models import hardware
from phreg_deploy.models.loading import load_model
from tests.small_models import small
from tests.training_helpers import SmallDataset, use_gradient_descent

TWO, THREE = ("cpu", "cpu"), ("cpu", "cpu", "cpu")


@pytest.fixture(scope="module")
def dataset(photos, tmp_path_factory):
    return SmallDataset("augreg", photos, tmp_path_factory.mktemp("dataset"))


def test_results_come_in_the_order_of_the_jobs():
    """The first device is slow; the second one continues, but only as far ahead as ``AHEAD`` allows."""
    replicas, started = Replicas(torch.nn.Linear(1, 1), TWO), []

    def work(model, device, job):
        assert device == "cpu"
        started.append(job)
        time.sleep(0.02 if model is replicas.models[0] else 0)
        return job, replicas.models.index(model), threading.get_ident()

    results = replicas.map(work, iter(range(11)))
    first = next(results)
    assert max(started) <= 2 * AHEAD
    results = [first, *results]
    assert [job for job, _, _ in results] == list(range(11))
    assert [device for _, device, _ in results] == [job % 2 for job in range(11)]
    assert len({thread for _, _, thread in results}) == 2


def test_one_device_needs_no_thread():
    replicas = Replicas(torch.nn.Linear(1, 1), ["cpu"])
    assert list(replicas.map(lambda *_: threading.current_thread(), [1, 2])) == 2 * [threading.main_thread()]


@pytest.mark.parametrize("error", [PhregError, KeyboardInterrupt])
def test_an_error_of_a_worker_is_raised_and_every_thread_ends(error):
    def work(_model, _device, job):
        if job == 3:
            raise error("here")
        return job

    before, results = threading.active_count(), []
    with pytest.raises(error, match="here"):
        results.extend(Replicas(torch.nn.Linear(1, 1), TWO).map(work, range(20)))
    assert threading.active_count() == before


def test_gradients_are_summed_and_weights_are_shared():
    replicas = Replicas(torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.Linear(2, 1)), THREE)
    replicas.models[0][1].bias.requires_grad_(False)
    for i, model in enumerate(replicas.models):
        for parameter in model.parameters():
            parameter.grad = None if i == 1 else torch.full_like(parameter, 10.0**i)
    replicas.models[0][0].bias.grad = None
    replicas.sum_gradients()
    sums = [parameter.grad.unique().tolist() for parameter in replicas.models[0].parameters()]
    assert sums == [[101], [100], [101], [101]]
    assert all(parameter.grad is None for model in replicas.models[1:] for parameter in model.parameters())
    with torch.no_grad():
        for parameter in replicas.models[0].parameters():
            parameter.add_(1)
    replicas.share_weights()
    for model in replicas.models[1:]:
        same = [torch.equal(a, b) for a, b in zip(replicas.models[0].parameters(), model.parameters())]
        assert same == [True, True, True, False], "what does not train is not copied"


@pytest.mark.parametrize("devices", [TWO, THREE])
def test_targets_of_several_devices_equal_those_of_one(dataset, monkeypatch, devices):
    # Two photographs per chunk.
    settings = {"views": 18, "seed": 1}
    model, models, real, advances = dataset.model, [], teacher.hooks.forward, []
    alone = list(Teacher(model, dataset.preprocess, **settings).targets(dataset.photographs))
    monkeypatch.setattr(teacher.hooks, "forward", lambda model, *args: models.append(id(model)) or real(model, *args))
    several = Teacher(model, dataset.preprocess, devices=devices, **settings)
    assert several.digest == Teacher(model, dataset.preprocess, **settings).digest
    together = list(several.targets(dataset.photographs, advances.append))
    assert len(set(models)) == len(devices)
    assert len(models) == 4
    assert sum(advances) == 7
    for one, other in zip(alone, together, strict=True):
        for name in ("patches", "cls", "norms", "plain"):
            assert np.array_equal(getattr(one, name), getattr(other, name))


@pytest.mark.parametrize(
    ("name", "int8", "devices", "options"),
    [
        ("transplant", False, TWO, {}),
        # Batches of three images, one for each device, and a last batch of one image.
        ("transplant", False, THREE, {}),
        ("ph-reg", False, TWO, {}),
        ("transplant", True, TWO, {}),
        ("transplant", False, TWO, {"micro_batch": 1, "grad_checkpointing": True}),
        ("transplant", True, TWO, {"micro_batch": 1, "grad_checkpointing": True}),
    ],
)
def test_several_devices_give_the_weights_of_one(dataset, monkeypatch, name, int8, devices, options):
    use_gradient_descent(monkeypatch)
    recipe = replace(RECIPES[name], batch=3, epochs=2, lr=0.05, lr_end=0.04, int8=int8)
    # In INT8 take one step: an input that rounds to another value of its grid would lead to another student.
    if int8:
        recipe = replace(recipe, batch=7, epochs=1, lr=0.5)
    alone, made = dataset.train(recipe), []
    monkeypatch.setattr(training, "Replicas", lambda *args: made.append(Replicas(*args)) or made[-1])
    together = dataset.train(recipe, devices, **options)
    alone.assert_close(together, within=1e-2 if int8 else 1e-4)
    (replicas,) = made
    assert [len(set(map(id, replicas.models)))] == [len(devices)]
    for model in replicas.models[1:]:
        for parameter, first in zip(model.parameters(), replicas.models[0].parameters()):
            assert torch.equal(parameter, first)


def test_a_run_repeated_on_two_devices_gives_the_same_bits(dataset):
    recipe = replace(RECIPES["transplant"], batch=5, epochs=2)
    dataset.train(recipe, TWO).assert_identical(dataset.train(recipe, TWO))


def test_a_distillation_over_two_devices(base, photos, tmp_path, monkeypatch):
    settings = {"epochs": 1, "batch": 8, "views": 3, "device": "cpu", "precision": "fp32", "lr": 1e-6}
    run = functools.partial(distill, str(base), photos, cache=tmp_path / "cache", **settings)
    monkeypatch.setattr(processes, "find_devices", lambda device: TWO)
    several = run(tmp_path / "two")
    monkeypatch.undo()
    alone = run(tmp_path / "one")
    assert (several.to_json()["device"], alone.to_json()["device"]) == ("cpu,cpu", "cpu")
    assert several.seconds.targets_computed > 0
    assert alone.seconds.targets_computed == 0, "the targets are the same"
    assert several.scores.student.fidelity.mean == pytest.approx(alone.scores.student.fidelity.mean)
    one, two = (load_model(str(tmp_path / name)).state_dict() for name in ("one", "two"))
    for name, value in one.items():
        np.testing.assert_allclose(two[name].numpy(), value.numpy(), rtol=1e-4, atol=1e-5, err_msg=name)


def test_a_copy_keeps_what_trains_and_how_attention_runs():
    model = small("augreg").train()
    model.blocks[1].attn.fused_attn = False
    model.blocks[0].requires_grad_(False)
    model.set_grad_checkpointing()
    first, second = Replicas(copy.deepcopy(model), TWO).models
    for one in (first, second):
        assert one.training
        assert one.grad_checkpointing
        assert one.blocks[1].attn.fused_attn is False
        assert {n for n, p in one.named_parameters() if p.requires_grad} == {
            n for n, p in model.named_parameters() if p.requires_grad
        }
    assert not {p.data_ptr() for p in first.parameters()} & {p.data_ptr() for p in second.parameters()}


# --- which devices


def test_gpus_of_this_machine_are_found(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert hardware.find_devices("cuda:1,cuda:0") == ("cuda:1", "cuda:0")
    assert hardware.find_devices("auto") == ("cuda",)
    with pytest.raises(BackendMissing, match=r"got 'cuda:2', but there are 2 GPUs, numbered from 0"):
        hardware.find_devices("cuda:0,cuda:2")


def test_gpus_that_are_not_there_are_refused_before_any_work(base, photos, run_cli, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    words = ["distill", base, "--images", photos, "-o", tmp_path / "out", "--cache", tmp_path / "cache", "--json"]
    run_cli(*words, "--device", "cuda:0,cuda:1").refused(4, "got 'cuda:0'", "sees no usable GPU", "--device cpu")
    assert list(tmp_path.iterdir()) == []
    assert hardware.find_devices("cpu") == hardware.find_devices("auto") == ("cpu",)
