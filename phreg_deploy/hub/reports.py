"""Report transfers from and to the hub: huggingface_hub's bars, and one line in place of its lines about retries."""

from __future__ import annotations

import logging
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

from phreg_deploy.progress import Progress

# Seconds after which a line says what is waited for.
PATIENCE = 3.0
# Lines of huggingface_hub about one attempt of several.
RETRIES = ("thrown while requesting", "Retrying in", "Rate limited. Waiting")
_progress: ContextVar[Progress | None] = ContextVar("progress of downloads", default=None)


@contextmanager
def shown_by(progress: Progress) -> Iterator[None]:
    """Let every ``reported`` block within this one report to ``progress``; elsewhere they report on stderr."""
    token = _progress.set(progress)
    try:
        yield
    finally:
        _progress.reset(token)


@contextmanager
def reported(name: str) -> Iterator[None]:
    """Report a transfer of the repository ``name`` in the block; only errors if the progress is quiet."""
    from huggingface_hub import constants

    progress = _progress.get() or Progress()

    def passes(record: logging.LogRecord) -> bool:
        hidden = progress.quiet or any(text in record.getMessage() for text in RETRIES)
        return record.levelno >= logging.ERROR or not hidden

    timer = threading.Timer(PATIENCE, progress.say, [f"hub: {name}: waiting for {constants.ENDPOINT}"])
    timer.daemon = True
    # Filters of a logger do not see what its children log.
    handlers = list(logging.getLogger("huggingface_hub").handlers)
    for handler in handlers:
        handler.addFilter(passes)
    timer.start()
    try:
        with _bars(sys.stderr.isatty() and not progress.quiet):
            yield
    finally:
        timer.cancel()
        for handler in handlers:
            handler.removeFilter(passes)


@contextmanager
def _bars(shown: bool) -> Iterator[None]:
    """Let huggingface_hub show its progress bars within the block, or hide them."""
    from huggingface_hub.utils.tqdm import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars

    if shown or are_progress_bars_disabled():
        yield
        return
    disable_progress_bars()
    try:
        yield
    finally:
        enable_progress_bars()
