"""Score base, student and bundles on photographs, and compare the bundles with the student, image by image."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from phreg_deploy.artifacts.measures import NormOutliers, cosine, norm_outliers, outlier_mask
from phreg_deploy.artifacts.scores import Run, Scores, score, score_norms
from phreg_deploy.bundle.manifest import Manifest
from phreg_deploy.images.photographs import Photographs, read_photographs
from phreg_deploy.layers import NORM
from phreg_deploy.progress import Progress
from phreg_deploy.readout import Readout
from phreg_deploy.runtime.features import FeatureExtractor
from phreg_deploy.runtime.parity import Parity, ParityAccumulator
from phreg_deploy.verify.maps import Gallery, Maps, ParityByImage

Answers = Callable[[np.ndarray], dict[str, np.ndarray]]  # uint8 images -> a bundle's outputs by name
BASE, STUDENT = "base", "student"


@dataclass(frozen=True)
class CheckRequest:
    """What to compare bundles with; the fields are the arguments of ``phreg_deploy.verify.check``.

    ``pictures``: the outputs on so many images, the worst, are kept in ``Maps``.
    """

    reference: str | None = None
    reference_checkpoint: Path | None = None
    base: str | None = None
    base_checkpoint: Path | None = None
    images: Path | None = None
    limit: int = 64
    cosine: float | None = None
    outlier_points: float | None = None
    pictures: int = 0


@dataclass(frozen=True)
class OnImages:
    """What was measured on photographs, by model.

    ``parity``: of each bundle with the student, by part (``ParityAccumulator.parts``). ``layers``: norm outliers of a
    bundle's further layers. ``by_image``: of each bundle that was compared.
    """

    photographs: Photographs
    scores: dict[str, Scores]
    parity: dict[str, dict[str, Parity]]
    layers: dict[str, dict[str, NormOutliers]]
    by_image: dict[str, ParityByImage]
    maps: Maps | None


class BundleRun:
    """A bundle as ``scores.score`` calls it: uint8 images -> features and pre-norm token norms.

    It keeps the token norms of further layers for the first image of each call, which is the unshifted view.
    """

    def __init__(self, extractor: FeatureExtractor) -> None:
        self.extractor = extractor
        self._norms: dict[int, list[np.ndarray]] = {}

    def __call__(self, images: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        dense = self.extractor.dense(np.ascontiguousarray(images))
        for block, layer in dense.layers.items():
            self._norms.setdefault(block, []).append(layer.token_norm[0])
        return dense.features, dense.token_norm

    def layers(self) -> dict[str, NormOutliers]:
        """The norm outliers of each further layer, against its own median over the images; by number of blocks."""
        return {str(block): norm_outliers(np.stack(norms)) for block, norms in self._norms.items()}

    def score(
        self, photographs: Photographs, median: float | None, progress: Progress, name: str = "scoring"
    ) -> Scores:
        """Score the bundle on photographs: of one with heads alone, the token norms."""
        manifest = self.extractor.manifest
        if manifest.only_heads:
            norms = lambda images: self.extractor.dense(images).token_norm  # noqa: E731
            return score_norms(norms, photographs, median=median, progress=progress, name=name)
        return score(self, photographs, manifest.model.patch, median=median, progress=progress, name=name)


def measure(extractors: Mapping[str, FeatureExtractor], request: CheckRequest, progress: Progress) -> OnImages:
    """Measure base, student and bundles on the photographs of a request.

    Of bundles with heads alone there are no maps, and no parity by image.

    Args:
        extractors: by the name that their results get; they share one input size, preprocessing and readout, and all or
            none serve features.
    """
    manifest = next(iter(extractors.values())).manifest
    size = manifest.sizes.default
    assert request.images is not None
    photographs = read_photographs(request.images, size, manifest.preprocess, request.limit, say=progress.say)
    models = {
        name: _load_model(source, checkpoint, size, manifest.readout)
        for name, source, checkpoint in (
            (BASE, request.base, request.base_checkpoint),
            (STUDENT, request.reference, request.reference_checkpoint),
        )
        if source
    }
    scores: dict[str, Scores] = {}
    median = manifest.norm_median
    own = {name: BundleRun(extractor) for name, extractor in extractors.items()}
    for name, model in models.items():
        run, patch = _model_run(model, manifest), manifest.model.patch
        scores[name] = score(run, photographs, patch, median=median, progress=progress, name=f"scoring {name}")
        if name == BASE:
            median = scores[name].norm_outliers.median
    for name, bundle in own.items():
        scores[name] = bundle.score(photographs, median, progress, f"scoring {name}")
    layers = {name: run.layers() for name, run in own.items()}
    pass_ = _Pass(photographs, models, extractors, median, 0 if manifest.only_heads else request.pictures)
    if pass_.compared or pass_.accumulators or pass_.pictures:
        pass_.run(progress)
    maps = pass_.maps(next(iter(scores.values())).norm_outliers.median)
    return OnImages(photographs, scores, pass_.parity(), layers, pass_.by_image(), maps)


class _Pass:
    """Runs every model once on every photograph, in the largest batches that a bundle serves."""

    def __init__(
        self,
        photographs: Photographs,
        models: dict[str, Any],
        extractors: Mapping[str, FeatureExtractor],
        median: float | None,
        pictures: int,
    ) -> None:
        self.photographs, self.models, self.extractors, self.median = photographs, models, extractors, median
        self.pictures = pictures
        first, *others = extractors
        # Whose features are compared with which model's.
        self.compared = dict.fromkeys(extractors, STUDENT) if STUDENT in models else dict.fromkeys(others, first)
        if extractors[first].manifest.only_heads:
            self.compared = {}
        self.accumulators = {name: ParityAccumulator(median) for name in extractors if STUDENT in models}
        self.gallery, self.cosines = Gallery(pictures), {name: list[np.ndarray]() for name in self.compared}
        self.norms: dict[str, dict[int, list[np.ndarray]]] = {name: {} for name in extractors}

    def run(self, progress: Progress) -> None:
        step = max(extractor.manifest.batches.highest for extractor in self.extractors.values())
        answers = self._answers()
        with progress.task("parity on images", len(self.photographs)) as advance:
            for start in range(0, len(self.photographs), step):
                batch = self.photographs.batch(start, start + step)
                self._add(start, {name: answer(batch) for name, answer in answers.items()})
                advance(len(batch))

    def _answers(self) -> dict[str, Answers]:
        """The models that run: the base for pictures alone. A student answers the heads of each bundle."""
        manifests = [extractor.manifest for extractor in self.extractors.values()]
        answers: dict[str, Answers] = {}
        if self.models:
            from phreg_deploy.heads.answers import answers_of, with_heads
        if BASE in self.models and self.pictures:
            answers[BASE] = answers_of(self.models[BASE], manifests)
        if STUDENT in self.models:
            answers[STUDENT] = student = _remembered(answers_of(self.models[STUDENT], manifests))
            for name, extractor in self.extractors.items():
                answers[_beside(name)] = with_heads(student, extractor.bundle)
        for name, extractor in self.extractors.items():
            answers[name] = lambda batch, extractor=extractor: extractor.dense(batch).outputs()  # type: ignore[misc]
        return answers

    def _add(self, start: int, answers: dict[str, dict[str, np.ndarray]]) -> None:
        """Add the answers to a batch whose first image has the index ``start``."""
        for name, accumulator in self.accumulators.items():
            expected = answers.pop(_beside(name))
            answers[STUDENT] = expected | answers[STUDENT]
            served = self.extractors[name].manifest.outputs
            accumulator.add(answers[name], {output: expected[output] for output in expected if output in served})
        count = len(next(iter(answers.values()))[NORM])
        bad = np.zeros((len(self.compared), count))
        for row, (name, reference) in enumerate(self.compared.items()):
            cosines = cosine(answers[name]["features"], answers[reference]["features"]).reshape(count, -1)
            # NaN counts as the worst.
            cosines = np.nan_to_num(cosines, nan=-1.0)
            self.cosines[name].append(cosines)
            bad[row] = -np.quantile(cosines, 0.01, axis=1)
        if not self.pictures:
            return
        last = list(self.extractors)[-1]
        centre = self.median or float(np.median(answers[last]["token_norm"]))
        badness = bad.max(0) if len(bad) else outlier_mask(answers[last]["token_norm"], centre).mean((1, 2))
        for i in range(count):
            outputs = {name: {k: v[i] for k, v in of_model.items()} for name, of_model in answers.items()}
            self.gallery.add(start + i, float(badness[i]), outputs)
        for name, extractor in self.extractors.items():
            for output, value in answers[name].items():
                kind, _, block = output.partition(".")
                depth = extractor.manifest.model.depth
                # A bundle may serve the last layer twice.
                if kind == "token_norm" and block != str(depth):
                    self.norms[name].setdefault(int(block or depth), []).append(value.reshape(-1))

    def parity(self) -> dict[str, dict[str, Parity]]:
        return {name: accumulator.parts() for name, accumulator in self.accumulators.items()}

    def by_image(self) -> dict[str, ParityByImage]:
        names = self.photographs.names
        return {
            name: ParityByImage.of(reference, names, np.concatenate(self.cosines[name]))
            for name, reference in self.compared.items()
        }

    def maps(self, median: float) -> Maps | None:
        """The pictures, and token norms by block: of bundles for the layers that they serve."""
        if not self.pictures:
            return None
        norms = {name: _norms(model, self.photographs) for name, model in self.models.items()}
        for name, blocks in self.norms.items():
            norms[name] = {block: np.concatenate(parts) for block, parts in sorted(blocks.items())}
        return self.gallery.maps(self.photographs, norms, median)


def _beside(name: str) -> str:
    """The name of the student's answers with the heads of a bundle."""
    return f"{STUDENT}\0{name}"


def _remembered(answers: Answers) -> Answers:
    """Answer the same batch once."""
    last: list[Any] = [None, {}]

    def answer(images: np.ndarray) -> dict[str, np.ndarray]:
        if images is not last[0]:
            last[:] = images, answers(images)
        return dict(last[1])

    return answer


def _load_model(source: str, checkpoint: Path | None, size: tuple[int, int], readout: Readout) -> Any:
    from phreg_deploy.models.loading import load_model
    from phreg_deploy.models.readouts import with_readout

    return with_readout(load_model(source, checkpoint=checkpoint, image_size=size), readout)


def _model_run(model: Any, manifest: Manifest) -> Run:
    from phreg_deploy.models.answers import model_run

    return model_run(model, manifest.preprocess)


def _norms(model: Any, photographs: Photographs) -> dict[int, np.ndarray]:
    from phreg_deploy.models.answers import norms_by_block

    norms = norms_by_block(model, photographs, photographs.preprocess)
    return {block: values.reshape(-1) for block, values in enumerate(norms, 1)}
