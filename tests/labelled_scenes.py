"""Folders of drawn scenes with their truth, for tests of linear probes."""

from pathlib import Path

import numpy as np
from PIL import Image

from phreg_deploy.demo.scenes import CLASSES, make_scene

SIDE = 64
PALETTE = [(10 * k, 255 - 10 * k, 5 * k) for k in range(len(CLASSES))]


def write_labelled(folder: Path, count: int = 12) -> Path:
    """Write images, masks with a palette, and 16-bit depth in millimetres of ``count`` scenes of 64 x 64 pixels.

    Names are those of frames of three videos. The lowest four rows of each mask are of no class (255). Depth is 1 m
    below and 9 m above, and 0, unknown, in the first four columns.
    """
    for part in ("images", "masks", "depth"):
        (folder / part).mkdir(parents=True)
    rows = np.linspace(9, 1, SIDE)[:, None] * np.ones((1, SIDE))
    rows[:, :4] = 0
    for i in range(count):
        image, labels = make_scene(500 + i, SIDE)
        labels[-4:] = 255
        name = f"drive{i % 3}_{i:04d}"
        Image.fromarray(image).save(folder / "images" / f"{name}.png")
        mask = Image.fromarray(labels)
        # All 256 colours: with fewer, Pillow would write fewer bits, and 255 would become 15.
        mask.putpalette([level for colour in [*PALETTE, *[(0, 0, 0)] * (256 - len(PALETTE))] for level in colour])
        mask.save(folder / "masks" / f"{name}.png")
        Image.fromarray((1000 * rows).astype(np.uint16)).save(folder / "depth" / f"{name}.png")
    (folder / "names.txt").write_text("\n".join(CLASSES) + "\n")
    return folder
