"""Run ``extract`` for shards, kill it at a chosen moment, and read what it leaves."""

import json
import multiprocessing
import os
import pathlib
import signal
from pathlib import Path

from tests.cli_helpers import invoke

HERE = ("--backend", "onnxruntime-cpu", "--threads", "1", "--json")


def extract(bundle, images, out, *more):
    return invoke("extract", bundle, *([images] if isinstance(images, Path) else images), "-o", out, *HERE, *more)


def kill_in(function, at, *arguments):
    """Fork; in the child, replace ``os.NAME`` (``function``) by one that sends SIGKILL before its ``at``-th call.

    ``at`` below 0: after the call. Returns whether the child was killed.
    """

    def run():
        real, calls = getattr(os, function), []

        def killing(*given, **options):
            calls.append(1)
            if len(calls) == at:
                os.kill(os.getpid(), signal.SIGKILL)
            answer = real(*given, **options)
            if len(calls) == -at:
                os.kill(os.getpid(), signal.SIGKILL)
            return answer

        setattr(os, function, killing)
        # Python 3.10 keeps its own names of these functions.
        accessor = getattr(pathlib, "_NormalAccessor", None)
        if hasattr(accessor, function):
            setattr(accessor, function, staticmethod(killing))
        os._exit(0 if extract(*arguments).code == 0 else 1)

    child = multiprocessing.get_context("fork").Process(target=run)
    child.start()
    child.join(60)
    assert child.exitcode in (-signal.SIGKILL, 0), child.exitcode
    return child.exitcode == -signal.SIGKILL


def index_of(out):
    return json.loads((out / "features.json").read_text())


def files_of(out, suffix=".npy"):
    """Every file of features: path in the output -> bytes."""
    return {p.relative_to(out).as_posix(): p.read_bytes() for p in out.rglob(f"*{suffix}")}


def journals(out):
    return sorted((out / ".parts").glob("*.jsonl"))


def journaled(out):
    """The names of images that the journals call whole, with repetitions."""
    lines = [line for path in journals(out) for line in path.read_text().splitlines(True) if line[-1:] == "\n"]
    records = [record for record in map(json.loads, lines) if "files" in record]
    return [entry["name"] for record in records for entry in record["images"]]
