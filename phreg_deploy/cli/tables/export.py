"""Lines that ``export`` prints."""

from __future__ import annotations

from typing import TYPE_CHECKING

from phreg_deploy.bundle.bundle import Bundle
from phreg_deploy.cli.console import Result

if TYPE_CHECKING:
    from phreg_deploy.runtime.features import FeatureExtractor
    from phreg_deploy.runtime.parity import Parity


def show_bundle(bundle: Bundle, result: Result) -> None:
    """Print what was written, and its size."""
    manifest = bundle.manifest
    size = sum(path.stat().st_size for path in bundle.folder.iterdir()) / 2**20
    serves = f"{manifest.precision}, {manifest.sizes}, batch {manifest.batches}"
    result.say(f"Wrote {bundle.folder}: {serves}, {size:.1f} MB.")


def show_parity(parity: Parity, extractor: FeatureExtractor, result: Result) -> None:
    """Print how close the answers of the written bundle are to those in its exam."""
    from phreg_deploy.runtime.parity import agreement

    other = "PyTorch" if extractor.manifest.quantisation is None else "ONNX Runtime's INT8"
    result.say(f"Parity with {other} on {extractor.backend}: {agreement(parity.to_json())}.")
