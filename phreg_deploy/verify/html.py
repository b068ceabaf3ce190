"""Render a check's report as one HTML page without other files: gates, figures and pictures."""

from __future__ import annotations

import html

from phreg_deploy.images.pictures import data_url
from phreg_deploy.verify.report import ArtifactRates, CheckReport, Comparison, Pictures

STYLE = """
body{font:15px/1.5 system-ui,sans-serif;max-width:60rem;margin:2rem auto;padding:0 1rem;color:#222;background:#fafaf8}
h1{font-size:1.4rem}h2{font-size:1.1rem;margin-top:2rem}table{border-collapse:collapse;width:100%}
th,td{text-align:right;padding:.3rem .6rem;border-bottom:1px solid #ddd}th:first-child,td:first-child{text-align:left}
.good{color:#176b3a}.bad{color:#a11}
figure{display:inline-block;margin:.3rem .5rem .3rem 0}figcaption{font-size:.85rem;color:#555}
img{width:168px;image-rendering:pixelated;display:block}footer{margin-top:2rem;font-size:.85rem;color:#777}
"""
PARITY = ["compared with", "size", "cosine mean", "1st pct", "min", "relative L2", "neighbours", "outlier points"]
RATES = ["", "norm-outlier rate", "largest / median", "shift incoherence", "note"]
FOOTER = (
    "Norm outliers: patch tokens above 2x or below 1/2 of the base model's median pre-norm norm. "
    "Shift incoherence: patches whose feature changes when the image is shifted under them."
)


def render(report: CheckReport) -> str:
    """The page of a report."""
    parts = [
        f"<h1>{html.escape(report.bundle)}</h1>",
        f"<p>{html.escape(report.backend)}, {html.escape(report.precision)}</p>",
        _verdict(report.missed),
        "<h2>Parity</h2>",
        _table(PARITY, [_parity_row(comparison) for comparison in report.comparisons]),
    ]
    if report.artifacts:
        rows = [_rates_row(name, rates) for name, rates in report.artifacts.items()]
        parts += [f"<h2>Artifacts on {report.images} images</h2>", _table(RATES, rows)]
    if report.pictures:
        parts += ["<h2>Pictures</h2>", _figures(report.pictures)]
    head = f"<meta charset=utf-8><title>phreg-deploy check</title><style>{STYLE}</style>"
    return f"<!doctype html><html lang=en>{head}{''.join(parts)}<footer>{FOOTER}</footer></html>\n"


def _verdict(missed: list[str]) -> str:
    if missed:
        return f'<p class="bad">Gates missed: {html.escape("; ".join(missed))}.</p>'
    return '<p class="good">All gates passed.</p>'


def _parity_row(comparison: Comparison) -> list[str]:
    parity = comparison.parity
    similar = (parity.cosine_mean, parity.cosine_p1, parity.cosine_min)
    figures = (*similar, parity.relative_l2, parity.neighbours, parity.outlier_points)
    return [comparison.reference, comparison.size, *(_number(figure) for figure in figures)]


def _rates_row(name: str, rates: ArtifactRates) -> list[str]:
    outliers = rates.norm_outliers
    return [name, _percent(outliers.rate), _number(outliers.largest), _percent(rates.incoherent), rates.note]


def _figures(pictures: Pictures) -> str:
    rows = (
        "".join(
            f'<figure><img src="{data_url(picture)}" alt="{html.escape(caption)}">'
            f"<figcaption>{html.escape(caption)}</figcaption></figure>"
            for caption, picture in row
        )
        for row in pictures
    )
    return "".join(f"<div>{row}</div>" for row in rows)


def _table(columns: list[str], rows: list[list[str]]) -> str:
    head = "".join(f"<th>{html.escape(column)}</th>" for column in columns)
    body = "".join("<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in row) + "</tr>" for row in rows)
    return f"<table><tr>{head}</tr>{body}</table>"


def _number(value: float) -> str:
    return f"{value:.8f}" if 0.9 < abs(value) <= 1 else f"{value:.3g}"


def _percent(share: float | None) -> str:
    return "-" if share is None else f"{100 * share:.3f} %"
