"""Run the command line in this process, draw synthetic photographs, and interrupt functions."""

import contextlib
import functools
import io
import json
import os
import subprocess
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
from PIL import Image, ImageDraw, ImageFilter

ROOT = Path(__file__).resolve().parent.parent
LEFTOVERS = (".writing", ".probe", ".old", ".partial")


@dataclass(frozen=True)
class Outcome:
    """The result of a command: exit code, stdout and stderr."""

    code: int
    out: str
    err: str

    @property
    def document(self) -> dict[str, Any]:
        """Parse the JSON document in the last line of stdout; raise for NaN and infinity, which are not JSON."""
        return json.loads(self.out.splitlines()[-1], parse_constant=_strict)

    def refused(self, code: int, *fragments: str) -> None:
        """Assert the exit code, and a message with ``fragments`` on stderr and, as JSON, on stdout; for ``--json``."""
        message = " ".join(self.err.split())
        assert self.code == code, f"exit code {self.code}, expected {code}: {self.err[-800:]}"
        assert "Traceback" not in message
        assert "Error: " in message
        for fragment in fragments:
            assert fragment in message, f"{fragment!r} is not in: {message[-800:]}"
        assert self.out, "with --json, the error goes to stdout as well"
        assert self.document["exit_code"] == code
        assert self.document["error"] in message, "the message is the same on both streams"


def _strict(word: str) -> None:
    raise ValueError(f"{word} is not JSON")


def invoke(*arguments: object) -> Outcome:
    """Run the command line in this process; an exception other than ``SystemExit`` is a defect and passes through."""
    from phreg_deploy.cli import main

    words, out, err, code = [str(a) for a in arguments], io.StringIO(), io.StringIO(), 0
    with mock.patch.object(sys, "argv", ["phreg-deploy", *words]):
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            try:
                main(prog_name="phreg-deploy")
            except SystemExit as stop:
                code = stop.code if isinstance(stop.code, int) else 0 if stop.code is None else 1
    return Outcome(code, out.getvalue(), err.getvalue())


def run_python(code: str, *arguments: object, warnings: str = "error") -> str:
    """Run code in a separate Python process, in the root of the repository; assert exit code 0 and return stdout."""
    command = [sys.executable, "-W", warnings, "-c", code, *(str(argument) for argument in arguments)]
    process = subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT)
    assert process.returncode == 0, process.stderr
    return process.stdout


RUN = """
import json, sys
from dataclasses import asdict
blocked, commands = json.loads(sys.argv[1])
sys.modules.update(dict.fromkeys(blocked))
from tests.cli_helpers import invoke
print(json.dumps([asdict(invoke(*command)) for command in commands]))
"""


def without(
    blocked: Sequence[str], commands: Iterable[Sequence[object]], path: Sequence[Path] = (), **environment: str
) -> list[Outcome]:
    """Run commands in one process that cannot import the ``blocked`` modules; ``path`` precedes its other paths.

    ``environment``: variables that the process has beside those of this one.
    """
    process = subprocess.run(
        [sys.executable, "-c", RUN, json.dumps([blocked, [[str(a) for a in command] for command in commands]])],
        capture_output=True,
        text=True,
        check=False,
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": ":".join(str(p) for p in (*path, ROOT)), **environment},
    )
    assert process.returncode == 0, process.stderr[-1500:]
    return [Outcome(**outcome) for outcome in json.loads(process.stdout.splitlines()[-1])]


@functools.lru_cache
def photograph(seed: int, width: int, height: int) -> Image.Image:
    """Draw sky, ground, a few soft shapes and grain, so features differ from patch to patch."""
    rng = np.random.default_rng(seed)
    colours = rng.integers(0, 256, (8, 3))
    image = Image.new("RGB", (width, height), tuple(colours[0]))
    draw = ImageDraw.Draw(image)
    draw.rectangle((0, height // 2, width, height), fill=tuple(colours[1]))
    for colour in colours[2:]:
        x, y, r = rng.integers(0, width), rng.integers(0, height), rng.integers(6, 30)
        draw.ellipse((x - r, y - r // 2, x + r, y + r // 2), fill=tuple(colour))
    soft = np.asarray(image.filter(ImageFilter.GaussianBlur(1)), dtype=np.float64)
    return Image.fromarray(np.clip(soft + rng.normal(0, 6, soft.shape), 0, 255).astype(np.uint8))


def leftovers(folder: Path) -> list[str]:
    """List the temporary files and folders below ``folder``."""
    return [str(p.relative_to(folder)) for p in folder.rglob("*") if any(mark in p.name for mark in LEFTOVERS)]


@contextlib.contextmanager
def interrupted(owner: Any, name: str, at: int) -> Any:
    """Raise ``KeyboardInterrupt`` in the ``at``-th call of ``owner.name``, and assert that it leaves the block."""
    real, calls = getattr(owner, name), []

    def broken(*arguments: Any, **options: Any) -> Any:
        calls.append(1)
        if len(calls) == at:
            raise KeyboardInterrupt
        return real(*arguments, **options)

    with mock.patch.object(owner, name, broken), pytest.raises(KeyboardInterrupt):
        yield
