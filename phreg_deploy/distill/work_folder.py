"""Keep the settings and the training state of an unfinished run in ``OUTPUT.partial``, and read them to resume it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import torch

from phreg_deploy.arguments import check_resume
from phreg_deploy.errors import PhregError, write_error
from phreg_deploy.json_files import read_json


def work_folder(output: Path, settings: dict[str, Any], resume: bool, force: bool, writes: bool = True) -> Path:
    """Return ``OUTPUT.partial`` with this run's settings in it; only its path unless this process ``writes`` it.

    Raises ``PhregError`` if it holds a run of other settings, or one that neither ``resume`` nor ``force`` allows for.
    """
    work = output.with_name(output.name + ".partial")
    if not writes:
        return work
    path = work / "settings.json"
    check_resume(work, resume, force)
    if path.is_file():
        if resume:
            _check_settings(path, settings)
            return work
        shutil.rmtree(work)
    try:
        work.mkdir(exist_ok=True)
        path.write_text(json.dumps(settings, indent=1))
    except OSError as error:
        raise write_error(error, work) from error
    return work


def _check_settings(path: Path, settings: dict[str, Any]) -> None:
    try:
        before = read_json(path)
        if not isinstance(before, dict):
            raise ValueError("no object")
    except ValueError:
        raise PhregError(f"resume: {path} is damaged; add --force instead of --resume to start over.") from None
    changed = sorted(k for k in settings if before.get(k) != json.loads(json.dumps(settings[k])))
    if changed:
        raise PhregError(
            f"resume: {path.parent} was started with other settings ({', '.join(changed)}); give the same ones, or "
            "--force to start over."
        )


def write_state(work: Path, state: dict[str, Any]) -> None:
    """Replace ``state.pt``, which holds the training state after an epoch. Raises ``PhregError`` if that fails."""
    path = work / "state.pt"
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
    path = work / "state.pt"
    if not path.is_file():
        return None
    try:
        state: dict[str, Any] = torch.load(path, map_location=device, weights_only=True)
    # PyTorch raises pickle, zip, EOF and runtime errors for damaged files.
    except Exception as error:
        kind = type(error).__name__
        raise PhregError(f"resume: {path} is damaged ({kind}); add --force, not --resume, to start over.") from None
    return state
