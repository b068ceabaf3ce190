"""The command lines that reproduce a page, as a user would type them."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from pathlib import Path

from phreg_deploy.runtime.backends.options import BackendOptions
from phreg_deploy.verify.measuring import CheckRequest


def commands_of(
    verb: str,
    bundles: Sequence[Path | str],
    output: Path | None,
    request: CheckRequest,
    backend: str,
    options: BackendOptions,
    latency: float | None,
) -> tuple[str, ...]:
    """Write the command of the page, and those of its figures: ``check`` and ``profile``."""
    how = _given(
        {
            "--backend": None if backend == "auto" else backend,
            "--threads": options.threads,
            "--compute": None if options.compute == "auto" else options.compute,
            "--mode": None if options.mode == "latency" else options.mode,
            "--device": options.device or None,
        }
    )
    compared = _given(
        {
            "--reference": request.reference,
            "--reference-checkpoint": request.reference_checkpoint,
            "--base": request.base,
            "--base-checkpoint": request.base_checkpoint,
            "--images": request.images,
            "--limit": request.limit if request.images else None,
            "--cosine": request.cosine,
            "--outlier-points": request.outlier_points,
        }
    )
    page = _given({"--report" if verb == "check" else "-o": output})
    if verb == "explore":
        page = _given({"--pictures": request.pictures, "--latency": latency}) + page
    lines = [[verb, *bundles, *compared, *how, *page]]
    lines += [["check", bundle, *compared, *how, "--json"] for bundle in bundles if verb != "check"]
    lines += [["profile", bundle, *how] for bundle in bundles if latency]
    lines += [["inspect", bundle] for bundle in bundles]
    return tuple(shlex.join(["phreg-deploy", *map(str, line)]) for line in lines)


def _given(options: dict[str, object]) -> list[object]:
    return [word for option, value in options.items() if value is not None for word in (option, value)]
