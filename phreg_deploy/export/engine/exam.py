"""Examine a saved plan on the GPU: every profile, at its least and best batch, on every path that serves frames."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np

from phreg_deploy.bundle.bundle import Bundle
from phreg_deploy.bundle.plans import StoredPlan
from phreg_deploy.bundle.profiles import ProfileShapes
from phreg_deploy.runtime.backends.options import BackendOptions
from phreg_deploy.runtime.backends.tensorrt_backend import Plan, TensorRtBackend
from phreg_deploy.runtime.features import FeatureExtractor
from phreg_deploy.runtime.gpu.arrays import GPU, DeviceArray
from phreg_deploy.runtime.gpu.cuda import Cuda, Stream
from phreg_deploy.runtime.gpu.memory import DeviceBuffer, PinnedBuffer
from phreg_deploy.runtime.parity import ExamCase, judge, run_exam, verdict
from phreg_deploy.runtime.trt.context import Feed
from phreg_deploy.spec import Stored

Case = dict[str, np.ndarray]
# Calls on the host with one shape: plain, recorded as a CUDA graph, replayed.
CALLS = 3
# Path of images in the GPU's memory -> bytes between an aligned address and the image.
ON_DEVICE = {"from the GPU": 108}


@dataclass(frozen=True)
class Run(Stored):
    """One comparison with the exam's answers.

    ``profile``: the optimisation profile that served it. ``size``: (height, width). ``path``: "plain", "captured",
    "replayed", or a key of ``ON_DEVICE`` for an image in the GPU's memory. ``cosine_p1``: as of ``Parity``.
    """

    profile: int
    batch: int
    size: tuple[int, int]
    path: str
    cosine_p1: float | None
    passed: bool

    def __str__(self) -> str:
        images = "image" if self.batch == 1 else "images"
        return f"profile {self.profile}, {self.batch} {images} of {self.size[0]}x{self.size[1]}, {self.path}"


def examine(
    bundle: Bundle, plan: StoredPlan, device: int = 0, on_device: Mapping[str, int] = ON_DEVICE
) -> dict[str, Any]:
    """Compare the answers of a saved plan with the bundle's exam; ``on_device`` is as ``ON_DEVICE``.

    Returns the ``verdict`` on the worst of all runs, and ``runs`` (``Run`` as JSON), the comparisons one by one. If a
    gate is missed, ``missed`` also says in which of them.
    """
    backend = TensorRtBackend(bundle, BackendOptions(device=device), plan)
    with FeatureExtractor(bundle, backend) as extractor:
        paths: list[tuple[int, str]] = []
        cases, answers = [], list[Case]()
        for case in bundle.cases():
            for index, batch in served_batches(plan.profiles, case["image"].shape):
                for path, turned, answer in _answers(backend, extractor.feed, case, batch, on_device):
                    paths.append((index, path))
                    cases.append(turned)
                    answers.append(answer)
        queue = iter(answers)
        compared = run_exam(bundle, lambda _: next(queue), cases)
        judged = verdict(*judge(bundle, compared, extractor.backend, extractor.compute))
        runs = [_run(bundle, one, where, extractor.compute) for one, where in zip(compared, paths)]
    failed = [run for run in runs if not run.passed]
    if failed:
        judged["missed"].append(f"{len(failed)} of {len(runs)} runs differ, first: {failed[0]}")
    return {**judged, "runs": [run.to_json() for run in runs]}


def served_batches(profiles: list[ProfileShapes], image: tuple[int, ...]) -> list[tuple[int, int]]:
    """List (profile, batch) to examine for images of a shape ``(B, H, W, 3)``.

    They are the least and the best batch that each profile serves at this size, and B itself. The runtime serves a
    shape with the first profile that holds it, so the least batch of a later one may be above its own lower bound.
    """

    def server(batch: int) -> int | None:
        shapes = {"image": (batch, *image[1:])}
        return next((i for i, profile in enumerate(profiles) if profile.holds(shapes)), None)

    found = {(server(image[0]), image[0])}
    for index, profile in enumerate(profiles):
        low, best, high = (shape[0] for shape in profile.inputs["image"])
        own = (batch for batch in range(low, high + 1) if server(batch) == index)
        found |= {(index, batch) for batch in itertools.islice(own, 1)}
        found |= {(index, best)} if server(best) == index else set()
    return sorted((index, batch) for index, batch in found if index is not None)


def _answers(
    backend: Plan, feed: Callable[[Any], Feed], case: Case, batch: int, on_device: Mapping[str, int]
) -> Iterator[tuple[str, Case, Case]]:
    """Answer a case, brought to a batch, on every path: (path, the case, the answers).

    The images are turned before each run. The graph that is replayed was recorded with other images, also in the GPU's
    memory: an answer that is left from a run before is wrong, even where the exam has one image.
    """
    with backend.context() as first, backend.context() as second:
        for turn in range(CALLS):
            turned = turned_case(case, batch, turn)
            context = first
            if turn == CALLS - 1:
                context = second
                for _ in range(turn):
                    context.run(feed(inverted(turned["image"])))
            answer = context.run(feed(turned["image"]))
            yield context.how, turned, answer
        # No context may hold the images that come next from the GPU's memory.
        for context in (first, second):
            context.run(feed(inverted(turned["image"])))
    for turn, (path, offset) in enumerate(on_device.items(), CALLS):
        turned = turned_case(case, batch, turn)
        image = turned["image"]
        for _ in range(CALLS - 1):
            _answer_on_device(backend, feed(inverted(image)), offset)
        yield path, turned, _answer_on_device(backend, feed(image), offset)


def inverted(image: np.ndarray) -> np.ndarray:
    """The negative of an image, whose features are others."""
    return np.asarray(255 - image, image.dtype)


def turned_case(case: Case, batch: int, turn: int) -> Case:
    """Repeat the images and answers of a case up to ``batch``, from the ``turn``-th image on."""
    order = (np.arange(batch) + turn) % len(case["image"])
    return {name: np.ascontiguousarray(value[order]) for name, value in case.items()}


def _answer_on_device(backend: Plan, feed: Feed, offset: int) -> Case:
    """Answer images in the GPU's memory."""
    with uploaded(backend.cuda, feed.pop("image"), offset) as array:
        return {name: value.numpy() for name, value in backend.run_device(array, feed).items()}


@contextmanager
def uploaded(cuda: Cuda, image: np.ndarray, offset: int) -> Iterator[DeviceArray]:
    """Yield a copy of an array in the GPU's memory, ``offset`` bytes behind an aligned address; the GPU is selected."""
    with (
        cuda.selected(),
        Stream(cuda) as stream,
        PinnedBuffer(cuda, image.nbytes) as near,
        DeviceBuffer(cuda, image.nbytes + offset) as far,
    ):
        np.copyto(near.view(image.shape, image.dtype), image)
        cuda.copy(far.pointer + offset, near.pointer, image.nbytes, "HostToDevice", stream.handle)
        stream.wait()
        yield DeviceArray(far.pointer + offset, image.shape, image.dtype, device=(GPU, cuda.index), cuda=cuda)


def _run(bundle: Bundle, case: ExamCase, where: tuple[int, str], compute: str) -> Run:
    _, gates = judge(bundle, [case], TensorRtBackend.name, compute)
    passed = all(gate.passed for gate in gates)
    return Run(where[0], case.batch, case.size, where[1], case.parity.cosine_p1, passed)
