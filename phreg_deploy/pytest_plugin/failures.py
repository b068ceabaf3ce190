"""Write the artifacts of a failed assertion and raise it: the gate, the images, and the patches by row and column."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from PIL import Image

import phreg_deploy
from phreg_deploy.errors import write_error
from phreg_deploy.files.atomic import write_atomic
from phreg_deploy.profiling.latency import backend_version
from phreg_deploy.pytest_plugin.context import CaseContext
from phreg_deploy.runtime.features import FeatureExtractor

# Images of a gate, and patches of an image, that are named.
IMAGES, PATCHES = 3, 5
# A patch is not named if its error is below this share of the image's largest.
SHARE = 0.01


@dataclass(frozen=True)
class Place:
    """An image, and its worst patches: ``(row, column, value)``, counted from 0 on a grid of (rows, columns).

    ``measure``: what the values are; the larger, the worse.
    """

    image: str
    measure: str
    grid: tuple[int, int]
    patches: tuple[tuple[int, int, float], ...]

    @classmethod
    def of(cls, image: str, measure: str, errors: np.ndarray) -> Place:
        """Name the worst patches of ``errors`` ``(Hp, Wp)``; those with little error, see ``SHARE``, are left out."""
        order = np.argsort(-errors, axis=None, kind="stable")[:PATCHES]
        places = [(int(i) // errors.shape[1], int(i) % errors.shape[1]) for i in order]
        least = max(SHARE * float(errors.max()), np.finfo(np.float64).tiny)
        worst = tuple(
            (row, column, float(errors[row, column])) for row, column in places if errors[row, column] >= least
        )
        return cls(image, measure, errors.shape, worst)

    def __str__(self) -> str:
        if not self.patches:
            return self.image
        listed = ", ".join(f"({row}, {column}) {value:.4g}" for row, column, value in self.patches)
        return f"{self.image}: {self.measure} at patch (row, column) {listed}, of {self.grid[0]} x {self.grid[1]}"

    def to_json(self) -> dict[str, Any]:
        patches = [{"row": row, "column": column, "value": value} for row, column, value in self.patches]
        return {"image": self.image, "measure": self.measure, "grid": list(self.grid), "patches": patches}


@dataclass(frozen=True)
class Miss:
    """A missed gate: ``figure`` against ``bar``, a sentence of both, and where."""

    gate: str
    figure: float
    bar: float
    sentence: str
    places: tuple[Place, ...] = ()

    def to_json(self) -> dict[str, Any]:
        places = [place.to_json() for place in self.places]
        own = {"gate": self.gate, "figure": self.figure, "bar": self.bar, "sentence": self.sentence}
        return {**own, "places": places}


@dataclass
class Verdict:
    """What an assertion found. ``document``: figures for the JSON; ``picture`` is drawn only if a gate was missed."""

    assertion: str
    label: str
    extractor: FeatureExtractor
    misses: Sequence[Miss]
    document: dict[str, Any] = field(default_factory=dict)
    picture: Image.Image | None = None

    def settle(self, context: CaseContext) -> None:
        """Pass, and remove artifacts of an earlier run; or write the artifacts and raise ``AssertionError``.

        Raises:
            AssertionError: a gate was missed. PhregError: the folder cannot be written to.
        """
        __tracebackhide__ = True
        folder = context.folder()
        paths = {suffix: folder / f"{self.label}.{suffix}" for suffix in ("png", "json")}
        try:
            for path in paths.values():
                path.unlink(missing_ok=True)
            if not self.misses:
                return
            folder.mkdir(parents=True, exist_ok=True)
            if self.picture is not None:
                self.picture.save(paths["png"], "PNG", optimize=True)
        except OSError as error:
            raise write_error(error, paths["png"]) from None
        text = json.dumps(_finite(self._report(context.name)), indent=1, ensure_ascii=False, allow_nan=False)
        write_atomic(paths["json"], text.encode(errors="replace"))
        raise AssertionError(self._message([path for path in paths.values() if path.is_file()]))

    def _message(self, written: list[Any]) -> str:
        count, extractor = len(self.misses), self.extractor
        lines = [
            f"{self.assertion}: {extractor.bundle.folder} misses {count} gate{'s' * (count > 1)} on "
            f"{extractor.backend}, {extractor.precision}"
        ]
        for miss in self.misses:
            lines += [f"{miss.gate}: {miss.sentence}", *(f"  {place}" for place in miss.places)]
        return "\n".join([*lines, *(f"wrote {path}" for path in written)])

    def _report(self, test: str) -> dict[str, Any]:
        extractor = self.extractor
        return {
            "assertion": self.assertion,
            "test": test,
            "bundle": str(extractor.bundle.folder),
            "files": extractor.manifest.files,
            "backend": extractor.backend,
            "backend_version": backend_version(extractor.backend),
            "compute": extractor.compute,
            "choice": extractor.choice,
            "precision": extractor.precision,
            "phreg_deploy": phreg_deploy.__version__,
            "python": sys.version.split()[0],
            "passed": not self.misses,
            "missed": [miss.to_json() for miss in self.misses],
            **self.document,
        }


def _finite(value: Any) -> Any:
    """Convert to JSON: NaN and infinity become null."""
    if isinstance(value, dict):
        return {key: _finite(entry) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(entry) for entry in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
