"""``Exploration``: what the page of an explorer shows."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from phreg_deploy.bundle.manifest import Manifest
from phreg_deploy.profiling.report import ProfileReport
from phreg_deploy.spec import plain
from phreg_deploy.verify.maps import Maps
from phreg_deploy.verify.report import CheckReport


@dataclass(frozen=True)
class Explored:
    """One bundle. ``name``: in ``Maps``. ``layers``: of ``calibration.json``, () for a bundle that has none.

    ``latency``: None where it was not measured.
    """

    name: str
    check: CheckReport
    manifest: Manifest
    layers: tuple[dict[str, Any], ...]
    latency: ProfileReport | None


@dataclass(frozen=True)
class Exploration:
    """Bundles that were explored together. ``maps``: None without images. ``commands``: that reproduce it."""

    bundles: tuple[Explored, ...]
    maps: Maps | None
    commands: tuple[str, ...]
    environment: dict[str, str]

    @property
    def missed(self) -> list[str]:
        """The missed gates, as sentences; of several bundles each with its name."""
        several = len(self.bundles) > 1
        return [f"{b.name}: {gate}" if several else gate for b in self.bundles for gate in b.check.missed]

    def to_json(self) -> dict[str, Any]:
        bundles = [
            {"name": b.name, **b.check.to_json(), "latency": None if b.latency is None else plain(b.latency)}
            for b in self.bundles
        ]
        shown = list(self.maps.names) if self.maps else []
        return {"bundles": bundles, "shown": shown, "missed": self.missed, "passed": not self.missed}
