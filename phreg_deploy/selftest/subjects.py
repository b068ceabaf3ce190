"""The bundles that are checked: the user's, or a small one and a ViT-S that are exported here in each precision."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from phreg_deploy.arguments import EIGHT_BITS
from phreg_deploy.bundle.bundle import Bundle
from phreg_deploy.errors import BackendMissing
from phreg_deploy.extras import CALIBRATION, EXPORT, require
from phreg_deploy.progress import Progress

SMALL, LARGE = "small", "ViT-S"
# The ViT-S has random weights: what is checked is that all backends compute the same.
LARGE_MODEL, LARGE_SIZE = "vit_small_patch14_reg4_dinov2", "224"
# Batches of its own bundles: single images and others have a profile each.
BATCHES = "1:2:4"
# Scenes to calibrate on, the least that ``calibrate`` takes.
SCENES = range(8)


@dataclass(frozen=True)
class Subject:
    """A bundle to check, which ``make`` writes into ``folder``; ``make`` returns how, as a sentence.

    ``model``: "small", "ViT-S", or "bundle 1" for the first of the user's.
    """

    model: str
    precision: str
    folder: Path
    make: Callable[[], str] = field(repr=False, compare=False)

    def __str__(self) -> str:
        return f"{self.model} {self.precision}"


def check_means(bundles: tuple[Path, ...]) -> None:
    """Raise ``PhregError`` for a damaged bundle, or ``BackendMissing`` if none is given and none can be exported."""
    for folder in bundles:
        Bundle.read(folder).verify()
    if bundles:
        return
    try:
        require("`phreg-deploy selftest` without --bundle", export=EXPORT, calibration=CALIBRATION)
    except BackendMissing as error:
        raise BackendMissing(f"{error} Or name bundles that were exported elsewhere: --bundle student.bundle") from None


def copied(bundles: tuple[Path, ...], room: Path) -> list[Subject]:
    """The user's bundles, which are copied without their engines, so that nothing is written into them."""

    def subject(number: int, folder: Path) -> Subject:
        name = f"bundle {number}"
        copy = room / name

        def make() -> str:
            shutil.copytree(folder, copy, ignore=shutil.ignore_patterns("engines"))
            manifest = Bundle.read(copy).manifest
            return f"{manifest.model.architecture} as given"

        return Subject(name, Bundle.read(folder).manifest.precision, copy, make)

    return [subject(number, folder) for number, folder in enumerate(bundles, 1)]


def exported(room: Path, precisions: list[str], models: list[str], target: str, progress: Progress) -> list[Subject]:
    """Bundles that are exported here: each model in each precision, FP32 first, which 8 bits are calibrated from.

    Args:
        target: of the calibration, "cpu" or "trt".
    """

    def make(model: str, precision: str, folder: Path) -> str:
        from phreg_deploy.calibration import calibrate
        from phreg_deploy.demo.scenes import write_scenes
        from phreg_deploy.export import export

        if precision in EIGHT_BITS:
            scenes, source = room / "scenes", room / f"{model}-fp32"
            write_scenes(scenes, SCENES)
            # Random weights may miss the bar on fidelity, which is not what is checked here.
            calibrate(source, scenes, folder, mode=precision, target=target, force=True, progress=progress)
            return f"calibrated on {len(SCENES)} scenes"
        if model == SMALL:
            export(str(packaged_model()), folder, precision=precision, batch=BATCHES, progress=progress)
            return "exported from the model that comes with the package"
        how: dict[str, Any] = {"precision": precision, "image_size": LARGE_SIZE, "batch": BATCHES}
        export(LARGE_MODEL, folder, random_weights=True, progress=progress, **how)
        return f"exported with random weights at {LARGE_SIZE} pixels"

    def subject(model: str, precision: str) -> Subject:
        folder = room / f"{model}-{precision}"
        return Subject(model, precision, folder, partial(make, model, precision, folder))

    ordered = sorted(precisions, key=lambda name: name != "fp32")
    return [subject(model, precision) for model in models for precision in ordered]


def packaged_model() -> Path:
    """The folder of the model that comes with the package."""
    from phreg_deploy.demo import scenes

    return Path(scenes.__file__).with_name("model")
