"""Run the command line in child processes, and send a signal at a chosen moment of their work."""

from __future__ import annotations

import multiprocessing
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from tests.cli_helpers import ROOT

# Seconds after which a child counts as hung.
SECONDS = 300.0
TICK = 1 / os.sysconf("SC_CLK_TCK")
# What runs the command line, and the same on the fake GPU and the fake TensorRT of the tests.
PLAIN = "from phreg_deploy.__main__ import main; main()"
ON_FAKE_GPU = f"""
import pytest
from tests import fake_gpu
patch, device = pytest.MonkeyPatch(), fake_gpu.Device()
fake_gpu.install(patch, device)
fake_gpu.install(patch, device, fake_gpu.FakeTensorRT(device))
{PLAIN}
"""
# Modules that a warm child has from the start.
LIBRARIES = (
    "phreg_deploy.distill.distillation",
    "phreg_deploy.export.exporter",
    "phreg_deploy.calibration.calibrator",
    "phreg_deploy.extraction.sharded",
    "phreg_deploy.export.engine.build",
    "onnxruntime",
    "tests.fake_gpu",
)


@dataclass(frozen=True)
class Ended:
    """How a child ended: exit code (below 0: the signal), stderr, and the CPU seconds that it took."""

    code: int
    error: str
    seconds: float

    @property
    def traceback(self) -> bool:
        return "Traceback (most recent call last)" in self.error


class Child:
    """A command line in a process group of its own, with its own temporary folder and home in ``place``.

    A warm child is forked from a process that has imported ``LIBRARIES``; a cold one is a new Python.
    """

    def __init__(
        self,
        place: Path,
        words: tuple[object, ...],
        code: str = PLAIN,
        *,
        warm: bool = False,
        name: str = "child",
        limits: tuple[str, ...] = (),
    ) -> None:
        """Start the child. ``limits``: a program that runs a cold child within limits, and its words."""
        self.error = place / f"{name}.err"
        for folder in ("tmp", "home"):
            (place / folder).mkdir(parents=True, exist_ok=True)
        environment = {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
        environment |= {"TMPDIR": str(place / "tmp"), "XDG_CACHE_HOME": str(place / "home")}
        texts = [str(word) for word in words]
        self.code: Callable[[], int | None]
        if warm:
            context = multiprocessing.get_context("forkserver")
            context.set_forkserver_preload(list(LIBRARIES))
            process = context.Process(target=_main, args=(code, texts, environment, str(self.error)))
            process.start()
            self.pid, self.code = process.pid or 0, lambda: process.exitcode
        else:
            # A shell starts background processes with SIGINT ignored, and children inherit that.
            signal.signal(signal.SIGINT, signal.default_int_handler)
            command = [*limits, sys.executable, "-c", code, *texts]
            with open(self.error, "wb") as file:
                started = subprocess.Popen(
                    command,
                    env={**os.environ, **environment},
                    stdout=subprocess.DEVNULL,
                    stderr=file,
                    start_new_session=True,
                )
            self.pid, self.code = started.pid, started.poll

    def wait(self, moment: float | None = None, number: int = signal.SIGKILL) -> Ended:
        """Wait for the end; send the signal to the group as soon as the child has used ``moment`` CPU seconds.

        CPU seconds, because they say how far a command is, also on a busy machine. A child that does not end is killed,
        and its stderr says so.
        """
        since, used, hung, sent = time.monotonic(), 0.0, "", moment is None
        while (code := self.code()) is None:
            used = max(used, _used(self.pid))
            if not sent and moment is not None and used >= moment - moment % TICK:
                # Linux counts CPU time in ticks.
                time.sleep(moment % TICK)
                self._signal(number)
                sent = True
            if time.monotonic() - since > SECONDS:
                hung = f"\nhung: it did not end within {SECONDS:.0f} s"
                self._signal(signal.SIGKILL)
            time.sleep(0.002)
        return Ended(code, self.error.read_text(errors="replace") + hung, used)

    def wait_until(self, moment: float) -> None:
        """Wait until the child has used so many CPU seconds, or has ended."""
        while self.code() is None and _used(self.pid) < moment:
            time.sleep(0.002)

    def _signal(self, number: int) -> None:
        # A warm child that has just started is in no group of its own yet.
        with suppress(ProcessLookupError):
            os.killpg(self.pid, number) if os.getpgid(self.pid) == self.pid else os.kill(self.pid, number)


def _used(pid: int) -> float:
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return 0.0
    return (int(fields[11]) + int(fields[12])) * TICK


def _main(code: str, words: list[str], environment: dict[str, str], error: str) -> None:
    """Run the command line in a forked process."""
    # Until the command line begins, a signal would hit the lines of this file.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    os.setsid()
    for path, number in ((os.devnull, 1), (error, 2)):
        file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
        os.dup2(file, number)
        os.close(file)
    os.environ.update(environment)
    tempfile.tempdir = None
    signal.signal(signal.SIGINT, signal.default_int_handler)
    sys.argv = ["phreg-deploy", *words]
    exec(code, {"__name__": "__main__"})


def run(place: Path, words: tuple[object, ...], code: str = PLAIN, *, warm: bool = False) -> Ended:
    """Run a command line to its end."""
    return Child(place, words, code, warm=warm).wait()
