"""Draw features: principal components as colours, norms as heat. Needs numpy and Pillow only."""

from __future__ import annotations

import base64
import io

import numpy as np
from PIL import Image, ImageDraw

SIDE = 256
GROUND, INK = (250, 250, 248), (40, 40, 40)
# Colours from dark to bright; those between are interpolated.
HEAT = np.array([[4, 5, 20], [62, 15, 92], [140, 41, 99], [221, 81, 58], [252, 165, 10], [252, 255, 164]], np.float64)


def components(maps: list[np.ndarray]) -> np.ndarray:
    """Compute the mean and the three principal axes of the patch tokens of all ``maps``, as columns ``(C, 4)``.

    The 2 % of tokens farthest from the mean are left out, so that artifacts do not choose the colours.
    """
    tokens = np.concatenate([m.reshape(-1, m.shape[-1]) for m in maps]).astype(np.float64)
    mean = tokens.mean(0)
    distance = np.linalg.norm(tokens - mean, axis=1)
    kept = tokens[distance <= np.quantile(distance, 0.98)]
    mean = kept.mean(0)
    _, vectors = np.linalg.eigh(np.cov((kept - mean).T))
    return np.column_stack([mean, vectors[:, ::-1][:, :3]])


def span(maps: list[np.ndarray], basis: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return what is darkest and brightest in each of the three colours of all ``maps``: 2nd and 98th percentile."""
    shown = np.concatenate([_project(m, basis).reshape(-1, 3) for m in maps])
    low, high = np.quantile(shown, (0.02, 0.98), axis=0)
    return low, high


def rgb_values(features: np.ndarray, basis: np.ndarray, low: np.ndarray, high: np.ndarray) -> np.ndarray:
    """Return the colours of features ``(..., C)`` by a basis of ``components``, float64 ``(..., 3)``, 0-255."""
    return np.clip((_project(features, basis) - low) / np.maximum(high - low, 1e-9), 0, 1) * 255  # type: ignore[no-any-return]


def colours(features: np.ndarray, basis: np.ndarray, side: int = SIDE) -> Image.Image:
    """Draw features ``(Hp, Wp, C)`` in RGB by a basis of ``components``; equal features get equal colours."""
    return _enlarge(rgb_values(features, basis, *span([features], basis)), side)


def heat(token_norm: np.ndarray, top: float, side: int = SIDE) -> Image.Image:
    """Draw norms ``(Hp, Wp)`` from 0 to ``top`` as heat; larger norms are as bright as ``top``."""
    place = np.clip(token_norm.astype(np.float64) / top, 0, 1) * (len(HEAT) - 1)
    below = np.minimum(place.astype(int), len(HEAT) - 2)
    part = (place - below)[..., None]
    return _enlarge(HEAT[below] * (1 - part) + HEAT[below + 1] * part, side)


def sheet(rows: list[list[tuple[str, Image.Image]]], side: int = SIDE) -> Image.Image:
    """Draw images with captions on a light ground, row by row; each keeps its aspect within ``side`` pixels."""
    gap, caption = 12, 20
    scaled = [[(text, _scale(picture, side)) for text, picture in row] for row in rows]
    heights = [caption + max(picture.height for _, picture in row) + gap for row in scaled]
    width = max(len(row) for row in rows) * (side + gap) + gap
    page = Image.new("RGB", (width, sum(heights) + gap), GROUND)
    draw, top = ImageDraw.Draw(page), gap
    for row, height in zip(scaled, heights):
        for x, (text, picture) in enumerate(row):
            left = gap + x * (side + gap)
            draw.text((left, top), text, fill=INK)
            page.paste(picture, (left, top + caption))
        top += height
    return page


def data_url(picture: Image.Image) -> str:
    """Encode a photograph as the URL of a JPEG, for an HTML page."""
    data = io.BytesIO()
    picture.save(data, "JPEG", quality=85, optimize=True)
    return "data:image/jpeg;base64," + base64.b64encode(data.getvalue()).decode()


def _project(features: np.ndarray, basis: np.ndarray) -> np.ndarray:
    return (features.astype(np.float64) - basis[:, 0]) @ basis[:, 1:]  # type: ignore[no-any-return]


def _enlarge(pixels: np.ndarray, side: int) -> Image.Image:
    height, width = pixels.shape[:2]
    scale = side / max(height, width)
    small = Image.fromarray(np.rint(pixels).astype(np.uint8))
    return small.resize((round(width * scale), round(height * scale)), Image.Resampling.NEAREST)


def _scale(picture: Image.Image, side: int) -> Image.Image:
    """Scale the long side to ``side`` pixels: by whole pixels to enlarge, by means to shrink."""
    longest = max(picture.size)
    size = max(1, round(side * picture.width / longest)), max(1, round(side * picture.height / longest))
    return picture.resize(size, Image.Resampling.BOX if longest > side else Image.Resampling.NEAREST)
