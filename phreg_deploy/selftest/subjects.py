"""The bundles that are checked: the user's, or a small one and a ViT-S that are exported here in each precision."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

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
    """A bundle to check. ``model``: "small", "ViT-S", or "bundle 1" for the first of the user's."""

    model: str
    precision: str
    folder: Path

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


def copied(bundles: tuple[Path, ...], room: Path) -> Iterator[Subject]:
    """Copy the user's bundles without their engines, one by one, so that nothing is written into them."""
    for number, folder in enumerate(bundles, 1):
        name = f"bundle {number}"
        copy = Path(shutil.copytree(folder, room / name, ignore=shutil.ignore_patterns("engines")))
        yield Subject(name, Bundle.read(copy).manifest.precision, copy)


def exported(
    room: Path, precisions: list[str], models: list[str], target: str, progress: Progress
) -> Iterator[Subject]:
    """Export bundles one by one: each model in each precision, FP32 first, which the 8-bit ones are calibrated from.

    Args:
        target: of the calibration, "cpu" or "trt".
    """
    from phreg_deploy.calibration import calibrate
    from phreg_deploy.demo.scenes import write_scenes
    from phreg_deploy.export import export

    scenes = room / "scenes"
    write_scenes(scenes, SCENES)
    for model in models:
        for precision in sorted(precisions, key=lambda name: name != "fp32"):
            folder = room / f"{model}-{precision}"
            if precision in ("int8", "fp8"):
                # Random weights may miss the bar on fidelity, which is not what is checked here.
                source = room / f"{model}-fp32"
                calibrate(source, scenes, folder, mode=precision, target=target, force=True, progress=progress)
            elif model == SMALL:
                export(str(packaged_model()), folder, precision=precision, batch=BATCHES, progress=progress)
            else:
                how = {"precision": precision, "image_size": LARGE_SIZE, "batch": BATCHES}
                export(LARGE_MODEL, folder, random_weights=True, progress=progress, **how)
            yield Subject(model, precision, folder)


def packaged_model() -> Path:
    """The folder of the model that comes with the package."""
    from phreg_deploy.demo import scenes

    return Path(scenes.__file__).with_name("model")
