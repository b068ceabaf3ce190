"""Write the features of image files: one ``.npy`` for each image and output, and their index, ``features.json``."""

from __future__ import annotations

import contextlib
import io
import json
import os
import re
import shutil
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from phreg_deploy.arguments import refuse_url
from phreg_deploy.bundle.heads import KINDS, LABELS, NAME, SEGMENTATION
from phreg_deploy.errors import Interrupted, PhregError
from phreg_deploy.files.atomic import atomic_folder
from phreg_deploy.images.photographs import list_images
from phreg_deploy.images.pictures import colours, components, heat, sheet
from phreg_deploy.layers import ATTENTION, kind_of
from phreg_deploy.progress import SILENT, Progress
from phreg_deploy.runtime.dense_features import DenseFeatures
from phreg_deploy.runtime.features import FeatureExtractor

INDEX = "features.json"
OUTPUTS = ("features", "cls", "token_norm")
DTYPES = ("float32", "float16")


@dataclass(frozen=True)
class ExtractedImage:
    """One image and its ``files`` by output; ``shape`` of its features; ``stamp``: see ``_stamp``."""

    image: str
    files: dict[str, str]
    shape: list[int]
    artifact_rate: float
    stamp: list[int]

    def to_json(self) -> dict[str, Any]:
        facts = dict(vars(self))
        return {"image": facts.pop("image"), **facts.pop("files"), **facts}


@dataclass(frozen=True)
class Extraction:
    """The index of an output folder. ``skipped``: name of each unreadable file -> reason."""

    output: str
    backend: str
    settings: dict[str, Any]
    complete: bool
    skipped: dict[str, str]
    images: list[ExtractedImage]

    def to_json(self) -> dict[str, Any]:
        return {**vars(self), "images": [image.to_json() for image in self.images]}


def find_images(images: Iterable[Path], outputs: tuple[str, ...] = ()) -> dict[Path, str]:
    """Every image file once, and the name of its features: its path in its folder, without suffix.

    A name that another file has, also in other case, gets a number.

    Args:
        images: files, or folders to search.
        outputs: of ``parse_outputs``, whose files must not collide either.

    Raises:
        PhregError: a path does not exist, or a folder holds no image.
    """
    names: dict[Path, str] = {}
    visited, taken = set[str](), set[str]()
    kinds = {*OUTPUTS, *outputs}
    for given in images:
        if not given.exists():
            refuse_url(str(given))
            raise PhregError(f"image: there is no file {given}. Check the name.")
        for path in list_images(given) if given.is_dir() else [given]:
            if os.path.abspath(path) in visited:
                continue
            visited.add(os.path.abspath(path))
            name = stem = (path.relative_to(given) if given.is_dir() else Path(path.name)).with_suffix("").as_posix()
            count = 1
            while taken & {_file(name, output).lower() for output in kinds}:
                count += 1
                name = f"{stem}-{count}"
            taken |= {_file(name, output).lower() for output in kinds}
            names[path] = name
    return names


def parse_outputs(text: str) -> tuple[str, ...]:
    """Read names of outputs with commas between, such as ``features,features.6``; a bundle may lack some.

    Raises ``PhregError`` for anything else.
    """
    names = tuple(dict.fromkeys(part.strip() for part in text.split(",")))
    layer = rf"({'|'.join(OUTPUTS)})\.[1-9]\d{{0,5}}"
    head = rf"({'|'.join(KINDS)})(\.{NAME.pattern})?"
    known = [name for name in names if name in (*OUTPUTS, ATTENTION) or re.fullmatch(f"{layer}|{head}", name)]
    if len(known) < len(names):
        expected = f"{', '.join(OUTPUTS)}, {ATTENTION}, of a layer (features.6), or of a head ({', '.join(KINDS)})"
        raise PhregError(f"outputs: got {text!r}, expected one or more of {expected}, with commas between.")
    return names


