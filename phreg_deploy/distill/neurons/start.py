"""Choose how a student starts: with its register neurons moved to a register, or with registers at random.

Outliers that dwarf every other token are best moved before training. Mild outliers that depend on the image yield to
training, and moving their neurons takes away what the model keeps there. The loss before training tells the two apart
(docs/figures.md).
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch

from phreg_deploy.distill.neurons.neuron import RegisterNeuron
from phreg_deploy.distill.neurons.transplant import silence, transplant
from phreg_deploy.models.hooks import ViT
from phreg_deploy.progress import Progress


@dataclass
class Start:
    """How a student can start.

    ``student``: with registers at random. ``moved``: with its register neurons moved to a register, or silenced if it
    has none; None if there are no neurons. ``neurons``: each with the reason why it was not moved, or None.
    """

    student: ViT
    moved: ViT | None
    neurons: dict[RegisterNeuron, str | None]


def move_neurons(
    student: ViT,
    neurons: list[RegisterNeuron],
    batches: Iterable[torch.Tensor],
    images: int,
    *,
    registers: int,
    strength: float,
    progress: Progress,
) -> Start:
    """Move the neurons in a copy of ``student``, or silence them if it was given no registers.

    Args:
        batches: normalised images ``(B, 3, H, W)``, ``images`` in all.

    Raises:
        PhregError: none of the neurons can be moved.
    """
    if not neurons:
        return Start(student, None, {})
    moved, reasons = copy.deepcopy(student), {}
    if registers:
        with progress.task("transplant", images * len({n.block for n in neurons})) as advance:
            reasons = transplant(moved, neurons, batches, strength=strength, advance=advance)
    else:
        silence(moved, neurons)
    if reasons:
        strongest = max(reasons, key=lambda n: n.share)
        progress.say(
            f"{len(reasons)} of {len(neurons)} register neurons were not moved. The strongest is unit "
            f"{strongest.unit} of block {strongest.block}: {reasons[strongest]}."
        )
    return Start(student, moved, {neuron: reasons.get(neuron) for neuron in neurons})


def choose_start(start: Start, loss: Callable[[ViT], float], progress: Progress) -> Start:
    """Keep the start with the lower training loss, as ``student``; the other one is dropped."""
    if start.moved is None:
        return start
    at_random, moved = loss(start.student), loss(start.moved)
    if moved < at_random:
        progress.say(f"Register neurons are moved: loss {moved:.3f} before training, {at_random:.3f} without the move.")
        return Start(start.moved, None, start.neurons)
    why = f"the loss before training is lower without the move, {at_random:.3f} against {moved:.3f}"
    progress.say(f"Register neurons stay where they are: {why}.")
    return Start(start.student, None, dict.fromkeys(start.neurons, why))
