"""The manifest of a bundle (``docs/bundle-format.md``)."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from phreg_deploy.errors import PhregError
from phreg_deploy.spec import Batches, ModelSpec, Preprocess, Sizes, plain

FORMAT = 3
MANIFEST, GRAPH, REFERENCE, POSITIONS = "manifest.json", "model.onnx", "reference.npz", "pos_embed.npy"
CALIBRATION = "calibration.json"


@dataclass(frozen=True)
class Manifest:
    """The content of ``manifest.json``.

    ``inputs`` and ``outputs`` map names to ``{"dtype", "shape"}``. ``source``: where the weights came from, with their
    sha256. ``norm_median``: the base model's median pre-norm patch-token norm, to which live artifact rates are
    relative; None if it was not measured. ``float_parts``: the nodes in a higher precision than ``precision``.
    ``quantisation``: what ``calibrate`` did and measured; None if the bundle was not calibrated. ``files``: name ->
    sha256.
    """

    model: ModelSpec
    preprocess: Preprocess
    sizes: Sizes
    batches: Batches
    precision: str
    opset: int
    inputs: dict[str, dict[str, Any]]
    outputs: dict[str, dict[str, Any]]
    source: dict[str, Any]
    versions: dict[str, str]
    norm_median: float | None = None
    float_parts: list[str] = field(default_factory=list)
    random_weights: bool = False
    quantisation: dict[str, Any] | None = None
    files: dict[str, str] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        return {"format": FORMAT, **plain(vars(self))}

    @classmethod
    def from_json(cls, data: Any) -> Manifest:
        """Build the manifest from JSON. Raises ``PhregError`` for unknown or missing keys and for newer formats.

        ``validity.read_manifest`` checks the values too.
        """
        version = data.get("format") if isinstance(data, dict) else None
        if type(version) is not int or version < 1:
            raise PhregError("manifest: it has no format number; it is damaged or not ours.")
        if version > FORMAT:
            advice = "Upgrade phreg-deploy, or export the bundle again"
            raise PhregError(f"manifest: got format {version}, expected at most {FORMAT}. {advice}.")
        fields = {k: v for k, v in data.items() if k != "format"}
        # Format 1 is older than calibration.
        if version == 1:
            fields.setdefault("quantisation", None)
        missing = sorted(set(cls.__dataclass_fields__) - set(fields))
        unknown = sorted(set(fields) - set(cls.__dataclass_fields__))
        if missing or unknown:
            raise PhregError(f"manifest: missing keys {missing}, unknown keys {unknown}. Export the bundle again.")
        fields.update(
            model=ModelSpec.from_json(fields["model"]),
            preprocess=Preprocess.from_json(fields["preprocess"]),
            sizes=Sizes.from_json(fields["sizes"]),
            batches=Batches.from_json(fields["batches"]),
        )
        for key in ("inputs", "outputs", "source", "versions", "files"):
            if not isinstance(fields[key], dict):
                raise PhregError(f"manifest: {key} is no object; it is damaged. Export the bundle again.")
        return cls(**fields)

    def required(self) -> list[str]:
        """Return the names of the files that a reader needs."""
        positions = [POSITIONS] if "pos_embed" in self.inputs else []
        return [GRAPH, REFERENCE, *positions, *([CALIBRATION] if self.quantisation else [])]
