"""Several processes that torchrun started distil one student together, over gloo on the CPU."""

import functools
import json
import os
import signal
import subprocess
import sys
from dataclasses import replace
from unittest import mock

import numpy as np
import pytest
import torch

from phreg_deploy.cli import main
from phreg_deploy.distill import distill, training
from phreg_deploy.distill.devices.launch import Launch, find_launch
from phreg_deploy.distill.devices.processes import Processes, joined
from phreg_deploy.distill.recipes import RECIPES
from phreg_deploy.distill.training_batches import read_batches
from phreg_deploy.errors import BackendMissing, PhregError
from phreg_deploy.models.loading import load_model
from phreg_deploy.student_record import read_record
from tests.cli_helpers import ROOT, interrupted, leftovers
from tests.process_helpers import run_processes
from tests.training_helpers import SmallDataset, use_gradient_descent

SETTINGS = {"epochs": 2, "batch": 7, "views": 3, "device": "cpu", "precision": "fp32", "lr": 1e-3, "average": 0.5}
WORDS = [word for name, value in SETTINGS.items() for word in (f"--{name}", str(value))]


@pytest.fixture(scope="module")
def dataset(photos, tmp_path_factory):
    return SmallDataset("augreg", photos, tmp_path_factory.mktemp("dataset"))


@pytest.fixture(scope="module")
def alone(base, photos, tmp_path_factory):
    """The record and the folder of a student that one process distilled."""
    folder = tmp_path_factory.mktemp("alone")
    return distill(str(base), photos, folder / "student", cache=folder / "cache", **SETTINGS), folder / "student"


def assert_same_student(base, one, other):
    """Assert that two students' weights are within 1e-3, which training has moved them by more than."""
    before, first, second = (load_model(str(folder)).state_dict() for folder in (base, one, other))
    for name, value in first.items():
        np.testing.assert_allclose(second[name].numpy(), value.numpy(), rtol=0, atol=1e-3, err_msg=name)
    # Neurons are moved in MLPs, so training alone changes attention.
    names = [name for name in before if ".attn." in name]
    moved, apart = (torch.cat([(first[n] - of[n]).flatten() for n in names]) for of in (before, second))
    assert moved.abs().max() > 2e-3
    assert apart.norm() < 0.01 * moved.norm()


# --- torchrun


