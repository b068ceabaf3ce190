"""Train a student against cached targets: loss, learning rate, epochs, resuming. B batch, N patch tokens, C width."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from phreg_deploy.distill.devices.processes import ALONE, Processes
from phreg_deploy.distill.devices.replicas import Replicas
from phreg_deploy.distill.fake_quantisation import observe_grids, quantised
from phreg_deploy.distill.objective import MicroBatch, TargetScale, objective, target_scale
from phreg_deploy.distill.recipes import NEIGHBOURS, SINGULAR_VALUES, Recipe
from phreg_deploy.distill.record import History
from phreg_deploy.distill.singular.directions import defect_directions
from phreg_deploy.distill.singular.neighbours import neighbour_loss
from phreg_deploy.distill.singular.values import merge_singular_values, train_singular_values
from phreg_deploy.distill.teacher import TargetCache, mixed_precision
from phreg_deploy.distill.training_batches import Batch, load_batch, read_batches, split_batch
from phreg_deploy.distill.work_folder import read_state, write_state
from phreg_deploy.errors import PhregError
from phreg_deploy.models import hooks
from phreg_deploy.models.hooks import ViT
from phreg_deploy.models.weights import unlock_weights
from phreg_deploy.progress import Advance, Progress
from phreg_deploy.quantisation import Grid, Smoothing
from phreg_deploy.spec import Preprocess

# Share of the steps in which the learning rate rises.
WARM_UP = 0.1
MOMENTUM = 0.9


def train(
    student: ViT,
    cache: TargetCache,
    digests: list[str],
    preprocess: Preprocess,
    recipe: Recipe,
    *,
    seed: int,
    devices: Sequence[str],
    autocast: bool,
    work: Path,
    resume: bool,
    progress: Progress,
    range_images: Iterable[torch.Tensor] = (),
    micro_batch: int | None = None,
    grad_checkpointing: bool = False,
    workers: int | None = None,
    processes: Processes = ALONE,
) -> History:
    """Train ``student`` in place, and keep the state after every epoch in ``work``.

    Args:
        digests: of the training images, all in the cache.
        seed: decides the order of each epoch, together with the epoch's number; a resumed run gives the same student.
        devices: the first one holds ``student`` and ``range_images``; each other one a copy of the student.
        work: this run's own folder; ``resume`` continues from the ``state.pt`` in it.
        range_images: normalised images ``(B, 3, H, W)``; the grids of fake quantisation are observed on them before
            each epoch.
        micro_batch: most images per forward and backward pass; None for a device's share of the batch.
        grad_checkpointing: recompute each block in the backward pass (arXiv 1604.06174).
        workers: threads that read targets; see ``read_batches``.
        processes: each trains on its part of every batch. The first one's student counts, in the end too.

    ``devices``, ``processes``, ``micro_batch`` and ``grad_checkpointing`` change the student by rounding only.

    Raises:
        PhregError: a loss that is not finite; ``work`` then still holds the last good epoch.
    """
    student.to(devices[0])
    only_values = recipe.unlock == SINGULAR_VALUES
    weights = train_singular_values(student) if only_values else unlock_weights(student, recipe.unlock)
    processes.share_weights(student)
    # Of the weights before training, also if it is resumed.
    directions = defect_directions(student) if recipe.loss == NEIGHBOURS else None
    optimizer = _make_optimizer(weights, recipe)
    average = _make_average(student, recipe) if processes.first else None
    losses = _restore(student, optimizer, average, work, devices[0]) if resume else []
    processes.check_same({"finished epochs": len(losses)}, f"let each of them see {work}, with the same files in it.")
    scale = target_scale(cache, digests, recipe)
    student.train()
    student.set_grad_checkpointing(grad_checkpointing)
    replicas = Replicas(student, devices)
    trainer = _Trainer(
        replicas, processes, weights, optimizer, average, preprocess, recipe, scale, autocast, micro_batch, directions
    )
    pin = devices[0].startswith("cuda")
    steps = max(1, math.ceil(len(digests) / recipe.batch))
    with progress.task("distilling", recipe.epochs * len(digests)) as advance:
        advance(len(losses) * len(digests))
        for epoch in range(len(losses), recipe.epochs):
            grids = observe_grids(student, range_images, Smoothing()) if recipe.int8 else {}
            batches = read_batches(cache, digests, recipe, seed, epoch, workers=workers, pin=pin, processes=processes)
            losses.append(trainer.run_epoch(epoch, batches, steps, grids, work, advance))
            state = {"student": student.state_dict(), "optimizer": optimizer.state_dict(), "history": losses}
            if average is not None:
                state["average"] = average.state_dict()
            if processes.first:
                write_state(work, state)
    if average is not None:
        student.load_state_dict(average.module.state_dict())
    merge_singular_values(student)
    student.eval().cpu()
    student.set_grad_checkpointing(False)
    student.requires_grad_(True)
    return History(losses, steps)


def _make_average(student: ViT, recipe: Recipe) -> AveragedModel | None:
    """Copy the student to hold the moving average of its weights; the first update sets it to the student's."""
    if not recipe.average:
        return None
    return AveragedModel(student, multi_avg_fn=get_ema_multi_avg_fn(recipe.average))


