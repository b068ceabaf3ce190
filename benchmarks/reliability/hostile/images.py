"""Images that take gigabytes, run something, or never end."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

from benchmarks.reliability.hostile import files
from benchmarks.reliability.hostile.case import ENDLESS, Case, Place
from benchmarks.reliability.subjects import HERE

# Sides of the largest image that Pillow's own limit lets through.
SIDE = 9400
# More than a case may take in memory.
LARGE = 5 << 29

BOMBS: dict[str, Callable[[Path], bytes]] = {
    "PNG, 65,535 pixels square": lambda _: files.png(65535, 65535, whole=False),
    "PNG, 16-bit grey, 88 megapixels": lambda _: files.png(SIDE, SIDE, 16, 0),
    "PNG, RGB, 88 megapixels": lambda _: files.png(SIDE, SIDE),
    "PNG, RGB of 16 bits, 88 megapixels": lambda _: files.png(SIDE, SIDE, 16),
    "PNG, one row of 80 million pixels": lambda _: files.png(80_000_000, 1, 8, 0),
    "PNG, one column of 80 million pixels": lambda _: files.png(1, 80_000_000, 8, 0),
    "PNG, 2.5 GB of text": lambda _: _chunked(b"zTXt"),
    "PNG, 2.5 GB of colour profile": lambda _: files.png(
        8, 8, extra=files.chunk(b"iCCP", b"a\0\0" + files.zeros(LARGE))
    ),
    "PNG, 100,000 chunks": lambda _: files.png(8, 8, extra=files.chunk(b"tEXt", b"a\0b") * 100_000),
    "JPEG, 65,500 pixels square": lambda _: files.forged_jpeg(65500, 65500),
    "PPM, 60,000 pixels square": lambda _: b"P6 60000 60000 255\n" + bytes(99),
    "PPM, a comment of 8 MB": lambda _: b"P6 " + b"#" * (8 << 20),
    "GIF, 65,535 pixels square": lambda _: b"GIF89a\xff\xff\xff\xff\0\0\0,\0\0\0\0\xff\xff\xff\xff\0\2\1\0\0;",
    "TIFF, 88 megapixels, deflated": lambda _: files.encoded("TIFF", SIDE, compression="tiff_adobe_deflate"),
    "PostScript in the name of a PNG": files.postscript,
}
# Those that the other commands read as well.
EVERYWHERE = ("PNG, 65,535 pixels square", "PNG, 16-bit grey, 88 megapixels")


def image_cases() -> dict[str, Case]:
    """Images for `extract`; some for `artifacts`, `calibrate` and `distill` too."""
    cases = {f"extract, {name}": Case("images", partial(_extract, name), harmless=True) for name in BOMBS}
    for name in EVERYWHERE:
        cases[f"artifacts, {name}"] = Case("images", partial(_artifacts, name), harmless=True)
        cases[f"calibrate, {name}"] = Case("images", partial(_calibrate, name), harmless=True)
        cases[f"distill, {name}"] = Case("images", partial(_distill, name), harmless=True)
    for kind in ENDLESS:
        cases[f"extract, image, {kind}"] = Case("images", partial(_endless, kind, False))
        cases[f"extract, folder with an image, {kind}"] = Case("images", partial(_endless, kind, True))
    cases["extract, link to a file of the system"] = Case("images", lambda p: p.extract(_link(p, "/etc/passwd")))
    cases["extract, link to its own folder"] = Case("images", lambda p: p.extract(_link(p, ".").parent))
    return cases


def _chunked(name: bytes) -> bytes:
    return files.png(8, 8, extra=files.chunk(name, b"a\0\0" + files.zeros(LARGE)))


def _extract(name: str, place: Place) -> Sequence[object]:
    return place.extract(place.write("a.png", BOMBS[name](place.marker)))


def _among(name: str, place: Place) -> Path:
    """A folder of good photographs and the bomb."""
    for photo in sorted(place.subjects.photos.iterdir())[:12]:
        place.write(photo.name, photo.read_bytes())
    return place.write("z.png", BOMBS[name](place.marker)).parent


def _artifacts(name: str, place: Place) -> Sequence[object]:
    return ["artifacts", place.subjects.bundle, "--images", _among(name, place), *HERE[:2], "--json"]


def _calibrate(name: str, place: Place) -> Sequence[object]:
    return ["calibrate", place.subjects.bundle, "--images", _among(name, place), "-o", place.output, "--quiet"]


def _distill(name: str, place: Place) -> Sequence[object]:
    options = ("--epochs", 1, "--batch", 4, "--views", 2, "--device", "cpu", "--cache", place.root / "cache")
    return ["distill", place.subjects.base, "--images", _among(name, place), "-o", place.output, *options]


def _endless(kind: str, folder: bool, place: Place) -> Sequence[object]:
    path = files.endless(place.inputs / "a.png", kind)
    return place.extract(path.parent if folder else path)


def _link(place: Place, target: str) -> Path:
    path = place.inputs / "a.png"
    path.symlink_to(target)
    return path
