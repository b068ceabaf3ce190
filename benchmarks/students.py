"""Base, trivial fix and students side by side: norm outliers, fidelity to the denoised target, class drift, blocks.

    python benchmarks/students.py --photographs DIR --scenes DIR --base NAME --checkpoint FILE --student NAME=FOLDER ... --json OUT

Fidelity and class drift are taken on the photographs that the first student's record names as held out; norm outliers on
all images of ``--scenes`` (squashed to the model's size), against the base model's median there.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch
from camvid_probe import nearest_interior

from phreg_deploy.artifacts import agreement, cosine, norm_outliers, outlier_mask
from phreg_deploy.distill.measure import REFERENCE_SEED, REFERENCE_VIEWS, block_norms, read_features
from phreg_deploy.distill.source import load_model, model_preprocess
from phreg_deploy.distill.teacher import Teacher
from phreg_deploy.photographs import read_photographs


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--photographs", type=Path, required=True)
    parser.add_argument("--scenes", type=Path, required=True)
    parser.add_argument("--base", required=True)
    parser.add_argument("--checkpoint", type=Path)
    parser.add_argument("--student", action="append", default=[], metavar="NAME=FOLDER")
    parser.add_argument("--json", type=Path)
    asked = parser.parse_args()

    students = dict(entry.split("=", 1) for entry in asked.student)
    record = json.loads((Path(next(iter(students.values()))) / "phreg.json").read_text())
    base = load_model(asked.base, checkpoint=asked.checkpoint)
    size, preprocess = tuple(base.patch_embed.img_size), model_preprocess(base, "center")
    photographs = read_photographs(asked.photographs, size, preprocess)
    held = set(record["images"]["held_out"])
    photographs = photographs.subset(i for i, name in enumerate(photographs.names) if name in held)
    scenes = read_photographs(asked.scenes, size, model_preprocess(base))

    teacher = Teacher(base, preprocess, views=REFERENCE_VIEWS, seed=REFERENCE_SEED)
    target = np.stack([t.patches for t in teacher.targets(photographs)])
    target = target.reshape(len(target), -1, target.shape[-1])
    first = read_features(base, photographs, preprocess)
    outliers = outlier_mask(first["norms"], float(np.median(first["norms"])))
    seen_scenes = read_features(base, scenes, preprocess)
    median = float(np.median(seen_scenes["norms"]))
    rows = []
    for name, folder in {"base": None, **students}.items():
        model = base if folder is None else load_model(folder)
        seen = first if folder is None else read_features(model, photographs, preprocess)
        on_scenes = seen_scenes if folder is None else read_features(model, scenes, preprocess)
        blocks = [block_norms(model, photos, preprocess) for photos in (photographs, scenes)]
        told = None if folder is None else json.loads((Path(folder) / "phreg.json").read_text())
        rows.append(
            {
                "model": name,
                "scenes_norm_outliers": asdict(norm_outliers(on_scenes["norms"], median)),
                "worst_block": max(b["largest"] for found in blocks for b in found),
                "fidelity": asdict(agreement(seen["patches"], target, outliers)),
                "class_cosine": float(cosine(seen["cls"], first["cls"]).mean()),
                "top1_agreement": float(np.mean(seen["logits"].argmax(1) == first["logits"].argmax(1))),
                "seconds": None if told is None else told["seconds"],
                "epochs": None if told is None else told["recipe"]["epochs"],
            }
        )
        print(json.dumps(rows[-1]), flush=True)  # noqa: T201
    fixed = nearest_interior(first["patches"], outliers, tuple(base.patch_embed.grid_size))
    rows.append(
        {"model": "base, nearest interior patch copied", "fidelity": asdict(agreement(fixed, target, outliers))}
    )
    print(json.dumps(rows[-1]))  # noqa: T201
    report = {
        "photographs": len(photographs),
        "scenes": len(scenes),
        "rows": rows,
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
    }
    if asked.json:
        asked.json.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
