"""Train linear probes on the features of every model and read them: the work of ``evaluate`` and ``probe``."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from phreg_deploy.errors import PhregError
from phreg_deploy.evaluation.data.sources import Source, open_source
from phreg_deploy.evaluation.data.splits import Split, split_names
from phreg_deploy.evaluation.data.store import FeatureStore
from phreg_deploy.evaluation.data.truth import Depths, Masks, Truth, find_truth, read_masks
from phreg_deploy.evaluation.intervals import Bootstrap
from phreg_deploy.evaluation.pictures import Pictures
from phreg_deploy.evaluation.reading import BaseTokens, read_heads
from phreg_deploy.evaluation.report import Evaluation, Subject
from phreg_deploy.evaluation.request import EvaluationRequest
from phreg_deploy.evaluation.scores import DECIDES, ClassParts, Parts, figures_of
from phreg_deploy.evaluation.training import targets_of, train
from phreg_deploy.files.cache import cache_folder
from phreg_deploy.heads.head import Head
from phreg_deploy.progress import Progress

# Suffixes of the truth; the first that is there is taken.
SUFFIXES = {"segmentation": (".png",), "depth": (".png", ".npy")}
SETTINGS = (
    "decay",
    "patches",
    "seeds",
    "seed",
    "group",
    "share",
    "image_size",
    "layers",
    "readout",
    "project",
    "depth_scale",
    "first_class",
)


@dataclass(frozen=True)
class Outcome:
    """The report, the first head of each model, and the pictures if they were asked for."""

    evaluation: Evaluation
    heads: list[Head]
    pictures: Pictures | None


@dataclass
class _Data:
    """What all models are evaluated on. ``base`` is known after the first model."""

    truth: Truth
    split: Split
    bootstrap: Bootstrap
    skipped: int
    base: BaseTokens | None = None
    # Of the base, figures in every resample.
    first: tuple[Subject, dict[str, np.ndarray]] | None = None
    pictures: Pictures | None = None
    # Bytes of cached features by their folder.
    cached: dict[Path | None, int] = field(default_factory=dict)
    subjects: list[Subject] = field(default_factory=list)


def run_evaluation(request: EvaluationRequest, progress: Progress, draw: bool) -> Outcome:
    """Evaluate every model of a request; ``draw``: also draw pictures."""
    began = time.perf_counter(), time.process_time()
    data = _read_data(request, progress)
    if draw:
        data.pictures = Pictures.of(request.images, data.truth, data.split)
    heads = []
    for place, name in enumerate(request.names):
        # A name given twice is trained again with other seeds.
        turn = request.names[:place].count(name)
        with ExitStack() as stack:
            where = ((request.readout, request.project), request.device, request.backend, stack)
            source = open_source(name, request.checkpoint_of(name), request.size, request.layers, *where)
            heads.append(_evaluate(source, f"{name} ({turn + 1})" if turn else name, turn, data, request, progress))
    spent = {"wall": time.perf_counter() - began[0], "cpu": time.process_time() - began[1]}
    return Outcome(_report(request, data, spent), heads, data.pictures)


def _read_data(request: EvaluationRequest, progress: Progress) -> _Data:
    task, folder = ("segmentation", request.masks) if request.masks else ("depth", request.depth)
    assert folder is not None
    files, missing = find_truth(request.images, folder, SUFFIXES[task])
    split = split_names(list(files), request.split, request.group, request.share)
    used = {name: files[name] for name in (*split.train, *split.val)}
    if missing:
        count = len(missing)
        progress.say(f"Left out {count} image{'s' * (count > 1)} without truth, e.g. {missing[0]}.")
    truth: Truth = Depths(folder, used, request.depth_scale)
    if task == "segmentation":
        truth = read_masks(used, folder, request.classes, request.ignore, progress, first=request.first_class)
    return _Data(truth, split, Bootstrap([split.groups[n] for n in split.val], request.seed), len(missing))


def _evaluate(
    source: Source, label: str, turn: int, data: _Data, request: EvaluationRequest, progress: Progress
) -> Head:
    """Evaluate one model, add it to ``data.subjects``, and return the head of its first seed."""
    truth, split = data.truth, data.split
    if data.base is not None:
        data.base.check_crop(source)
    store, seconds = FeatureStore(source, request.images, _cache(request)), dict[str, dict[str, float]]()
    with _timed(seconds, "features"):
        store.fill([*split.train, *split.val], truth, progress, f"features of {label}")
    base = data.base = data.base or BaseTokens.of(store, split)
    heads, fits = [], []
    with _timed(seconds, "training"), progress.task(f"probes of {label}", request.seeds) as advance:
        targets = targets_of(store, truth, split)
        for seed in range(request.seeds):
            number = request.seed + turn * request.seeds + seed
            head, fit = train(store, truth, targets, split, request, number)
            heads.append(head)
            fits.append(fit)
            advance()
    with _timed(seconds, "reading"), progress.task(f"testing {label}", len(split.val)) as advance:
        parts = read_heads(store, heads, truth, split, base, advance)
    if data.pictures is not None:
        data.pictures.add(label, store, heads[0])
    drawn, figures, decides = data.bootstrap.draw(parts), figures_of(parts), DECIDES[truth.task]
    if figures[decides] is None:
        raise PhregError("evaluate: the images to test on have no pixel of a class; split otherwise.")
    subject = Subject.of(
        source,
        decides,
        figures,
        drawn,
        data.first,
        name=label,
        width=heads[0].width,
        layers=source.layers,
        seeds=[figures_of([p])[decides] for p in parts],
        class_iou=_class_iou(parts),
        patches=int(heads[0].trained_on["patches"]),
        iterations=[fit.iterations for fit in fits],
        converged=all(fit.converged for fit in fits),
        computed=store.computed,
        cache_bytes=sum(store.sizes.values()),
        seconds=seconds,
    )
    data.cached[store.folder] = sum(store.sizes.values())
    data.first = data.first or (subject, drawn)
    data.subjects.append(subject)
    return heads[0]


def _report(request: EvaluationRequest, data: _Data, seconds: dict[str, float]) -> Evaluation:
    masks, base = data.truth if isinstance(data.truth, Masks) else None, data.base
    assert base is not None
    folder = _cache(request)
    return Evaluation(
        task=data.truth.task,
        images=len(data.split.train) + len(data.split.val),
        train=len(data.split.train),
        val=len(data.split.val),
        split=data.split.how,
        groups=len(set(data.split.groups.values())),
        val_groups=len({data.split.groups[name] for name in data.split.val}),
        resampled=data.bootstrap.unit,
        units=data.bootstrap.units,
        classes=masks.classes if masks else None,
        colours=masks.colours if masks else None,
        ignore=request.ignore if masks else None,
        protocol=request.solver,
        settings={key: getattr(request, key) for key in SETTINGS},
        outliers=base.count,
        outlier_median=base.median,
        skipped=data.skipped,
        cache=None if folder is None else str(folder),
        cache_bytes=sum(data.cached.values()),
        subjects=tuple(data.subjects),
        seconds=seconds,
    )


def _class_iou(parts: list[Parts]) -> list[float | None] | None:
    """Means over seeds; a class that does not occur has None in all of them."""
    rows = [p.class_iou() for p in parts if isinstance(p, ClassParts)]
    known = [[value for value in column if value is not None] for column in zip(*rows)]
    return [float(np.mean(column)) if column else None for column in known] or None


def _cache(request: EvaluationRequest) -> Path | None:
    return (request.cache or cache_folder()) if request.keep else None


@contextmanager
def _timed(seconds: dict[str, dict[str, float]], name: str) -> Iterator[None]:
    wall, cpu = time.perf_counter(), time.process_time()
    yield
    seconds[name] = {"wall": time.perf_counter() - wall, "cpu": time.process_time() - cpu}
