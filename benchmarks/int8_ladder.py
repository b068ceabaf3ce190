"""Measure what registers do for INT8: the same ladder of measures on the base model and on its students.

    python benchmarks/int8_ladder.py --photographs DIR --base NAME --checkpoint FILE --model NAME=FOLDER ... --json OUT

Every linear layer runs in 8 bits, except on the last rungs. A figure is 1 - cosine of patch tokens with the model's
own FP32, on ONNX Runtime's CPU provider. 256 photographs give ranges and rounding, 32 the order of layers. At most 96
are scored: those that the first student's record names as held out. Each rung keeps the measures before it.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import click
import numpy as np
import onnx
from subjects import held_out

from phreg_deploy.calibration.gptq import round_all
from phreg_deploy.calibration.qdq import write_int8
from phreg_deploy.calibration.ranges import observe_ranges
from phreg_deploy.calibration.search import EvalSet, Search, compare
from phreg_deploy.calibration.smoothing import equalise
from phreg_deploy.export.exporter import ExportRequest, export_bundle
from phreg_deploy.models.batches import spread
from phreg_deploy.onnx_graph.external import put_together
from phreg_deploy.onnx_graph.linears import find_linears
from phreg_deploy.onnx_graph.session import open_session
from phreg_deploy.onnx_graph.wiring import Wiring
from phreg_deploy.quantisation import Grid, Range, Smoothing, make_grid
from phreg_deploy.runtime.features import FeatureExtractor

NONE = Smoothing(None, None, None)
RANGED, CHOSEN, SCORED = 256, 32, 96


def plain(observed: Range, kind: str, smoothing: Smoothing) -> Grid:
    """Symmetric, per tensor, without smoothing."""
    top = float(max(-observed.low.min(), observed.high.max(), 1e-5))
    return Grid(np.zeros_like(observed.low), np.ones_like(observed.low), top / 127, 128)


def offset(observed: Range, kind: str, smoothing: Smoothing) -> Grid:
    """As ``plain``, with a zero point for hidden units."""
    if kind == "hidden":
        return make_grid(observed, kind, replace(smoothing, hidden=None))
    return plain(observed, kind, smoothing)


RUNGS = (
    ("symmetric, per tensor", plain, NONE),
    ("+ zero point for hidden units", offset, NONE),
    ("+ centred layer norms", make_grid, NONE),
    ("+ smoothed layer norms and values", make_grid, Smoothing(hidden=None)),
    ("+ smoothed hidden units", make_grid, Smoothing()),
)


def climb(folder: Path, photographs: str, student: str) -> dict[str, Any]:
    """Figures of every rung for the FP32 bundle in ``folder``."""
    with FeatureExtractor.load(folder, "onnxruntime-cpu") as extractor:
        manifest = extractor.manifest
        trained, unseen = held_out(Path(photographs), manifest.sizes.default, manifest.preprocess, student)
        pool = spread(trained, RANGED + CHOSEN)
        order = [int(i) for i in np.random.default_rng(0).permutation(len(pool))]
        images = [pool.array(i) for i in order] + [unseen.array(i) for i in range(min(SCORED, len(unseen)))]
        feeds = [(extractor.feed(image[None]), 1) for image in images]
        answers = [extractor.run(feed["image"]) for feed, _ in feeds]
    ranged, last = feeds[:RANGED], RANGED + CHOSEN
    chosen, scored = EvalSet(feeds[RANGED:last], answers[RANGED:last]), EvalSet(feeds[last:], answers[last:])
    model = onnx.load(folder / "model.onnx")
    linears, wiring = find_linears(model), Wiring(model)
    ranges = observe_ranges(model, linears, manifest.model, ranged, lambda _n: None)
    rows = {}

    def score(name: str, graph: Any) -> None:
        parity = compare(open_session(graph), scored, manifest.norm_median).parity()
        rows[name] = {"mean": 1 - parity.cosine_mean, "p1": 1 - parity.cosine_p1, "neighbours": parity.neighbours}
        click.echo(f"  {name:40s} {rows[name]['mean']:.5f} {rows[name]['p1']:.5f} {rows[name]['neighbours']:.3f}")

    for name, rule, smoothing in RUNGS:
        score(name, write_int8(model, linears, equalise(wiring, linears, ranges, smoothing, rule), set(), "cpu"))
    tokens = manifest.model.prefix_tokens + answers[0]["token_norm"].size
    without = equalise(wiring, linears, ranges, replace(Smoothing(), registers=False))
    score("the same, hidden ranges without registers", write_int8(model, linears, without, set(), "cpu"))
    equalised = equalise(wiring, linears, ranges, Smoothing())
    round_all(wiring, linears, equalised, tokens, ranged, lambda _n=1: None)
    score("+ GPTQ rounding", write_int8(model, linears, equalised, set(), "cpu"))
    search = Search(wiring, linears, ranges, "cpu", manifest.norm_median, chosen)
    search.round_weights(Smoothing(), tokens, ranged, lambda _n=1: None)
    gains = search.sensitivities(Smoothing(), lambda _n=1: None)
    for share in (0.01, 0.1):
        # No cosine reaches 2, so the whole share is spent.
        keep, _ = search.fallback(Smoothing(), gains, share, 2.0, lambda _n=1: None)
        spent = sum(n.size for n in linears if n.name in keep) / sum(n.size for n in linears)
        score(f"+ at most {100 * share:.0f} % of MACs in float", put_together(*search.graph(Smoothing(), set(keep))))
        rows[f"+ at most {100 * share:.0f} % of MACs in float"].update(layers=keep, share=spent)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for option in ("--photographs", "--base", "--checkpoint"):
        parser.add_argument(option, required=True)
    parser.add_argument("--model", action="append", required=True, metavar="NAME=FOLDER")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    models = {
        "base": (args.base, Path(args.checkpoint)),
        **{e.split("=", 1)[0]: (e.split("=", 1)[1], None) for e in args.model},
    }
    report, student = {}, args.model[0].split("=", 1)[1]
    for name, (model, checkpoint) in models.items():
        with tempfile.TemporaryDirectory() as scratch:
            click.echo(name)
            folder = Path(scratch, "fp32.bundle")
            export_bundle(ExportRequest(model=model, checkpoint=checkpoint), folder)
            report[name] = climb(folder, args.photographs, student)
    if args.json:
        args.json.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
