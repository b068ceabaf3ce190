"""Keep a copy of a model on each of several devices, and distribute jobs over them in a fixed order.

Tested with the CPU named twice; not yet run on several GPUs.
"""

from __future__ import annotations

import copy
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from typing import TypeVar

import torch

from phreg_deploy.models.hooks import ViT

Job = TypeVar("Job")
Result = TypeVar("Result")
# Jobs per device that may be running or finished before their results are read.
AHEAD = 2


class Replicas:
    """A model on the first of ``devices``, and a copy of it on each other one.

    Gradients are summed on the model and weights are copied from it; an optimizer needs only the model's parameters.
    The timing of threads decides neither which device does a job nor the order in which gradients are summed.
    """

    def __init__(self, model: ViT, devices: Sequence[str]) -> None:
        self.devices = tuple(devices)
        self.models = [model.to(devices[0]), *(copy.deepcopy(model).to(device) for device in devices[1:])]

    def map(self, work: Callable[[ViT, str, Job], Result], jobs: Iterable[Job]) -> Iterator[Result]:
        """Yield ``work(model, device, job)`` for every job, in the order of the jobs.

        Job i goes to device i modulo their number. Each device has one thread; a single device needs none. Errors of
        ``work`` are raised here. ``work`` must enter autocast and inference mode itself: they hold for one thread.
        """

        def run(index: int, job: Job) -> Result:
            with _current_gpu(self.devices[index]):
                return work(self.models[index], self.devices[index], job)

        if len(self.models) == 1:
            yield from (run(0, job) for job in jobs)
            return
        pools = [ThreadPoolExecutor(1) for _ in self.models]
        pending: deque[Future[Result]] = deque()
        try:
            for i, job in enumerate(jobs):
                if len(pending) == AHEAD * len(pools):
                    yield pending.popleft().result()
                pending.append(pools[i % len(pools)].submit(run, i % len(pools), job))
            while pending:
                yield pending.popleft().result()
        finally:
            for pool in pools:
                pool.shutdown(cancel_futures=True)

    @torch.no_grad()
    def sum_gradients(self) -> None:
        """Add the gradients of the copies to the model's, in the order of the devices, and clear them on the copies."""
        for first, *others in zip(*(model.parameters() for model in self.models)):
            for other in others:
                if other.grad is not None:
                    gradient = other.grad.to(first.device)
                    first.grad = gradient if first.grad is None else first.grad.add_(gradient)
                    other.grad = None

    @torch.no_grad()
    def share_weights(self) -> None:
        """Copy the weights that train to the other devices; the others never change."""
        for first, *others in zip(*(model.parameters() for model in self.models)):
            if first.requires_grad:
                for other in others:
                    other.copy_(first)


def _current_gpu(device: str) -> AbstractContextManager[object]:
    """Make ``device``, if it is a GPU, the current one of this thread."""
    return torch.cuda.device(device) if device.startswith("cuda") else nullcontext()
