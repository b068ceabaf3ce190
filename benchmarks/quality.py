"""Compare base model, trivial fix, students and bundles: fidelity, class token, norm outliers, CamVid probe.

    python benchmarks/quality.py --data DIR --base NAME --checkpoint FILE --subject NAME=PLACE ... --json OUT

PLACE is a student's folder or a bundle that serves 224 px and 352x480. A NAME given several times is one row with
several seeds, which holds means over them. Fidelity and class token are measured on the photographs of
``DIR/distil_imagenet1000`` that the first student's record names as held out, against denoised targets of 20 views
with a seed of their own in float32. Norm outliers are counted on ``DIR/camvid_val``, squashed to 224 px, against the
base model's median there. The probe is that of segmentation.py.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Collection
from dataclasses import asdict
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch
from segmentation import SIZE, CamVid, intervals, nearest_interior
from subjects import Subject, gather, held_out

from phreg_deploy.artifacts.measures import agreement, cosine, norm_outliers, outlier_mask
from phreg_deploy.distill.evaluation import REFERENCE_SEED, REFERENCE_VIEWS
from phreg_deploy.distill.teacher import Teacher
from phreg_deploy.images.photographs import read_photographs
from phreg_deploy.models.loading import load_model, model_preprocess
from phreg_deploy.profiling.latency import processor

NATIVE = (224, 224)


class Comparison:
    """The base model's answers on photographs and scenes, with which other models are compared.

    ``student``: its record names the photographs. ``without``: sha256 of photographs to leave out.
    """

    def __init__(self, base: Subject, data: Path, student: str, without: Collection[str] = ()) -> None:
        model = load_model(base.place, checkpoint=base.checkpoint)
        steps = model_preprocess(model, "center")
        _, photographs = held_out(data / "distil_imagenet1000", NATIVE, steps, student)
        photographs = photographs.subset(i for i, d in enumerate(photographs.digests) if d not in without)
        self.photographs = photographs.batch(0, len(photographs))
        scenes = read_photographs(data / "camvid_val", NATIVE, model_preprocess(model))
        self.scenes = scenes.batch(0, len(scenes))
        teacher = Teacher(model, steps, views=REFERENCE_VIEWS, seed=REFERENCE_SEED)
        target = np.stack([t.patches for t in teacher.targets(photographs)]).astype(np.float32)
        self.target = target.reshape(len(target), -1, target.shape[-1])
        answer = base.at(NATIVE)
        self.first = gather(answer, self.photographs)
        self.outliers = outlier_mask(self.first["norms"], float(np.median(self.first["norms"])))
        self.median = float(np.median(gather(answer, self.scenes)["norms"]))
        self.camvid = CamVid(data, model.patch_embed.patch_size[0])
        self.grid = tuple(s // model.patch_embed.patch_size[0] for s in SIZE)
        self.frames = self._frames(base)
        middle = float(np.median(self.frames["val"]["norms"]))
        self.marked = {name: outlier_mask(answers["norms"], middle) for name, answers in self.frames.items()}

    def _frames(self, subject: Subject) -> dict[str, dict[str, np.ndarray]]:
        answer = subject.at(SIZE)
        return {name: gather(answer, images, 4) for name, images in self.camvid.images.items()}

    def row(self, subject: Subject, base: bool = False) -> tuple[dict[str, Any], np.ndarray]:
        """Figures of one model or bundle, and the parts of its mean IoU by frame."""
        answer = subject.at(NATIVE)
        answers, scenes = gather(answer, self.photographs), gather(answer, self.scenes)
        row = {
            "norm_outliers": asdict(norm_outliers(scenes["norms"], self.median)),
            "fidelity": asdict(agreement(answers["patches"], self.target, self.outliers)),
            "class_cosine": float(cosine(answers["cls"], self.first["cls"]).mean()),
        }
        if "logits" in answers:
            same = answers["logits"].argmax(1) == self.first["logits"].argmax(1)
            row["top1_agreement"] = float(np.mean(same))
        frames = self.frames if base else self._frames(subject)
        return self._probed(row, frames["train"]["patches"], frames["val"]["patches"])

    def trivial(self) -> tuple[dict[str, Any], np.ndarray]:
        """The same for the base model with each outlier token replaced by the nearest ordinary one."""
        fixed = nearest_interior(self.first["patches"], self.outliers, (14, 14))
        row = {"fidelity": asdict(agreement(fixed, self.target, self.outliers))}
        frames = {n: nearest_interior(f["patches"], self.marked[n], self.grid) for n, f in self.frames.items()}
        return self._probed(row, frames["train"], frames["val"])

    def _probed(self, row: dict[str, Any], train: np.ndarray, val: np.ndarray) -> tuple[dict[str, Any], np.ndarray]:
        scores = self.camvid.read(self.camvid.probe(train, val), self.marked["val"])
        parts = scores.pop("parts")
        return {**row, **scores}, parts


def mean(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Means of the same figures of several seeds."""
    means: dict[str, Any] = {}
    for key, value in rows[0].items():
        values = [row[key] for row in rows]
        if isinstance(value, dict):
            means[key] = mean(values)
        else:
            means[key] = None if value is None else float(np.mean(values))
    return means


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--base", required=True)
    parser.add_argument("--checkpoint", type=Path, required=True)
    parser.add_argument("--subject", action="append", default=[], metavar="NAME=PLACE")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    named: dict[str, list[str]] = {}
    for entry in args.subject:
        name, place = entry.split("=", 1)
        named.setdefault(name, []).append(place)
    base = Subject("base", args.base, args.checkpoint)
    student = next(place for places in named.values() for place in places if Path(place, "phreg.json").is_file())
    compared = Comparison(base, args.data, student)
    row, first = compared.row(base, base=True)
    rows = {"base": {"seeds": 1, **row, **intervals([first], first)}}
    fixed, parts = compared.trivial()
    rows["trivial fix"] = {"seeds": 1, **fixed, **intervals([parts], first)}
    for name, places in named.items():
        measured = [compared.row(Subject(name, place)) for place in places]
        records = [json.loads(p.read_text()) for place in places if (p := Path(place, "phreg.json")).is_file()]
        training = (
            {"epochs": records[0]["recipe"]["epochs"], "seconds": [r["seconds"]["total"] for r in records]}
            if records
            else {}
        )
        rows[name] = {
            "seeds": len(places),
            **training,
            **mean([r for r, _ in measured]),
            **intervals([p for _, p in measured], first),
        }
        click.echo(f"{name}: {json.dumps(rows[name])}")
    report = {
        "model": args.base,
        "photographs": len(compared.photographs),
        "scenes": len(compared.scenes),
        "frames": {name: len(images) for name, images in compared.camvid.images.items()},
        "outlier_tokens": int(compared.marked["val"].sum()),
        "views": REFERENCE_VIEWS,
        "rows": rows,
        "processor": processor(),
        "torch": torch.__version__,
    }
    if args.json:
        args.json.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
