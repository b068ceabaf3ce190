"""Write the features of image files: one ``.npy`` for each image and output, and their index, ``features.json``."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from phreg_deploy.arguments import refuse_url
from phreg_deploy.bundle.heads import NAME
from phreg_deploy.errors import Interrupted, PhregError
from phreg_deploy.files.atomic import atomic_folder
from phreg_deploy.images.fitting import check_fit
from phreg_deploy.images.intake import rgb
from phreg_deploy.images.photographs import list_images
from phreg_deploy.layers import ATTENTION, HEADS, LABELS, SEGMENTATION
from phreg_deploy.progress import SILENT, Progress
from phreg_deploy.runtime.dense_features import DenseFeatures
from phreg_deploy.runtime.feature_files import MASK, ExtractedImage, FeatureWriter, file_name, file_names, stamp_of
from phreg_deploy.runtime.features import FeatureExtractor
from phreg_deploy.runtime.tiling import window_sizes

INDEX = "features.json"
OUTPUTS = ("features", "cls", "token_norm")
DTYPES = ("float32", "float16")


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
    kinds = {*OUTPUTS, MASK, *outputs}
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
            while taken & {file_name(name, output).lower() for output in kinds}:
                count += 1
                name = f"{stem}-{count}"
            taken |= {file_name(name, output).lower() for output in kinds}
            names[path] = name
    return names


def parse_outputs(text: str) -> tuple[str, ...]:
    """Read names of outputs with commas between, such as ``features,features.6``; a bundle may lack some.

    Raises ``PhregError`` for anything else.
    """
    names = tuple(dict.fromkeys(part.strip() for part in text.split(",")))
    layer = rf"({'|'.join(OUTPUTS)})\.[1-9]\d{{0,5}}"
    head = rf"({'|'.join(HEADS)})(\.{NAME.pattern})?"
    known = [name for name in names if name in (*OUTPUTS, ATTENTION, MASK) or re.fullmatch(f"{layer}|{head}", name)]
    if len(known) < len(names):
        expected = (
            f"{', '.join(OUTPUTS)}, {ATTENTION}, {MASK}, of a layer (features.6), or of a head ({', '.join(HEADS)})"
        )
        raise PhregError(f"outputs: got {text!r}, expected one or more of {expected}, with commas between.")
    return names


def extract_images(
    extractor: FeatureExtractor,
    images: dict[Path, str],
    output: Path,
    *,
    size: tuple[int, int] | None = None,
    fit: str | None = None,
    window: tuple[int, int] | None = None,
    stride: tuple[int, int] | None = None,
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
        fit: as in a call of the extractor. window, stride: of ``FeatureExtractor.tiled``; without a window, images are
            resized to ``size``.
        outputs: of the bundle's, and "mask", which "pad" and a window always write. dtype: of features, class tokens
            and attention; token norms are always float32.
        pictures: also write ``NAME.png``: the image, its features as colours, its norms as heat, its heads' answers.
        resume: keep the images that ``output`` holds from the same bundle and settings, and extract the rest.

    Raises:
        PhregError: no readable image, an output that the bundle lacks, values beyond float16, other settings to resume,
            or options that exclude each other.
        Interrupted: by Ctrl-C; its report is the index of the finished images.
    """
    check_fit_and_window(size, fit, window, stride)
    outputs = _with_mask(outputs, masked=fit == "pad" or window is not None)
    served = {MASK, *extractor.manifest.outputs, *([LABELS] if SEGMENTATION in extractor.manifest.outputs else [])}
    if missing := [name for name in outputs if name not in served]:
        raise PhregError(f"outputs: this bundle has no {missing[0]}; it has {', '.join(extractor.manifest.outputs)}.")
    size = size or window or extractor.manifest.sizes.default
    extractor.manifest.sizes.check(size, extractor.spec.patch)
    tiles = None if window is None else window_sizes(extractor.manifest, window, stride)
    settings = {
        "graph_sha256": extractor.manifest.files.get("model.onnx"),
        "size": list(size),
        "fit": fit,
        "stride": None if tiles is None else list(tiles[1]),
        "outputs": list(outputs),
        "dtype": dtype,
        "pictures": pictures,
        "preprocess": json.loads(json.dumps(extractor.preprocess.to_json())),
    }
    files = {path: file_names(name, outputs, pictures) for path, name in images.items()}
    replaces, complete, path = output.exists() and not resume, True, None
    done: dict[Path, ExtractedImage] = {}
    skipped: dict[str, str] = {}
    reads = [extractor.bundle.folder, *sorted({path.parent for path in images})]
    with atomic_folder(output, force or resume, reads) as folder, progress.task("extracting", len(images)) as advance:
        writer = FeatureWriter(folder, dtype, extractor.manifest.heads)
        try:
            if resume:
                done = _resumed(output, folder, settings, files)
                advance(len(done))
            for path in [path for path in images if path not in done]:
                try:
                    image = (
                        rgb(path, extractor.preprocess.exif, whole=True)
                        if tiles
                        else extractor.fitted(path, size, fit=fit)
                    )
                except PhregError as error:
                    skipped[str(path)] = str(error)
                else:
                    done[path] = writer.write(path, files[path], *_dense(extractor, image, tiles, advance))
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


def check_fit_and_window(size: Any, fit: str | None, window: Any, stride: Any) -> None:
    """Raise ``PhregError`` for an unknown fit, or one of these options with another that leaves it without effect."""
    check_fit(fit)
    if stride is not None and window is None:
        raise PhregError("stride: got a stride without a window; expected both: --window 518 --stride 259.")
    for name, value in (("fit", fit), ("image-size", size)):
        if window is not None and value is not None:
            raise PhregError(f"window: got --window and --{name}; expected one of them. Windows are not resized.")


def _with_mask(outputs: tuple[str, ...], masked: bool) -> tuple[str, ...]:
    """Add the mask where there is one."""
    if MASK in outputs and not masked:
        raise PhregError("outputs: got mask without padding; expected --fit pad or --window with it.")
    return (*outputs, MASK) if masked and MASK not in outputs else outputs


def _read(extractor: FeatureExtractor, path: Path, size: tuple[int, int], fit: str | None, whole: bool) -> Any:
    """The whole image, upright, or the image of the model's size with its mask."""
    return rgb(path, extractor.preprocess.exif, whole=True) if whole else extractor.fitted(path, size, fit=fit)


def _dense(
    extractor: FeatureExtractor, image: Any, tiles: tuple[Any, Any] | None, advance: Callable[..., None]
) -> tuple[Any, DenseFeatures]:
    """The pixels and the features of an image of ``_read``."""
    if tiles is not None:
        report = lambda done, of: advance(0, note=f"window {done} of {of}")  # noqa: E731
        return image, extractor.tiled(image, *tiles, exif=False, report=report)
    mask = None if image.mask is None else image.mask[None]
    return image.image, extractor.dense(image.image[None]).masked(mask)


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
        unchanged = entry is not None and {**entry, **names, "stamp": stamp_of(path)} == entry
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
