"""Read which of torchrun's processes this is. Needs no PyTorch."""

from __future__ import annotations

import os
from dataclasses import dataclass

# Set by torchrun in every process that it starts (https://pytorch.org/docs/stable/elastic/run.html).
NAMES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")


@dataclass(frozen=True)
class Launch:
    """This process's number among ``count``, from 0, and its number on this machine."""

    rank: int = 0
    count: int = 1
    local: int = 0

    @property
    def first(self) -> bool:
        """Whether this process speaks and writes for all."""
        return self.rank == 0


def find_launch() -> Launch:
    """Return how torchrun started this process; one process alone if it did not."""
    values = [os.environ.get(name, "") for name in NAMES]
    if not all(values) or not all(value.isdigit() for value in values[:3]):
        return Launch()
    return Launch(*(int(value) for value in values[:3]))
