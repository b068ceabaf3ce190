"""Let the processes that torchrun started do one distillation together, each on a device of its own.

Tensors on a CPU travel over gloo, those on GPUs over NCCL. Tested with two processes on a CPU; not yet run on GPUs.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed import distributed_c10d as c10d
from torch.distributed.rendezvous import rendezvous

from phreg_deploy.distill.devices.launch import Launch
from phreg_deploy.errors import BackendMissing, PhregError
from phreg_deploy.models.hardware import find_device, find_devices

T = TypeVar("T")
# A lost process ends the others at once; this bounds how long one may work while the others wait for it.
PATIENCE = timedelta(days=2)


class Processes:
    """The processes of a run. Every method is called by all of them in the same order; alone, they do nothing."""

    def __init__(self, launch: Launch) -> None:
        self.rank, self.count, self._local = launch.rank, launch.count, launch.local

    @property
    def first(self) -> bool:
        """Whether this process speaks and writes for all."""
        return self.rank == 0

    def find_devices(self, requested: str) -> tuple[str, ...]:
        """Return this process's devices for ``--device``; one of several processes has one.

        Raises:
            BackendMissing: this machine has fewer usable GPUs than processes.
            PhregError: GPUs given by number, although each of several processes takes its own.
        """
        if self.count == 1:
            return find_devices(requested)
        if requested not in ("auto", "cpu", "cuda"):
            raise PhregError(
                f"device: got {requested!r} under torchrun, where each process takes the GPU of its own number; leave "
                "--device out, or give auto, cpu or cuda."
            )
        if find_device(requested) == "cpu":
            return ("cpu",)
        if self._local >= torch.cuda.device_count():
            raise BackendMissing(
                f"device: process {self._local} of this machine has no GPU of its own, since there are "
                f"{torch.cuda.device_count()}; lower --nproc-per-node, or use --device cpu."
            )
        torch.cuda.set_device(self._local)
        return (f"cuda:{self._local}",)

    def sum(self, values: Sequence[float]) -> list[float]:
        """Add up each of ``values`` over all processes, in float64; returns when all have called it."""
        total = torch.tensor(values, dtype=torch.float64)
        if self.count > 1:
            with _reaching_all():
                dist.all_reduce(total)
        return [float(value) for value in total]

    def first_of(self, value: T | None) -> T:
        """Return the first process's ``value``; those of the others are not read."""
        values = [value]
        if self.count > 1:
            with _reaching_all():
                dist.broadcast_object_list(values, src=0, device=torch.device("cpu"))
        return values[0]  # type: ignore[return-value]

    def check_same(self, values: dict[str, Any], what_to_do: str) -> None:
        """Raise ``PhregError`` unless all processes have equal ``values``, and name those that differ."""
        everywhere = [values] * self.count
        if self.count > 1:
            with _reaching_all():
                dist.all_gather_object(everywhere, values)
        differ = sorted(name for name in values if any(other[name] != values[name] for other in everywhere))
        if differ:
            raise PhregError(f"processes: they differ in {', '.join(differ)}; {what_to_do}")

    @torch.no_grad()
    def share_weights(self, model: nn.Module) -> None:
        """Give every process the first one's parameters and buffers."""
        if self.count > 1:
            with _reaching_all():
                for tensor in model.state_dict().values():
                    dist.broadcast(tensor, src=0)

    @torch.no_grad()
    def sum_gradients(self, weights: Sequence[nn.Parameter], loss: float) -> float:
        """Add up the gradients of ``weights`` over all processes; returns the sum of ``loss``.

        A weight without gradient in every process keeps none, so that an optimizer passes it over as it would alone.
        """
        if self.count == 1:
            return loss
        total, *having = self.sum([loss, *(float(weight.grad is not None) for weight in weights)])
        waits = []
        with _reaching_all():
            for weight, number in zip(weights, having):
                if number:
                    # A process that has no image of the batch adds zeros.
                    weight.grad = torch.zeros_like(weight) if weight.grad is None else weight.grad
                    waits.append(dist.all_reduce(weight.grad, async_op=True))
            for wait in waits:
                wait.wait()
        return total


ALONE = Processes(Launch())


@contextmanager
def joined(launch: Launch) -> Iterator[Processes]:
    """Connect the processes of ``launch`` for the block. Every process sees the same end of it.

    If a process fails, its exception leaves the block there; in all others, which lose the connection, ``SystemExit``
    with a code other than 0 does, so that one process alone says what happened.
    """
    store = _connect(launch)
    try:
        yield Processes(launch)
    except BaseException as error:
        if _is_reported(store, launch.rank):
            raise SystemExit(getattr(error, "exit_code", 130 if isinstance(error, KeyboardInterrupt) else 1)) from None
        # torchrun sends SIGTERM as soon as another process has ended, maybe before this one has said why.
        with suppress(ValueError):
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
        raise
    finally:
        dist.destroy_process_group()


def _connect(launch: Launch) -> c10d.Store:
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() and dist.is_nccl_available() else "gloo"
    try:
        store, rank, count = next(rendezvous("env://", timeout=PATIENCE))
        # torchrun keeps its store over a restart of the processes.
        store = c10d.PrefixStore(f"phreg-deploy/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", store)
        dist.init_process_group(backend, store=store, rank=rank, world_size=count, timeout=PATIENCE)
    except (RuntimeError, ValueError, OSError) as error:
        raise PhregError(
            f"processes: number {launch.rank} of {launch.count} cannot connect ({error}); start them with torchrun, "
            "and let nothing else in them use torch.distributed."
        ) from error
    return store


def _is_reported(store: c10d.Store, rank: int) -> bool:
    """Whether another process reports the failure of this run; the first one to ask does."""
    try:
        return bool(store.compare_set("failed", "", str(rank)).decode() != str(rank))
    # The store is gone with the process that had it, which did not fail after this one.
    except RuntimeError:
        return True


@contextmanager
def _reaching_all() -> Iterator[None]:
    try:
        yield
    # What gloo and NCCL raise if a process has ended.
    except RuntimeError as error:
        raise PhregError(
            "processes: the connection to another process of this run is lost, so that process ended without a "
            "message; see what torchrun reports, then run the same command with --resume."
        ) from error
