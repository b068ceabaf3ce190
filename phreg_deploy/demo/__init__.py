"""Run the whole pipeline on a small model and scenes that come with the package, and show what registers change.

Needs the extras ``export`` and ``calibration``. Importing this module imports none of their modules.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from phreg_deploy.extras import CALIBRATION, EXPORT, require
from phreg_deploy.files.atomic import check_target
from phreg_deploy.progress import SILENT, Progress

if TYPE_CHECKING:
    from phreg_deploy.demo.report import DemoReport

__all__ = ["run_demo"]


def run_demo(output: Path | str, *, force: bool = False, progress: Progress = SILENT) -> DemoReport:
    """Distil, export, calibrate, check and serve the embedded model on generated scenes.

    Writes ``student/``, ``demo.bundle/``, ``demo-int8.bundle/``, the scenes, ``before-after.png``, ``report.html`` and
    ``demo.json`` into ``output``.

    Raises:
        PhregError: the output exists and ``force`` is not set.
        BackendMissing: an extra is not installed.
        GateFailed: the bundle does not agree with the PyTorch student.
    """
    output = Path(output)
    check_target(output, force)
    require("`phreg-deploy demo`", export=EXPORT, calibration=CALIBRATION)
    from phreg_deploy.demo.pipeline import run_pipeline

    return run_pipeline(output, force, progress)
