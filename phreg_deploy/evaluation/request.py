"""``EvaluationRequest``: what to evaluate, on which images and truth, and how; its checks need no model."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from phreg_deploy.arguments import check_device, check_model
from phreg_deploy.bundle.bundle import Bundle, is_bundle
from phreg_deploy.errors import PhregError
from phreg_deploy.heads.class_embeddings import ClassEmbeddings
from phreg_deploy.layers import check_layers
from phreg_deploy.spec import parse_size
from phreg_deploy.student_record import model_path, read_readout

OVSS = "ovss"
PROTOCOLS = ("logistic", "ridge", "dinov2", OVSS)
# What a protocol without training has no use for.
TRAINING = ("split", "share", "decay", "patches", "seeds", "layers", "image_size", "classes", "depth")


@dataclass(frozen=True)
class EvaluationRequest:
    """What to evaluate, on what, and how.

    ``what``: timm names, students' folders and bundles; a name given twice is trained again with other seeds.
    ``base``: the one that the others are compared with and whose outlier tokens count; None for the first.
    ``checkpoints``: weights, one file for each timm name in their order, the base first.

    ``images``: folder of images. ``masks``: folder of masks, PNG with a palette or 8-bit grey, at the images' paths.
    ``depth``: folder of depth instead, 16-bit PNG or ``.npy``. ``classes``: a file with one name a line. ``ignore``:
    the value of masks that means no class, or None. ``first_class``: the value of the first class; smaller ones mean no
    class. ``depth_scale``: metres per unit of a PNG; ``.npy`` is taken as it
    is. ``split``, ``group``: see ``data.splits``; ``share`` of the groups is tested on where a hash decides.

    ``protocol``: "logistic", "ridge" or "dinov2", see ``solvers``, or "ovss", see ``zero_shot``; None for logistic, or
    ridge for depth. ``decay``: weight decay on the mean loss. ``patches``: the most that one seed trains on. ``seeds``:
    how many times the probe is trained, each time on its own draw of patches, from ``seed`` on.

    ``image_size``: "518" or "480x640" (height x width); None for each model's own. ``layers``: as of ``export``, joined
    along the channels; None for the features after the last block. ``readout``, ``project``: of PyTorch models; None
    for what a student's record says, else the final tokens. ``device``: where PyTorch computes. ``backend``: what
    serves bundles. ``cache``: folder of features, None for ``$XDG_CACHE_HOME/phreg-deploy``; ``keep``: write them.

    Of "ovss" alone: ``text``, the file of ``phreg-deploy classes``; ``scale`` of cosines, None for the paper's 40, or
    for the model's own where it was trained with sigmoids; ``background``: a probability below which a pixel is
    background (``ClassEmbeddings.head``), or None; ``short_side`` that images are resized to, ``window`` and
    ``stride``, in pixels.
    """

    what: tuple[str, ...]
    images: Path
    masks: Path | None = None
    depth: Path | None = None
    checkpoints: tuple[Path, ...] = ()
    base: str | None = None
    split: str = "auto"
    group: str = "prefix"
    share: float = 0.25
    classes: Path | None = None
    ignore: int | None = 255
    first_class: int = 0
    depth_scale: float = 0.001
    protocol: str | None = None
    decay: float = 1e-4
    patches: int = 100_000
    seeds: int = 3
    seed: int = 0
    image_size: str | None = None
    layers: str | None = None
    readout: str | None = None
    project: bool | None = None
    device: str = "auto"
    backend: str = "auto"
    cache: Path | None = None
    keep: bool = True
    text: Path | None = None
    scale: float | None = None
    background: float | None = None
    short_side: int = 448
    window: int = 336
    stride: int = 112

    @property
    def names(self) -> tuple[str, ...]:
        """What is evaluated, the base first."""
        base = self.base or self.what[0]
        rest = list(self.what)
        if base in rest:
            rest.remove(base)
        return (base, *rest)

    @property
    def solver(self) -> str:
        """The protocol by name."""
        return self.protocol or ("ridge" if self.depth is not None else "logistic")

    @property
    def reads(self) -> list[Path | None]:
        """The inputs, which no output may replace."""
        return [
            self.images,
            self.masks,
            self.depth,
            self.classes,
            self.text,
            *self.checkpoints,
            *map(model_path, self.what),
        ]

    @property
    def size(self) -> tuple[int, int] | None:
        return parse_size(self.image_size) if self.image_size else None

    def checkpoint_of(self, name: str) -> Path | None:
        """The weights of a timm name; checkpoints are given in the order of ``names``."""
        names = [n for n in dict.fromkeys(self.names) if not is_bundle(n) and check_model(n) is None]
        return self.checkpoints[names.index(name)] if self.checkpoints and name in names else None

    def check(self) -> None:
        """Raise ``PhregError`` for arguments that are wrong, before anything slow."""
        if not self.what:
            raise PhregError("evaluate: got no model; name a timm model, a student or a bundle.")
        if self.solver == OVSS:
            self._check_zero_shot()
        elif self.text is not None:
            raise PhregError("evaluate: --text goes with --protocol ovss.")
        if (self.masks is None) == (self.depth is None):
            given = "neither" if self.masks is None else "both"
            raise PhregError(f"evaluate: got {given} of --masks and --depth, expected one of them.")
        if self.depth is not None and self.classes is not None:
            raise PhregError("evaluate: --classes goes with --masks.")
        if self.solver not in PROTOCOLS:
            raise PhregError(
                f"protocol: got {self.protocol!r}, expected {', '.join(PROTOCOLS[:-1])} or {PROTOCOLS[-1]}."
            )
        if self.depth is not None and self.solver != "ridge":
            raise PhregError(f"protocol: got {self.protocol!r} with --depth, expected ridge.")
        for name, value, least in (("seeds", self.seeds, 1), ("seed", self.seed, 0), ("patches", self.patches, 100)):
            if value < least:
                raise PhregError(f"{name}: got {value}, expected at least {least}.")
        if not 0 < self.share < 1:
            raise PhregError(f"share: got {self.share}, expected a share between 0 and 1, e.g. 0.25.")
        if not 0 < self.decay < 1e3:
            raise PhregError(f"decay: got {self.decay}, expected a number above 0, e.g. 1e-4.")
        if not 0 < self.depth_scale < float("inf"):
            raise PhregError(f"depth-scale: got {self.depth_scale}, expected metres per unit of the PNG, e.g. 0.001.")
        if self.ignore is not None and not 0 <= self.ignore <= 255:
            raise PhregError(f"ignore: got {self.ignore}, expected a value of the masks, 0 to 255.")
        if not 0 <= self.first_class < 255:
            raise PhregError(f"first-class: got {self.first_class}, expected a value of the masks, 0 to 254.")
        check_device(self.device)
        check_layers(self.layers)
        parse_size(self.image_size or "1")
        self._check_models()

    def _check_zero_shot(self) -> None:
        if self.text is None:
            raise PhregError("evaluate: --protocol ovss needs --text, the file that `phreg-deploy classes` wrote.")
        fields = type(self).__dataclass_fields__
        given = [name for name in TRAINING if getattr(self, name) != fields[name].default]
        if given:
            raise PhregError(
                f"evaluate: --protocol ovss trains nothing and takes its classes and sizes from --text and --window; "
                f"leave out --{given[0].replace('_', '-')}."
            )
        if self.project is False:
            raise PhregError("evaluate: --protocol ovss compares projected features with text; leave out --no-project.")
        if not 1 <= self.stride <= self.window <= self.short_side:
            raise PhregError(
                f"evaluate: got the short side {self.short_side}, windows of {self.window} and the stride "
                f"{self.stride}; expected a stride up to the window, and a window up to the short side."
            )
        ClassEmbeddings.read(self.text).head(self.scale, self.background)

    def _check_models(self) -> None:
        if (self.readout is not None or self.project is not None) and all(is_bundle(name) for name in self.names):
            raise PhregError("evaluate: --readout and --project go with a PyTorch model; a bundle has its own.")
        timm_names = 0
        for name in dict.fromkeys(self.names):
            if is_bundle(name):
                Bundle.read(name)
            elif check_model(name) is None:
                timm_names += 1
        if len(self.checkpoints) not in (0, timm_names):
            raise PhregError(
                f"checkpoint: got {len(self.checkpoints)} files for {timm_names} timm names; expected one --checkpoint "
                "for each, in their order, the base first."
            )
        for name in dict.fromkeys(self.names):
            if not is_bundle(name):
                check_model(name, self.checkpoint_of(name))
                read_readout(name, self.readout, self.project)
