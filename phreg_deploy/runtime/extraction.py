"""Files of images -> files of features, one ``.npy`` an image and output, with an index of them: ``features.json``."""

from __future__ import annotations

import contextlib
import io
import json
import os
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from phreg_deploy.arguments import refuse_url
from phreg_deploy.errors import Interrupted, PhregError
from phreg_deploy.files.atomic import atomic_folder
from phreg_deploy.images.photographs import list_images
from phreg_deploy.images.pictures import colours, components, heat, sheet
from phreg_deploy.progress import SILENT, Progress
from phreg_deploy.runtime.dense_features import DenseFeatures
from phreg_deploy.runtime.features import FeatureExtractor

INDEX = "features.json"
OUTPUTS = ("features", "cls", "token_norm")
DTYPES = ("float32", "float16")


def find_images(images: Iterable[Path]) -> dict[Path, str]:
    """Every image file that was asked for, once, and the name of its features: its path in its folder, without suffix.

    Args:
        images: files, or folders that are searched.

    A name that is taken, also where case does not count, gets a number.

    Raises:
        PhregError: nothing is there, or a folder holds no image.
    """
    found: dict[Path, str] = {}
    seen: set[str] = set()
    taken: set[str] = set()
    for asked in images:
        if not asked.exists():
            refuse_url(str(asked))
            raise PhregError(f"image: there is no file {asked}. Check the name.")
        for path in list_images(asked) if asked.is_dir() else [asked]:
            if os.path.abspath(path) in seen:
                continue
            seen.add(os.path.abspath(path))
            stem = (path.relative_to(asked) if asked.is_dir() else Path(path.name)).with_suffix("").as_posix()
            name, count = stem, 1
            while taken & {_file(name, output).lower() for output in OUTPUTS}:
                count += 1
                name = f"{stem}-{count}"
            taken |= {_file(name, output).lower() for output in OUTPUTS}
            found[path] = name
    return found


def parse_outputs(text: str) -> tuple[str, ...]:
    """Read ``features,cls,token_norm``, or some of them. Raises ``PhregError`` for anything else."""
    names = tuple(dict.fromkeys(part.strip() for part in text.split(",")))
    if not names or not set(names) <= set(OUTPUTS):
        raise PhregError(f"outputs: got {text!r}, expected one or more of {', '.join(OUTPUTS)}, with commas between.")
    return names


def extract_images(
    extractor: FeatureExtractor, found: dict[Path, str], output: Path, *, size: tuple[int, int] | None = None,
    outputs: tuple[str, ...] = ("features",), dtype: str = "float32", pictures: bool = False, force: bool = False,
    resume: bool = False, progress: Progress = SILENT,
) -> dict[str, Any]:  # fmt: skip
    """Write for every image ``NAME.npy`` (features ``(Hp, Wp, C)``), ``NAME.cls.npy`` and ``NAME.token_norm.npy``, as asked.

    A file that cannot be read is left out and named in the index. An interrupt keeps what is done, and an index that says
    so, unless an older output would be replaced by less.

    Args:
        found: what ``find_images`` found.
        outputs: of ``OUTPUTS``. dtype: of features and class tokens; token norms are always float32.
        pictures: write ``NAME.png`` too: the image, its features as colours, its norms as heat.
        resume: take over what ``output`` holds of the same bundle and settings, and extract the rest.

    Returns:
        The index: ``settings``, ``complete``, ``images`` (per image its name, files, shape and artifact rate) and
        ``skipped`` (names and reasons).

    Raises:
        PhregError: no image can be read, an output that the bundle lacks, values beyond float16, other settings to resume.
        Interrupted: by Ctrl-C; its report is the index of what was kept.
    """
    missing = [name for name in outputs if name not in extractor.manifest.outputs]
    if missing:
        raise PhregError(f"outputs: this bundle has no {missing[0]}; it has {', '.join(extractor.manifest.outputs)}.")
    size = size or extractor.manifest.sizes.default
    extractor.manifest.sizes.check(size, extractor.spec.patch)
    settings = {
        "graph_sha256": extractor.manifest.files.get("model.onnx"), "size": list(size), "outputs": list(outputs), "dtype": dtype,
        "pictures": pictures, "preprocess": json.loads(json.dumps(extractor.preprocess.to_json())),
    }  # fmt: skip
    replaces = output.exists() and not resume
    index: dict[str, Any] = {
        "output": str(output),
        "backend": extractor.backend,
        "settings": settings,
        "complete": True,
        "skipped": {},
    }
    entries: dict[Path, dict[str, Any]] = {}
    files = {path: _files(name, outputs, pictures) for path, name in found.items()}
    reads = [extractor.bundle.folder, *sorted({path.parent for path in found})]
    basis, path = None, None
    with atomic_folder(output, force or resume, reads) as folder, progress.task("extracting", len(found)) as advance:
        try:
            if resume:
                entries = _taken_over(output, folder, settings, files)
                advance(len(entries))
            for path in [path for path in found if path not in entries]:
                try:
                    array = extractor.prepare(path, size)
                except PhregError as error:
                    index["skipped"][str(path)] = str(error)
                    advance()
                    continue
                dense = extractor.dense(array[None])
                (folder / found[path]).parent.mkdir(parents=True, exist_ok=True)
                for kind in outputs:
                    _save(
                        folder / files[path][kind],
                        getattr(dense, kind)[0],
                        "float32" if kind == "token_norm" else dtype,
                    )
                if pictures:
                    basis = components([dense.features[0]]) if basis is None else basis  # one set of colours for all
                    _picture(array, dense, basis).save(folder / files[path]["picture"])
                entries[path] = _entry(path, files[path], dense)
                advance()
        except KeyboardInterrupt:
            if replaces or not entries:
                kept = f" {output} is as it was before." if output.exists() else ""
                raise Interrupted(f"Interrupted. Nothing new was kept.{kept}") from None
            if path is not None and path not in entries:
                for file in files[path].values():
                    (folder / file).unlink(missing_ok=True)
            index["complete"] = False
        index["images"] = [entries[path] for path in found if path in entries]
        if not entries:
            raise PhregError(
                f"extract: none of the {len(found)} images can be read. The first: {next(iter(index['skipped'].values()))}"
            )
        (folder / INDEX).write_text(json.dumps(index, indent=1) + "\n")
    if not index["complete"]:
        raise Interrupted(
            f"Interrupted. {output} holds the features of {len(entries)} of {len(found)} images, each of them whole; "
            "the same command with --resume extracts the rest.",
            index,
        )
    return index


