"""``OUTPUT.partial``: what an interrupted distillation leaves behind, and whether it may be gone on with."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from phreg_deploy.arguments import check_resume
from phreg_deploy.errors import PhregError, write_error
from phreg_deploy.json_files import read_json


def work_folder(output: Path, settings: dict[str, Any], resume: bool, force: bool) -> Path:
    """``OUTPUT.partial`` with this run's settings in it; another run's is refused, or replaced with ``force``."""
    work = output.with_name(output.name + ".partial")
    kept = work / "settings.json"
    check_resume(work, resume, force)
    if kept.is_file():
        try:
            before = read_json(kept)
            if not isinstance(before, dict):
                raise ValueError("no object")
        except ValueError:
            if resume:
                raise PhregError(f"resume: {kept} is damaged; add --force instead of --resume to start over.") from None
            before = {}
        changed = sorted(k for k in settings if before.get(k) != json.loads(json.dumps(settings[k])))
        if resume and changed:
            raise PhregError(
                f"resume: {work} was started with other settings ({', '.join(changed)}); give the same ones, or --force to start over."
            )
        if resume:
            return work
        shutil.rmtree(work)
    try:
        work.mkdir(exist_ok=True)
        kept.write_text(json.dumps(settings, indent=1))
    except OSError as error:
        raise write_error(error, work) from error
    return work