def test_torchrun_gives_the_student_of_one_process(alone, base, photos, tmp_path):
    record, student = alone
    options = ["--micro-batch", "2", "--grad-checkpointing", "--cache", tmp_path / "cache", "--json"]
    words = ["distill", base, "--images", photos, "-o", tmp_path / "student", *WORDS, *options]
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "phreg_deploy"]
    done = subprocess.run(
        [sys.executable, *launcher, *map(str, words)],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert_same_student(base, student, tmp_path / "student")
    (document,) = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    assert done.stderr.count("Base and student on") == 1
    assert done.stderr.count("images to train on") == 1
    stored = read_record(tmp_path / "student")
    assert stored["processes"] == document["processes"] == 2
    assert record.to_json()["processes"] == 1
    assert stored["seconds"]["targets_computed"] == record.seconds.targets_computed > 0
    np.testing.assert_allclose(stored["history"]["loss"], record.history.loss, rtol=1e-4)
    assert len(list((tmp_path / "cache").rglob("*.safetensors"))) == record.images.trained
    assert leftovers(tmp_path) == []


# --- the same code in forked processes


@pytest.mark.fresh_process
def test_weights_are_those_of_one_process(dataset, monkeypatch, tmp_path):
    """Seven images make batches of 5 and 2; of three processes, one has no image of the last batch."""
    use_gradient_descent(monkeypatch)
    recipe = replace(RECIPES["transplant"], batch=5, epochs=2, lr=0.05, lr_end=0.04)
    whole = dataset.train(recipe)

    def work(rank):
        with joined(find_launch()) as processes:
            run = dataset.train(recipe, processes=processes, micro_batch=1)
            return run.student.state_dict(), run.losses, run.sizes

    ends = run_processes(work, tmp_path, count=3)
    assert [end.code for end in ends] == [0, 0, 0], ends[0].output
    states, losses, sizes = zip(*(end.result for end in ends))
    assert sizes == ([1] * 6, [1] * 6, [1] * 2)
    assert losses[0] == losses[1] == losses[2]
    for state in states:
        for name, value in state.items():
            assert torch.equal(states[0][name], value), name
        other = replace(whole, student=mock.Mock(state_dict=lambda state=state: state), losses=losses[0])
        whole.assert_close(other)


@pytest.mark.fresh_process
def test_quantised_training_in_processes(dataset, monkeypatch, tmp_path):
    use_gradient_descent(monkeypatch)
    recipe = replace(RECIPES["transplant"], batch=7, epochs=1, lr=0.5, lr_end=0.4, int8=True)
    whole = dataset.train(recipe)

    def work(rank):
        with joined(find_launch()) as processes:
            run = dataset.train(recipe, processes=processes, grad_checkpointing=True)
            return run.student.state_dict(), run.losses

    ends = run_processes(work, tmp_path)
    assert [end.code for end in ends] == [0, 0], ends[0].output
    state, losses = ends[1].result
    whole.assert_close(replace(whole, student=mock.Mock(state_dict=lambda: state), losses=losses), within=1e-2)


@pytest.mark.fresh_process
def test_an_interrupted_run_is_resumed_by_two_processes(alone, base, photos, tmp_path):
    record, student = alone
    settings = {"cache": student.parent / "cache", **SETTINGS}
    run = functools.partial(distill, str(base), photos, tmp_path / "student", **settings)
    # The loss of both starts, then an epoch.
    steps = record.history.steps_per_epoch
    with interrupted(training, "objective", at=3 * steps + 2):
        run()
    assert (tmp_path / "student.partial" / "state.pt").is_file()
    ends = run_processes(lambda rank: run(resume=True).to_json(), tmp_path)
    assert [end.code for end in ends] == [0, 0], ends[0].output + ends[1].output
    assert ends[0].result == ends[1].result
    assert (ends[0].result["processes"], len(ends[0].result["history"]["loss"])) == (2, 2)
    assert ends[0].result["seconds"]["targets_computed"] == 0
    assert_same_student(base, student, tmp_path / "student")


def command(rank, *words):
    """Run the command line in a forked process; it exits with the command's code."""
    with mock.patch.object(sys, "argv", ["phreg-deploy", *map(str, words)]):
        main(args=list(map(str, words)))


def assert_said_once(ends, *fragments):
    """Every process ended with an error, and one alone has reported it."""
    assert all(end.code != 0 for end in ends)
    said = [" ".join(end.output.split()) for end in ends if end.output]
    assert len(said) == 1, said
    assert "Traceback" not in said[0]
    assert said[0].count("Error: ") == 1
    for fragment in fragments:
        assert fragment in said[0]


def test_an_error_in_one_process_ends_all_with_one_message(alone, base, photos, tmp_path):
    (tmp_path / "out").mkdir()

    def work(rank):
        real = training.learning_rate
        broken = mock.Mock(side_effect=PhregError("here: it broke.") if rank == 1 else real)
        with mock.patch.object(training, "learning_rate", broken):
            command(rank, "distill", base, "--images", photos, "-o", tmp_path / "out" / "student", *words)

    words = [*WORDS, "--cache", alone[1].parent / "cache", "--quiet"]
    assert_said_once(run_processes(work, tmp_path), "Error: here: it broke.")
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["student.partial"], "it can be resumed"


def test_a_killed_process_ends_the_others(alone, base, photos, tmp_path):
    def work(rank):
        stop = mock.Mock(side_effect=lambda *_: os._exit(9) if rank == 1 else 1e-4)
        with mock.patch.object(training, "learning_rate", stop):
            command(rank, "distill", base, "--images", photos, "-o", tmp_path / "student", *words)

    words = [*WORDS, "--cache", alone[1].parent / "cache", "--quiet"]
    ends = run_processes(work, tmp_path)
    assert ends[1].code == 9
    assert_said_once(ends, "processes: the connection to another process of this run is lost", "with --resume")
    assert not (tmp_path / "student").exists()


@pytest.mark.parametrize(
    ("words", "fragments"),
    [
        (["--device", "cuda:1"], ["device: got 'cuda:1' under torchrun", "leave --device out"]),
        (["--average", "1"], ["average: got 1.0", "from 0 (no average) to below 1"]),
        (["--epochs", "few"], ["Invalid value for '--epochs'"]),
    ],
)
def test_wrong_words_are_refused_once(base, photos, tmp_path, words, fragments):
    distil = ["distill", base, "--images", photos, "-o", tmp_path / "student", "--quiet", *words]
    ends = run_processes(lambda rank: command(rank, *distil), tmp_path)
    assert_said_once(ends, *fragments)
    assert {end.code for end in ends} == {2}


def test_processes_that_see_other_things_are_refused(tmp_path):
    def work(rank):
        try:
            with joined(find_launch()) as processes:
                processes.check_same({"seed": 0, "images": 7, "autocast": rank == 1}, "give each the same.")
        except PhregError:
            # What torchrun sends when another process has ended.
            os.kill(os.getpid(), signal.SIGTERM)
            raise

    ends = run_processes(work, tmp_path)
    assert all(end.code != 0 for end in ends)
    said = "".join(end.output for end in ends)
    assert said.count("processes: they differ in autocast; give each the same.") == 1


# --- one process's part


def test_processes_share_out_every_batch(dataset):
    recipe = replace(RECIPES["transplant"], batch=3)
    whole = list(read_batches(dataset.cache, dataset.photographs.digests, recipe, 0, 1))
    parts = [
        list(read_batches(dataset.cache, dataset.photographs.digests, recipe, 0, 1, workers=1, processes=of))
        for of in (Processes(Launch(rank, 2, rank)) for rank in range(2))
    ]
    assert [[len(batch.images) for batch in part] for part in parts] == [[2, 2, 1], [1, 1, 0]]
    for batch, first, second in zip(whole, *parts):
        assert batch.whole == first.whole == second.whole == len(batch.images)
        for name in ("images", "patches", "cls", "drift"):
            assert torch.equal(getattr(batch, name)[::2], getattr(first, name))
            if len(second.images):
                assert torch.equal(getattr(batch, name)[1::2], getattr(second, name))


def test_each_process_takes_its_own_gpu(monkeypatch):
    chosen = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    second, third = (Processes(Launch(rank, 3, rank)) for rank in (1, 2))
    assert second.find_devices("auto") == second.find_devices("cuda") == ("cuda:1",)
    assert second.find_devices("cpu") == ("cpu",)
    assert chosen == [1, 1]
    with pytest.raises(BackendMissing, match=r"process 2 .* no GPU of its own, since there are 2; lower --nproc"):
        third.find_devices("auto")


def test_one_process_alone_needs_no_connection(monkeypatch):
    monkeypatch.setenv("RANK", "1")
    assert find_launch() == Launch(), "not torchrun"
    processes = Processes(Launch())
    assert processes.sum([1, 2.5]) == [1.0, 2.5]
    assert processes.first_of("here") == "here"
    processes.check_same({"seed": 0}, "")
    weight = torch.nn.Parameter(torch.ones(2))
    assert processes.sum_gradients([weight], 0.5) == 0.5
    assert weight.grad is None