def _taken_over(
    output: Path, folder: Path, settings: dict[str, Any], files: dict[Path, dict[str, str]]
) -> dict[Path, dict[str, Any]]:
    """What an earlier run wrote to ``output``, of images that have not changed since, now in ``folder`` too."""
    if not output.exists():
        return {}
    try:
        index = json.loads((output / INDEX).read_text())
        earlier = {entry["image"]: entry for entry in index["images"]}
        if differing := sorted(key for key in settings if index["settings"].get(key) != settings[key]):
            raise PhregError(
                f"resume: {output} was written with another {differing[0]}; choose another output, or --force."
            )
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        raise PhregError(
            f"resume: {output} holds no whole {INDEX}; expected an output of extract. Use --force."
        ) from None
    if others := [name for name in earlier if name not in {str(path) for path in files}]:
        raise PhregError(
            f"resume: {output} holds {len(others)} images that are not asked for now, e.g. {others[0]}; name the same images as before."
        )
    taken = {}
    for path, names in files.items():
        entry = earlier.get(str(path))
        same = entry is not None and {**entry, **names, "stamp": _stamp(path)} == entry
        if entry is None or not same or not all((output / name).is_file() for name in names.values()):
            continue
        for name in names.values():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            try:
                os.link(output / name, folder / name)
            except OSError:  # a file system without hard links
                shutil.copyfile(output / name, folder / name)
        taken[path] = entry
    return taken


def _stamp(path: Path) -> list[int]:
    """What changes when a file is replaced: its bytes and the time of its last change, in nanoseconds."""
    with contextlib.suppress(OSError):
        return [path.stat().st_size, path.stat().st_mtime_ns]
    return []


def _entry(path: Path, files: dict[str, str], dense: DenseFeatures) -> dict[str, Any]:
    return {
        "image": str(path), **files, "shape": list(dense.features.shape[1:]), "artifact_rate": float(dense.artifact_rate[0]),
        "stamp": _stamp(path),
    }  # fmt: skip


def _file(name: str, kind: str) -> str:
    return f"{name}.npy" if kind == "features" else f"{name}.{kind}.npy"


def _files(name: str, outputs: tuple[str, ...], pictures: bool) -> dict[str, str]:
    return {kind: _file(name, kind) for kind in outputs} | ({"picture": f"{name}.png"} if pictures else {})


def _save(path: Path, array: np.ndarray, dtype: str) -> None:
    """One ``.npy``, by a single write: ``np.save`` to a file on a full disk does not say that the disk is full."""
    with np.errstate(over="ignore"):
        narrow = array.astype(dtype)
    if not np.isfinite(narrow).all() and np.isfinite(array).all():
        raise PhregError(f"dtype: features reach {np.abs(array).max():.0f}, beyond float16; use --dtype float32.")
    data = io.BytesIO()
    np.save(data, narrow, allow_pickle=False)
    path.write_bytes(data.getbuffer())


def _picture(array: np.ndarray, dense: DenseFeatures, basis: np.ndarray) -> Image.Image:
    top = 3 * (dense.norm_median or float(np.median(dense.token_norm)))
    return sheet([[
        ("image", Image.fromarray(array)), ("features (PCA)", colours(dense.features[0], basis)), ("token norms", heat(dense.token_norm[0], top)),
    ]])  # fmt: skip
