"""Distillations of small models at the level of ``train``: what one pass saw and held, and the weights that came out."""

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
class Lesson:
    """``sizes``: images of each forward on the first device. ``calls``: forwards with gradients of each block.

    ``held``: elements that autograd kept for backward passes.
    """

    before: dict[str, torch.Tensor]
    student: Any
    sizes: list[int] = field(default_factory=list)
    calls: list[int] = field(default_factory=list)
    held: int = 0
    losses: list[float] = field(default_factory=list)

    def same(self, other: "Lesson") -> None:
        """Assert that both students have the same weights to the last bit, and that these have moved."""
        state = other.student.state_dict()
        for name, value in self.student.state_dict().items():
            assert torch.equal(state[name], value), name
        assert self.losses == other.losses
        assert any(not torch.equal(value, self.before[name]) for name, value in state.items())

    def compare(self, other: "Lesson", within: float = 1e-4) -> None:
        """Assert that both students have moved by the same, to a share ``within`` of each tensor's largest move."""
        state, most = other.student.state_dict(), 0.0
        for name, value in self.student.state_dict().items():
            moved, differs = (value - self.before[name]).abs().max().item(), (value - state[name]).abs().max().item()
            assert differs <= within * moved + 4e-7 * value.abs().max().item(), (
                f"{name} moved {moved}, differs {differs}"
            )
            most = max(most, moved)
        assert most > 1e-2
        np.testing.assert_allclose(other.losses, self.losses, rtol=0.1 * within)


class School:
    """The targets of seven photographs, from which students of one model are distilled."""

    def __init__(self, family: str, photos: Path, folder: Path, images: int = 7) -> None:
        self.model, self.folder = small(family), folder
        self.preprocess = model_preprocess(self.model, "center")
        size = tuple(self.model.patch_embed.img_size)
        self.photographs = read_photographs(photos, size, self.preprocess, limit=images)
        self.cache = TargetCache(Teacher(self.model, self.preprocess, views=3), folder / "cache")
        self.cache.fill(self.photographs)

    def train(
        self, recipe: Recipe, devices: tuple[str, ...] = ("cpu",), autocast: bool = False, **options: Any
    ) -> Lesson:
        student = add_registers(self.model, 2)
        lesson = Lesson({name: value.clone() for name, value in student.state_dict().items()}, student)
        lesson.calls = [0] * len(student.blocks)
        student.patch_embed.register_forward_pre_hook(lambda _m, inputs: self._count_images(lesson, inputs[0]))
        for i, block in enumerate(student.blocks):
            block.register_forward_pre_hook(lambda _m, _i, i=i: self._count_call(lesson, i))
        ranges_on = Batches(self.photographs, self.preprocess) if recipe.int8 else ()
        with torch.autograd.graph.saved_tensors_hooks(lambda t: self._count_held(lesson, t), lambda t: t):
            history = train(
                student, self.cache, self.photographs.digests, self.preprocess, recipe,
                seed=0, devices=devices, autocast=autocast, work=self.folder, resume=False, progress=SILENT,
                ranges_on=ranges_on, **options,
            )  # fmt: skip
        lesson.losses = history["loss"]
        return lesson

    @staticmethod
    def _count_images(lesson: Lesson, images: torch.Tensor) -> None:
        if torch.is_grad_enabled():
            lesson.sizes.append(len(images))

    @staticmethod
    def _count_call(lesson: Lesson, block: int) -> None:
        if torch.is_grad_enabled():
            lesson.calls[block] += 1

    @staticmethod
    def _count_held(lesson: Lesson, tensor: torch.Tensor) -> torch.Tensor:
        if not (tensor.is_leaf and tensor.requires_grad):  # weights are held anyway
            lesson.held += tensor.numel()
        return tensor


def descent(monkeypatch: Any) -> None:
    """Plain gradient descent for AdamW, whose first step is the sign of a gradient, of rounding too where that is zero."""
    monkeypatch.setattr(torch.optim, "AdamW", lambda groups, lr, betas: torch.optim.SGD(groups, lr=lr))