def extract_images(
    extractor: FeatureExtractor,
    images: dict[Path, str],
    output: Path,
    *,
    size: tuple[int, int] | None = None,
    outputs: tuple[str, ...] = ("features",),
    dtype: str = "float32",
    pictures: bool = False,
    force: bool = False,
    resume: bool = False,
    progress: Progress = SILENT,
) -> Extraction:
    """Write ``NAME.npy`` (features ``(Hp, Wp, C)``), ``NAME.cls.npy`` and so on for every image.

    The index names each unreadable file. An interrupt keeps the finished images and an index that says so, unless they
    would replace an older output.

    Args:
        images: see ``find_images``.
        outputs: of the bundle's. dtype: of features, class tokens and attention; token norms are always float32.
        pictures: also write ``NAME.png``: the image, its features as colours, its norms as heat.
        resume: keep the images that ``output`` holds from the same bundle and settings, and extract the rest.

    Raises:
        PhregError: no readable image, an output that the bundle lacks, values beyond float16, other settings to resume.
        Interrupted: by Ctrl-C; its report is the index of the finished images.
    """
    served = {*extractor.manifest.outputs, *([LABELS] if SEGMENTATION in extractor.manifest.outputs else [])}
    if missing := [name for name in outputs if name not in served]:
        raise PhregError(f"outputs: this bundle has no {missing[0]}; it has {', '.join(extractor.manifest.outputs)}.")
    size = size or extractor.manifest.sizes.default
    extractor.manifest.sizes.check(size, extractor.spec.patch)
    settings = {
        "graph_sha256": extractor.manifest.files.get("model.onnx"),
        "size": list(size),
        "outputs": list(outputs),
        "dtype": dtype,
        "pictures": pictures,
        "preprocess": json.loads(json.dumps(extractor.preprocess.to_json())),
    }
    files = {path: _files(name, outputs, pictures) for path, name in images.items()}
    replaces, complete, path = output.exists() and not resume, True, None
    done: dict[Path, ExtractedImage] = {}
    skipped: dict[str, str] = {}
    reads = [extractor.bundle.folder, *sorted({path.parent for path in images})]
    with atomic_folder(output, force or resume, reads) as folder, progress.task("extracting", len(images)) as advance:
        writer = _Writer(folder, dtype)
        try:
            if resume:
                done = _resumed(output, folder, settings, files)
                advance(len(done))
            for path in [path for path in images if path not in done]:
                try:
                    array = extractor.prepare(path, size)
                except PhregError as error:
                    skipped[str(path)] = str(error)
                else:
                    done[path] = writer.write(path, files[path], array, extractor.dense(array[None]))
                advance()
        except KeyboardInterrupt:
            if replaces or not done:
                unchanged = f" {output} is as it was before." if output.exists() else ""
                raise Interrupted(f"Interrupted. Nothing new was kept.{unchanged}") from None
            if path is not None and path not in done:
                for file in files[path].values():
                    (folder / file).unlink(missing_ok=True)
            complete = False
        if not done:
            reason = next(iter(skipped.values()))
            raise PhregError(f"extract: none of the {len(images)} images can be read. The first: {reason}")
        entries = [done[path] for path in images if path in done]
        index = Extraction(str(output), extractor.backend, settings, complete, skipped, entries)
        (folder / INDEX).write_text(json.dumps(index.to_json(), indent=1) + "\n")
    if not complete:
        raise Interrupted(
            f"Interrupted. {output} holds the features of {len(done)} of {len(images)} images, each of them whole; "
            "the same command with --resume extracts the rest.",
            index.to_json(),
        )
    return index


class _Writer:
    """Writes the files of one image after another; all pictures share the colours of the first."""

    def __init__(self, folder: Path, dtype: str) -> None:
        self.folder, self.dtype = folder, dtype
        self.basis: np.ndarray | None = None

    def write(self, path: Path, files: dict[str, str], array: np.ndarray, dense: DenseFeatures) -> ExtractedImage:
        arrays = dense.outputs()
        if dense.labels is not None:
            arrays[LABELS] = dense.labels
        for kind, file in files.items():
            (self.folder / file).parent.mkdir(parents=True, exist_ok=True)
            if kind == "picture":
                self.basis = components([dense.features[0]]) if self.basis is None else self.basis
                _picture(array, dense, self.basis).save(self.folder / file)
            else:
                values = arrays[kind][0]
                dtype = {"token_norm": "float32", LABELS: "uint8"}.get(kind_of(kind), self.dtype)
                _save(self.folder / file, values, dtype)
        shape, rate = list(dense.features.shape[1:]), float(dense.artifact_rate[0])
        return ExtractedImage(str(path), files, shape, rate, _stamp(path))


def _resumed(
    output: Path, folder: Path, settings: dict[str, Any], files: dict[Path, dict[str, str]]
) -> dict[Path, ExtractedImage]:
    """Link the files of an earlier run into ``folder``, for images that have not changed since."""
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
            f"resume: {output} holds {len(others)} images that are not asked for now, e.g. {others[0]}; "
            "name the same images as before."
        )
    done = {}
    for path, names in files.items():
        entry = earlier.get(str(path))
        unchanged = entry is not None and {**entry, **names, "stamp": _stamp(path)} == entry
        if entry is None or not unchanged or not all((output / name).is_file() for name in names.values()):
            continue
        for name in names.values():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            try:
                os.link(output / name, folder / name)
            except OSError:  # a file system without hard links
                shutil.copyfile(output / name, folder / name)
        done[path] = ExtractedImage(str(path), names, entry["shape"], entry["artifact_rate"], entry["stamp"])
    return done


def _stamp(path: Path) -> list[int]:
    """A file's size in bytes and the time of its last change in nanoseconds; they change when it is replaced."""
    with contextlib.suppress(OSError):
        return [path.stat().st_size, path.stat().st_mtime_ns]
    return []


def _file(name: str, kind: str) -> str:
    return f"{name}.npy" if kind == "features" else f"{name}.{kind}.npy"


def _files(name: str, outputs: tuple[str, ...], pictures: bool) -> dict[str, str]:
    return {kind: _file(name, kind) for kind in outputs} | ({"picture": f"{name}.png"} if pictures else {})


def _save(path: Path, array: np.ndarray, dtype: str) -> None:
    """Write one ``.npy`` at once: ``np.save`` to a file does not report a full disk as such."""
    with np.errstate(over="ignore"):
        narrow = array.astype(dtype)
    if not np.isfinite(narrow).all() and np.isfinite(array).all():
        raise PhregError(f"dtype: features reach {np.abs(array).max():.0f}, beyond float16; use --dtype float32.")
    data = io.BytesIO()
    np.save(data, narrow, allow_pickle=False)
    path.write_bytes(data.getbuffer())


def _picture(array: np.ndarray, dense: DenseFeatures, basis: np.ndarray) -> Image.Image:
    top = 3 * (dense.norm_median or float(np.median(dense.token_norm)))
    features, norms = colours(dense.features[0], basis), heat(dense.token_norm[0], top)
    return sheet([[("image", Image.fromarray(array)), ("features (PCA)", features), ("token norms", norms)]])
