"""Define recipes (which weights are trained, with which loss and learning rate) and a user's request. No PyTorch."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from phreg_deploy.errors import PhregError
from phreg_deploy.readout import FINAL, NEIGHBOUR, VALUE, Readout
from phreg_deploy.spec import Stored

SINGULAR_VALUES = "singular-values"
NEIGHBOURS = "neighbours"


@dataclass(frozen=True)
class Recipe(Stored):
    """Settings of a distillation; the defaults are those of "transplant".

    ``unlock``: "all" weights but the head, "paper" (registers, position embedding, class token, patch projection, last
    block), or "singular-values" (of the blocks' linear layers but queries and keys; no registers). ``loss``: "targets"
    (against denoised targets) or "neighbours" (SINDER's, which reads none). ``class_weight``: weight of the class-token
    term. ``hard_weight``: extra weight of a patch token per unit of 1 - cosine between the base model's token and its
    denoised target; artifact tokens then count for more.
    ``norm_weight``: weight of the term that draws the norms of patch tokens into the base model's ordinary range.
    ``scale_free``: divide squared errors by the targets' variance. ``flips``: mirror image and target at random.
    ``optimiser``: "adamw", or "sgd" with a momentum of 0.9. ``lr_end``: if None, one cycle with 10 % warm-up; otherwise
    exponential decay from ``lr`` to ``lr_end``. ``clip``: largest gradient norm, 0 for no limit. ``registers``: tokens
    to add. ``int8``: train through fake quantisation.
    ``readout``: what is trained and served, see ``phreg_deploy.readout``; ``teacher``: the readout of the targets, None
    for the same; ``project``: targets and features are projected into the space of text. ``layers``: further layers, by
    numbers of blocks, that are trained against denoised targets of their own; ``layer_weight``: of their mean loss.
    ``moves_neurons``: move register neurons to a register token before training. ``decays_vectors``: apply weight
    decay to biases and norms too. ``rate_by_width``: lower ``lr`` for wider models. ``average``: decay per step of an
    exponential moving average of the weights, which becomes the student; 0 for none.
    """

    name: str
    # The measurements behind these values are in docs/figures.md.
    unlock: str = "all"
    loss: str = "targets"
    class_weight: float = 4.0
    hard_weight: float = 30.0
    norm_weight: float = 1.0
    scale_free: bool = True
    flips: bool = True
    optimiser: str = "adamw"
    lr: float = 5e-5
    lr_end: float | None = None
    weight_decay: float = 0.05
    batch: int = 16
    clip: float = 1.0
    epochs: int = 16
    registers: int = 4
    int8: bool = False
    moves_neurons: bool = False
    decays_vectors: bool = False
    rate_by_width: bool = True
    average: float = 0.0
    readout: str = FINAL
    teacher: str | None = None
    project: bool = False
    layers: tuple[int, ...] = ()
    layer_weight: float = 1.0

    @property
    def student_readout(self) -> Readout:
        return Readout(self.readout, self.project)

    @property
    def teacher_readout(self) -> Readout:
        return Readout(self.teacher or self.readout, self.project)

    def default_rate(self, width: int) -> float:
        """Return the learning rate for a model's width: it falls with the square root of the width."""
        return self.lr * min(1.0, (WIDTH / width) ** 0.5) if self.rate_by_width else self.lr


# arXiv 2505.21501 supplement S.2 (learning rates, batch) and section 3.2 (loss, unlocked weights). The paper trains for
# 100 epochs and reports epoch 30; this recipe spreads the same decay over the requested epochs. It also differs in
# three points: it uses the paper's rate and batch for CLIP with every model, draws each image's views once
# instead of in every epoch, and crops the centre.
_PH_REG = Recipe(
    name="ph-reg",
    unlock="paper",
    class_weight=0.0,
    hard_weight=0.0,
    norm_weight=0.0,
    scale_free=False,
    flips=False,
    lr=3e-4,
    lr_end=1e-5,
    weight_decay=0.01,
    batch=16,
    clip=0.0,
    epochs=16,
    registers=16,
    decays_vectors=True,
    rate_by_width=False,
)
RECIPES = {
    "transplant": Recipe("transplant", moves_neurons=True),
    # The control for the transplant: the same loss, schedule and weights, with registers that start at random.
    "random-registers": Recipe("random-registers"),
    "ph-reg": _PH_REG,
    # The paper for CLIP (``CLIP/`` of its code): targets by NACLIP, a student read out as MaskCLIP, both projected, and
    # the last two blocks unlocked, since a value-only last block has no attention to train.
    "ph-reg-clip": replace(
        _PH_REG, name="ph-reg-clip", unlock="paper-clip", readout=VALUE, teacher=NEIGHBOUR, project=True
    ),
    # SINDER's repair (arXiv 2407.16826), which adds no registers. The values are those of the released code but for the
    # rate, the length and the choices named in docs/distil.md.
    "sinder": Recipe(
        "sinder",
        unlock=SINGULAR_VALUES,
        loss=NEIGHBOURS,
        class_weight=0.0,
        hard_weight=0.0,
        norm_weight=0.0,
        flips=False,
        optimiser="sgd",
        lr=2e-4,
        lr_end=2e-4,
        weight_decay=0.0,
        batch=1,
        clip=0.0,
        registers=0,
        rate_by_width=False,
    ),
}
# The width at which the learning rate of "transplant" was chosen.
WIDTH = 192


@dataclass(frozen=True)
class Request:
    """The arguments of ``phreg_deploy.distill.distill`` that decide the student; ``image_size`` is (height, width)."""

    model: str
    images: Path
    checkpoint: Path | None
    recipe: str
    registers: int | None
    image_size: tuple[int, int] | None
    epochs: int | None
    lr: float | None
    batch: int | None
    micro_batch: int | None
    grad_checkpointing: bool
    unlock: str | None
    strength: float | None
    int8_aware: bool
    views: int
    holdout: float
    seed: int
    device: str
    precision: str
    average: float | None = None
    workers: int | None = None
    readout: str | None = None
    project: bool | None = None
    layers: str | None = None

    def adjusted_recipe(self, width: int = WIDTH) -> Recipe:
        """Return the recipe with the requested values, and a learning rate for a model of this width.

        Raises ``PhregError`` if a strength was given, but the recipe moves no neurons; for a readout that cannot be
        distilled through fake quantisation; for registers where singular values alone train; and for further layers
        if the loss reads no targets.
        """
        recipe = RECIPES[self.recipe]
        if self.strength is not None and not recipe.moves_neurons:
            moving = next(name for name, other in RECIPES.items() if other.moves_neurons)
            raise PhregError(
                f"strength: got {self.strength} with the recipe {self.recipe}, which moves no neurons; leave it out, "
                f"or use --recipe {moving}."
            )
        lr = self.lr or recipe.default_rate(width)
        adjusted = replace(
            recipe,
            registers=recipe.registers if self.registers is None else self.registers,
            epochs=recipe.epochs if self.epochs is None else self.epochs,
            batch=self.batch or recipe.batch,
            unlock=self.unlock or recipe.unlock,
            lr=lr,
            # A constant rate stays constant.
            lr_end=lr if recipe.lr_end == recipe.lr else recipe.lr_end,
            int8=self.int8_aware or recipe.int8,
            average=recipe.average if self.average is None else self.average,
            readout=self.readout or recipe.readout,
            project=recipe.project if self.project is None else self.project,
        )
        if adjusted.int8 and adjusted.student_readout.name != FINAL:
            raise PhregError(
                f"int8-aware: got the readout {adjusted.readout}, which leaves layers of the last block unused; "
                "expected --readout final. Distil without --int8-aware, and calibrate the bundle."
            )
        if adjusted.unlock == SINGULAR_VALUES and adjusted.registers:
            raise PhregError(
                f"registers: got {adjusted.registers} where singular values alone train, and no token could; give "
                "--registers 0, or --unlock all."
            )
        if adjusted.loss == NEIGHBOURS and self.layers is not None:
            raise PhregError(
                f"layers: got {self.layers!r} with the recipe {self.recipe}, whose loss reads no targets; leave it "
                "out, or use another recipe."
            )
        return adjusted
