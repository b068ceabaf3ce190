"""Choose how a student starts: with its register neurons moved to a register, or with registers at random.

Outliers that dwarf every other token do not yield to training, so their neurons have to be moved. Mild outliers that
depend on the image do, and moving their neurons takes away what the model keeps there. The loss before training tells
the two apart (docs/figures.md).
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable

import torch

from phreg_deploy.distill.neurons.neuron import RegisterNeuron
from phreg_deploy.distill.neurons.search import NeuronSearch
from phreg_deploy.distill.neurons.transplant import STRENGTH, silence, transplant
from phreg_deploy.models.hooks import ViT
from phreg_deploy.progress import Progress


def start_student(
    student: ViT,
    search: NeuronSearch,
    batches: Iterable[torch.Tensor],
    images: int,
    loss: Callable[[ViT], float],
    *,
    registers: int,
    strength: float | None,
    progress: Progress,
) -> dict[RegisterNeuron, str | None]:
    """Move the register neurons of ``student`` in place, unless registers at random have the lower loss.

    A student without registers has its neurons silenced instead.

    Args:
        batches: normalised images ``(B, 3, H, W)``, ``images`` in all, for the transplant.
        loss: the training loss of a model, before training.
        registers: how many the student was given.
        strength: of the transplant; None for the default, and for the choice by loss. A given strength always moves.

    Returns:
        The neurons found, each with the reason why it was not moved, or None.

    Raises:
        PhregError: none of the neurons can be moved.
    """
    neurons = search.neurons
    if not neurons:
        return {}
    if not registers:
        silence(student, neurons)
        return dict.fromkeys(neurons)
    moved = copy.deepcopy(student)
    with progress.task("transplant", images * len({n.block for n in neurons})) as advance:
        reasons = transplant(
            moved, neurons, batches, strength=STRENGTH if strength is None else strength, advance=advance
        )
    if strength is None:
        at_random, with_moved = loss(student), loss(moved)
        if at_random <= with_moved:
            why = f"registers at random have the lower loss before training, {at_random:.3f} against {with_moved:.3f}"
            progress.say(f"The register neurons stay: {why}.")
            return dict.fromkeys(neurons, why)
        progress.say(
            f"The register neurons move to a register: loss {with_moved:.3f} before training, against {at_random:.3f} "
            "with registers at random."
        )
    student.load_state_dict(moved.state_dict())
    if reasons:
        strongest = max(reasons, key=lambda n: n.share)
        progress.say(
            f"{len(reasons)} of {len(neurons)} register neurons were not moved. The strongest is unit "
            f"{strongest.unit} of block {strongest.block}: {reasons[strongest]}."
        )
    return {neuron: reasons.get(neuron) for neuron in neurons}
