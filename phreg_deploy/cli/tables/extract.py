"""The tables and lines of ``extract``."""

from __future__ import annotations

from typing import TYPE_CHECKING

from phreg_deploy.cli.console import Result, percent
from phreg_deploy.errors import PhregError

if TYPE_CHECKING:
    from phreg_deploy.runtime.extraction import Extraction

# Images that the table lists.
ROWS = 20


def show_extraction(index: Extraction, result: Result) -> None:
    """The first images with their shapes and artifact rates, and every file that was left out."""
    rows = [[i.image, "x".join(str(side) for side in i.shape), percent(i.artifact_rate)] for i in index.images[:ROWS]]
    result.table(f"Features in {index.output}", ["image", "features", "artifact rate"], rows)
    for reason in index.skipped.values():
        result.say(f"Left out: {reason}")


def skipped_error(index: Extraction) -> PhregError:
    """The error that names the unreadable files; its report is the index."""
    names, count = list(index.skipped), len(index.skipped) + len(index.images)
    more = f" and {len(names) - 5} more" if len(names) > 5 else ""
    return PhregError(
        f"extract: {len(names)} of {count} files cannot be read: {', '.join(names[:5])}{more}. {index.output} holds "
        "the features of the others. Fix or remove these files, or add --skip-bad.",
        index.to_json(),
    )
