"""Write an exploration as one HTML page without other files and without network."""

from __future__ import annotations

import html
import json
from importlib.resources import files
from string import Template
from typing import Any

from phreg_deploy.explorer import tables
from phreg_deploy.explorer.charts import chart_data
from phreg_deploy.explorer.data import page_data
from phreg_deploy.explorer.exploration import Exploration
from phreg_deploy.progress import printable

# In the order in which they run. uPlot (MIT licence) draws the charts.
SCRIPTS = ("uPlot.iife.min.js", "arrays.js", "maps.js", "explorer.js", "charts.js")
STYLES = ("uPlot.min.css", "explorer.css")


def render(exploration: Exploration) -> str:
    """Return the page; a few megabytes for a dozen images."""
    data = {**page_data(exploration), "charts": chart_data(exploration)}
    names = ", ".join(b.check.bundle for b in exploration.bundles)
    how = ", ".join(dict.fromkeys(f"{b.check.backend}, {b.check.precision}" for b in exploration.bundles))
    folded = "".join(tables.sensitivity(b) for b in exploration.bundles if b.layers)
    return Template(_asset("explorer.html")).substitute(
        title=html.escape(printable(names)),
        how=html.escape(how),
        style="\n".join(map(_asset, STYLES)),
        script="\n".join(map(_asset, SCRIPTS)),
        data=_json(data),
        verdict=tables.verdict(exploration),
        gates=tables.gates(exploration),
        artifacts=tables.artifacts(exploration),
        parity=tables.parity(exploration),
        images=tables.images(exploration),
        sensitivity=folded,
        latency=tables.latency(exploration),
        environment=tables.environment(exploration),
        commands=tables.commands(exploration),
        licence=html.escape(_asset("uPlot.LICENSE")),
    )


def _asset(name: str) -> str:
    return (files("phreg_deploy.explorer") / "assets" / name).read_text(encoding="utf-8")


def _json(data: dict[str, Any]) -> str:
    """JSON that may stand in a script element: without the characters that could end it."""
    return json.dumps(data, separators=(",", ":")).replace("<", "\\u003c")
