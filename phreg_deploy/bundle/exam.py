"""Read the arrays of a bundle. Their headers are compared with the manifest before memory is allocated."""

from __future__ import annotations

import zipfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import IO

import numpy as np

from phreg_deploy.bundle.manifest import Manifest
from phreg_deploy.errors import PhregError
from phreg_deploy.layers import kind_of

# Bytes of an exam's file beside its arrays, at most.
SLACK = 1 << 20
HEADERS = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}

Check = Callable[[tuple[int, ...], str], None]


def read_positions(path: Path, shape: tuple[int, ...]) -> np.ndarray:
    """Read a float32 position embedding of this shape from a ``.npy`` file.

    Raises ``ValueError`` for another shape or type, and ``OSError`` if the file cannot be read.
    """

    def check(got: tuple[int, ...], dtype: str) -> None:
        if got != shape or dtype != "float32":
            raise ValueError(f"it holds {dtype} {got}, expected float32 {shape}")

    with open(path, "rb") as file:
        return _read(file, check)


def read_cases(path: Path, manifest: Manifest) -> list[dict[str, np.ndarray]]:
    """Read the cases of an exam: ``image``, and every output that the manifest lists.

    Raises ``ValueError`` or ``zipfile.BadZipFile`` if there are no cases, if a tensor is missing or unknown, or if the
    manifest does not allow its shape or type; ``OSError`` if the file cannot be read.
    """
    tensors = ["image", *manifest.outputs]
    most = len(manifest.sizes.sizes)
    size, allowed = path.stat().st_size, SLACK + sum(_case_bytes(manifest, size) for size in manifest.sizes.sizes)
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
    """Read one case, the image first, because the shapes of the answers follow from its shape."""
    arrays: dict[str, np.ndarray] = {}
    for name in tensors:
        member = members[f"{case}/{name}.npy"]
        if member.compress_type != zipfile.ZIP_STORED or member.flag_bits & 1:
            raise ValueError(f"{member.filename} is compressed or encrypted, expected it stored without either")

        def check(shape: tuple[int, ...], dtype: str, name: str = name) -> None:
            if name == "image":
                _check_image(f"{case}/{name}", shape, dtype, manifest)
                return
            expected = answer_shape(manifest, name, arrays["image"].shape)
            head = manifest.head(name)
            wanted = "float32" if head is None else head.dtype
            if shape != expected or dtype not in (("uint8",) if wanted == "uint8" else ("float16", "float32")):
                raise ValueError(f"{case}/{name} is {dtype} {shape}, expected {wanted} {expected}")

        with archive.open(member) as file:
            arrays[name] = _read(file, check)
    return arrays


def _check_image(name: str, shape: tuple[int, ...], dtype: str, manifest: Manifest) -> None:
    fits = len(shape) == 4 and shape[3] == 3 and dtype == "uint8"
    try:
        if fits:
            manifest.sizes.check((shape[1], shape[2]), manifest.model.patch)
            manifest.batches.check(shape[0])
    except PhregError:
        fits = False
    if not fits:
        raise ValueError(f"{name} is {dtype} {shape}, expected uint8 (B, H, W, 3) of a batch and size that are served")


def answer_shape(manifest: Manifest, name: str, image: Sequence[int]) -> tuple[int, ...]:
    """Return the shape of an output for images of shape ``(B, H, W, 3)``."""
    patch, channels = manifest.model.patch, manifest.channels(name)
    grid = (image[1] // patch[0], image[2] // patch[1])
    head = manifest.head(name)
    if head is not None:
        return head.shape(image[0], [side * cells for side, cells in zip(grid, head.cells(patch))])
    return {
        "features": (image[0], *grid, channels),
        "token_norm": (image[0], *grid),
        "cls": (image[0], channels),
        "attention": (image[0], manifest.model.heads, *grid),
    }[kind_of(name)]


def check_shapes(manifest: Manifest, answers: Mapping[str, np.ndarray], image: Sequence[int]) -> None:
    """Raise ``PhregError`` unless a graph's answers to images of shape ``(B, H, W, 3)`` have the manifest's shapes."""
    for name in manifest.outputs:
        got, expected = np.shape(answers[name]) if name in answers else None, answer_shape(manifest, name, image)
        if got != expected:
            raise PhregError(
                f"graph: got {name} of shape {got}, expected {expected}; the graph is not this bundle's. "
                "Copy or export the bundle again."
            )


def _case_bytes(manifest: Manifest, size: tuple[int, int]) -> int:
    """Return how many bytes a case of this size takes at most, in float32."""
    image = (manifest.batches.highest, *size, 3)
    answers = sum(int(np.prod(answer_shape(manifest, name, image), dtype=object)) for name in manifest.outputs)
    return int(np.prod(image, dtype=object)) + 4 * answers


def _read(file: IO[bytes], check: Check) -> np.ndarray:
    """Read an array in numpy's format, after ``check`` was called with its shape and type."""
    version = np.lib.format.read_magic(file)
    if version not in HEADERS:
        raise ValueError(f"its arrays are of numpy's format {version}, expected 1.0 or 2.0")
    try:
        shape, fortran, dtype = HEADERS[version](file)
    # numpy parses the header as Python, which raises many kinds of errors.
    except Exception as error:
        raise ValueError(f"the header of an array cannot be read ({error})") from None
    check(shape, dtype.name)
    size = int(np.prod(shape, dtype=object)) * dtype.itemsize
    data = file.read(size)
    if len(data) != size:
        raise ValueError(f"an array of {dtype} {shape} has {len(data)} bytes, expected {size}")
    return np.frombuffer(data, dtype).reshape(shape, order="F" if fortran else "C").astype(dtype.newbyteorder("="))
