"""Run a function in several processes of this machine that know each other as torchrun's do."""

import multiprocessing
import os
import pickle
import socket
import traceback
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any

TIMEOUT = 60


@dataclass
class End:
    """How a process ended: its exit code, what it wrote, and what the function returned."""

    code: int
    output: str
    result: Any


def run_processes(work: Callable[[int], Any], folder: Path, count: int = 2) -> list[End]:
    """Call ``work(rank)`` in ``count`` forked processes, and wait for them.

    torchrun would start them anew, which takes several seconds for the imports.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    context = multiprocessing.get_context("fork")
    processes = [context.Process(target=_run, args=(work, rank, count, port, folder)) for rank in range(count)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(TIMEOUT)
        process.kill()
        process.join()
    return [
        End(process.exitcode, (folder / f"{rank}.txt").read_text(), _result(folder / f"{rank}.pickle"))
        for rank, process in enumerate(processes)
    ]


def _run(work: Callable[[int], Any], rank: int, count: int, port: int, folder: Path) -> None:
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(count))
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    code = 1
    with open(folder / f"{rank}.txt", "w") as file, redirect_stdout(file), redirect_stderr(file):
        try:
            (folder / f"{rank}.pickle").write_bytes(pickle.dumps(work(rank)))
            code = 0
        except SystemExit as stop:
            code = stop.code if isinstance(stop.code, int) else 0
        except BaseException:
            traceback.print_exc()
    # Skip what this session registered to run at its exit.
    os._exit(code)


def _result(path: Path) -> Any:
    return pickle.loads(path.read_bytes()) if path.is_file() else None
