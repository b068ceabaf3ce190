"""Arrays in a bundle, read header first: what a header declares is compared with the manifest before memory is taken."""

from __future__ import annotations

import zipfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import IO

import numpy as np

from phreg_deploy.bundle.manifest import Manifest
from phreg_deploy.errors import PhregError

SLACK = 1 << 20  # bytes of a reference beside its arrays
HEADERS = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}

Check = Callable[[tuple[int, ...], str], None]


def read_positions(path: Path, shape: tuple[int, ...]) -> np.ndarray:
    """The ``.npy`` file of a position embedding of this shape, float32.

    Raises:
        ValueError: another shape or type, or no array. OSError: the system refuses.
    """

    def check(found: tuple[int, ...], kind: str) -> None:
        if found != shape or kind != "float32":
            raise ValueError(f"it holds {kind} {found}, expected float32 {shape}")

    with open(path, "rb") as file:
        return _read(file, check)


def read_cases(path: Path, manifest: Manifest) -> list[dict[str, np.ndarray]]:
    """The cases of a reference: ``image``, ``features``, ``token_norm``, and ``cls`` where the manifest has it.

    Raises:
        ValueError, zipfile.BadZipFile: no cases, a missing or unknown tensor, or one that the manifest does not allow.
            OSError: the system refuses.
    """
    tensors = [
        name for name in ("image", "features", "token_norm", "cls") if name == "image" or name in manifest.outputs
    ]
    most = len(manifest.sizes.sizes)
    size, allowed = path.stat().st_size, SLACK + sum(_bytes(manifest, size) for size in manifest.sizes.sizes)
    if size > allowed:
        raise ValueError(f"it has {size} bytes, expected at most {allowed} for {most} cases")
    with open(path, "rb") as file, zipfile.ZipFile(file) as archive:
        members = archive.infolist()
        count, rest = divmod(len(members), len(tensors))
        if rest or not 1 <= count <= most:
            raise ValueError(f"it has {len(members)} members, expected {' and '.join(tensors)} of 1 to {most} cases")
        wanted = {f"{case}/{name}.npy" for case in range(count) for name in tensors}
        unknown = sorted({m.filename for m in members} ^ wanted)
        if unknown:
            raise ValueError(f"{unknown[0][:60]!r} is missing, or is no member that is expected")
        by_name = {m.filename: m for m in members}
        return [_case(archive, by_name, case, tensors, manifest) for case in range(count)]


def _case(
    archive: zipfile.ZipFile, members: dict[str, zipfile.ZipInfo], case: int, tensors: Sequence[str], manifest: Manifest
) -> dict[str, np.ndarray]:
    """One case, the image first: its shape says what the others have."""
    found: dict[str, np.ndarray] = {}
    for name in tensors:
        member = members[f"{case}/{name}.npy"]
        if member.compress_type != zipfile.ZIP_STORED or member.flag_bits & 1:
            raise ValueError(f"{member.filename} is compressed or encrypted, expected it stored without either")

        def check(shape: tuple[int, ...], kind: str, name: str = name) -> None:
            place = f"{case}/{name}"
            if name == "image":
                if len(shape) != 4 or shape[3] != 3 or kind != "uint8" or not _served(manifest, shape):
                    raise ValueError(
                        f"{place} is {kind} {shape}, expected uint8 (B, H, W, 3) of a batch and size that are served"
                    )
            elif shape != answer_shape(manifest, name, found["image"].shape) or kind not in ("float16", "float32"):
                expected = answer_shape(manifest, name, found["image"].shape)
                raise ValueError(f"{place} is {kind} {shape}, expected float32 {expected}")

        with archive.open(member) as file:
            found[name] = _read(file, check)
    return found


def _served(manifest: Manifest, image: tuple[int, ...]) -> bool:
    try:
        manifest.sizes.check((image[1], image[2]), manifest.model.patch)
        manifest.batches.check(image[0])
    except PhregError:
        return False
    return True


def answer_shape(manifest: Manifest, name: str, image: Sequence[int]) -> tuple[int, ...]:
    """The shape of an output for images ``(B, H, W, 3)``."""
    patch, width = manifest.model.patch, manifest.model.width
    grid = (image[1] // patch[0], image[2] // patch[1])
    return {"features": (image[0], *grid, width), "token_norm": (image[0], *grid), "cls": (image[0], width)}[name]


def check_shapes(manifest: Manifest, answers: Mapping[str, np.ndarray], image: Sequence[int]) -> None:
    """Raise ``PhregError`` unless a graph's answers to images ``(B, H, W, 3)`` are all there, in the shapes that readers expect."""
    for name in manifest.outputs:
        got, expected = np.shape(answers[name]) if name in answers else None, answer_shape(manifest, name, image)
        if got != expected:
            raise PhregError(
                f"graph: got {name} of shape {got}, expected {expected}; the graph is not this bundle's. Copy or export the bundle again."
            )


def _bytes(manifest: Manifest, size: tuple[int, int]) -> int:
    """Bytes at most of a case at a size, in float32."""
    image = (manifest.batches.highest, *size, 3)
    answers = sum(int(np.prod(answer_shape(manifest, name, image), dtype=object)) for name in manifest.outputs)
    return int(np.prod(image, dtype=object)) + 4 * answers


def _read(file: IO[bytes], check: Check) -> np.ndarray:
    """An array in numpy's format, after ``check`` has seen its shape and type."""
    version = np.lib.format.read_magic(file)
    if version not in HEADERS:
        raise ValueError(f"its arrays are of numpy's format {version}, expected 1.0 or 2.0")
    try:
        shape, fortran, dtype = HEADERS[version](file)
    except Exception as error:  # numpy parses a header as Python, whose parsers raise many kinds
        raise ValueError(f"the header of an array cannot be read ({error})") from None
    check(shape, dtype.name)
    size = int(np.prod(shape, dtype=object)) * dtype.itemsize
    data = file.read(size)
    if len(data) != size:
        raise ValueError(f"an array of {dtype} {shape} has {len(data)} bytes, expected {size}")
    return np.frombuffer(data, dtype).reshape(shape, order="F" if fortran else "C").astype(dtype.newbyteorder("="))
