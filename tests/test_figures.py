"""Compare the tables of README and docs with the JSON in benchmarks/; every JSON is listed in benchmarks/README.md."""

import re

import pytest

from benchmarks.tables.cells import HERE
from benchmarks.tables.pages import MARK, PAGES, TABLES, render


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(HERE.parent)))
def test_tables_equal_the_json(page):
    text = page.read_text()
    assert MARK.search(text), "the page has tables"
    assert render(text) == text, "run: python -m benchmarks.tables"


def test_every_table_is_on_a_page():
    names = {match["name"] for page in PAGES for match in MARK.finditer(page.read_text())}
    assert names == set(TABLES)


def test_the_headline_names_its_processor():
    text = (HERE.parent / "README.md").read_text()
    table = next(match[0] for match in MARK.finditer(text) if match["name"] == "headline")
    assert re.search(r"on AMD|on Intel|on ARM", table)
    assert "8-bit dot products" in text[: text.index(table)]


def test_every_figure_of_the_readme_is_in_a_table():
    """Cosines, milliseconds and mean IoU in prose would age unseen; bars of gates are no measurements."""
    prose = MARK.sub("", (HERE.parent / "README.md").read_text())
    assert re.findall(r"\d+(?:\.\d+)? (?:ms|images/s)\b|mean IoU (?:of )?\d|\d+\.\d+ % mean", prose) == []


def test_every_json_is_named_by_its_page():
    text = (HERE / "README.md").read_text()
    assert [path.name for path in sorted(HERE.glob("*.json")) if path.name not in text] == []
