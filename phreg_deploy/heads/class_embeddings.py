"""``ClassEmbeddings``: text embeddings of class names, and their file ``classes.npz`` (``docs/text.md``)."""

from __future__ import annotations

import io
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from phreg_deploy.arguments import refuse_url
from phreg_deploy.bundle.heads import PromptRule
from phreg_deploy.errors import FORCE, PhregError
from phreg_deploy.files.atomic import write_atomic
from phreg_deploy.heads.text_head import TextHead

# The format of classes.npz.
NEWEST = 1
BACKGROUND = "background"
# An embedding's length may differ from 1 by so much.
UNIT = 1e-3
# numpy raises these for a damaged file.
DAMAGED = (OSError, ValueError, EOFError, LookupError, RuntimeError, zipfile.BadZipFile)


@dataclass(frozen=True)
class ClassEmbeddings:
    """Embeddings of the names of K classes by a model's text tower. S names, D channels.

    ``embeddings`` float32 ``(S, D)`` of unit length. ``names``: the text of each row; a class's synonyms stand
    together. ``classes``: the class of each row, from 0, growing; a class is called by its first name. ``scale``: the
    model's own factor of cosines. ``bias``: what a model trained with sigmoids (SigLIP) adds, or None for one trained
    with softmax (CLIP). ``model``, ``pretrained``: open_clip's architecture, and its tag or the weights' file.
    ``vision``: timm names of the image towers that go with it, with their tag where it is known; empty if they are not
    known. ``templates``: with ``{}`` in place of the name.
    """

    embeddings: np.ndarray
    names: tuple[str, ...]
    classes: tuple[int, ...]
    scale: float
    bias: float | None
    model: str
    pretrained: str
    vision: tuple[str, ...]
    templates: tuple[str, ...]

    def __post_init__(self) -> None:
        e = self.embeddings
        if e.ndim != 2 or e.dtype != np.float32 or 0 in e.shape or len(e) != len(self.names):
            raise PhregError(f"classes: got embeddings {e.dtype} {e.shape} of {len(self.names)} names.")
        if not np.isfinite(e).all() or np.abs(np.linalg.norm(e, axis=1) - 1).max() > UNIT:
            raise PhregError(
                "classes: the embeddings have not unit length; the model's weights or the file are broken."
            )
        steps = np.diff((-1, *self.classes))
        if len(self.classes) != len(e) or steps[0] != 1 or not np.isin(steps, (0, 1)).all():
            raise PhregError("classes: expected the class of each name from 0, with a class's names together.")
        bias = 0.0 if self.bias is None else self.bias
        if not (np.isfinite(self.scale) and self.scale > 0 and np.isfinite(bias)):
            raise PhregError(f"classes: got the scale {self.scale} and the bias {self.bias}, expected a scale above 0.")

    @property
    def class_names(self) -> tuple[str, ...]:
        """The first name of each class."""
        return tuple(self.names[self.classes.index(k)] for k in range(self.classes[-1] + 1))

    def head(self, scale: float | None = None, background: float | None = None) -> TextHead:
        """Build a head that scores patches by these classes.

        Args:
            scale: the factor of cosines; None for the model's own.
            background: a probability. Where every class's is below it, the class is background: the class of that name
                if it is the first, else a further class before the others. The probability is the softmax over all
                names, and with a ``bias`` the sigmoid of each.

        Raises:
            PhregError: a scale or probability out of range, or more classes than 8 bits have.
        """
        factor = self.scale if scale is None else scale
        if not 0 < factor < 1e4:
            raise PhregError(f"scale: got {factor}, expected a number above 0, e.g. 40.")
        if background is not None and not 0 < background < 1:
            raise PhregError(f"background: got {background}, expected a probability between 0 and 1, e.g. 0.1.")
        counts = np.bincount(self.classes).tolist()
        weight = np.float32(factor) * self.embeddings
        added = np.full(len(weight), 0.0 if self.bias is None else self.bias, np.float32)
        names, first = self.class_names, self.class_names[0].lower() == BACKGROUND
        log: float | None = None
        if background is not None and not first:
            names = (BACKGROUND, *names)
        if background is not None and self.bias is None:
            log = float(np.log(background))
        elif background is not None:
            # A row without direction has the same score everywhere.
            counts = [counts[0] + 1, *counts[1:]] if first else [1, *counts]
            weight = np.concatenate([np.zeros_like(weight[:1]), weight])
            added = np.concatenate([np.array([np.log(background / (1 - background))], np.float32), added])
        return TextHead(weight, added, PromptRule(tuple(counts), log, log is not None and first), names, self.vision)

    def write(self, path: Path | str, force: bool = False) -> None:
        """Write ``classes.npz``.

        Raises:
            PhregError: the file exists and ``force`` is False, or it cannot be written.
        """
        check_output(path, force)
        arrays: dict[str, Any] = {
            "format": np.int64(NEWEST),
            "embeddings": self.embeddings,
            "names": np.array(self.names, np.str_),
            "classes": np.array(self.classes, np.int64),
            "scale": np.float32(self.scale),
            "bias": np.float32(np.nan if self.bias is None else self.bias),
            "model": np.array(self.model, np.str_),
            "pretrained": np.array(self.pretrained, np.str_),
            "vision": np.array(self.vision, np.str_),
            "templates": np.array(self.templates, np.str_),
        }
        data = io.BytesIO()
        np.savez(data, **arrays)
        write_atomic(Path(path), data.getvalue())

    @classmethod
    def read(cls, path: Path | str) -> ClassEmbeddings:
        """Read ``classes.npz``; nothing is unpickled.

        Raises:
            PhregError: the file is missing, damaged, or of a newer format.
        """
        refuse_url(str(path))
        path = Path(path)
        if not path.is_file():
            raise PhregError(f"classes: there is no file {path}; `phreg-deploy classes` writes one.")
        try:
            with np.load(io.BytesIO(path.read_bytes()), allow_pickle=False) as arrays:
                found = {key: arrays[key] for key in arrays.files}
            version = int(found["format"])
            if version > NEWEST:
                raise PhregError(
                    f"classes: {path} has format {version}, expected at most {NEWEST}. Upgrade phreg-deploy."
                )
            bias = float(found["bias"])
            return cls(
                found["embeddings"],
                tuple(map(str, found["names"])),
                tuple(map(int, found["classes"])),
                float(found["scale"]),
                None if np.isnan(bias) else bias,
                str(found["model"]),
                str(found["pretrained"]),
                tuple(map(str, found["vision"])),
                tuple(map(str, found["templates"])),
            )
        except PhregError:
            raise
        except (*DAMAGED, TypeError, AttributeError) as error:
            raise PhregError(
                f"classes: {path} cannot be read ({error}); expected a file written by `phreg-deploy classes`."
            ) from None


def check_output(path: Path | str, force: bool) -> None:
    """Raise ``PhregError`` unless ``path`` can be written: a file name with ``.npz``, new or to be replaced."""
    path = Path(path)
    if path.suffix != ".npz":
        raise PhregError(f"classes: got the output {path.name}, expected a name with .npz, e.g. classes.npz.")
    if path.is_dir() or (path.exists() and not force):
        raise PhregError(f"classes: {path} exists; choose another name, or replace it with {FORCE}.")
    if not path.absolute().parent.is_dir():
        raise PhregError(f"classes: there is no folder {path.absolute().parent}; make it first.")
