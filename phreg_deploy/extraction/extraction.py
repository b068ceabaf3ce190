"""Write the features of images: one ``.npy`` for each image and output, and their index, ``features.json``."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from phreg_deploy.errors import FORCE, RESUME, Interrupted, PhregError
from phreg_deploy.extraction.feature_files import INDEX, ExtractedImage, FeatureWriter, file_names
from phreg_deploy.extraction.inputs.archives import ArchiveReader
from phreg_deploy.extraction.inputs.bad_files import BadFiles
from phreg_deploy.extraction.inputs.sources import ImageSource
from phreg_deploy.extraction.task import ExtractionOptions, ExtractionTask
from phreg_deploy.files.atomic import atomic_folder
from phreg_deploy.progress import SILENT, Progress
from phreg_deploy.runtime.features import FeatureExtractor


@dataclass(frozen=True)
class Extraction:
    """The index of an output folder. ``skipped``: name of each unreadable file -> reason; ``heads``: as of the task."""

    output: str
    backend: str
    settings: dict[str, Any]
    complete: bool
    skipped: dict[str, str]
    heads: list[dict[str, Any]]
    images: list[ExtractedImage]

    def to_json(self) -> dict[str, Any]:
        return {**vars(self), "images": [image.to_json() for image in self.images]}


def extract_images(
    extractor: FeatureExtractor,
    images: Sequence[ImageSource],
    output: Path,
    options: ExtractionOptions,
    *,
    max_bad: str | None = None,
    force: bool = False,
    resume: bool = False,
    progress: Progress = SILENT,
) -> Extraction:
    """Write ``NAME.npy`` (features ``(Hp, Wp, C)``), ``NAME.cls.npy`` and so on for every image.

    The index names each unreadable file. An interrupt, or too many unreadable files, keeps the finished images and an
    index that says so, unless they would replace an older output. A killed process keeps nothing; with
    ``extract_shard`` it does.

    Args:
        images: see ``find_images``.
        max_bad: the largest number of unreadable files, or "1%" of all; None for any number.
        resume: keep the images that ``output`` holds from the same bundle and settings, and extract the rest.

    Raises:
        PhregError: no readable image, too many that are not, an output that the bundle lacks, values beyond float16,
            other settings to resume, or options that exclude each other.
        Interrupted: by Ctrl-C; its report is the index of the finished images.
    """
    bad = BadFiles(max_bad, len(images))
    task = ExtractionTask(extractor, options)
    files = {str(image): file_names(image.name, task.outputs, task.pictures) for image in images}
    replaces, stopped, current = output.exists() and not resume, "", None
    done: dict[str, ExtractedImage] = {}
    reads = [extractor.bundle.folder, *sorted({image.path.parent for image in images})]
    with atomic_folder(output, force or resume, reads) as folder, progress.task("extracting", len(images)) as advance:
        writer = FeatureWriter(folder, task.dtype, extractor.manifest.heads)
        try:
            with ArchiveReader() as archives:
                if resume:
                    done = _resumed(output, folder, task.settings, images, files)
                    advance(len(done))
                for source in [image for image in images if str(image) not in done]:
                    current = str(source)
                    try:
                        image = task.read(source, archives)
                    except PhregError as error:
                        bad.add(current, str(error))
                    else:
                        done[current] = writer.write(source, files[current], *task.dense(image, advance))
                    advance()
                    if bad.too_many:
                        stopped = bad.message
                        break
        except KeyboardInterrupt:
            if current is not None and current not in done:
                for file in files[current].values():
                    (folder / file).unlink(missing_ok=True)
            stopped = "Interrupted."
        if stopped and (replaces or not done):
            unchanged = f" {output} is as it was before." if output.exists() else ""
            kind = PhregError if bad.too_many else Interrupted
            raise kind(f"{stopped} Nothing new was kept.{unchanged}", {"skipped": bad.files})
        if not done:
            reason = next(iter(bad.files.values()))
            raise PhregError(f"extract: none of the {len(images)} images can be read. The first: {reason}")
        entries = [done[str(image)] for image in images if str(image) in done]
        index = Extraction(str(output), extractor.backend, task.settings, not stopped, bad.files, task.heads, entries)
        (folder / INDEX).write_text(json.dumps(index.to_json(), indent=1) + "\n")
    if stopped:
        kind = PhregError if bad.too_many else Interrupted
        raise kind(
            f"{stopped} {output} holds the features of {len(done)} of {len(images)} images, each of them whole; "
            f"the same command with {RESUME} extracts the rest.",
            index.to_json(),
        )
    return index


def _resumed(
    output: Path,
    folder: Path,
    settings: dict[str, Any],
    images: Sequence[ImageSource],
    files: dict[str, dict[str, str]],
) -> dict[str, ExtractedImage]:
    """Link the files of an earlier run into ``folder``, for images that have not changed since."""
    if not output.exists():
        return {}
    try:
        index = json.loads((output / INDEX).read_text())
        earlier = {entry["image"]: entry for entry in index["images"]}
        if differing := sorted(key for key in settings if index["settings"].get(key) != settings[key]):
            raise PhregError(
                f"resume: {output} was written with another {differing[0]}; choose another output, or {FORCE}."
            )
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        raise PhregError(
            f"resume: {output} holds no whole {INDEX}; expected an output of extract. Use {FORCE}."
        ) from None
    if others := [name for name in earlier if name not in files]:
        raise PhregError(
            f"resume: {output} holds {len(others)} images that are not asked for now, e.g. {others[0]}; "
            "name the same images as before."
        )
    done = {}
    for source in images:
        label, names = str(source), files[str(source)]
        entry = earlier.get(label)
        unchanged = entry is not None and {**entry, **names, "stamp": source.stamp} == entry
        if entry is None or not unchanged or not all((output / name).is_file() for name in names.values()):
            continue
        for name in names.values():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            try:
                os.link(output / name, folder / name)
            except OSError:  # a file system without hard links
                shutil.copyfile(output / name, folder / name)
        done[label] = ExtractedImage(label, names, entry["shape"], entry["artifact_rate"], entry["stamp"])
    return done
