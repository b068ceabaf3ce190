"""Denoise the base model's features by averaging re-aligned shifted and flipped views, and cache the results.

The method is arXiv 2505.21501 section 3.1. Targets depend only on the image, the weights and the settings. They are
computed once and kept on disk in float16; later epochs and runs compute only the student.
"""

from __future__ import annotations

import functools
import hashlib
import itertools
import json
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.numpy import load, save

from phreg_deploy.artifacts.measures import cosine
from phreg_deploy.distill.devices.replicas import Replicas
from phreg_deploy.errors import PhregError
from phreg_deploy.files.atomic import write_atomic
from phreg_deploy.files.temporary import remove_dead
from phreg_deploy.images.photographs import Photographs
from phreg_deploy.images.views import View, draw_views, most_views, seed_of, show, way_back
from phreg_deploy.models import hooks
from phreg_deploy.models.hooks import ViT
from phreg_deploy.models.origin import ModelIdentity, model_identity
from phreg_deploy.models.readouts import readout_of
from phreg_deploy.spec import Preprocess

# Format of the cached files; each format has its own folders.
CACHE_FORMAT = 3
# Arrays of a cached target.
ARRAYS = ("image", "patches", "cls", "norms", "drift")
# Views per forward; about 1 GB of activations for a ViT-B at 224 px.
CHUNK = 40


@dataclass
class Target:
    """The base model's features of one image, float32.

    ``patches`` ``(Hp, Wp, C)``: mean over the views that cover each patch. ``plain`` ``(Hp, Wp, C)``: the unshifted
    view. ``norms`` ``(Hp, Wp)``: its pre-norm norms. ``cls`` ``(2, C)``: class tokens of the image and its mirror
    image. ``layers`` ``(L, N, C)``: the mean of each further layer.
    """

    patches: np.ndarray
    cls: np.ndarray | None
    norms: np.ndarray
    plain: np.ndarray
    layers: np.ndarray


