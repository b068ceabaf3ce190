"""Show progress bars on stderr with rate, time left and a note. Functions take a ``Progress``, e.g. ``SILENT``."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, ProgressColumn, Task, TextColumn, TimeRemainingColumn
from rich.progress import Progress as Bars
from rich.text import Text

CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")
# advance(count=1, note="loss 0.12")
Advance = Callable[..., None]


def printable(text: str) -> str:
    """Replace control characters, which a terminal would obey, by ``?``; newlines and tabs stay."""
    return CONTROL.sub("?", text)


class _Rate(ProgressColumn):
    def render(self, task: Task) -> Text:
        speed = task.finished_speed or task.speed
        return Text(f"{speed:.1f}/s" if speed else "", style="dim")


class Progress:
    """Show one bar per task on stderr, and lines of text; nothing if ``quiet``."""

    def __init__(self, quiet: bool = False) -> None:
        self.quiet = quiet
        self.console = Console(stderr=True, quiet=quiet, highlight=False)

    def say(self, text: str) -> None:
        """Print a line on stderr."""
        self.console.print(printable(text), markup=False)

    @contextmanager
    def task(self, name: str, total: int | None) -> Iterator[Advance]:
        """Show a bar: ``with progress.task("targets", 1000) as advance: advance(32, note="loss 0.1")``.

        ``total`` is None if it is not known; the bar ends full at what was counted. A bar that is done shows the time
        that it took.
        """
        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            _Rate(),
            TimeRemainingColumn(elapsed_when_finished=True),
            TextColumn("{task.fields[note]}"),
        )
        with Bars(*columns, console=self.console, disable=self.quiet) as bars:
            task = bars.add_task(name, total=total, note="")

            def advance(count: int = 1, note: str | None = None) -> None:
                bars.advance(task, count)
                if note is not None:
                    bars.update(task, note=note)

            yield advance
            if total is None:
                bars.update(task, total=bars.tasks[0].completed)


SILENT = Progress(quiet=True)
