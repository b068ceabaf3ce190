"""Train students of small models with ``train``, and count images, forwards and saved activations."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from phreg_deploy.distill.recipes import Recipe
from phreg_deploy.distill.teacher import TargetCache, Teacher
from phreg_deploy.distill.training import train
from phreg_deploy.images.photographs import read_photographs
from phreg_deploy.models.batches import Batches
from phreg_deploy.models.loading import model_preprocess
from phreg_deploy.models.registers import add_registers
from phreg_deploy.progress import SILENT
from tests.small_models import small


@dataclass
class TrainingRun:
    """A trained student and what its training did.

    ``before``: its weights before. ``sizes``: images of each forward on the first device. ``forwards``: forwards with
    gradients of each block. ``saved``: elements that autograd saved for backward passes.
    """

    before: dict[str, torch.Tensor]
    student: Any
    sizes: list[int] = field(default_factory=list)
    forwards: list[int] = field(default_factory=list)
    saved: int = 0
    losses: list[float] = field(default_factory=list)

    def assert_identical(self, other: "TrainingRun") -> None:
        """Assert that both students have the same weights to the last bit, and that training changed them."""
        state = other.student.state_dict()
        for name, value in self.student.state_dict().items():
            assert torch.equal(state[name], value), name
        assert self.losses == other.losses
        assert any(not torch.equal(value, self.before[name]) for name, value in state.items())

    def assert_close(self, other: "TrainingRun", within: float = 1e-4) -> None:
        """Assert that training changed both students alike, within a share of each tensor's largest change."""
        state, most = other.student.state_dict(), 0.0
        for name, value in self.student.state_dict().items():
            change, difference = ((value - other).abs().max().item() for other in (self.before[name], state[name]))
            rounding = 4e-7 * value.abs().max().item()
            assert difference <= within * change + rounding, f"{name} changed by {change}, differs by {difference}"
            most = max(most, change)
        assert most > 1e-2
        np.testing.assert_allclose(other.losses, self.losses, rtol=0.1 * within)


class SmallDataset:
    """Seven photographs and their teacher targets, to train students of one small model."""

    def __init__(self, family: str, photos: Path, folder: Path, images: int = 7) -> None:
        self.model, self.folder = small(family), folder
        self.preprocess = model_preprocess(self.model, "center")
        size = tuple(self.model.patch_embed.img_size)
        self.photographs = read_photographs(photos, size, self.preprocess, limit=images)
        self.cache = TargetCache(Teacher(self.model, self.preprocess, views=3), folder / "cache")
        self.cache.fill(self.photographs)

    def train(
        self, recipe: Recipe, devices: tuple[str, ...] = ("cpu",), autocast: bool = False, **options: Any
    ) -> TrainingRun:
        student = add_registers(self.model, 2)
        run = TrainingRun({name: value.clone() for name, value in student.state_dict().items()}, student)
        run.forwards = [0] * len(student.blocks)
        student.patch_embed.register_forward_pre_hook(lambda _m, inputs: self._count_images(run, inputs[0]))
        for i, block in enumerate(student.blocks):
            block.register_forward_pre_hook(lambda _m, _i, i=i: self._count_forward(run, i))
        range_images = Batches(self.photographs, self.preprocess) if recipe.int8 else ()
        with torch.autograd.graph.saved_tensors_hooks(lambda t: self._count_saved(run, t), lambda t: t):
            history = train(
                student,
                self.cache,
                self.photographs.digests,
                self.preprocess,
                recipe,
                seed=0,
                devices=devices,
                autocast=autocast,
                work=self.folder,
                resume=False,
                progress=SILENT,
                range_images=range_images,
                **options,
            )
        run.losses = history.loss
        return run

    @staticmethod
    def _count_images(run: TrainingRun, images: torch.Tensor) -> None:
        if torch.is_grad_enabled():
            run.sizes.append(len(images))

    @staticmethod
    def _count_forward(run: TrainingRun, block: int) -> None:
        if torch.is_grad_enabled():
            run.forwards[block] += 1

    @staticmethod
    def _count_saved(run: TrainingRun, tensor: torch.Tensor) -> torch.Tensor:
        # Weights are in memory anyway.
        if not (tensor.is_leaf and tensor.requires_grad):
            run.saved += tensor.numel()
        return tensor


def use_gradient_descent(monkeypatch: Any) -> None:
    """Replace AdamW by plain gradient descent, since AdamW's first step takes the sign even of a rounding error."""
    monkeypatch.setattr(torch.optim, "AdamW", lambda groups, lr, betas: torch.optim.SGD(groups, lr=lr))
