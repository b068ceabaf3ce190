"""Extract one shard of the images into an output that other processes write too; a killed process loses nothing."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from phreg_deploy.errors import RESUME, Interrupted, PhregError, write_error
from phreg_deploy.extraction.formats import ImageWriter, check_format, open_writer
from phreg_deploy.extraction.inputs.archives import ArchiveReader
from phreg_deploy.extraction.inputs.bad_files import BadFiles
from phreg_deploy.extraction.inputs.shards import Shard
from phreg_deploy.extraction.inputs.sources import ImageSource
from phreg_deploy.extraction.joining import join_parts
from phreg_deploy.extraction.parts import Part
from phreg_deploy.extraction.task import ExtractionOptions, ExtractionTask
from phreg_deploy.progress import SILENT, Progress
from phreg_deploy.runtime.features import FeatureExtractor


@dataclass
class ShardExtraction:
    """What a process did.

    ``images``: of the shard; ``kept``: by an earlier run; ``extracted``: by this one; ``skipped``: name of each
    unreadable file -> reason; ``complete``: the shard is done; ``joined``: every shard is, and the index was written.
    """

    output: str
    backend: str
    settings: dict[str, Any]
    shard: str
    images: int
    kept: int = 0
    extracted: int = 0
    complete: bool = False
    joined: bool = False
    skipped: dict[str, str] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def extract_shard(
    extractor: FeatureExtractor,
    images: Sequence[ImageSource],
    output: Path,
    options: ExtractionOptions,
    shard: Shard,
    *,
    format: str = "npy",
    max_bad: str | None = None,
    force: bool = False,
    resume: bool = False,
    progress: Progress = SILENT,
) -> ShardExtraction:
    """Write the features of one shard. The process that finishes the last one joins them into ``features.json``.

    Each finished image is kept, whatever ends the process; ``resume`` keeps those whose files have their digests.

    Args:
        images: all images of all shards, see ``find_images``.
        format: of ``formats.FORMATS``.
        max_bad: the largest number of unreadable files in this shard, or "1%" of its images; None for any number.
        force: start this shard over. Other shards are not touched.

    Raises:
        PhregError: too many unreadable files; another process writes this shard; the shard was begun before; other
            shards were begun with other options; or as ``extract_images``.
        Interrupted: by Ctrl-C; its report is what is done.
    """
    check_format(format, options)
    task = ExtractionTask(extractor, options)
    mine = [image for image in images if shard.holds(image.key)]
    bad = BadFiles(max_bad, len(mine))
    result = ShardExtraction(str(output), extractor.backend, task.settings, str(shard), len(mine), skipped=bad.files)
    plan = {"settings": task.settings, "format": format}
    try:
        with Part(output, shard, plan, extractor.backend, resume=resume, force=force) as part:
            part.begin(mine, resume)
            result.kept = len(part.done)
            try:
                _extract(task, part, mine, bad, open_writer(format, part, task), progress)
            finally:
                result.extracted = len(part.done) - result.kept
            if not bad.too_many:
                part.finish()
                result.complete = True
    except OSError as error:
        raise write_error(error, output) from error
    except KeyboardInterrupt:
        raise Interrupted(f"Interrupted. {_kept(result)}", result.to_json()) from None
    if bad.too_many:
        raise PhregError(f"{bad.message} {_kept(result)}", result.to_json())
    try:
        result.joined = join_parts(output, task.heads)
    except OSError as error:
        raise write_error(error, output) from error
    return result


def _extract(
    task: ExtractionTask,
    part: Part,
    images: Sequence[ImageSource],
    bad: BadFiles,
    writer: ImageWriter,
    progress: Progress,
) -> None:
    """Extract what is not done; stop at too many bad files."""
    with ArchiveReader() as archives, progress.task("extracting", len(images)) as advance:
        advance(len(part.done))
        try:
            for source in [image for image in images if image.name not in part.done]:
                try:
                    image = task.read(source, archives)
                except PhregError as error:
                    bad.add(str(source), str(error))
                    part.skip(source, str(error))
                    if bad.too_many:
                        break
                else:
                    writer.add(source, *task.dense(image, advance))
                advance()
        except KeyboardInterrupt:
            writer.flush()
            raise
        writer.flush()


def _kept(result: ShardExtraction) -> str:
    return (
        f"{result.output} keeps {result.kept + result.extracted} of {result.images} images of shard {result.shard}, "
        f"each of them whole; the same command with {RESUME} extracts the rest."
    )