def _restore(
    student: ViT, optimizer: torch.optim.Optimizer, average: AveragedModel | None, work: Path, device: str
) -> list[float]:
    """Load the state after the last finished epoch; returns the losses until then."""
    state = read_state(work, device)
    if state is None:
        return []
    student.load_state_dict(state["student"])
    optimizer.load_state_dict(state["optimizer"])
    if average is not None:
        average.load_state_dict(state["average"])
    return list(state["history"])


def _make_optimizer(weights: list[nn.Parameter], recipe: Recipe) -> torch.optim.Optimizer:
    decayed = [p for p in weights if p.ndim > 1 or recipe.decays_vectors]
    others = [p for p in weights if p.ndim <= 1 and not recipe.decays_vectors]
    if recipe.optimiser == "sgd":
        return torch.optim.SGD(weights, lr=recipe.lr, momentum=MOMENTUM, weight_decay=recipe.weight_decay)
    groups = [{"params": decayed, "weight_decay": recipe.weight_decay}, {"params": others, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=recipe.lr, betas=(0.9, 0.999))


@dataclass
class _Trainer:
    """What a training step needs; ``weights`` are those that train, ``average`` follows them if it is not None.

    ``directions`` ``(L, C)``: of defective tokens after each block, for SINDER's loss; None for the loss on targets.
    """

    replicas: Replicas
    processes: Processes
    weights: list[nn.Parameter]
    optimizer: torch.optim.Optimizer
    average: AveragedModel | None
    preprocess: Preprocess
    recipe: Recipe
    scale: TargetScale
    autocast: bool
    micro_batch: int | None
    directions: torch.Tensor | None = None

    def run_epoch(
        self, epoch: int, batches: Iterable[Batch], steps: int, grids: dict[str, Grid], work: Path, advance: Advance
    ) -> float:
        """Take one step per batch; returns the mean loss."""
        losses: list[float] = []
        for step, batch in enumerate(batches):
            lr = learning_rate(self.recipe, (epoch * steps + step) / (self.recipe.epochs * steps))
            for group in self.optimizer.param_groups:
                group["lr"] = lr
            self.optimizer.zero_grad(set_to_none=True)
            loss = self._backward(batch, grids)
            self.replicas.sum_gradients()
            loss = self.processes.sum_gradients(self.weights, loss)
            if not math.isfinite(loss):
                raise PhregError(
                    f"distill: the loss became {loss} in epoch {epoch + 1}, step {step + 1}. The state after epoch "
                    f"{epoch} is kept in {work}; try a smaller --lr, or --precision fp32."
                )
            if self.recipe.clip:
                nn.utils.clip_grad_norm_(self.weights, self.recipe.clip)
            self.optimizer.step()
            self.replicas.share_weights()
            if self.average is not None:
                self.average.update_parameters(self.replicas.models[0])
            losses.append(loss)
            advance(batch.whole, note=f"loss {np.mean(losses[-20:]):.4f}")
        return float(np.mean(losses))

    def _backward(self, batch: Batch, grids: dict[str, Grid]) -> float:
        """Compute the gradients of this process's images on all its devices; returns their share of the loss."""

        def backward(model: ViT, device: str, part: MicroBatch) -> float:
            loss = self._loss(model, device, part.to(device))
            # SINDER's loss of images without defective tokens depends on no weight.
            if loss.requires_grad:
                loss.backward()
            return loss.item()

        parts = split_batch(batch, self.recipe, self.micro_batch, len(self.replicas.devices), self.processes)
        # Open in the backward pass too, since that may compute blocks again.
        with ExitStack() as stack:
            for model in self.replicas.models:
                stack.enter_context(quantised(model, grids))
            return sum(self.replicas.map(backward, parts))

    def _loss(self, model: ViT, device: str, part: MicroBatch) -> torch.Tensor:
        images = hooks.normalise(part.images, self.preprocess.mean, self.preprocess.std)
        with mixed_precision(device, self.autocast):
            if self.directions is not None:
                return neighbour_loss(model, images, self.directions.to(device)) * part.share
            features = hooks.forward(model, images, self.recipe.layers)
        return objective(features, part, self.recipe, self.scale)


def learning_rate(recipe: Recipe, done: float) -> float:
    """Return the learning rate after the share ``done`` (0-1) of all steps."""
    if recipe.lr_end is not None:
        return float(recipe.lr * (recipe.lr_end / recipe.lr) ** done)
    if done < WARM_UP:
        return recipe.lr * (0.04 + 0.96 * done / WARM_UP)
    return recipe.lr * max(1e-4, 0.5 + 0.5 * math.cos(math.pi * (done - WARM_UP) / (1 - WARM_UP)))


@torch.inference_mode()
def loss_of(
    model: ViT,
    cache: TargetCache,
    digests: list[str],
    preprocess: Preprocess,
    recipe: Recipe,
    *,
    device: str,
    autocast: bool,
) -> float:
    """The loss of ``model`` on the images of ``digests``, all in the cache, without training."""
    scale, total = target_scale(cache, digests, recipe), 0.0
    for start in range(0, len(digests), recipe.batch):
        part = digests[start : start + recipe.batch]
        batch = load_batch(cache, part, np.zeros(len(part), bool))
        whole = split_batch(batch, recipe, None, 1)[0].to(device)
        with mixed_precision(device, autocast):
            images = hooks.normalise(whole.images, preprocess.mean, preprocess.std)
            features = hooks.forward(model, images, recipe.layers)
        total += objective(features, whole, recipe, scale).item() * len(part) / len(digests)
    return total
