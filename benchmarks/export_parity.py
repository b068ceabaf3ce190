"""Compare exported graphs with PyTorch: big models, with and without registers, three sizes, several batches.

    python benchmarks/export_parity.py --json OUT

Random weights (seed 0), scaled to make every path carry signal (timm's initial LayerScale would hide the blocks). Each
model is one bundle with a range of sizes, which puts the runtime's own position embeddings into the comparison.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path

import numpy as np
import torch

from phreg_deploy.export.exporter import ExportRequest, export_bundle
from phreg_deploy.models import hooks
from phreg_deploy.models.checkpoint import write_student
from phreg_deploy.models.loading import load_model, model_preprocess
from phreg_deploy.models.registers import add_registers
from phreg_deploy.runtime.features import FeatureExtractor
from phreg_deploy.runtime.parity import compare_runs

NAMES = (
    "vit_small_patch14_dinov2",
    "vit_base_patch16_clip_quickgelu_224",
    "deit3_small_patch16_224",
    "vit_base_patch16_siglip_224",
)
CASES = (((14, 14), 1), ((16, 12), 8), ((21, 27), 2))  # patch grid, batch


def stir(model: torch.nn.Module) -> None:
    """Set LayerScale near one, and move norms and biases off their initial values."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if "gamma" in name:
                parameter.copy_(0.5 + 0.2 * noise)
            elif "norm" in name and name.endswith("weight"):
                parameter.copy_(1 + 0.2 * noise)
            elif parameter.ndim == 1:
                parameter.copy_(0.1 * noise)
            elif "token" in name or "pos_embed" in name:
                parameter.copy_(0.5 * noise)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    rows = []
    for name in NAMES:
        for registers in (0, 4):
            model = load_model(name, random_weights=True)
            stir(model)
            model = add_registers(model, registers) if registers else model
            patch = model.patch_embed.patch_size[0]
            preprocess = model_preprocess(model)
            with tempfile.TemporaryDirectory() as place:
                folder = Path(place) / "model"
                folder.mkdir()
                write_student(model, {"scores": {"median_norm": None}, "recipe": {"name": "none"}}, folder)
                request = ExportRequest(str(folder), image_size=f"{8 * patch}:{16 * patch}:{32 * patch}", batch="1:2:8")
                export_bundle(request, Path(place) / "bundle")
                with FeatureExtractor.load(Path(place) / "bundle") as extractor:
                    for grid, batch in CASES:
                        size = (grid[0] * patch, grid[1] * patch)
                        images = np.random.default_rng(0).integers(0, 256, (batch, *size, 3), dtype=np.uint8)
                        outputs = extractor.run(images)
                        sized = load_model(str(folder), image_size=size)
                        with torch.inference_mode():
                            features = hooks.forward(sized, hooks.normalise(images, preprocess.mean, preprocess.std))
                        expected = {
                            "features": features.patches.numpy().reshape(outputs["features"].shape),
                            "token_norm": features.norms.numpy().reshape(outputs["token_norm"].shape),
                        }
                        parity = compare_runs(outputs, expected)
                        rows.append(
                            {"model": name, "registers": registers, "size": size, "batch": batch, **parity.to_json()}
                        )
                        print(json.dumps(rows[-1]), flush=True)  # noqa: T201
    worst = min(row["cosine_p1"] for row in rows)
    report = {"worst_cosine_p1": worst, "rows": rows}
    print(json.dumps({"worst_cosine_p1": worst}))  # noqa: T201
    if args.json:
        args.json.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
