"""Draw the answers of heads over the image: classes in their colours, depth as heat."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw

from phreg_deploy.images.pictures import GROUND, INK, SIDE, heat
from phreg_deploy.layers import DEPTH, SEGMENTATION

Colours = Sequence[tuple[int, int, int]]
# Share of the colours over the image.
SHARE = 0.5
# Lines of a key.
KEY_LINES, KEY_LINE = 14, 16
# Pixels of no class, as PASCAL VOC draws them.
NO_CLASS = (224, 224, 192)


def voc_colours() -> tuple[tuple[int, int, int], ...]:
    """Return the 256 colours of PASCAL VOC's masks: bits of the number, spread over red, green and blue."""
    index = np.arange(256)
    levels = [sum((index >> 3 * bit + channel & 1) << 7 - bit for bit in range(3)) for channel in range(3)]
    return tuple((int(r), int(g), int(b)) for r, g, b in zip(*levels))


def palette(colours: Colours | None = None) -> np.ndarray:
    """Return a colour for each of 256 classes, uint8 ``(256, 3)``: those given, then those of PASCAL VOC."""
    table = np.array(voc_colours(), np.uint8)
    if colours is not None:
        table[: len(colours)] = colours
    return table


def mask_palette(colours: Colours | None = None) -> np.ndarray:
    """Return the ``palette`` of masks, whose value 255 means no class and is drawn in ``NO_CLASS``."""
    table = palette(colours)
    table[-1] = NO_CLASS
    return table


def overlay(image: Image.Image | np.ndarray, labels: np.ndarray, colours: Colours | None = None) -> Image.Image:
    """Draw classes ``(h, w)``, enlarged to the image by the nearest one, over an RGB image.

    Args:
        colours: 8-bit RGB by class; None takes those of PASCAL VOC.
    """
    picture = Image.fromarray(image) if isinstance(image, np.ndarray) else image.convert("RGB")
    drawn = Image.fromarray(palette(colours)[labels]).resize(picture.size, Image.Resampling.NEAREST)
    return Image.blend(picture, drawn, SHARE)


def draw_answer(
    image: Image.Image | np.ndarray, kind: str, answer: np.ndarray, colours: Colours | None = None
) -> Image.Image:
    """Draw one head's answer to one image.

    Args:
        kind: "segmentation" with logits ``(h, w, K)``, "labels" with classes ``(h, w)``, or "depth" ``(h, w)``, whose
            98th percentile and beyond are brightest.
    """
    if kind == DEPTH:
        return heat(answer, max(float(np.quantile(answer, 0.98)), 1e-12), max(answer.shape))
    return overlay(image, classes_of(kind, answer), colours)


def classes_of(kind: str, answer: np.ndarray) -> np.ndarray:
    """Return the classes, uint8 ``(h, w)``, of a head's answer: those of the largest logits of "segmentation"."""
    return answer.argmax(-1).astype(np.uint8) if kind == SEGMENTATION else answer


def class_key(
    labels: np.ndarray, classes: Sequence[str], colours: Colours | None = None, shade: float = 1.0
) -> Image.Image:
    """Draw the names of the classes that occur in ``labels`` with their colours; those of most places come first.

    Args:
        labels: classes, uint8 ``(h, w)``; values beyond ``classes`` are left out.
        colours: 8-bit RGB by class; None takes those of PASCAL VOC.
        shade: share of the colours, as in an overlay; the rest is grey.
    """
    counts = np.bincount(labels.ravel(), minlength=len(classes))[: len(classes)]
    found = [int(k) for k in np.argsort(-counts, kind="stable") if counts[k]]
    lines = [(k, f"{k} {classes[k]}") for k in found]
    more = len(lines) - KEY_LINES
    shown = lines if more <= 0 else lines[: KEY_LINES - 1]
    table = np.rint(palette(colours) * shade + 128 * (1 - shade)).astype(np.uint8)
    height = KEY_LINE * max(1, len(shown) + (more > 0))
    page = Image.new("RGB", (SIDE, height), GROUND)
    draw = ImageDraw.Draw(page)
    for y, (k, text) in enumerate(shown):
        red, green, blue = (int(level) for level in table[k])
        draw.rectangle((0, y * KEY_LINE + 2, 11, y * KEY_LINE + 13), fill=(red, green, blue), outline=INK)
        # Pillow without FreeType draws Latin-1 alone.
        draw.text((18, y * KEY_LINE + 2), text.encode("latin-1", "replace").decode("latin-1"), fill=INK)
    if more > 0:
        draw.text((18, len(shown) * KEY_LINE + 2), f"and {more + 1} more", fill=INK)
    return page
