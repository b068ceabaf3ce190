"""Print tables, lines and one JSON document."""

from __future__ import annotations

import json
import math
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TextIO

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from rich.text import Text

from phreg_deploy.errors import PhregError
from phreg_deploy.progress import Progress, printable

# Width of tables in files and pipes.
WIDTH = 140


class Screen(Console):
    """A console that keeps working without output after its reader has left, as ``head`` does after ten lines."""

    def on_broken_pipe(self) -> None:
        drop(sys.stderr if self.stderr else sys.stdout)


def drop(stream: TextIO) -> None:
    """Discard what is still written to ``stream``: its reader has left, and the command continues its work."""
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, stream.fileno())
    os.close(null)


@contextmanager
def output(err: bool = False) -> Iterator[TextIO | None]:
    """Yield the stream to write to, or None if the shell closed it. A reader that has left is no error.

    Raises:
        PhregError: the system refuses to write, e.g. on a full disk.
    """
    stream = sys.stderr if err else sys.stdout
    try:
        yield stream
    except BrokenPipeError:
        drop(stream)
    except OSError as error:
        drop(stream)
        raise PhregError(f"output: std{'err' if err else 'out'} cannot be written ({error.strerror}).") from None


def echo(text: str, err: bool = False) -> None:
    """Print a line without control characters, in the encoding of the stream; click's ``echo`` would write UTF-8."""
    with output(err) as stream:
        if stream is not None:
            stream.write(printable(text) + "\n")
            stream.flush()


class Result:
    """The output of a command: tables on stdout; with ``--json`` tables on stderr and one JSON line on stdout."""

    def __init__(self, as_json: bool, quiet: bool) -> None:
        self.as_json, self.quiet = as_json, quiet
        self.progress = Progress(quiet)
        self.console = Screen(stderr=as_json, highlight=False)
        if not self.console.is_terminal:
            self.console = Screen(stderr=as_json, highlight=False, width=WIDTH)

    def table(self, title: str, columns: list[str], rows: list[list[Any]]) -> None:
        if self.quiet:
            return
        table = Table(*columns, title=printable(title), title_justify="left", title_style="bold", box=SIMPLE_HEAD)
        for row in rows:
            # ``Text`` is never markup: "[distill]" must stay.
            table.add_row(*(Text(printable(figure(cell))) for cell in row))
        with output(self.as_json):
            self.console.print(table)

    def say(self, text: str) -> None:
        if not self.quiet:
            with output(self.as_json):
                self.console.print(printable(text), markup=False, soft_wrap=True)

    def chosen(self, choice: str, backend: str) -> None:
        """Say what ``--backend auto`` chose, and why."""
        if backend == "auto":
            self.say(f"Backend {choice}.")

    def json(self, document: dict[str, Any]) -> None:
        if self.as_json:
            echo(json.dumps(plain(document), sort_keys=True))


def figure(value: Any, form: str = "") -> str:
    """A cell of a table: numbers in the format ``form`` or with the digits that matter, None as "-"."""
    if value is None:
        return "-"
    if isinstance(value, bool) or not isinstance(value, float):
        return str(value)
    if form:
        return format(value, form)
    return f"{value:.4g}" if abs(value) < 0.9 or abs(value) >= 1.1 else f"{value:.6f}".rstrip("0").rstrip(".")


def percent(share: float | None) -> str:
    return "-" if share is None else f"{100 * share:.3f} %"


def plain(value: Any) -> Any:
    """Convert a document to JSON: NaN and infinity become null, paths become text, typed results their ``to_json``."""
    if isinstance(value, dict):
        return {str(k): plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(v) for v in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if hasattr(value, "to_json"):
        return plain(value.to_json())
    return str(value) if isinstance(value, Path) else value
