"""Keep the dense features of images: in float16, in memory and on disk, so that a second evaluation reads them."""

from __future__ import annotations

import hashlib
import io
import json
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from phreg_deploy.errors import PhregError
from phreg_deploy.evaluation.data.sources import BATCH, Source
from phreg_deploy.evaluation.data.truth import Truth, check_sides
from phreg_deploy.files.atomic import write_atomic
from phreg_deploy.files.temporary import remove_dead
from phreg_deploy.heads.inputs import join_layers
from phreg_deploy.images.decoding import read_image
from phreg_deploy.images.photographs import fit
from phreg_deploy.progress import Progress

# Format of the cached files; each format has its own folders.
CACHE_FORMAT = 1
# Bytes of features kept in memory.
KEEP_BYTES = 1 << 30
# numpy raises these for a damaged file.
DAMAGED = (OSError, ValueError, EOFError, LookupError, RuntimeError, zipfile.BadZipFile)


@dataclass
class FeatureStore:
    """Features of one source over named images: ``features`` float16 ``(Hp, Wp, C)``, ``norms`` float32 ``(Hp, Wp)``.

    ``sizes``: bytes of each cached file. ``computed``: how many images were computed and not read.

    A file of the cache is an uncompressed ``.npz`` of both, whose checksums numpy compares on reading. Its folder is
    named by the source's weights and settings, preprocessing, size and layers; its name is the image's sha256.
    Without ``cache``, features beyond ``KEEP_BYTES`` of memory are computed again.
    """

    source: Source
    images: Path
    cache: Path | None
    digests: dict[str, str] = field(default_factory=dict)
    kept: dict[str, dict[str, np.ndarray]] = field(default_factory=dict, repr=False)
    kept_bytes: int = 0
    sizes: dict[str, int] = field(default_factory=dict)
    computed: int = 0

    @property
    def folder(self) -> Path | None:
        """The folder of the cached files."""
        facts = {
            "format": CACHE_FORMAT,
            "source": self.source.digest,
            "preprocess": self.source.preprocess.to_json(),
            "size": self.source.size,
            "layers": self.source.layers,
        }
        key = hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()
        return None if self.cache is None else self.cache / f"features-{key[:16]}"

    def fill(self, names: Sequence[str], truth: Truth, progress: Progress, label: str) -> None:
        """Compute what the cache lacks; check that every truth has the proportions of its image.

        Raises:
            PhregError: an unreadable image, another shape, a full disk, or features beyond float16.
        """
        if self.folder is not None:
            self.folder.mkdir(parents=True, exist_ok=True)
            remove_dead(self.folder)
        with progress.task(label, len(names)) as advance:
            waiting: list[tuple[str, np.ndarray]] = []
            for name in names:
                data = self._bytes(name)
                self.digests[name] = hashlib.sha256(data).hexdigest()
                if self._cached(name) is None:
                    image = read_image(io.BytesIO(data), self.source.preprocess.exif, str(self.images / name))
                    check_sides(truth.read(name), image, name)
                    waiting.append((name, fit(image, self.source.size, self.source.preprocess)))
                else:
                    advance()
                if len(waiting) == BATCH:
                    self._compute(waiting)
                    advance(len(waiting))
                    waiting = []
            if waiting:
                self._compute(waiting)
                advance(len(waiting))

    def read(self, name: str) -> dict[str, np.ndarray]:
        """Read ``features`` and ``norms`` of an image."""
        item = self.kept.get(name)
        if item is None:
            item = self._cached(name)
        if item is None:
            image = read_image(self.images / name, self.source.preprocess.exif)
            item = self._compute([(name, fit(image, self.source.size, self.source.preprocess))])[0]
        return item

    def _bytes(self, name: str) -> bytes:
        try:
            return (self.images / name).read_bytes()
        except OSError as error:
            raise PhregError(f"image: {self.images / name} cannot be read ({error.strerror}).") from None

    def _cached(self, name: str) -> dict[str, np.ndarray] | None:
        path = self._path(name)
        if path is None or not path.is_file():
            return None
        try:
            # numpy would leave the file of a damaged archive open.
            with np.load(io.BytesIO(path.read_bytes()), allow_pickle=False) as arrays:
                item = {key: arrays[key] for key in ("features", "norms")}
        except DAMAGED:
            # It is computed again.
            return None
        self._keep(name, item)
        self.sizes[name] = path.stat().st_size
        return item

    def _path(self, name: str) -> Path | None:
        return None if self.folder is None else self.folder / f"{self.digests[name][:32]}.npz"

    def _compute(self, images: list[tuple[str, np.ndarray]]) -> list[dict[str, np.ndarray]]:
        outputs = self.source.run(np.stack([array for _, array in images]))
        joined = join_layers(outputs, self.source.layers)
        with np.errstate(over="ignore"):
            narrow = joined.astype(np.float16)
        if not np.isfinite(narrow).all():
            raise PhregError(
                f"evaluate: features of {self.source.name} for {images[0][0]} are not finite in float16 (they reach "
                f"{np.abs(joined).max():.3g}); the model is broken, or serves layers without the final norm."
            )
        items = []
        for row, (name, _) in enumerate(images):
            item = {"features": narrow[row], "norms": outputs["token_norm"][row].astype(np.float32)}
            path = self._path(name)
            if path is not None:
                data = io.BytesIO()
                np.savez(data, **item)
                write_atomic(path, data.getvalue())
                self.sizes[name] = data.tell()
            self._keep(name, item)
            items.append(item)
        self.computed += len(items)
        return items

    def _keep(self, name: str, item: dict[str, np.ndarray]) -> None:
        size = sum(array.nbytes for array in item.values())
        if name not in self.kept and self.kept_bytes + size <= KEEP_BYTES:
            self.kept[name] = item
            self.kept_bytes += size
