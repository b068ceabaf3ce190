"""Draw street and yard scenes from a seed, with their exact segmentation. Needs no PyTorch.

Pillow draws the shapes at twice the size and averages them down; numpy then adds grain and light. Lengths are shares of
the side, the origin is top left; colours are RGB on a scale of 0-255.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw

CLASSES = ("sky", "hill", "grass", "road", "building", "tree", "vehicle", "person", "box")
SKY, HILL, GRASS, ROAD, BUILDING, TREE, VEHICLE, PERSON, BOX = range(len(CLASSES))
# Noise of each class's surface, in grey levels.
GRAIN = np.array([0.4, 4, 10, 7, 5, 14, 2, 3, 5], dtype=np.float32)
OVERHEAD = ((72, 128, 204), (118, 160, 206), (150, 160, 172), (92, 92, 150), (60, 100, 160))
# One for each of OVERHEAD.
FAR_SKY = ((190, 216, 236), (226, 230, 226), (206, 208, 208), (244, 190, 150), (238, 214, 180))
GROUNDS = ((104, 140, 66), (126, 150, 78), (150, 142, 84), (86, 122, 70), (168, 150, 112))
ROADS = ((98, 98, 102), (122, 118, 114), (84, 86, 94), (150, 142, 132))
ROOFS = ((140, 66, 52), (92, 84, 84), (116, 90, 70))
WALLS = ((178, 96, 74), (208, 186, 154), (150, 152, 158), (222, 214, 200), (126, 108, 96), (108, 126, 146))
LEAVES = ((58, 104, 48), (82, 124, 52), (44, 88, 56), (128, 128, 48), (176, 108, 44))
PAINTS = ((196, 44, 40), (38, 84, 168), (232, 232, 228), (44, 46, 52), (226, 172, 40), (52, 132, 118), (158, 162, 168))
CLOTHES = ((206, 60, 60), (48, 78, 150), (230, 200, 70), (60, 60, 66), (70, 140, 90), (222, 222, 222), (150, 70, 140))
SKINS = ((236, 196, 164), (198, 146, 108), (132, 88, 62), (92, 62, 46))
CARTONS = ((188, 142, 92), (206, 166, 112), (160, 116, 72), (70, 110, 150), (214, 120, 50))
Shape = tuple[Any, ...]
# The whole picture; points are (right, down).
PAGE = (0, 0, 1, -1)
CAR = (((-0.36, 0.9), (-0.24, 1.6), (0.12, 1.6), (0.3, 0.9)), ((-0.28, 0.95), (-0.2, 1.48), (0.09, 1.48), (0.22, 0.95)))
VAN = (((-0.5, 0.6), (-0.48, 1.7), (0.28, 1.7), (0.42, 0.9)), ((0.08, 1.0), (0.08, 1.55), (0.25, 1.55), (0.35, 1.0)))


def make_scene(seed: int, size: int = 128) -> tuple[np.ndarray, np.ndarray]:
    """Draw an image, uint8 RGB ``(size, size, 3)``, and its labels, uint8 ``(size, size)``, indices of ``CLASSES``."""
    return Scene(seed, size).finished()


def write_scenes(folder: Path, seeds: range) -> None:
    """Write ``scene-SEED.png`` of 128 x 128 pixels for each seed; ``make_scene`` draws its labels again."""
    folder.mkdir(parents=True, exist_ok=True)
    for seed in seeds:
        Image.fromarray(make_scene(seed)[0]).save(folder / f"scene-{seed:06d}.png")


class Scene:
    """A picture and its labels, drawn together from back to front."""

    def __init__(self, seed: int, size: int) -> None:
        self.rng, self.size, self.side = np.random.default_rng(seed), size, 2 * size
        self.between, self.horizon = self.rng.uniform, self.rng.uniform(0.34, 0.58)
        self.picture, self.labels = (Image.new(mode, (self.side, self.side)) for mode in ("RGB", "L"))
        self.pen, self.marker = ImageDraw.Draw(self.picture), ImageDraw.Draw(self.labels)
        # Light comes from the right or from the left.
        self.sun = self.rng.choice((-1, 1))
        # Brightness of a side that is turned away from the light.
        self.dark = self.between(0.62, 0.85)
        for layer in (self.backdrop, self.road, self.things):
            layer()

    def colour(self, palette: Shape, spread: float = 14) -> np.ndarray:
        noise = self.rng.normal(0, spread) + self.rng.normal(0, spread * 0.6, 3)
        return np.asarray(np.clip(palette[self.rng.integers(len(palette))] + noise, 8, 248))

    def draw(self, points: Shape, colour: Any, label: int | None, at: Shape = PAGE, shape: str = "polygon") -> None:
        """Fill a shape; ``points`` (right, up) in units of ``at`` (x, y, width, height). No label: a detail."""
        x, y, width, height = at
        pixels = [((x + u * width) * self.side, (y - v * height) * self.side) for u, v in points]
        # Pillow expects the lower coordinate first.
        if shape != "polygon":
            pixels = [tuple(np.min(pixels, axis=0)), tuple(np.max(pixels, axis=0))]
        getattr(self.pen, shape)(pixels, fill=tuple(int(c) for c in np.clip(colour, 0, 255)))
        if label is not None:
            getattr(self.marker, shape)(pixels, fill=label)

    def disc(self, x: float, y: float, rx: float, ry: float, colour: Any, label: int | None = None) -> None:
        self.draw(((-1, -1), (1, 1)), colour, label, (x, y, rx, ry), "ellipse")

    def shadow(self, x: float, y: float, half: float) -> None:
        under = self.picture.getpixel((int(min(max(x, 0), 0.99) * self.side), int(min(y, 0.99) * self.side)))
        self.disc(x - self.sun * half * 0.5, y, half * 1.25, half * 0.22, np.array(under) * 0.62)

    def smooth(self, cells: int, side: int, aspect: int = 1) -> np.ndarray:
        """Draw soft noise ``(side, side)``, deviation 0.5: ``cells`` bumps across, ``aspect`` times as many down."""
        coarse = Image.fromarray(self.rng.normal(0, 0.7, (cells * aspect, cells)).astype(np.float32))
        return np.asarray(coarse.resize((side, side), Image.Resampling.BICUBIC))

    def backdrop(self) -> None:
        """Draw sky with clouds, hills, and the ground."""
        mood = self.rng.integers(len(OVERHEAD))
        top, low = (palette[mood] + self.rng.normal(0, 6, 3) for palette in (OVERHEAD, FAR_SKY))
        rise = np.clip(np.linspace(0, 1, self.side) / self.horizon, 0, 1) ** self.between(0.8, 1.8)
        sky = np.broadcast_to(top + (low - top) * rise[:, None, None], (self.side, self.side, 3))
        if self.rng.random() < 0.6:
            layers = sum(self.smooth(cells, self.side, 3) / (i + 1) for i, cells in enumerate((3, 7, 15)))
            sky = sky + (246 - sky) * 0.8 * np.clip(layers - self.between(-0.1, 0.7), 0, 1)[..., None]
        self.picture.paste(Image.fromarray(np.clip(sky, 0, 255).astype(np.uint8)))
        across = np.linspace(0, 1, 40)
        for depth in range(self.rng.integers(0, 3)):
            waves = np.sum([np.sin(across * self.between(3, 16) + self.between(0, 6)) / (i + 1) for i in range(3)], 0)
            ridge = self.horizon - self.between(0.02, 0.12) / (depth + 1) * (1.3 + 0.6 * waves)
            hazy = self.colour(GROUNDS) * (0.3 + 0.2 * depth) + low * (0.6 - 0.3 * depth)
            self.draw((*zip(across, ridge), (1, 1), (0, 1)), hazy, HILL)
        self.draw(((0, self.horizon), (1, 1)), self.colour(GROUNDS), GRASS, shape="rectangle")

    def road(self) -> None:
        """Draw a road to the horizon, a road across, a paved yard, or none; with markings."""
        kind, tar, far = self.rng.integers(4), self.colour(ROADS, 8), self.horizon
        paint = (226, 222, 206) if self.rng.random() < 0.7 else (222, 184, 70)
        if kind == 0:
            goal, near, half = self.between(0.2, 0.8), self.between(0.2, 0.8), self.between(0.25, 0.55)
            self.draw(((goal - 0.02, far), (goal + 0.02, far), (near + half, 1), (near - half, 1)), tar, ROAD)
            for a in (0.05, 0.09, 0.2, 0.4, 0.7):
                dash = ((a, -0.02), (a, 0.02), (a * 1.3, 0.02), (a * 1.3, -0.02))
                self.draw(tuple((goal + (near - goal + w) * t, far + (1 - far) * t) for t, w in dash), paint, None)
        elif kind < 3:  # across, or from an edge down: a yard
            y, tilt = self.between(far + 0.04, 0.8), self.between(-0.07, 0.07)
            width = self.between(0.14, 0.26) if kind == 1 else 1.0
            self.draw(((0, y), (1, y + tilt), (1, y + tilt + width), (0, y + width)), tar, ROAD)
            for x in np.arange(self.between(0, 0.1), 1, 0.16):  # a yard's middle line lies below the picture
                dash = ((0, 0), (0.07, 0.07 * tilt), (0.07, 0.07 * tilt + 0.014), (0, 0.014))
                self.draw(dash, paint, None, (x, y + tilt * x + width / 2, 1, -1))

    def things(self) -> None:
        """Draw buildings at the horizon, then all else from far to near; near things then occlude far ones."""
        x = self.between(-0.1, 0.4)
        for width in self.between(0.14, 0.4, self.rng.choice(4, p=(0.2, 0.3, 0.3, 0.2))):
            self.building(x, self.horizon + self.between(0, 0.05), width, self.between(0.12, 0.5))
            x += width + self.between(-0.03, 0.3)
        makers, liked = (self.tree, self.vehicle, self.person, self.box), self.rng.dirichlet(np.full(4, 0.8))
        for near in np.sort(self.rng.beta(1.3, 1.2, self.rng.integers(3, 9))):
            y = self.horizon + 0.03 + (0.97 - self.horizon) * near
            scale = 0.3 + 0.8 * (y - self.horizon) / (1 - self.horizon)  # the horizon is at eye level
            makers[self.rng.choice(4, p=liked)](self.between(0, 1), y, scale)

    def building(self, x: float, y: float, width: float, height: float) -> None:
        wall, depth, at = self.colour(WALLS), self.between(-0.1, 0.35), (x, y, width, height)
        if depth > 0.1:
            flank = ((1, 0), (1 + depth, 0.02), (1 + depth, 1 - 0.3 * depth), (1, 1))
            self.draw(flank, wall * self.dark, BUILDING, at if self.sun < 0 else (x + width, y, -width, height))
        if height < 0.25:  # a house
            self.draw(((-0.1, 1), (0.5, self.between(1.2, 1.5)), (1.1, 1)), self.colour(ROOFS), BUILDING, at)
        self.draw(((0, 0), (1, 1)), wall, BUILDING, at, "rectangle")
        glass = np.array((196, 214, 226) if self.rng.random() < 0.3 else (58, 72, 92))
        across, down, fill = 2 + int(width * 9), 1 + int(height * self.between(8, 12)), self.between(0.45, 0.7)
        for i, j in np.ndindex(across, down):
            pane = np.array((244, 214, 140)) if self.rng.random() < 0.06 else glass * self.between(0.85, 1.15)
            u, v = (i + 0.5 - fill / 2) / across, (j + 0.5 - fill / 2) / down
            self.draw(((u, v), (u + fill / across, v + fill / down)), pane, None, at, "rectangle")

    def tree(self, x: float, y: float, scale: float) -> None:
        leaf, height, half = self.colour(LEAVES), self.between(0.3, 0.55) * scale, self.between(0.09, 0.16) * scale
        at = (x, y, half, height)
        self.shadow(x, y, half)
        self.draw(((-0.15, 0), (0.15, 0.5)), (94, 70, 50), TREE, at, "rectangle")
        if self.rng.random() < 0.35:  # a conifer
            for low, wide in ((0.2, 1), (0.45, 0.75), (0.7, 0.5)):
                self.draw(((-wide, low), (0, low + 0.42), (wide, low)), leaf * (0.8 + 0.3 * low), TREE, at)
            return
        for u, v in self.rng.normal(0, 0.42, (9, 2)):
            r, light = half * self.between(0.5, 0.75), 1 + 0.16 * (self.sun * u - v)
            self.disc(x + u * half, y - height * 0.72 + v * half, r, r, leaf * light, TREE)

    def vehicle(self, x: float, y: float, scale: float) -> None:
        paint, height = self.colour(PAINTS), self.between(0.1, 0.14) * scale
        length = self.between(0.3, 0.42) * scale * self.rng.choice((-1, 1))  # it may face either way
        at, (cabin, panes) = (x, y, length, height), VAN if self.rng.random() < 0.35 else CAR
        self.shadow(x, y, abs(length) * 0.5)
        self.draw(cabin, paint * 0.92, VEHICLE, at)
        self.draw(((-0.5, 0.4), (-0.5, 0.9), (0.32, 0.95), (0.5, 0.8), (0.5, 0.4)), paint, VEHICLE, at)
        self.draw(((-0.5, 0.2), (0.5, 0.42)), paint * self.dark, VEHICLE, at, "rectangle")
        self.draw(panes, (70, 88, 106), None, at)
        for u in (-0.3, 0.3):
            for share, colour in ((0.27, (30, 30, 32)), (0.13, (150, 150, 154))):
                self.disc(x + u * length, y - 0.25 * height, share * height, share * height, colour, VEHICLE)
        self.draw(((0.43, 0.6), (0.48, 0.75)), (250, 240, 196), None, at, "ellipse")

    def person(self, x: float, y: float, scale: float) -> None:
        skin, shirt, cloth = self.colour(SKINS, 5), self.colour(CLOTHES), self.colour(CLOTHES) * 0.6
        height, stride = self.between(0.24, 0.32) * scale, self.between(0.1, 0.9)
        self.shadow(x, y, height * 0.22)
        for side in (-1, 1):  # one unit across is half a shoulder width
            at, foot, hand = (x, y, side * 0.13 * height, height), stride, 1 + stride
            self.draw(((-0.2, 0.5), (0.8, 0.5), (foot + 0.4, 0), (foot - 0.4, 0)), cloth, PERSON, at)
            self.draw(((0.6, 0.82), (1, 0.8), (hand, 0.45), (hand - 0.5, 0.43)), shirt * self.dark, PERSON, at)
        self.draw(((-1, 0.83), (1, 0.83), (0.85, 0.44), (-0.85, 0.44)), shirt, PERSON, at)
        self.disc(x, y - 0.9 * height, 0.09 * height, 0.1 * height, skin, PERSON)
        self.draw(((-0.7, 0.93), (-0.4, 1.02), (0.4, 1.02), (0.7, 0.93)), cloth * 0.5, PERSON, at)

    def box(self, x: float, y: float, scale: float) -> None:
        width, height = self.between(0.12, 0.22) * scale, self.between(0.09, 0.18) * scale
        self.shadow(x, y, width * 0.6)
        for _ in range(self.rng.integers(1, 4)):
            carton, lift, at = self.colour(CARTONS), 0.15 * width / height, (x, y, -self.sun * width, height)
            self.draw(((0.5, 0), (0.8, lift), (0.8, 1 + lift), (0.5, 1)), carton * self.dark, BOX, at)
            self.draw(((-0.5, 1), (-0.2, 1 + lift), (0.8, 1 + lift), (0.5, 1)), carton * 1.12, BOX, at)
            self.draw(((-0.5, 0), (0.5, 1)), carton, BOX, at, "rectangle")
            self.draw(((-0.07, 0), (0.07, 1)), carton * 0.84, None, at, "rectangle")
            x, y, width, height = x + self.between(-0.1, 0.1) * width, y - height, width * 0.9, height * 0.8

    def finished(self) -> tuple[np.ndarray, np.ndarray]:
        """Average down; add the grain of each surface, uneven light, exposure and sensor noise."""
        n, labels = self.size, np.asarray(self.labels)[::2, ::2].copy()
        grain = (self.rng.standard_normal((n, n), dtype=np.float32) + self.smooth(n // 4, n)) * GRAIN[labels]
        fall = (0.86 + 0.24 * np.linspace(0, 1, n))[:, None]  # distance dims the ground
        light = np.where(labels == SKY, 1, fall + 0.1 * self.smooth(3, n))[..., None]
        light = light * self.between(0.82, 1.12) * (1 + self.rng.normal(0, 0.025, 3))  # exposure and tint
        image = (np.asarray(self.picture.reduce(2)) + grain[..., None]) * light
        return np.clip(image + self.rng.normal(0, 1.2, (n, n, 3)), 0, 255).astype(np.uint8), labels
