"""The manifest of a bundle (``docs/bundle-format.md``)."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from phreg_deploy.bundle.heads import ServedHead
from phreg_deploy.errors import PhregError
from phreg_deploy.layers import Layers, kind_of
from phreg_deploy.readout import PLAIN, Readout
from phreg_deploy.spec import Batches, ModelSpec, Preprocess, Rotary, Sizes, plain

FORMAT = 4
MANIFEST, GRAPH, REFERENCE, POSITIONS = "manifest.json", "model.onnx", "reference.npz", "pos_embed.npy"
ROTARY, CALIBRATION, WEIGHTS = "rotary.npy", "calibration.json", "weights.bin"
# TensorRT plans, and detached signatures over the files above and over the plans, see ``signing``.
ENGINES, SIGNATURE, ENGINES_SIGNATURE = "engines", "model.sig", "engines.sig"
# Keys that are stored only where they have another value.
UNUSED: dict[str, Any] = {"layers": None, "readout": PLAIN, "heads": (), "only_heads": False}
# Inputs of the graph beside the images, and the file that each is computed from.
TABLES = {"pos_embed": POSITIONS, "rotary": ROTARY}


@dataclass(frozen=True)
class Manifest:
    """The content of ``manifest.json``.

    ``inputs`` and ``outputs`` map names to ``{"dtype", "shape"}``. ``source``: where the weights came from, with their
    sha256. ``norm_median``: the base model's median pre-norm patch-token norm, to which live artifact rates are
    relative; None if it was not measured. ``float_parts``: the nodes in a higher precision than ``precision``.
    ``rotary``: how the input ``rotary`` is computed; None if the graph has none. ``weights``: the file beside the
    graph that holds its weights; None if the graph holds them.
    ``layers``: further layers that are served; None for the last alone, and then not stored.
    ``readout``: what the features of the last layer are; not stored if they are the model's final tokens.
    ``heads``: whose answers are served too; not stored if there are none. ``only_heads``: nothing else is served but
    ``token_norm``, and ``layers`` are those that heads read; stored only where it is true.
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
    rotary: Rotary | None = None
    weights: str | None = None
    layers: Layers | None = None
    readout: Readout = PLAIN
    heads: tuple[ServedHead, ...] = ()
    only_heads: bool = False
    files: dict[str, str] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        unused = {key for key, default in UNUSED.items() if getattr(self, key) == default}
        fields = {key: value for key, value in vars(self).items() if key not in unused}
        return {"format": FORMAT, **plain(fields)}

    def head(self, output: str) -> ServedHead | None:
        """Return the head whose answers an output holds; None for other outputs."""
        return next((head for head in self.heads if head.output == output), None)

    def channels(self, output: str) -> int:
        """Return the channels of ``features``, ``cls`` or those of a further layer; a projection changes the first two.

        ``validity.read_manifest`` has checked the shape that a projected width is taken from.
        """
        projected = self.readout.project and output == kind_of(output) and not self.only_heads
        return int(self.outputs["features"]["shape"][-1]) if projected else self.model.width

    def need_features(self, verb: str, advice: str) -> None:
        """Raise ``PhregError`` where only heads are served; ``advice``: a sentence that says what to do."""
        if self.only_heads:
            outputs = ", ".join(self.outputs)
            raise PhregError(
                f"{verb}: the bundle serves {outputs} and no features, since it was written with --only-head. {advice}"
            )

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
        # Format 3 is older than inputs for rotary embeddings and than weights beside the graph.
        if version < 4:
            fields = {"rotary": None, "weights": None, **fields}
        fields = {"layers": None, "readout": PLAIN.to_json(), "heads": [], "only_heads": False, **fields}
        missing = sorted(set(cls.__dataclass_fields__) - set(fields))
        unknown = sorted(set(fields) - set(cls.__dataclass_fields__))
        if missing or unknown:
            raise PhregError(f"manifest: missing keys {missing}, unknown keys {unknown}. Export the bundle again.")
        fields.update(
            model=ModelSpec.from_json(fields["model"]),
            preprocess=Preprocess.from_json(fields["preprocess"]),
            sizes=Sizes.from_json(fields["sizes"]),
            batches=Batches.from_json(fields["batches"]),
            rotary=None if fields["rotary"] is None else Rotary.from_json(fields["rotary"]),
            layers=None if fields["layers"] is None else Layers.from_json(fields["layers"]),
            readout=Readout.from_json(fields["readout"]),
        )
        if not isinstance(fields["heads"], list):
            raise PhregError("manifest: heads is no list; it is damaged. Export the bundle again.")
        fields["heads"] = tuple(ServedHead.from_json(head) for head in fields["heads"])
        for key in ("inputs", "outputs", "source", "versions", "files"):
            if not isinstance(fields[key], dict):
                raise PhregError(f"manifest: {key} is no object; it is damaged. Export the bundle again.")
        return cls(**fields)

    def required(self) -> list[str]:
        """Return the names of the files that a reader needs."""
        positions = [name for key, name in TABLES.items() if key in self.inputs]
        weights = [self.weights] if self.weights else []
        return [GRAPH, REFERENCE, *weights, *positions, *([CALIBRATION] if self.quantisation else [])]
