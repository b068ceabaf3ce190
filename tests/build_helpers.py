"""Run `phreg-deploy build` in this process, and list the plans that it wrote."""

from tests.cli_helpers import invoke


def plan_files(folder):
    """Return the names of the plans and sidecars in ``engines/``."""
    names = [p.name for p in (folder / "engines").glob("*") if p.suffix in (".plan", ".json")]
    plans, texts = (sum(name.endswith(ending) for name in names) for ending in (".plan", ".inspector.json"))
    assert plans == texts, "each plan has the inspector's text beside it"
    return sorted(name for name in names if not name.endswith(".inspector.json"))


def build(folder, *words):
    return invoke("build", folder, *words, "--json")
