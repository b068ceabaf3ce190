"""Several devices in one process: a copy of a model on each, and work spread over them in a fixed order.

Tested with the CPU named twice; it has not run on several GPUs yet.
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

J = TypeVar("J")  # a job
T = TypeVar("T")  # what comes of it
AHEAD = 2  # jobs of each device that are under way or done before the first of them is read


class Replicas:
    """A model on the first of ``devices`` and a copy of it on each other one.

    Gradients are summed on the model and weights are copied from it, so an optimizer needs the model's parameters alone.
    Neither which device does which job nor the order in which gradients are summed depends on which thread is first.
    """

    def __init__(self, model: ViT, devices: Sequence[str]) -> None:
        self.devices = tuple(devices)
        self.models = [model.to(devices[0]), *(copy.deepcopy(model).to(device) for device in devices[1:])]

    def spread(self, work: Callable[[ViT, str, J], T], jobs: Iterable[J]) -> Iterator[T]:
        """``work(model, device, job)`` of every job, in the order of the jobs.

        Job i goes to device i modulo their number. Each device has one thread and does one job at a time; with one device
        no thread is started. What ``work`` raises is raised here. Autocast and inference mode hold for one thread, so
        ``work`` must enter them itself.
        """

        def run(place: int, job: J) -> T:
            with _current(self.devices[place]):
                return work(self.models[place], self.devices[place], job)

        if len(self.models) == 1:
            yield from (run(0, job) for job in jobs)
            return
        pools = [ThreadPoolExecutor(1) for _ in self.models]
        waiting: deque[Future[T]] = deque()
        try:
            for i, job in enumerate(jobs):
                if len(waiting) == AHEAD * len(pools):
                    yield waiting.popleft().result()
                waiting.append(pools[i % len(pools)].submit(run, i % len(pools), job))
            while waiting:
                yield waiting.popleft().result()
        finally:
            for pool in pools:
                pool.shutdown(cancel_futures=True)

    @torch.no_grad()
    def sum_gradients(self) -> None:
        """Add the gradients of the copies to the model's, in the order of the devices, and clear them on the copies."""
        for first, *others in zip(*(model.parameters() for model in self.models)):
            for other in others:
                if other.grad is not None:
                    moved = other.grad.to(first.device)
                    first.grad = moved if first.grad is None else first.grad.add_(moved)
                    other.grad = None

    @torch.no_grad()
    def share_weights(self) -> None:
        """Give the copies the weights of the model that train; the others never change."""
        for first, *others in zip(*(model.parameters() for model in self.models)):
            if first.requires_grad:
                for other in others:
                    other.copy_(first)


def _current(device: str) -> AbstractContextManager[object]:
    """While open, kernels of this thread that name no GPU run on ``device``."""
    return torch.cuda.device(device) if device.startswith("cuda") else nullcontext()