class Teacher:
    """A frozen base model that denoises its own features.

    Args:
        model: the base model, in evaluation mode; its features are those of its readout.
        views: views per image, the first one unshifted; 10 in the paper. At most as many as differ on the model's grid.
        seed: each image's views are drawn from this seed and the image's digest, whatever the order of images.
        devices: the first one holds ``model``; ``targets`` distributes photographs over all of them.
        autocast: compute in bfloat16; twice as fast on CPUs and GPUs that have it.
        layers: further layers to denoise, by the number of blocks that their tokens have passed.
        identity: ``model_identity(model)``, if it is known already; computing it reads every weight.
    """

    def __init__(
        self,
        model: ViT,
        preprocess: Preprocess,
        *,
        views: int = 10,
        seed: int = 0,
        devices: Sequence[str] = ("cpu",),
        autocast: bool = False,
        layers: Sequence[int] = (),
        identity: ModelIdentity | None = None,
    ) -> None:
        self.model, self.preprocess, self.seed = model.to(devices[0]), preprocess, seed
        self.devices, self.autocast = tuple(devices), autocast
        self.patch = tuple(model.patch_embed.patch_size)
        self.grid = tuple(model.patch_embed.grid_size)
        self.views = min(views, most_views(self.grid))
        self._identity, self.layers = identity, tuple(layers)

    @functools.cached_property
    def digest(self) -> str:
        """The sha256 of every setting that decides a target."""
        settings: dict[str, Any] = {
            "model": (self._identity or model_identity(self.model)).to_json(),
            "preprocess": self.preprocess.to_json(),
            "views": self.views,
            "seed": self.seed,
            "autocast": self.autocast,
            "format": CACHE_FORMAT,
        }
        readout = readout_of(self.model)
        if not readout.is_plain:
            settings["readout"] = readout.to_json()
        if self.layers:
            settings["layers"] = list(self.layers)
        return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()

    @torch.inference_mode()
    def _denoise(self, model: ViT, device: str, photographs: Photographs, start: int, stop: int) -> list[Target]:
        seeds = [seed_of(self.seed, digest) for digest in photographs.digests[start:stop]]
        plans = [draw_views(self.views, self.grid, seed) for seed in seeds]
        images = photographs.batch(start, stop)
        # (B * (V + 1), H, W, 3): the last view is the mirror image, whose class token is a target of its own.
        shown = [(*plan, View(0, 0, True)) for plan in plans]
        pixels = np.stack([show(image, view, self.patch) for image, views in zip(images, shown) for view in views])
        batch = hooks.normalise(torch.from_numpy(pixels).to(device), self.preprocess.mean, self.preprocess.std)
        with mixed_precision(device, self.autocast):
            features = hooks.forward(model, batch, self.layers)
        shape = (len(plans), self.views + 1)
        # Averaged on the device: only the mean and the unshifted view are copied to the host.
        maps = features.patches.reshape(*shape, *self.grid, -1)  # (B, V + 1, Hp, Wp, C)

        def means_of(maps: torch.Tensor) -> np.ndarray:
            means = [mean_of_views(maps[i, :-1].float(), plan) for i, plan in enumerate(plans)]
            return torch.stack(means).cpu().numpy()

        means = means_of(maps)
        middle = [means_of(layer.reshape(*shape, *self.grid, -1)) for layer in features.layers]
        layers = np.stack([layer.reshape(len(plans), -1, layer.shape[-1]) for layer in middle], 1) if middle else None
        plain = maps[:, 0].float().cpu().numpy()
        norms = features.norms.reshape(*shape, *self.grid)[:, 0].cpu().numpy()
        cls = None if features.cls is None else features.cls.reshape(*shape, -1)[:, [0, -1]].float().cpu().numpy()
        none = np.zeros((0, 0, 0), np.float32)
        return [
            Target(
                means[i],
                None if cls is None else cls[i],
                norms[i],
                plain[i],
                none if layers is None else layers[i],
            )
            for i in range(len(plans))
        ]

    def targets(self, photographs: Photographs, advance: Callable[[int], None] = lambda _n: None) -> Iterator[Target]:
        """Yield the target of every photograph, in order, without the cache; each device computes a chunk at a time."""
        step = max(1, CHUNK // self.views)
        spans = [(start, min(start + step, len(photographs))) for start in range(0, len(photographs), step)]
        replicas = Replicas(self.model, self.devices[: max(1, len(spans))])
        chunks = replicas.map(lambda model, device, span: self._denoise(model, device, photographs, *span), spans)
        for target in itertools.chain.from_iterable(chunks):
            # Before the yield: a reader that knows the count does not come back after the last one.
            advance(1)
            yield target


def mean_of_views(maps: torch.Tensor, plan: list[View]) -> torch.Tensor:
    """Average the views that cover each patch: ``(Hp, Wp, C)``, on the device of ``maps``.

    Args:
        maps: features ``(V, Hp, Wp, C)`` of the views of ``plan``; the first view is unshifted and covers every patch.
    """
    total, covered = torch.zeros_like(maps[0]), maps.new_zeros(maps.shape[1:3])
    for features, view in zip(maps[1:], plan[1:]):
        valid, place = way_back(view, maps.shape[1:3])
        total[place] += (features.flip(1) if view.flip else features)[valid]
        covered[place] += 1
    return (total + maps[0]) / (covered + 1)[..., None]


class TargetCache:
    """Targets on disk, one ``.safetensors`` per image, in a folder named by the teacher's settings.

    A file holds ``image`` uint8 ``(H, W, 3)`` at the input size; ``patches`` float16 ``(N, C)``; ``cls`` float16
    ``(2, C)`` of the image and its mirror image, empty without class token; ``norms`` float32 ``(N,)`` of the unshifted
    view; ``drift`` float16 ``(N,)``, 1 - cosine between that view and the target; ``layers`` float16 ``(L, N, C)``
    where there are further layers; and ``crc32`` uint32 ``(1,)`` of the others' bytes in this order, since safetensors
    has no checksum. Several threads may read at once.
    """

    def __init__(self, teacher: Teacher, folder: Path) -> None:
        self.teacher, self.folder = teacher, folder / f"targets-{teacher.digest[:16]}"

    def path(self, digest: str) -> Path:
        return self.folder / f"{digest[:32]}.safetensors"

    def fill(self, photographs: Photographs, advance: Callable[[int], None] = lambda _n: None) -> int:
        """Compute the missing targets, and return their number. After an interruption, the next call continues."""
        self.folder.mkdir(parents=True, exist_ok=True)
        remove_dead(self.folder)
        missing = [i for i, digest in enumerate(photographs.digests) if not self._is_complete(digest)]
        advance(len(photographs) - len(missing))
        todo = photographs.subset(missing)
        for i, target in enumerate(self.teacher.targets(todo, advance)):
            flat = target.patches.reshape(-1, target.patches.shape[-1])
            drift = 1 - cosine(target.plain, target.patches).reshape(-1)
            cls = np.zeros(0) if target.cls is None else target.cls
            item = {
                "image": todo.array(i),
                "patches": flat.astype(np.float16),
                "cls": cls.astype(np.float16),
                "norms": target.norms.reshape(-1),
                "drift": drift.astype(np.float16),
            }
            if target.layers.size:
                item["layers"] = target.layers.astype(np.float16)
            item = {name: np.ascontiguousarray(value) for name, value in item.items()}
            write_atomic(self.path(todo.digests[i]), save({**item, "crc32": _checksum(item)}))
        return len(missing)

    def check_shared(self, digests: Sequence[str]) -> None:
        """Raise ``PhregError`` if this process does not see a target that another one has written."""
        unseen = next((digest for digest in digests if not self.path(digest).is_file()), None)
        if unseen is not None:
            raise PhregError(
                f"targets: another process wrote {self.path(unseen)}, but it is not here; give --cache a folder that "
                "every machine of the run shares."
            )

    def read(self, digest: str) -> dict[str, np.ndarray]:
        """Read the arrays of one image's target, without ``crc32``; they may be read-only.

        Raises:
            OSError: there is no such file, or it cannot be read.
            PhregError: the file is damaged.
        """
        path = self.path(digest)
        try:
            data = load(path.read_bytes())
            item = {name: data[name] for name in (*ARRAYS, *(["layers"] if self.teacher.layers else []))}
            intact = np.array_equal(data["crc32"], _checksum(item))
        except (SafetensorError, ValueError, KeyError):
            intact = False
        if not intact:
            raise PhregError(f"targets: {path} is damaged; remove it and run the same command again.")
        return item

    def _is_complete(self, digest: str) -> bool:
        try:
            self.read(digest)
        except (OSError, PhregError):
            return False
        return True


def _checksum(item: dict[str, np.ndarray]) -> np.ndarray:
    """Compute the CRC-32 of the arrays' bytes in the order of ``ARRAYS``, layers last, uint32 ``(1,)``."""
    value = 0
    for name in (*ARRAYS, "layers"):
        if name in item:
            value = zlib.crc32(item[name].data, value)
    return np.array([value], np.uint32)


def mixed_precision(device: str, enabled: bool) -> AbstractContextManager:
    """Return bfloat16 autocast for the device, or a context that does nothing."""
    return torch.autocast(torch.device(device).type, dtype=torch.bfloat16) if enabled else nullcontext()
