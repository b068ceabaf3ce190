"""A check's report as one HTML page that needs nothing else: figures, gates and pictures."""

from __future__ import annotations

import html
from typing import Any

from PIL import Image

from phreg_deploy.images.pictures import data_url

STYLE = """
body{font:15px/1.5 system-ui,sans-serif;max-width:60rem;margin:2rem auto;padding:0 1rem;color:#222;background:#fafaf8}
h1{font-size:1.4rem}h2{font-size:1.1rem;margin-top:2rem}table{border-collapse:collapse;width:100%}
th,td{text-align:right;padding:.3rem .6rem;border-bottom:1px solid #ddd}th:first-child,td:first-child{text-align:left}
.good{color:#176b3a}.bad{color:#a11}figure{display:inline-block;margin:.3rem .5rem .3rem 0}figcaption{font-size:.85rem;color:#555}
img{width:168px;image-rendering:pixelated;display:block}footer{margin-top:2rem;font-size:.85rem;color:#777}
"""


def render(report: dict[str, Any], pictures: list[list[tuple[str, Image.Image]]]) -> str:
    """The document of ``check`` and rows of captioned pictures -> a page."""
    missed = report["missed"]
    verdict = (
        f'<p class="bad">Gates missed: {html.escape("; ".join(missed))}.</p>'
        if missed
        else '<p class="good">All gates passed.</p>'
    )
    parity = [
        [
            c["with"],
            c["size"],
            *(
                _number(c["parity"][k])
                for k in ("cosine_mean", "cosine_p1", "cosine_min", "relative_l2", "neighbours", "outlier_points")
            ),
        ]
        for c in report["comparisons"]
    ]
    rates = [
        [
            name,
            _percent(a["norm_outliers"]["rate"]),
            _number(a["norm_outliers"]["largest"]),
            _percent(a["shift_incoherence"]["rate"]),
            a["note"],
        ]
        for name, a in report["artifacts"].items()
    ]
    parts = [
        f"<h1>{html.escape(report['bundle'])}</h1><p>{html.escape(report['backend'])}, {html.escape(report['precision'])}</p>{verdict}",
        "<h2>Parity</h2>"
        + _table(
            ["compared with", "size", "cosine mean", "1st pct", "min", "relative L2", "neighbours", "outlier points"],
            parity,
        ),
    ]
    if rates:
        parts.append(
            f"<h2>Artifacts on {report['images']} images</h2>"
            + _table(["", "norm-outlier rate", "largest / median", "shift incoherence", "note"], rates)
        )
    if pictures:
        figures = "".join(
            "<div>"
            + "".join(
                f'<figure><img src="{data_url(p)}" alt="{html.escape(text)}"><figcaption>{html.escape(text)}</figcaption></figure>'
                for text, p in row
            )
            + "</div>"
            for row in pictures
        )
        parts.append(f"<h2>Pictures</h2>{figures}")
    footer = "<footer>Norm outliers: patch tokens above 2x or below 1/2 of the base model's median pre-norm norm. Shift incoherence: patches whose feature changes when the image is shifted under them.</footer>"
    return f"<!doctype html><html lang=en><meta charset=utf-8><title>phreg-deploy check</title><style>{STYLE}</style>{''.join(parts)}{footer}</html>\n"


def _table(columns: list[str], rows: list[list[str]]) -> str:
    head = "".join(f"<th>{html.escape(c)}</th>" for c in columns)
    body = "".join("<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in row) + "</tr>" for row in rows)
    return f"<table><tr>{head}</tr>{body}</table>"


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.8f}" if 0.9 < abs(value) <= 1 else f"{value:.3g}"


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{100 * value:.3f} %"
