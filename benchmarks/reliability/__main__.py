"""Measure one row of docs/reliability.md, and put it into ``benchmarks/reliability.json``.

python -m benchmarks.reliability bundles --count 20000
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from benchmarks.reliability import damage, disk, hostile, kills, long_runs, threads
from benchmarks.reliability.subjects import Subjects, default_folder
from phreg_deploy.profiling.latency import processor

REPORT = Path(__file__).resolve().parent.parent / "reliability.json"
# row: what measures it, and how many cases it takes by default.
ROWS: dict[str, tuple[Callable[[Subjects, int], dict[str, Any]], int]] = {
    "bundles": (damage.damage_bundles, 20_000),
    "students": (damage.damage_students, 300),
    "checkpoints": (damage.damage_checkpoints, 500),
    "hostile": (hostile.measure_hostile, 1000),
    "long": (long_runs.measure_long, 20_000),
    "threads": (threads.measure_threads, 4000),
    "kills": (kills.kill_writers, 50),
    "disk": (disk.press_writers, 6),
}


@click.command()
@click.argument("row", type=click.Choice(list(ROWS)))
@click.option("--count", type=int, help="Cases; by default as many as the docs show.")
@click.option("--work", type=click.Path(path_type=Path), default=default_folder, help="Where subjects are kept.")
@click.option("--json", "report", type=click.Path(path_type=Path), default=REPORT, help="The file the row goes into.")
def main(row: str, count: int | None, work: Path, report: Path) -> None:
    """Measure ROW."""
    os.environ.update(HF_HUB_OFFLINE="1", OMP_NUM_THREADS="1", COLUMNS="140")
    measure, usual = ROWS[row]
    started = time.monotonic()
    figures = measure(Subjects(work.absolute()), count or usual)
    figures |= {"seconds": round(time.monotonic() - started), "processor": processor()}
    document = json.loads(report.read_text()) if report.exists() else {}
    document[row] = figures
    report.write_text(json.dumps(document, indent=1) + "\n")
    click.echo(json.dumps(figures, indent=1))


if __name__ == "__main__":
    main()
