"""Draw the images of a failure, their features before and after, and marks around the worst patches."""

from __future__ import annotations

import numpy as np
from PIL import Image, ImageDraw

from phreg_deploy.images.pictures import SIDE, colours, components, heat
from phreg_deploy.layers import FEATURES
from phreg_deploy.pytest_plugin.comparison import Compared
from phreg_deploy.pytest_plugin.failures import Place

Rows = list[list[tuple[str, Image.Image]]]
MARK, HALO = (255, 40, 40), (255, 255, 255)
# Characters of a caption.
CAPTION = 40
# Errors that are as bright as possible in the map of errors: no picture shows less than these.
DIMMEST = 1e-6


def marked(picture: Image.Image, place: Place) -> Image.Image:
    """Enlarge a picture to ``SIDE`` and mark the patches of a place."""
    scale = SIDE / max(picture.size)
    size = max(1, round(picture.width * scale)), max(1, round(picture.height * scale))
    method = Image.Resampling.BOX if scale < 1 else Image.Resampling.NEAREST
    large = picture.convert("RGB").resize(size, method)
    draw, (rows, columns) = ImageDraw.Draw(large), place.grid
    for row, column, _ in place.patches:
        left, top = column * large.width // columns, row * large.height // rows
        right, bottom = (column + 1) * large.width // columns - 1, (row + 1) * large.height // rows - 1
        draw.rectangle((left - 2, top - 2, right + 2, bottom + 2), outline=HALO)
        draw.rectangle((left - 1, top - 1, right + 1, bottom + 1), outline=MARK, width=2)
    return large


def parity_row(image: Compared, place: Place, errors: np.ndarray) -> list[tuple[str, Image.Image]]:
    """Draw an image, its features and norms by reference and bundle, and the errors ``(Hp, Wp)`` of a gate."""
    pixels, got, expected = image.again()
    norms = [_sound(outputs["token_norm"]) for outputs in (expected, got)]
    top = 3 * float(np.median(norms[0]))
    row = [(_caption(image.name), marked(Image.fromarray(pixels), place))]
    if FEATURES in expected:
        wanted, features = (_sound(outputs[FEATURES]) for outputs in (expected, got))
        basis = components([wanted])
        row.append(("reference: features (PCA)", colours(wanted, basis)))
        row.append(("bundle: features (PCA)", marked(colours(features, basis), place)))
    return [
        *row,
        ("reference: token norms", heat(norms[0], top)),
        ("bundle: token norms", marked(heat(norms[1], top), place)),
        (place.measure[:CAPTION], marked(error_map(errors), place)),
    ]


def error_map(errors: np.ndarray) -> Image.Image:
    """Draw errors ``(Hp, Wp)`` from 0 to the largest as heat."""
    return heat(errors, max(float(errors.max()), DIMMEST))


def artifact_row(
    pixels: np.ndarray, features: np.ndarray | None, norms: np.ndarray, median: float, place: Place
) -> list[tuple[str, Image.Image]]:
    """Draw an image, its features if there are any, and its token norms, which are bright at 3 medians."""
    row = [(_caption(place.image), marked(Image.fromarray(pixels), place))]
    if features is not None:
        row.append(("features (PCA)", marked(colours(features, components([features])), place)))
    return [
        *row,
        ("token norms, bright at 3 medians", marked(heat(norms, 3 * median), place)),
    ]


def label_row(
    pixels: np.ndarray,
    truth: np.ndarray,
    predicted: np.ndarray,
    palette: np.ndarray,
    wrong: np.ndarray,
    place: Place,
) -> list[tuple[str, Image.Image]]:
    """Draw an image, its mask, the prediction, and the share of wrong pixels in each patch ``(Hp, Wp)``."""
    return [
        (_caption(place.image), marked(Image.fromarray(pixels), place)),
        ("mask", Image.fromarray(palette[truth])),
        ("prediction", marked(Image.fromarray(palette[predicted]), place)),
        ("share of wrong pixels", marked(heat(wrong, 1.0), place)),
    ]


def _caption(name: str) -> str:
    return name if len(name) <= CAPTION else "…" + name[1 - CAPTION :]


def _sound(values: np.ndarray) -> np.ndarray:
    return np.nan_to_num(values.astype(np.float32), nan=0.0, posinf=0.0, neginf=0.0)
