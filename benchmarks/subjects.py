"""Open PyTorch models and bundles behind one call, and list the photographs that no student was trained on."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from phreg_deploy.bundle.bundle import is_bundle
from phreg_deploy.images.photographs import Photographs, read_photographs
from phreg_deploy.models import hooks
from phreg_deploy.models.loading import classifies, load_model, model_preprocess
from phreg_deploy.runtime.features import FeatureExtractor
from phreg_deploy.spec import Preprocess

Answers = dict[str, np.ndarray]  # patches (B, N, C), norms (B, N), cls (B, C), logits (B, classes)


@dataclass
class Subject:
    """A timm model, a student or a bundle: ``at(size)`` gives a call from uint8 images ``(B, H, W, 3)`` to answers."""

    name: str
    place: str
    checkpoint: Path | None = None
    backend: str = "onnxruntime-cpu"

    def at(self, size: tuple[int, int]) -> Callable[[np.ndarray], Answers]:
        if is_bundle(self.place):
            return self._bundle(size)
        model = load_model(self.place, checkpoint=self.checkpoint, image_size=size).eval()
        steps, heads = model_preprocess(model), classifies(model)

        @torch.inference_mode()
        def answer(images: np.ndarray) -> Answers:
            features = hooks.forward(model, hooks.normalise(images, steps.mean, steps.std))
            patches, norms, cls = (t.numpy() for t in (features.patches, features.norms, features.cls))
            answers = {"patches": patches, "norms": norms, "cls": cls}
            return {**answers, "logits": model.forward_head(features.head_input).numpy()} if heads else answers

        return answer

    def _bundle(self, size: tuple[int, int]) -> Callable[[np.ndarray], Answers]:
        extractor = FeatureExtractor.load(self.place, self.backend)
        extractor.manifest.sizes.check(size, extractor.spec.patch)

        def answer(images: np.ndarray) -> Answers:
            dense = extractor.dense(np.ascontiguousarray(images))
            flat = dense.features.reshape(len(images), -1, dense.features.shape[-1])
            return {"patches": flat, "norms": dense.token_norm.reshape(len(images), -1), "cls": dense.cls}

        return answer


def gather(answer: Callable[[np.ndarray], Answers], images: np.ndarray, step: int = 8) -> Answers:
    """Answers to many images, computed ``step`` at a time."""
    parts = [answer(images[i : i + step]) for i in range(0, len(images), step)]
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


def held_out(folder: Path, size: tuple[int, int], steps: Preprocess, student: str) -> tuple[Photographs, Photographs]:
    """Photographs of ``folder`` that the student was trained on, and those that its record names as held out.

    Raises ``SystemExit`` if a held-out photograph is missing.
    """
    record: dict[str, Any] = json.loads((Path(student) / "phreg.json").read_text())
    names = set(record["images"]["held_out"])
    photographs = read_photographs(folder, size, steps)
    trained, unseen = (
        photographs.subset(i for i, name in enumerate(photographs.names) if (name in names) == wanted)
        for wanted in (False, True)
    )
    if len(unseen) != len(names):
        raise SystemExit(
            f"{student} names {len(names)} photographs as held out, {len(unseen)} of them are in {folder}."
        )
    return trained, unseen
