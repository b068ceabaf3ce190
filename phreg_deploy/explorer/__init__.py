"""Draw base, student and bundles on one HTML page that needs no network: patches to click, gates, figures, digests.

Importing this module imports neither a runtime nor PyTorch; a bundle alone needs no PyTorch.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from phreg_deploy.arguments import check_file
from phreg_deploy.errors import PhregError
from phreg_deploy.progress import SILENT, Progress

if TYPE_CHECKING:
    from phreg_deploy.bundle.manifest import Manifest
    from phreg_deploy.explorer.exploration import Exploration
    from phreg_deploy.runtime.backends.options import BackendOptions

__all__ = ["explore"]


def explore(
    bundles: Sequence[Path | str],
    *,
    images: Path | None = None,
    reference: str | None = None,
    reference_checkpoint: Path | None = None,
    base: str | None = None,
    base_checkpoint: Path | None = None,
    backend: str = "auto",
    options: BackendOptions | None = None,
    limit: int = 12,
    pictures: int = 12,
    cosine: float | None = None,
    outlier_points: float | None = None,
    latency: float | None = None,
    output: Path | None = None,
    verb: str = "explore",
    progress: Progress = SILENT,
) -> Exploration:
    """Check bundles together, keep their outputs on the worst images, and write the page ``output`` if it is given.

    A missed gate is on the page and in the result; it is not raised. Bundles that serve heads alone have no features to
    draw: their page has the gates, figures and artifact rates.

    Args:
        bundles: of one input size, preprocessing and readout; the first is the reference of the others if there is no
            student.
        images: folder of photographs, of which the first ``limit`` are measured and the worst ``pictures`` are shown.
            None for the exams alone.
        reference, base: the student and the model that it was distilled from, each a folder or a timm name; a timm name
            may come with a checkpoint.
        backend, options, cosine, outlier_points: as of ``phreg_deploy.verify.check``.
        latency: seconds of measuring for each bundle; None to measure none.
        output: the HTML file to write; None to write none, as ``explorer.page.render`` makes it.
        verb: the command, "explore" or "check", for messages and for the commands that the page lists.

    Raises:
        PhregError: bad arguments, damaged bundles, bundles that do not fit together, or a page that cannot be written.
        BackendMissing: the backend, or PyTorch for a model, is not installed.
    """
    from phreg_deploy.bundle.bundle import Bundle
    from phreg_deploy.verify import check_inputs, require_models

    if output is not None:
        check_file(output, "report" if verb == "check" else "output")
    models = {"reference": (reference, reference_checkpoint), "base": (base, base_checkpoint)}
    check_inputs(verb, models, images, cosine)
    if not bundles:
        raise PhregError(f"{verb}: got no bundle, expected at least one.")
    manifests = [Bundle.read(bundle).manifest for bundle in bundles]
    if cosine is not None:
        manifests[0].need_features(f"{verb}: --cosine", "Leave the bar out, or take bundles that have features too.")
    for path, manifest in zip(bundles, manifests):
        _check_alike(str(bundles[0]), manifests[0], str(path), manifest)
    require_models(f"`phreg-deploy {verb} --reference` or --base", models, backend)
    from phreg_deploy.explorer.commands import commands_of
    from phreg_deploy.explorer.measuring import explore_extractors
    from phreg_deploy.runtime.backends.options import BackendOptions as Options
    from phreg_deploy.runtime.features import FeatureExtractor
    from phreg_deploy.verify.measuring import CheckRequest

    how = options or Options()
    request = CheckRequest(
        reference, reference_checkpoint, base, base_checkpoint, images, limit, cosine, outlier_points, pictures
    )
    commands = commands_of(verb, bundles, output, request, backend, how, latency)
    with ExitStack() as stack:
        extractors = {
            name: stack.enter_context(FeatureExtractor.load(path, backend, examine=False, **asdict(how)))
            for name, path in zip(_names(bundles), bundles)
        }
        exploration = explore_extractors(extractors, request, how, latency, commands, progress)
    if output is not None:
        from phreg_deploy.explorer.page import render
        from phreg_deploy.files.atomic import write_atomic

        write_atomic(output, render(exploration).encode(errors="replace"))
    return exploration


def _names(bundles: Sequence[Path | str]) -> list[str]:
    """How the page names the bundles: "bundle", or several by their folders, each name once."""
    if len(bundles) == 1:
        return ["bundle"]
    names: list[str] = []
    for bundle in bundles:
        name = Path(bundle).resolve().name
        name = f"{name} (bundle)" if name in ("base", "student") else name
        count = sum(other == name or other.startswith(f"{name} (") for other in names)
        names.append(f"{name} ({count + 1})" if count else name)
    return names


def _check_alike(first: str, one: Manifest, second: str, other: Manifest) -> None:
    """Raise ``PhregError`` unless maps of two bundles can be shown side by side."""
    facts = {
        "the input size": lambda m: "{}x{}".format(*m.sizes.default),
        "the preprocessing": lambda m: m.preprocess,
        "the patch": lambda m: m.model.patch,
        "whether they serve features": lambda m: not m.only_heads,
        "the width": lambda m: m.channels("features"),
        "the number of blocks": lambda m: m.model.depth,
        "the readout": lambda m: m.readout,
        "the norm of further layers": lambda m: None if m.layers is None else m.layers.norm,
    }
    for name, fact in facts.items():
        a, b = fact(one), fact(other)
        if a != b and not (name.startswith("the norm") and None in (a, b)):
            raise PhregError(
                f"explore: {first} and {second} differ in {name}: got {a} and {b}, expected the same. "
                "Explore each on a page of its own."
            )
