"""Write the tables of README and docs from the JSON files; a test compares them.

A table stands between ``<!-- figures: NAME -->`` and ``<!-- end -->`` on a page of ``PAGES``.
"""

from __future__ import annotations

import re
from collections.abc import Callable

from benchmarks.reliability import run_tables
from benchmarks.reliability.summary import disks, kills, outcomes
from benchmarks.tables import answers, precisions, services, students
from benchmarks.tables.cells import HERE, load, table

ROOT = HERE.parent

PAGES = (ROOT / "README.md", ROOT / "docs" / "reliability.md", ROOT / "docs" / "figures.md", ROOT / "docs" / "int8.md")

MARK = re.compile(r"(<!-- figures: (?P<name>[\w-]+) -->\n).*?(<!-- end -->)", re.DOTALL)

TABLES: dict[str, Callable[[str], str]] = {
    "reliability": lambda name: table(*outcomes(load(name))),
    "reliability-hostile": lambda _name: table(*run_tables.hostile(load("reliability"))),
    "reliability-long": lambda _name: table(*run_tables.long_runs(load("reliability"))),
    "reliability-threads": lambda _name: table(*run_tables.threads(load("reliability"))),
    "reliability-kills": lambda _name: table(*kills(load("reliability"))),
    "reliability-disk": lambda _name: table(*disks(load("reliability"))),
    "heads": answers.heads,
    "heads-deit": answers.heads,
    "heads-cost": answers.heads_cost,
    "upsamplers": answers.upsamplers,
    "tiling": answers.tiling,
    "stream": services.stream,
    "extraction": services.extraction,
    "serving": services.serving,
    "hand-over": services.hand_over,
    "present-recipe": students.present_recipe,
    "present-students": students.quality,
    "present-students-deit": students.quality,
    "sinder-direction": students.sinder_direction,
    "students": students.quality,
    "students-deit": students.quality,
    "headline": students.headline,
    "headline-deit": students.headline,
    "demo": students.demo,
    "speed": precisions.speed,
    "speed-short": precisions.speed,
    "int8-without-vnni": precisions.no_vnni,
    "int8-choices": precisions.choices,
    "gates": precisions.gates,
    "gpu-images": precisions.gpu_images,
}


def render(page: str) -> str:
    """The page, with every table replaced by that of its JSON."""
    return MARK.sub(lambda m: f"{m[1]}{TABLES[m['name']](m['name'].replace('-', '_'))}\n{m[3]}", page)
