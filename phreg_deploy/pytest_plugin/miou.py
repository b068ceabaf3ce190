"""``assert_miou``: the mean IoU of a head that the bundle serves, on images with masks. Nothing is trained."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from PIL import Image

from phreg_deploy.bundle.heads import ServedHead
from phreg_deploy.bundle.manifest import Manifest
from phreg_deploy.errors import PhregError
from phreg_deploy.evaluation.data.truth import VOID, Masks, check_sides, find_truth, read_masks, scored
from phreg_deploy.evaluation.scores import COUNTS, ClassParts, class_row, per_image
from phreg_deploy.images.decoding import read_image
from phreg_deploy.images.overlays import mask_palette
from phreg_deploy.images.photographs import fit
from phreg_deploy.images.pictures import sheet
from phreg_deploy.images.upsampling import upsample
from phreg_deploy.layers import LABELS, SEGMENTATION
from phreg_deploy.progress import SILENT
from phreg_deploy.pytest_plugin.context import Assertion, CaseContext, refusing
from phreg_deploy.pytest_plugin.failures import IMAGES, Miss, Place, Verdict
from phreg_deploy.pytest_plugin.pictures import Rows, label_row
from phreg_deploy.pytest_plugin.settings import PathLike
from phreg_deploy.runtime.features import FeatureExtractor

MEASURE = "share of wrong pixels"


@dataclass(frozen=True)
class Labelled:
    """One image: pixels uint8 ``(H, W, 3)`` as the model sees them; mask and prediction uint8, ``(H', W')`` both."""

    name: str
    pixels: np.ndarray
    truth: np.ndarray
    predicted: np.ndarray

    def wrong(self, grid: tuple[int, int]) -> np.ndarray:
        """Return the share of wrong pixels in each patch, among those with a class, float64 ``(Hp, Wp)``."""
        rows, columns = (np.arange(s) * g // s for s, g in zip(self.truth.shape, grid))
        patch = (rows[:, None] * grid[1] + columns).reshape(-1)
        known = (self.truth != VOID).reshape(-1)
        wrong = known & (self.truth != self.predicted).reshape(-1)
        count = np.bincount(patch[known], minlength=grid[0] * grid[1])
        return (np.bincount(patch[wrong], minlength=len(count)) / np.maximum(count, 1)).reshape(grid)


class AssertMiou(Assertion):
    """The fixture ``assert_miou``."""

    @refusing
    def __call__(
        self,
        bundle: PathLike | None = None,
        images: PathLike | None = None,
        masks: PathLike | None = None,
        *,
        at_least: float | None = None,
        head: str | None = None,
        limit: int | None = None,
        backend: str | None = None,
    ) -> None:
        """Compare what a head of the bundle predicts with masks, over all pixels that the model sees.

        Logits are enlarged bilinearly to the mask's pixels; labels by the nearest.

        Args:
            images: folder of images. masks: folder of PNG with a palette or in grey, at the images' paths.
            at_least: least mean IoU over the classes that the masks have, 0-1.
            head: the output, such as "labels" or "segmentation.street"; None for the only one.
            limit: images at most; None for all.

        Raises:
            AssertionError: the mean IoU is lower; names the images and patches.
        """
        __tracebackhide__ = True
        context, settings = self._context, self._context.settings
        bar = settings.number("miou", at_least, 1)
        if bar is None:
            raise PhregError("assert_miou: no bar; give at_least to the call, or phreg_miou in the ini.")
        folder = settings.needed_path("images", images, "a folder of images")
        of_masks = settings.needed_path("masks", masks, "a folder of masks")
        count = settings.count("limit", limit)
        extractor = context.load(bundle, backend)
        served = _chosen(extractor.manifest, head)
        files, missing = find_truth(folder, of_masks, (".png",))
        files = dict(list(files.items())[:count])
        truth = read_masks(files, of_masks, None, served.ignore, SILENT)
        if len(truth.classes) > len(served.classes):
            raise PhregError(
                f"masks: {of_masks} has the class {len(truth.classes) - 1}, but the head {served.output} knows "
                f"{len(served.classes)} classes, from 0. Give masks with the classes that it was trained on."
            )
        labelled = [_predict(extractor, served, folder / name, name, truth) for name in files]
        _settle(context, extractor, served, labelled, bar, missing)


def _chosen(manifest: Manifest, output: str | None) -> ServedHead:
    heads = [head for head in manifest.heads if head.kind in (SEGMENTATION, LABELS)]
    names = ", ".join(head.output for head in heads)
    if not heads:
        raise PhregError("assert_miou: the bundle has no head for classes; add one by `phreg-deploy attach`.")
    if output is None and len(heads) > 1:
        raise PhregError(f"assert_miou: the bundle has several heads; give head, one of {names}.")
    found = heads[0] if output is None else next((head for head in heads if head.output == output), None)
    if found is None:
        raise PhregError(f"assert_miou: got the head {output!r}, expected one of {names}.")
    return found


def _predict(extractor: FeatureExtractor, head: ServedHead, path: PathLike, name: str, masks: Masks) -> Labelled:
    size, steps = extractor.manifest.sizes.default, extractor.manifest.preprocess
    image, mask = read_image(path, steps.exif), masks.read(name)
    check_sides(mask, image, name)
    truth, pixels = scored(mask, size, steps), fit(image, size, steps)
    answer = extractor.dense(pixels[None]).heads[head.output]
    if head.kind == SEGMENTATION:
        predicted = upsample(answer, truth.shape)[0].argmax(-1).astype(np.uint8)
    else:
        nearest = Image.fromarray(answer[0]).resize(truth.shape[::-1], Image.Resampling.NEAREST)
        predicted = np.asarray(nearest)
    return Labelled(name, pixels, truth, predicted)


def _settle(
    context: CaseContext,
    extractor: FeatureExtractor,
    head: ServedHead,
    labelled: list[Labelled],
    bar: float,
    missing: list[str],
) -> None:
    __tracebackhide__ = True
    label = context.label("miou", extractor)
    rows = np.stack([class_row(one.predicted, one.truth, len(head.classes)) for one in labelled])
    parts = ClassParts(rows, np.zeros_like(rows), np.zeros((len(rows), len(COUNTS))))
    figure = float(parts.figures(np.ones((1, len(rows))))["miou"][0])
    by_class = dict(zip(head.classes, parts.class_iou()))
    by_image = np.nan_to_num(per_image(parts, "miou"), nan=1.0)
    classes = {f"class.{name}": iou for name, iou in by_class.items()}
    context.record(label, {"head": head.output, "miou": figure, "images": len(rows), **classes})
    document = {
        "head": head.output,
        "miou": figure,
        "classes": by_class,
        "images": [{"image": one.name, "miou": float(iou)} for one, iou in zip(labelled, by_image)],
        "without_mask": missing,
    }
    if figure >= bar:
        Verdict("assert_miou", label, extractor, (), document).settle(context)
        return
    grid = tuple(side // patch for side, patch in zip(extractor.manifest.sizes.default, extractor.manifest.model.patch))
    worst = [labelled[i] for i in np.argsort(by_image, kind="stable")[:IMAGES]]
    wrong = [one.wrong((grid[0], grid[1])) for one in worst]
    places = [Place.of(one.name, MEASURE, errors) for one, errors in zip(worst, wrong)]
    colours = mask_palette(head.colours)
    pictures: Rows = [
        label_row(one.pixels, one.truth, one.predicted, colours, errors, place)
        for one, errors, place in zip(worst, wrong, places)
    ]
    sentence = f"mean IoU of {head.output} on {len(rows)} images is {figure:.4f}, expected at least {bar:g}"
    miss = Miss("miou", figure, bar, sentence, tuple(places))
    Verdict("assert_miou", label, extractor, [miss], document, sheet(pictures)).settle(context)
