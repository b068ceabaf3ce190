"""``Evaluation``: the result of ``evaluate``, as tables and JSON hold it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from phreg_deploy.evaluation.data.sources import Source
from phreg_deploy.evaluation.intervals import Comparison, compare, interval
from phreg_deploy.spec import Stored, plain


@dataclass(frozen=True)
class Subject(Stored):
    """Figures of one model, student or bundle; means over the seeds of training.

    ``figures`` and ``intervals`` by name: of segmentation ``miou``, ``pixel_accuracy``, ``patch_miou``,
    ``patch_accuracy``, ``outlier_accuracy``; of depth ``rmse``, ``abs_rel``, ``delta_1``. ``seeds``: the deciding
    figure of each training. ``class_iou``: of every class, None for depth. ``iterations``: of the solver, per seed.
    ``against_base`` is None for the base. ``cache_bytes``: of its features on disk. ``seconds``: wall and CPU time of
    its features, its training and its reading.
    """

    name: str
    kind: str
    runs_on: str
    size: tuple[int, int]
    grid: tuple[int, int]
    width: int
    layers: tuple[int, ...] | None
    figures: dict[str, float | None]
    intervals: dict[str, tuple[float, float] | None]
    seeds: list[float]
    class_iou: list[float | None] | None
    against_base: Comparison | None
    patches: int
    iterations: list[int]
    converged: bool
    computed: int
    cache_bytes: int
    seconds: dict[str, dict[str, float]]

    @classmethod
    def of(
        cls,
        source: Source,
        deciding: str,
        figures: dict[str, float | None],
        resampled: dict[str, np.ndarray],
        base: tuple[Subject, dict[str, np.ndarray]] | None,
        **facts: Any,
    ) -> Subject:
        """Make the entry of a source; the deciding figure is compared with the base's.

        Args:
            deciding: name of the figure. resampled: figures in every resample, float ``(R,)`` by name.
            base: entry and resampled figures of the base; None for the base itself.
            facts: the other fields.
        """
        against = None
        if base is not None:
            gain = (figures[deciding] or 0.0) - (base[0].figures[deciding] or 0.0)
            against = compare(deciding, gain, resampled[deciding] - base[1][deciding])
        return cls(
            kind=source.kind,
            runs_on=source.runs_on,
            size=source.size,
            grid=source.grid,
            figures=figures,
            intervals={name: interval(values) for name, values in resampled.items()},
            against_base=against,
            **facts,
        )


@dataclass(frozen=True)
class Evaluation(Stored):
    """``subjects``: the base first. ``val_groups``: groups to test on. ``resampled``: "images" or "groups", and
    ``units``, how many there were.

    ``outliers``: tokens of the base model that are norm outliers on the images to test on, and ``outlier_median``, the
    median norm that they are relative to. ``skipped``: images without truth. ``cache``: folder, None without
    cache; ``cache_bytes``: of all models' features in it.
    """

    task: str
    images: int
    train: int
    val: int
    split: str
    groups: int
    val_groups: int
    resampled: str
    units: int
    classes: tuple[str, ...] | None
    colours: tuple[tuple[int, int, int], ...] | None
    ignore: int | None
    protocol: str
    settings: dict[str, Any]
    outliers: int | None
    outlier_median: float | None
    skipped: int
    cache: str | None
    cache_bytes: int
    subjects: tuple[Subject, ...]
    seconds: dict[str, float]

    def to_json(self) -> dict[str, Any]:
        return dict(plain(vars(self)))
