"""Show a stream in a terminal while it runs, and its report at the end."""

from __future__ import annotations

import time
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any

from rich.box import SIMPLE_HEAD
from rich.live import Live
from rich.table import Table
from rich.text import Text

from phreg_deploy.cli.console import Result, figure, percent
from phreg_deploy.progress import printable

if TYPE_CHECKING:
    from phreg_deploy.stream.alarms import Alarm
    from phreg_deploy.stream.frames import CameraFigures
    from phreg_deploy.stream.stream import Stream
    from phreg_deploy.stream.watching import WatchReport

# Seconds between two updates of the table.
REFRESH = 0.25
COLUMNS = ["camera", "served", "frames/s", "latency p50 ms", "p99 ms", "late", "dropped", "pending", "artifact rate"]


class Display(AbstractContextManager["Display"]):
    """A table on stderr that follows the stream, where stderr is a terminal; alarms are lines above it.

    ``timed``: whether there is a deadline to be late for.
    """

    def __init__(self, result: Result, timed: bool) -> None:
        self._timed = timed
        self._progress, self._console = result.progress, result.progress.console
        self._live = Live(console=self._console, auto_refresh=False, transient=True)
        self._shown, self._drawn = self._console.is_terminal and not result.quiet, 0.0

    def __enter__(self) -> Display:
        if self._shown:
            self._live.start()
        return self

    def __exit__(self, *_error: object) -> None:
        if self._shown:
            self._live.stop()

    def update(self, stream: Stream) -> None:
        """Draw the stream's figures, at most every ``REFRESH`` seconds."""
        now = time.monotonic()
        if self._shown and now - self._drawn >= REFRESH:
            self._drawn = now
            table = Table(*COLUMNS, title=f"On {stream.backend}; Ctrl-C ends it", title_justify="left", box=SIMPLE_HEAD)
            for figures in stream.figures().values():
                table.add_row(*(Text(printable(figure(cell))) for cell in _row(figures, self._timed)))
            self._live.update(table, refresh=True)

    def alarm(self, alarm: Alarm) -> None:
        """Print an alarm."""
        self._progress.say(f"Alarm ({alarm.kind}): {alarm}.")


def show_report(report: WatchReport, result: Result, timed: bool) -> None:
    """Print the figures at the end of a stream. ``timed``: see ``Display``."""
    title = f"{report.seconds:.1f} s on {report.backend}"
    result.table(title, COLUMNS, [_row(figures, timed) for figures in report.cameras])
    if report.written:
        result.say(f"Wrote {report.written}.")


def _row(figures: CameraFigures, timed: bool) -> list[Any]:
    late = percent(figures.late_share if timed else None)
    speed = [figures.fps, figures.latency_p50, figures.latency_p99, late]
    drops = [figures.dropped, figures.pending, percent(figures.artifact_rate)]
    return [figures.camera, figures.served, *speed, *drops]
