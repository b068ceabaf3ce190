"""Tables of ``artifacts``."""

from __future__ import annotations

from typing import Any

from phreg_deploy.cli.console import Result, percent


def show_scores(model: str, document: dict[str, Any], result: Result) -> None:
    """Print the scores of a model or bundle and, for a PyTorch model, the norms of each block."""
    outliers, shift = document["norm_outliers"], document["shift_incoherence"]
    rows = [
        ["norm-outlier rate", percent(outliers["rate"])],
        ["    high / low", f"{percent(outliers['upper'])} / {percent(outliers['lower'])}"],
        ["largest norm / median", outliers["largest"]],
        ["median norm measured against", outliers["median"]],
        ["shift incoherence", percent(shift["rate"])],
        [
            "    1 - cosine, percentiles 50 / 90 / 95 / 99",
            " / ".join(f"{shift[p]:.3f}" for p in ("p50", "p90", "p95", "p99")),
        ],
    ]
    result.table(f"Artifacts of {model} on {document['images']} images", ["score", "value"], rows)
    if document.get("blocks"):
        rows = [[str(i), b["median"], b["largest"], percent(b["rate"])] for i, b in enumerate(document["blocks"])]
        result.table(
            "Block by block, over patch tokens", ["block", "median norm", "largest / median", "above 2x"], rows
        )
