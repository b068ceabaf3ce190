"""The tables and lines of ``extract``."""

from __future__ import annotations

from typing import TYPE_CHECKING

from phreg_deploy.cli.console import Result, percent
from phreg_deploy.errors import PhregError
from phreg_deploy.layers import FEATURES

if TYPE_CHECKING:
    from phreg_deploy.extraction.extraction import Extraction
    from phreg_deploy.extraction.ray_data import RayExtraction
    from phreg_deploy.extraction.sharded import ShardExtraction

# Images that the table lists.
ROWS = 20


def show_extraction(index: Extraction, result: Result) -> None:
    """The first images with their shapes and artifact rates, and every file that was left out."""
    rows = [[i.image, "x".join(str(side) for side in i.shape), percent(i.artifact_rate)] for i in index.images[:ROWS]]
    outputs = index.settings["outputs"]
    title = f"Features in {index.output}" if FEATURES in outputs else f"{', '.join(outputs)} in {index.output}"
    result.table(title, ["image", "shape of features", "artifact rate"], rows)
    for reason in index.skipped.values():
        result.say(f"Left out: {reason}")


def show_shard(done: ShardExtraction, result: Result) -> None:
    """What this process did of its shard, every file that was left out, and whether the index is there."""
    row = [done.images, done.kept, done.extracted, len(done.skipped)]
    result.table(f"Shard {done.shard} of {done.output}", ["images", "kept", "extracted", "left out"], [row])
    for reason in done.skipped.values():
        result.say(f"Left out: {reason}")
    if done.joined:
        result.say(f"Every shard is done; features.json in {done.output} lists all images.")
    else:
        result.say("Other shards are not done; the process that finishes the last one writes features.json.")


def show_ray(done: RayExtraction, result: Result) -> None:
    """What all actors did, and every file that was left out."""
    row = [done.images, done.kept, done.extracted, len(done.skipped), done.shards, done.workers]
    columns = ["images", "kept", "extracted", "left out", "shards", "actors"]
    result.table(f"Features in {done.output}", columns, [row])
    for reason in done.skipped.values():
        result.say(f"Left out: {reason}")


def skipped_error(index: Extraction | ShardExtraction | RayExtraction) -> PhregError:
    """The error that names the unreadable files; its report is the index."""
    done = index.images if isinstance(index.images, int) else len(index.images) + len(index.skipped)
    names = list(index.skipped)
    more = f" and {len(names) - 5} more" if len(names) > 5 else ""
    return PhregError(
        f"extract: {len(names)} of {done} files cannot be read: {', '.join(names[:5])}{more}. {index.output} holds "
        "the features of the others. Fix or remove these files, or add --skip-bad or --max-bad.",
        index.to_json(),
    )
