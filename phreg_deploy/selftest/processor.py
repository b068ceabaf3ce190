"""Check the backends of the processor on a bundle."""

from __future__ import annotations

from functools import partial

from phreg_deploy.bundle.bundle import Bundle
from phreg_deploy.errors import PhregError
from phreg_deploy.progress import Progress
from phreg_deploy.runtime.features import FeatureExtractor
from phreg_deploy.selftest.checks import Sheet, Skipped
from phreg_deploy.selftest.serving import CALLS, check_memory, check_threads, repeat_exam
from phreg_deploy.selftest.subjects import Subject


def check_backends(sheet: Sheet, subject: Subject, backends: list[str], frames: int, progress: Progress) -> None:
    """Examine each backend on a bundle, serve two threads, and serve ``frames`` frames."""
    for backend in backends:
        load = partial(FeatureExtractor.load, subject.folder, backend)
        if sheet.run(f"{subject} on {backend}, exam", partial(check_exam, subject, load)):
            sheet.run(f"{subject} on {backend}, two threads", partial(check_threads, load))
            memory = partial(check_memory, load, frames, progress)
            sheet.run(f"{subject} on {backend}, memory", memory)


def check_exam(subject: Subject, load: partial[FeatureExtractor]) -> str:
    """Answer the exam several times with one extractor."""
    bundle = Bundle.read(subject.folder)
    try:
        extractor = load()
    except PhregError as error:
        # Every backend refuses some precisions, with the reason.
        raise Skipped(str(error)) from None
    with extractor:
        agreed = repeat_exam(bundle, extractor)
        return f"{CALLS} exams in {extractor.compute}, {agreed}"
