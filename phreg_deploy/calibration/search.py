"""Choose the smoothing and the layers that stay in float, by the features at the end of the network."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from onnx import ModelProto

from phreg_deploy.calibration.fp8 import E4M3, FP8, FUSED_FROM, write_fp8
from phreg_deploy.calibration.gptq import INT8, round_all
from phreg_deploy.calibration.images import Feeds
from phreg_deploy.calibration.kernels import open_counted
from phreg_deploy.calibration.qdq import write_int8
from phreg_deploy.calibration.ranges import Ranges
from phreg_deploy.calibration.report import FallbackStep, Sensitivity, Trial
from phreg_deploy.calibration.smoothing import Equalised, equalise
from phreg_deploy.onnx_graph.linears import Linear, find_linears
from phreg_deploy.onnx_graph.parts import Walk, block_starts
from phreg_deploy.onnx_graph.session import open_session
from phreg_deploy.onnx_graph.wiring import Wiring
from phreg_deploy.progress import Advance
from phreg_deploy.quantisation import WEIGHT_STEPS, Smoothing
from phreg_deploy.runtime.parity import Parity, ParityAccumulator, missed_gates

CANDIDATES: tuple[dict[str, Any], ...] = (
    {"norm": 0.65, "value": 0.65},
    {"norm": 0.95, "value": 0.95},
    {"hidden": 0.65},
    {"hidden": 0.95},
    {"hidden": None},
    {"registers": False},
)
# A candidate is taken if it leaves at most this share of 1 - p1; a smaller gain is noise.
WORTH = 0.98
# Patches on which a layer's sensitivity is measured: 16 images of 14 x 14. At least two images of any size are used.
PATCHES = 3136


@dataclass
class EvalSet:
    """Images, and the float graph's answers to them."""

    feeds: Feeds
    answers: list[dict[str, np.ndarray]]

    def first(self, images: int) -> EvalSet:
        batches = max(1, -(-images // max(1, self.feeds[0][1])))
        return EvalSet(self.feeds[:batches], self.answers[:batches])

    def __len__(self) -> int:
        return sum(count for _, count in self.feeds)


def run_session(session: Any, feed: dict[str, np.ndarray], count: int) -> dict[str, np.ndarray]:
    """Return the outputs of a session by name, for the first ``count`` images of ``feed``."""
    names = [output.name for output in session.get_outputs()]
    return {name: value[:count] for name, value in zip(names, session.run(names, feed))}


def compare(session: Any, images: EvalSet, median: float | None) -> ParityAccumulator:
    """Compare a session's answers with the float graph's; ``median``: the base model's median token norm."""
    accumulator = ParityAccumulator(median)
    for (feed, count), expected in zip(images.feeds, images.answers):
        accumulator.add(run_session(session, feed, count), expected)
    return accumulator


@dataclass
class Search:
    """Quantised graphs of one model, scored on the same images.

    ``median``: the base model's median token norm. ``largest``: tensor -> its largest magnitude, for FP8. ``tokens``:
    of the smallest image that is served; with fewer than ``FUSED_FROM``, FP8 attention is slower than FP16's.
    """

    wiring: Wiring
    linears: list[Linear]
    ranges: Ranges
    target: str
    median: float | None
    images: EvalSet
    mode: str = "int8"
    largest: dict[str, float] = field(default_factory=dict)
    tokens: int = FUSED_FROM
    _equalised: tuple[Smoothing, Equalised] | None = field(default=None, init=False)

    @property
    def size(self) -> int:
        """Multiply-accumulates of all linear layers per token."""
        return sum(linear.size for linear in self.linears)

    def equalised(self, smoothing: Smoothing) -> Equalised:
        if self._equalised is None or self._equalised[0] != smoothing:
            # Free the last one first: a large model's weights do not fit twice.
            self._equalised = None
            self._equalised = smoothing, equalise(self.wiring, self.linears, self.ranges, smoothing)
        return self._equalised[1]

    def graph(
        self, smoothing: Smoothing, keep: set[str], share: bool = False
    ) -> tuple[ModelProto, dict[str, np.ndarray]]:
        """Write all layers but ``keep`` in 8 bits, and floats in FP32; ``share``: see ``write_int8``.

        Returns the graph, and its large constants by name: a graph without them is quickly serialised.
        """
        model, equalised, arrays = self.wiring.model, self.equalised(smoothing), dict(self.wiring.arrays)
        if self.mode == "int8":
            return write_int8(model, self.linears, equalised, keep, self.target, share, arrays), arrays
        # Equalise the graph and leave every layer in float; then write FP8 into it.
        centred = write_int8(model, self.linears, equalised, {n.name for n in self.linears}, self.target, False, arrays)
        weights = {name: value for name, value in equalised.eight_bits.items() if value[0].dtype == E4M3}
        magnitudes, attention = self._magnitudes(equalised), self.tokens >= FUSED_FROM
        return write_fp8(centred, find_linears(centred), magnitudes, keep, weights, attention, arrays), arrays

    def _magnitudes(self, equalised: Equalised) -> dict[str, float]:
        """Return the largest magnitudes in the equalised graph; those of layer norms are after centring."""
        grids = {n.source: equalised.grids[n.name] for n in self.linears if n.kind == "norm"}
        return {**self.largest, **{source: grid.step * WEIGHT_STEPS for source, grid in grids.items()}}

    def round_weights(self, smoothing: Smoothing, tokens: int, feeds: Feeds, advance: Advance) -> None:
        """Round the weights on images by GPTQ, for this smoothing; ``tokens``: per image."""
        form = INT8 if self.mode == "int8" else FP8
        round_all(self.wiring, self.linears, self.equalised(smoothing), tokens, feeds, advance, form)

    def score(self, smoothing: Smoothing, keep: set[str], images: EvalSet | None = None) -> Parity:
        """Return the parity of the graph in which all layers but ``keep`` are in 8 bits."""
        return self._compare(smoothing, keep, images).parity()

    def _compare(self, smoothing: Smoothing, keep: set[str], images: EvalSet | None = None) -> ParityAccumulator:
        """Write the graph, count its integer kernels (INT8), and compare its features with the float graph's."""
        graph, arrays = self.graph(smoothing, keep)
        if self.mode == "int8":
            session, _ = open_counted(graph, [n.name for n in self.linears if n.name not in keep], arrays)
        else:
            session = open_session(graph, literal=True, arrays=arrays)
        return compare(session, images or self.images, self.median)

    def choose_smoothing(self, start: Smoothing, advance: Advance) -> tuple[Smoothing, list[Trial]]:
        """Try one change after another, and take each that improves the 1st-percentile cosine."""
        best, score = start, self.score(start, set())
        trials = [Trial(best, score)]
        advance(1)
        for change in CANDIDATES:
            if "registers" not in change or self._registers_matter():
                candidate = replace(best, **change)
                parity = self.score(candidate, set())
                trials.append(Trial(candidate, parity))
                if 1 - _cosines(parity)[1] < WORTH * (1 - _cosines(score)[1]):
                    best, score = candidate, parity
            advance(1)
        return best, trials

    def sensitivities(self, smoothing: Smoothing, advance: Advance) -> dict[str, Sensitivity]:
        """Measure each layer's gain in mean and 1st-percentile cosine when it alone goes back to float.

        Up to the layer's block the graph is that of all layers in 8 bits, so it is run from there on.
        """
        images = self.images.first(max(2, PATCHES // self.images.answers[0]["token_norm"][0].size))
        whole = self.score(smoothing, set(), images)
        graph, arrays = self.graph(smoothing, set())
        walk, starts = Walk(graph, [feed for feed, _ in images.feeds], arrays, self.mode == "fp8"), block_starts(graph)
        blocks = [sum(start <= place for start in starts) - 1 for place in self._places(graph)]
        gains = {}
        for linear, block in zip(self.linears, blocks):
            if block > 0 and walk.at < starts[block]:
                walk.step(starts[block])
            alone = self._alone(smoothing, linear, images, walk)
            mean, p1 = (own - of_all for own, of_all in zip(_cosines(alone), _cosines(whole)))
            gains[linear.name] = Sensitivity(mean, p1, len(images))
            advance(1)
        return gains

    def _places(self, graph: ModelProto) -> list[int]:
        """The place of every layer's product in the order of nodes."""
        places = {node.name: place for place, node in enumerate(graph.graph.node)}
        return [places[linear.matmul] for linear in self.linears]

    def _alone(self, smoothing: Smoothing, linear: Linear, images: EvalSet, walk: Walk) -> Parity:
        """Compare the graph with one layer in float, from the place that ``walk`` has reached on."""
        # Its kernels are not counted: those of the whole graph were, and those of the graph that is written will be.
        graph, arrays = self.graph(smoothing, {linear.name})
        accumulator = ParityAccumulator(self.median)
        answers = walk.rest(graph, walk.at, arrays)
        for (_, count), answer, expected in zip(images.feeds, answers, images.answers):
            accumulator.add({name: value[:count] for name, value in answer.items()}, expected)
        return accumulator.parity()

    def fallback(
        self, smoothing: Smoothing, gains: dict[str, Sensitivity], cap: float, bar: float, advance: Advance
    ) -> tuple[list[str], list[FallbackStep]]:
        """Leave layers in float, the most sensitive for their size first, until other images will pass too.

        ``cap``: share of the multiply-accumulates that may be in float. ``bar``: least 1st-percentile cosine.
        """
        spent, keep, steps = 0, list[str](), list[FallbackStep]()
        order = iter(sorted(self.linears, key=lambda n: -gains[n.name].mean / n.size))
        while True:
            measured = self._compare(smoothing, set(keep))
            parity = measured.parity()
            steps.append(FallbackStep(keep[-1] if keep else None, parity))
            # Other images decide in the end, so a score that just passes on these is not enough.
            careful = replace(parity, cosine_p1=measured.lower_p1())
            fits = (n for n in order if gains[n.name].mean > 0 and (spent + n.size) / self.size <= cap)
            if not missed_gates(careful, self.mode, bar) or (linear := next(fits, None)) is None:
                return keep, steps
            spent += linear.size
            keep.append(linear.name)
            advance(1)

    def _registers_matter(self) -> bool:
        return any(
            not np.array_equal(parts["all"].low, parts["others"].low)
            or not np.array_equal(parts["all"].high, parts["others"].high)
            for parts in self.ranges.values()
        )


def _cosines(parity: Parity) -> tuple[float, float]:
    """Return the mean and the 1st-percentile cosine; ``calibrate`` has refused bundles without features."""
    assert parity.cosine_mean is not None
    assert parity.cosine_p1 is not None
    return parity.cosine_mean, parity.cosine_p1
