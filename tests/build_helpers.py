"""Run `phreg-deploy build` in this process, and list the plans that it wrote."""

from tests.cli_helpers import invoke


def plan_files(folder):
    """Return the names of the plans and sidecars in ``engines/``."""
    return sorted(p.name for p in (folder / "engines").glob("*") if p.suffix in (".plan", ".json"))


def build(folder, *words):
    return invoke("build", folder, *words, "--json")
