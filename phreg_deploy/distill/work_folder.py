"""Keep the settings and the training state of an unfinished run in ``OUTPUT.partial``, and read them to resume it.

Importing this module imports no PyTorch.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from phreg_deploy.arguments import check_resume
from phreg_deploy.errors import FORCE, PhregError, write_error
from phreg_deploy.files.atomic import write_atomic
from phreg_deploy.files.temporary import is_locked, open_locked
from phreg_deploy.json_files import read_json
from phreg_deploy.student_record import RECORD

# In ``OUTPUT.partial``: what must be equal to resume the run, and its training state after the last whole epoch.
SETTINGS, STATE = "settings.json", "state.pt"
# Settings that a student's record has under the same names.
WRITTEN = ("preprocess", "recipe", "registers", "views", "strength", "seed", "autocast")


@contextmanager
def work_folder(
    output: Path, settings: dict[str, Any], resume: bool, force: bool, writes: bool = True
) -> Iterator[Path]:
    """Yield ``OUTPUT.partial`` with this run's settings in it, locked; only its path unless this process ``writes`` it.

    The folder stays after the block, unless it is empty; ``remove`` removes it once the student is scored.

    Raises ``PhregError`` if another process is at work in it, or if it holds a run of other settings, or one that
    neither ``resume`` nor ``force`` allows for.
    """
    work = output.with_name(output.name + ".partial")
    if not writes:
        yield work
        return
    try:
        lock = _open(work)
    except OSError as error:
        raise write_error(error, work) from error
    try:
        check_resume(work, resume, force)
        path = work / SETTINGS
        if resume:
            _check_settings(path, settings)
        else:
            # First the settings: without them nothing counts. The state of another run must not meet new settings.
            path.unlink(missing_ok=True)
            (work / STATE).unlink(missing_ok=True)
            write_atomic(path, (json.dumps(settings, indent=1) + "\n").encode())
        yield work
    finally:
        # Empty, it is of no use to anybody.
        with suppress(OSError):
            work.rmdir()
        if lock is not None:
            os.close(lock)


def remove(work: Path) -> None:
    """Remove the folder of a run; first its settings, without which nothing is left to resume."""
    (work / SETTINGS).unlink(missing_ok=True)
    shutil.rmtree(work, ignore_errors=True)


def wrote(work: Path, output: Path) -> bool:
    """Whether the run in ``work`` has written the student in ``output`` already, and ended before its scores were."""
    try:
        settings, record = read_json(work / SETTINGS), read_json(output / RECORD)
        same = {key: record[key] for key in WRITTEN}
        same |= {"images": record["images"]["digest"], "weights": record["source"]["weights_sha256"]}
        return same == {key: settings[key] for key in same}
    except (OSError, ValueError, KeyError, TypeError):
        return False


def refuse_running(work: Path) -> None:
    """Raise ``PhregError`` if another process is at work in the folder of a run."""
    if is_locked(work):
        raise PhregError(
            f"distill: another process is at work in {work}; wait until it has ended, or choose another output."
        )


def _open(work: Path) -> int | None:
    """Make the folder unless it is there, and lock it; None on a system without locks."""
    while True:
        work.mkdir(exist_ok=True)
        try:
            return open_locked(work)
        except FileNotFoundError:
            # The process that had it has just ended, and removed it.
            continue
        except BlockingIOError:
            refuse_running(work)
        except OSError:
            return None


def _check_settings(path: Path, settings: dict[str, Any]) -> None:
    try:
        before = read_json(path)
        if not isinstance(before, dict):
            raise ValueError("no object")
    except ValueError:
        raise PhregError(f"resume: {path} is damaged; start over with {FORCE}, without --resume.") from None
    changed = sorted(k for k in settings if before.get(k) != json.loads(json.dumps(settings[k])))
    if changed:
        raise PhregError(
            f"resume: {path.parent} was started with other settings ({', '.join(changed)}); give the same ones, or "
            f"{FORCE} to start over."
        )


def write_state(work: Path, state: dict[str, Any]) -> None:
    """Replace ``state.pt``, which holds the training state after an epoch. Raises ``PhregError`` if that fails."""
    import torch

    path = work / STATE
    partial = path.with_suffix(".writing")
    try:
        torch.save(state, partial)
        partial.replace(path)
    # PyTorch reports a full disk as a RuntimeError.
    except (OSError, RuntimeError) as error:
        partial.unlink(missing_ok=True)
        raise write_error(error if isinstance(error, OSError) else OSError(28, str(error)), path) from error


def read_state(work: Path, device: str) -> dict[str, Any] | None:
    """Return the training state on ``device``, None before the first epoch ends. Raises ``PhregError`` if damaged."""
    import torch

    path = work / STATE
    if not path.is_file():
        return None
    try:
        state: dict[str, Any] = torch.load(path, map_location=device, weights_only=True)
    # PyTorch raises pickle, zip, EOF and runtime errors for damaged files.
    except Exception as error:
        kind = type(error).__name__
        raise PhregError(f"resume: {path} is damaged ({kind}); start over with {FORCE}, without --resume.") from None
    return state
