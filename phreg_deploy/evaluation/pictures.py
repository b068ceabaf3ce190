"""Draw images with their truth and the predictions of each model, and write the folder of a report."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath

import numpy as np
from PIL import Image, ImageDraw

from phreg_deploy.evaluation.data.sources import Source
from phreg_deploy.evaluation.data.splits import Split
from phreg_deploy.evaluation.data.store import FeatureStore
from phreg_deploy.evaluation.data.truth import Depths, Masks, Truth, scored
from phreg_deploy.evaluation.report import Evaluation
from phreg_deploy.files.atomic import atomic_folder
from phreg_deploy.heads.head import Head
from phreg_deploy.images.decoding import read_image
from phreg_deploy.images.overlays import class_key, mask_palette
from phreg_deploy.images.photographs import fit
from phreg_deploy.images.pictures import heat
from phreg_deploy.images.upsampling import upsample

# Images in a report, evenly spaced over those that were tested on.
MOST = 8
HEIGHT, GAP, CAPTION = 240, 12, 20
REPORT = "evaluation.json"


@dataclass
class Pictures:
    """Rows of captioned pictures by image: the image, the truth, before (the base), after (each other model).

    ``shown``: the classes of each row, truth and predictions.
    """

    images: Path
    truth: Truth
    rows: dict[str, list[tuple[str, Image.Image]]] = field(default_factory=dict)
    shown: dict[str, list[np.ndarray]] = field(default_factory=dict)

    @classmethod
    def of(cls, images: Path, truth: Truth, split: Split) -> Pictures:
        """Choose the images to draw."""
        count = min(MOST, len(split.val))
        return cls(images, truth, {split.val[i * len(split.val) // count]: [] for i in range(count)})

    def add(self, label: str, store: FeatureStore, head: Head) -> None:
        """Add the predictions of one model, the base first."""

        def predict(name: str, size: tuple[int, int]) -> np.ndarray:
            return head.decide(upsample(head.logits(store.read(name)["features"][None]), size))[0]

        self.draw(label, store.source, predict)

    def draw(self, label: str, source: Source, predict: Callable[[str, tuple[int, int]], np.ndarray]) -> None:
        """Add what ``predict`` returns for an image's name and a size: classes or depth ``(H, W)``."""
        for name, row in self.rows.items():
            truth = scored(self.truth.read(name), source.size, source.preprocess)
            if not row:
                image: Image.Image | np.ndarray = read_image(self.images / name, source.preprocess.exif)
                if truth.shape == source.size:
                    image = fit(image, source.size, source.preprocess)
                picture = image if isinstance(image, Image.Image) else Image.fromarray(image)
                row += [("image", _sized(picture)), ("truth", self._map(truth, truth))]
                self.shown[name] = [truth.ravel()]
            when, predicted = "before" if len(row) == 2 else "after", predict(name, (truth.shape[0], truth.shape[1]))
            row.append((f"{when}: {PurePosixPath(label).name}", self._map(predicted, truth)))
            self.shown[name].append(predicted.ravel())

    def _map(self, values: np.ndarray, truth: np.ndarray) -> Image.Image:
        if isinstance(self.truth, Depths):
            top = float(np.nanquantile(truth, 0.98))
            return _sized(heat(np.nan_to_num(values), top, max(values.shape)))
        return _sized(colour(values, self.truth))

    def write(self, folder: Path) -> list[str]:
        """Write a PNG for each image, and return their names."""
        names = []
        for number, (name, row) in enumerate(self.rows.items(), 1):
            names.append(f"{number:02d}-{PurePosixPath(name).stem}.png")
            _sheet([*row, *self._key(name)]).save(folder / names[-1])
        return names

    def _key(self, name: str) -> list[tuple[str, Image.Image]]:
        if isinstance(self.truth, Depths):
            return []
        labels = np.concatenate(self.shown[name])
        return [("classes", class_key(labels, self.truth.classes, self.truth.colours))]


def write_report(
    folder: Path, evaluation: Evaluation, pictures: Pictures, force: bool, reads: Iterable[Path | None]
) -> None:
    """Write ``evaluation.json`` and the pictures. ``force``, ``reads``: see ``atomic_folder``."""
    with atomic_folder(folder, force, reads) as place:
        document = {**evaluation.to_json(), "pictures": pictures.write(place)}
        (place / REPORT).write_text(json.dumps(document, indent=1, sort_keys=True) + "\n")


def colour(labels: np.ndarray, masks: Masks) -> Image.Image:
    """Draw classes ``(H, W)`` in the colours of the masks, and pixels of no class as PASCAL VOC does."""
    return Image.fromarray(mask_palette(masks.colours)[labels])


def _sized(picture: Image.Image) -> Image.Image:
    width = max(1, round(picture.width * HEIGHT / picture.height))
    return picture.resize((width, HEIGHT), Image.Resampling.NEAREST)


def _sheet(row: list[tuple[str, Image.Image]]) -> Image.Image:
    width = sum(picture.width + GAP for _, picture in row) + GAP
    page = Image.new("RGB", (width, HEIGHT + CAPTION + 2 * GAP), (250, 250, 248))
    draw, left = ImageDraw.Draw(page), GAP
    for text, picture in row:
        draw.text((left, GAP), text, fill=(40, 40, 40))
        page.paste(picture, (left, GAP + CAPTION))
        left += picture.width + GAP
    return page
