"""Make the small model, the photographs and the bundles that the reliability figures are measured on."""

from __future__ import annotations

import os
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from tests import student_fixtures
from tests.cli_helpers import invoke, photograph

HERE = ("--backend", "onnxruntime-cpu", "--threads", "1", "--json")


@dataclass(frozen=True)
class Subjects:
    """A folder with the tests' small ViT, 24 photographs, and what the commands make of them.

    Everything is made at first use, and kept for the next run.
    """

    folder: Path

    def _once(self, name: str, *command: object) -> Path:
        target = self.folder / name
        if not target.exists():
            self.folder.mkdir(parents=True, exist_ok=True)
            made = invoke(*command, "-o", target, "--quiet")
            if made.code:
                raise SystemExit(f"{name}: {made.err}")
        return target

    @cached_property
    def photos(self) -> Path:
        target = self.folder / "photos"
        if not target.exists():
            target.mkdir(parents=True)
            for i in range(24):
                photograph(i, 70 + 7 * (i % 5), 66 + 11 * (i % 4)).save(target / f"frame-{i:02d}.png")
        return target

    @cached_property
    def base(self) -> Path:
        """A folder that timm loads: 64 px, patch 8, width 48, 3 blocks, 5 classes."""
        target = self.folder / "base"
        if not target.exists():
            import timm
            import torch
            from timm.models import save_for_hf

            shape = {
                "img_size": student_fixtures.SIDE,
                "patch_size": student_fixtures.PATCH,
                "embed_dim": student_fixtures.WIDTH,
                "depth": student_fixtures.DEPTH,
                "num_heads": 3,
            }
            model = timm.create_model("vit_tiny_patch16_224", num_classes=5, **shape)
            student_fixtures.plant(model, torch)
            save_for_hf(model, str(target), model_args=shape, safe_serialization=True)
        return target

    @cached_property
    def distil(self) -> tuple[object, ...]:
        """The command that makes the student, without its output."""
        return (
            *("distill", self.base, "--images", self.photos, "--epochs", 1, "--batch", 8, "--views", 6),
            *("--device", "cpu", "--cache", self.folder / "cache"),
        )

    @cached_property
    def student(self) -> Path:
        return self._once("student", *self.distil)

    @cached_property
    def bundle(self) -> Path:
        return self._once("fixed", "export", self.student)

    @cached_property
    def bundles(self) -> dict[str, Path]:
        """FP32, a range of sizes and batches, INT8, and FP32 with two further layers."""
        wide = self._once("range", "export", self.student, "--image-size", "48:64:96", "--batch", "1:2:4")
        int8 = self._once("int8", "calibrate", self.bundle, "--images", self.photos, "--force")
        layers = self._once("layers", "export", self.student, "--layers", "1,2")
        return {"fp32": self.bundle, "range": wide, "int8": int8, "layers": layers}


def default_folder() -> Path:
    """Where subjects are kept: ``$PHREG_RELIABILITY``, or ``reliability-work`` in the working folder."""
    return Path(os.environ.get("PHREG_RELIABILITY", "reliability-work")).absolute()
