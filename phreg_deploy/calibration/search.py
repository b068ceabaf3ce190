"""What to smooth and what to leave in float, decided by the features that come out at the end."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from phreg_deploy.calibration.fp8 import E4M3, FP8, FUSED_FROM, write_fp8
from phreg_deploy.calibration.gptq import INT8, round_all
from phreg_deploy.calibration.kernels import open_counted
from phreg_deploy.calibration.qdq import write_int8
from phreg_deploy.calibration.ranges import Ranges
from phreg_deploy.calibration.smoothing import Equalised, equalise
from phreg_deploy.onnx_graph.linears import Linear, Wiring, find_linears
from phreg_deploy.onnx_graph.session import open_session
from phreg_deploy.quantisation import WEIGHT_STEPS, Smoothing
from phreg_deploy.runtime.parity import Parity, ParityAccumulator

Feeds = list[tuple[dict[str, np.ndarray], int]]
CANDIDATES = (
    {"norm": 0.65},
    {"norm": 0.95},
    {"hidden": 0.65},
    {"hidden": 0.95},
    {"hidden": None},
    {"registers": False},
)
WORTH = 0.98  # a candidate replaces what is there when it leaves at most this share of 1 - p1: less is noise
MARGIN = 0.95  # the same for the bar, so that other images than the ones chosen on pass it too
PATCHES = 3136  # that a layer's sensitivity is taken on: 16 images of 14 x 14, at least two of any size


@dataclass
class EvalSet:
    """Images with the float graph's answers to them."""

    feeds: Feeds
    answers: list[dict[str, np.ndarray]]

    def first(self, images: int) -> EvalSet:
        batches = max(1, -(-images // max(1, self.feeds[0][1])))
        return EvalSet(self.feeds[:batches], self.answers[:batches])

    def __len__(self) -> int:
        return sum(count for _, count in self.feeds)


def answer(session: Any, feed: dict[str, np.ndarray], count: int) -> dict[str, np.ndarray]:
    names = [output.name for output in session.get_outputs()]
    return {name: value[:count] for name, value in zip(names, session.run(names, feed))}


class Search:
    """Quantised graphs of one model, scored on the same images.

    ``score`` builds a graph, counts its integer kernels (``census``) and compares its features with the float graph's.
    """

    def __init__(
        self, wiring: Wiring, linears: list[Linear], ranges: Ranges, target: str, median: float | None, scene: EvalSet,
        mode: str = "int8", largest: dict[str, float] | None = None, tokens: int = FUSED_FROM,
    ) -> None:  # fmt: skip
        self.wiring, self.linears, self.ranges, self.target = wiring, linears, ranges, target
        self.median, self.scene, self.mode, self.largest = median, scene, mode, largest or {}
        self.attention = (
            tokens >= FUSED_FROM
        )  # of the smallest size that is served: FP8 attention that is not fused only costs
        self._known: tuple[Smoothing, Equalised] | None = None

    def equalised(self, smoothing: Smoothing) -> Equalised:
        if self._known is None or self._known[0] != smoothing:
            self._known = None  # before the next one is made: both would not fit for large models
            self._known = (smoothing, equalise(self.wiring, self.linears, self.ranges, smoothing))
        return self._known[1]

    def graph(self, smoothing: Smoothing, keep: set[str], share: bool = False) -> Any:
        """The graph in 8 bits but for ``keep``, floats in FP32; ``share`` see ``write_int8``."""
        equalised = self.equalised(smoothing)
        if self.mode == "int8":
            return write_int8(self.wiring.model, self.linears, equalised, keep, self.target, share)
        names = {n.name for n in self.linears}
        centred = write_int8(
            self.wiring.model, self.linears, equalised, names, self.target
        )  # equalised, and all in float
        weights = {name: value for name, value in equalised.eight_bits.items() if value[0].dtype == E4M3}
        return write_fp8(centred, find_linears(centred), self._reaches(equalised), keep, weights, self.attention)

    def _reaches(self, equalised: Equalised) -> dict[str, float]:
        """Largest magnitudes in the equalised graph: what was seen, and for layer norms what centring and smoothing left."""
        found = dict(self.largest)
        for n in self.linears:
            if n.kind == "norm":
                found[n.source] = equalised.grids[n.name].step * WEIGHT_STEPS
        return found

    def round(self, smoothing: Smoothing, tokens: int, feeds: Feeds, advance: Callable[..., None]) -> None:
        """Round the weights on images, for this smoothing."""
        form = INT8 if self.mode == "int8" else FP8
        round_all(self.wiring.model, self.linears, self.equalised(smoothing), tokens, feeds, advance, form)

    def score(self, smoothing: Smoothing, keep: set[str], scene: EvalSet | None = None) -> Parity:
        graph = self.graph(smoothing, keep)
        if self.mode == "fp8":
            session = open_session(graph, literal=True)
        else:
            session, _ = open_counted(graph, [n.name for n in self.linears if n.name not in keep])
        return compare(session, scene or self.scene, self.median)

    def smoothing(self, start: Smoothing, advance: Callable[..., None]) -> tuple[Smoothing, list[dict[str, Any]]]:
        """One setting after another, each kept where it makes the 1st-percentile cosine better."""
        best, score = start, self.score(start, set())
        tried = [{"smoothing": best.to_json(), "parity": score.to_json()}]
        advance(1)
        for change in CANDIDATES:
            candidate = (
                replace(best, **change)
                if "norm" not in change
                else replace(best, norm=change["norm"], value=change["norm"])
            )
            if "registers" not in change or self._registers_matter():
                found = self.score(candidate, set())
                tried.append({"smoothing": candidate.to_json(), "parity": found.to_json()})
                if 1 - found.cosine_p1 < WORTH * (1 - score.cosine_p1):
                    best, score = candidate, found
            advance(1)
        return best, tried

    def sensitivities(self, smoothing: Smoothing, advance: Callable[..., None]) -> dict[str, dict[str, float]]:
        """What each layer's 8 bits cost: the gain in mean and 1st-percentile cosine when it alone goes back to float."""
        scene = self.scene.first(max(2, PATCHES // self.scene.answers[0]["token_norm"][0].size))
        whole = self.score(smoothing, set(), scene)
        found = {}
        for linear in self.linears:
            alone = self.score(smoothing, {linear.name}, scene)
            found[linear.name] = {
                "mean": alone.cosine_mean - whole.cosine_mean,
                "p1": alone.cosine_p1 - whole.cosine_p1,
                "images": len(scene),
            }
            advance(1)
        return found

    def fallback(
        self, smoothing: Smoothing, gains: dict[str, dict[str, float]], cap: float, passes: Callable[[Parity], bool],
        advance: Callable[..., None],
    ) -> tuple[list[str], list[dict[str, Any]]]:  # fmt: skip
        """Layers to leave in float, the most sensitive for their size first, until the bar is passed or ``cap`` of the MACs is spent."""
        total, spent = sum(n.size for n in self.linears), 0
        keep: list[str] = []
        score = self.score(smoothing, set())
        steps: list[dict[str, Any]] = [{"layer": None, "parity": score.to_json()}]
        for linear in sorted(self.linears, key=lambda n: -gains[n.name]["mean"] / n.size):
            if passes(score):
                break
            if gains[linear.name]["mean"] <= 0 or (spent + linear.size) / total > cap:
                continue
            spent += linear.size
            keep.append(linear.name)
            score = self.score(smoothing, set(keep))
            steps.append({"layer": linear.name, "parity": score.to_json()})
            advance(1)
        return keep, steps

    def _registers_matter(self) -> bool:
        return any(
            not np.array_equal(parts["all"].low, parts["others"].low)
            or not np.array_equal(parts["all"].high, parts["others"].high)
            for parts in self.ranges.values()
        )


def compare(session: Any, scene: EvalSet, median: float | None) -> Parity:
    """Parity of a session with the answers of a scene."""
    tally = ParityAccumulator(median)
    for (feed, count), expected in zip(scene.feeds, scene.answers):
        tally.add(answer(session, feed, count), expected)
    return tally.parity()
