"""The type of a register neuron: what the search returns and ``phreg.json`` stores."""

from __future__ import annotations

from dataclasses import dataclass

from phreg_deploy.spec import Stored


@dataclass(frozen=True)
class RegisterNeuron(Stored):
    """A hidden unit that fires on outlier tokens, by the indices of its block and unit.

    ``activation``: its signed mean on the outlier tokens that it adds to, weighted by how much it adds. ``elsewhere``:
    its mean magnitude on other patch tokens. ``share``: of what sets outlier tokens apart from the others, 0-1.
    """

    block: int
    unit: int
    activation: float
    elsewhere: float
    share: float
