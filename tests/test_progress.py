"""Progress bars: what is left on the terminal when a task is done."""

import io
import re

from rich.console import Console

from phreg_deploy.progress import Progress


def drawn(total, steps):
    """The last line that a bar of ``steps`` steps leaves."""
    progress = Progress()
    progress.console = Console(file=io.StringIO(), force_terminal=True, width=100)
    with progress.task("counting", total) as advance:
        for _ in range(steps):
            advance()
    return re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", progress.console.file.getvalue()).strip().splitlines()[-1]


def test_a_bar_without_a_known_total_ends_full():
    assert " 7/7 " in drawn(None, 7)
    assert drawn(None, 0).endswith(" 0/0")


def test_a_bar_that_stopped_early_says_so():
    assert " 2/5 " in drawn(5, 2)
