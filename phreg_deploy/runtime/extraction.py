"""Files of images -> files of features: one ``.npy`` and one picture an image."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from phreg_deploy.errors import PhregError
from phreg_deploy.photographs import list_images
from phreg_deploy.pictures import colours, components, heat, sheet
from phreg_deploy.progress import SILENT, Progress
from phreg_deploy.runtime.features import FeatureExtractor
from phreg_deploy.whole import whole_folder


def extract_images(
    extractor: FeatureExtractor, images: list[Path], output: Path, *, size: tuple[int, int] | None = None, pictures: bool = True,
    force: bool = False, progress: Progress = SILENT,
) -> dict[str, Any]:  # fmt: skip
    """Write ``NAME.npy`` (float32 ``(Hp, Wp, C)``) and ``NAME.png`` (image, features as colours, norms as heat) for every image.

    Args:
        images: files, or folders that are searched. A folder's unreadable files are skipped and named; a file that was
            named and cannot be read is an error.

    ``features.json`` beside them is the index, which is also returned.

    Returns:
        ``images``: per image its name, files, shape and artifact rate; ``skipped``: names and reasons.
    """
    wanted = [(path, True) for path in images if not path.is_dir()]
    wanted += [(path, False) for folder in images if folder.is_dir() for path in list_images(folder)]
    names = _names([path for path, _ in wanted])
    size = size or extractor.manifest.sizes.default
    extractor.manifest.sizes.check(size, extractor.spec.patch)
    report: dict[str, Any] = {"output": str(output), "backend": extractor.backend, "images": [], "skipped": {}}
    basis = None
    with (
        whole_folder(output, force, [extractor.bundle.folder, *images]) as folder,
        progress.task("extracting", len(wanted)) as advance,
    ):
        for (path, named), name in zip(wanted, names):
            try:
                array = extractor.prepare(path, size)
            except PhregError as error:
                if named:
                    raise
                report["skipped"][str(path)] = str(error)
                advance()
                continue
            dense = extractor.dense(array[None])
            np.save(folder / f"{name}.npy", dense.features[0], allow_pickle=False)
            if pictures:
                basis = components([dense.features[0]]) if basis is None else basis  # one set of colours for all
                top = 3 * (dense.norm_median or float(np.median(dense.token_norm)))
                parts = [
                    ("image", Image.fromarray(array)),
                    ("features (PCA)", colours(dense.features[0], basis)),
                    ("token norms", heat(dense.token_norm[0], top)),
                ]
                sheet([parts]).save(folder / f"{name}.png")
            report["images"].append(
                {
                    "image": str(path),
                    "features": f"{name}.npy",
                    "shape": list(dense.features.shape[1:]),
                    "artifact_rate": float(dense.artifact_rate[0]),
                }
            )
            advance()
        if not report["images"]:
            raise PhregError(
                f"extract: none of the {len(wanted)} images can be read. The first: {next(iter(report['skipped'].values()))}"
            )
        (folder / "features.json").write_text(json.dumps(report, indent=1) + "\n")
    return report


def _names(paths: list[Path]) -> list[str]:
    """File names without suffix; the second of a name gets a number. Unlike also where case does not count."""
    taken: set[str] = set()
    names = []
    for path in paths:
        name, count = path.stem, 1
        while name.lower() in taken:
            count += 1
            name = f"{path.stem}-{count}"
        taken.add(name.lower())
        names.append(name)
    return names
