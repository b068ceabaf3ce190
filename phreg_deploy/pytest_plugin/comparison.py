"""Compare a bundle with one reference, case by case and patch by patch, and find what missed a gate."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import numpy as np

from phreg_deploy.images.photographs import Photographs
from phreg_deploy.pytest_plugin.failures import IMAGES, Miss, Place
from phreg_deploy.pytest_plugin.patch_errors import KINDS, MEASURES, WORST_PATCH, Errors, patch_errors
from phreg_deploy.runtime.features import FeatureExtractor
from phreg_deploy.runtime.parity import Gate, Parity, ParityAccumulator, part_name, worst

Outputs = Mapping[str, np.ndarray]
Answers = Callable[[np.ndarray], dict[str, np.ndarray]]


@dataclass(frozen=True)
class Compared:
    """One image. ``errors``: by layer and kind, ``(Hp, Wp)``; ``case``: the number of its case.

    ``again`` runs both sides once more: uint8 image ``(H, W, 3)``, and the outputs of the bundle and of the reference.
    """

    name: str
    case: int
    errors: dict[str, Errors]
    again: Callable[[], tuple[np.ndarray, Outputs, Outputs]]

    def to_json(self) -> dict[str, object]:
        errors, cosines = self.errors[""], {}
        if "cosine" in errors:
            values = 1 - errors["cosine"]
            cosines = {
                "cosine_mean": float(values.mean()),
                "cosine_p1": float(np.quantile(values, 0.01)),
                "cosine_min": float(values.min()),
            }
        return {"image": self.name, **cosines, "norm_difference": float(errors["norm"].max())}


@dataclass
class Comparison:
    """Parity with one ``reference`` over cases of one size each; ``label`` names it in properties and files."""

    label: str
    reference: str
    median: float | None
    images: list[Compared] = field(default_factory=list)
    _cases: list[ParityAccumulator] = field(default_factory=list)

    def new_case(self) -> None:
        """Begin images of another size."""
        self._cases.append(ParityAccumulator(self.median))

    def add(
        self, names: list[str], images: np.ndarray, got: Outputs, expected: Outputs, again: Callable[..., Outputs]
    ) -> None:
        """Add a batch to the newest case.

        Args:
            images: uint8 ``(B, H, W, 3)``. got, expected: outputs by name.
            again: ``again(images, i)`` -> the bundle's outputs and ``again(images, i, True)`` -> the reference's, for
                image i alone.

        Raises:
            PhregError: the outputs do not fit together.
        """
        self._cases[-1].add(dict(got), dict(expected))
        errors = patch_errors(got, expected, self.median)
        for i, name in enumerate(names):
            own = {part: {kind: value[i] for kind, value in kinds.items()} for part, kinds in errors.items()}

            def both(i: int = i) -> tuple[np.ndarray, Outputs, Outputs]:
                return images[i], again(images, i), again(images, i, True)

            self.images.append(Compared(name, len(self._cases) - 1, own, both))

    @property
    def parity(self) -> Parity:
        """The worst of each figure over all cases and layers."""
        return worst([case.parity() for case in self._cases])

    def miss(self, gate: Gate) -> tuple[Miss, list[tuple[Compared, Place, np.ndarray]]]:
        """Find the images and patches of a missed gate, and the errors ``(Hp, Wp)``; the worst image first."""
        case, part = self._located(gate)
        kind = KINDS[gate.name]
        chosen = [image for image in self.images if image.case == case and kind in image.errors[part]]
        rank = np.max if gate.name in WORST_PATCH else np.mean
        chosen.sort(key=lambda image: -float(rank(image.errors[part][kind])))
        chosen = [image for image in chosen[:IMAGES] if image.errors[part][kind].any()]
        places = [_place(image, part, kind) for image in chosen]
        where = f"{part_name(part)}: " if part else ""
        sentence = f"{where}{gate} (against {self.reference})"
        return Miss(gate.name, gate.figure, gate.bar, sentence, tuple(places)), [
            (image, place, image.errors[part]["cosine" if kind == "cls" else kind])
            for image, place in zip(chosen, places)
        ]

    def _located(self, gate: Gate) -> tuple[int, str]:
        """The case and the layer whose figure is the gate's, which is the worst of all."""
        for number, case in enumerate(self._cases):
            for part, parity in case.parts().items():
                if getattr(parity, gate.name) == gate.figure:
                    return number, part
        return 0, ""


def _place(image: Compared, part: str, kind: str) -> Place:
    errors = image.errors[part][kind]
    if kind == "cls":
        return Place(f"{image.name}: class token", MEASURES[kind], image.errors[part]["cosine"].shape, ())
    return Place.of(image.name, MEASURES[kind], errors)


def compare_exam(extractor: FeatureExtractor) -> Comparison:
    """Compare a bundle's answers with those that it carries. Raises ``PhregError`` for a damaged exam."""
    bundle = extractor.bundle
    comparison = Comparison("exam", "its exam", bundle.manifest.norm_median)
    for number, case in enumerate(bundle.cases()):
        images = case.pop("image")
        height, width = images.shape[1:3]
        names = [f"exam case {number}, image {i} ({height}x{width})" for i in range(len(images))]

        def again(images: np.ndarray, i: int, reference: bool = False, case: Outputs = case) -> Outputs:
            outputs = case if reference else extractor.run(images)
            return {name: value[i] for name, value in outputs.items()}

        comparison.new_case()
        comparison.add(names, images, extractor.run(images), case, again)
    return comparison


def compare_photographs(
    extractor: FeatureExtractor, reference: str, answers: Answers, photographs: Photographs
) -> Comparison:
    """Compare a bundle with ``answers`` on photographs, in the largest batches that it serves.

    Of a bundle with heads alone, nothing but its own outputs is compared.
    """
    manifest = extractor.manifest
    comparison = Comparison("reference", reference, extractor.manifest.norm_median)
    comparison.new_case()
    step = extractor.manifest.batches.highest

    def wanted(images: np.ndarray) -> dict[str, np.ndarray]:
        outputs = answers(images)
        return {k: v for k, v in outputs.items() if k in manifest.outputs} if manifest.only_heads else outputs

    def again(images: np.ndarray, i: int, reference: bool = False) -> Outputs:
        one = images[i : i + 1]
        outputs = wanted(one) if reference else extractor.dense(one).outputs()
        return {name: value[0] for name, value in outputs.items()}

    for start in range(0, len(photographs), step):
        batch = photographs.batch(start, start + step)
        got, names = extractor.dense(batch).outputs(), photographs.names[start : start + step]
        comparison.add(names, batch, got, wanted(batch), again)
    return comparison
