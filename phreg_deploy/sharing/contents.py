"""List what a repository gets: the files of a student or a bundle, and its model card under the repository's name."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from phreg_deploy.arguments import check_model
from phreg_deploy.bundle.bundle import Bundle, is_bundle
from phreg_deploy.bundle.manifest import MANIFEST, SIGNATURE
from phreg_deploy.cards.bundle import bundle_card
from phreg_deploy.cards.metadata import CARD, PLACE
from phreg_deploy.cards.student import PICTURE, student_card
from phreg_deploy.errors import PhregError
from phreg_deploy.hub.names import HubName
from phreg_deploy.spec import Stored
from phreg_deploy.student_record import RECORD, model_path, read_record

STUDENT = ("config.json", "model.safetensors", RECORD)


@dataclass(frozen=True)
class Pushed(Stored):
    """What was pushed, or with a dry run would be.

    ``kind``: "student" or "bundle". ``files``: name -> bytes. ``commit`` and ``url``: None after a dry run.
    """

    kind: str
    repository: str
    revision: str | None
    files: dict[str, int]
    commit: str | None = None
    url: str | None = None


@dataclass(frozen=True)
class Contents:
    """The files on this machine by their names in the repository, and the text of the card."""

    kind: str
    paths: dict[str, Path]
    card: str

    def pushed(self, name: HubName, commit: str | None = None, url: str | None = None) -> Pushed:
        """Return the report of a push to ``name``."""
        files = {CARD: len(self.card.encode())} | {file: path.stat().st_size for file, path in self.paths.items()}
        return Pushed(self.kind, name.repository, name.revision, files, commit, url)


def list_contents(folder: Path | str, name: HubName) -> Contents:
    """List the files of a student or a bundle, and verify a bundle's hashes; the card says ``name``.

    Raises:
        PhregError: neither of both, or a damaged one.
    """
    if is_bundle(folder):
        bundle = Bundle.read(folder)
        bundle.verify()
        place, kind, names = bundle.folder, "bundle", [MANIFEST, *bundle.manifest.files]
        card = bundle_card(bundle.manifest.to_json())
    else:
        place, kind, names = model_path(str(folder)), "student", list(STUDENT)
        if not place.is_dir():
            raise PhregError(f"push: got {folder}, where there is no folder; expected a student's folder or a bundle.")
        record = read_record(place)
        if record is None:
            raise PhregError(
                f"push: {folder} holds neither {MANIFEST} nor {RECORD}; expected a student or a bundle. timm's "
                "push_to_hf_hub pushes other models."
            )
        check_model(str(place))
        names += [PICTURE] if (place / PICTURE).is_file() else []
        try:
            card = student_card(record, PICTURE in names)
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            reason = f"{type(error).__name__}: {error}"
            raise PhregError(f"push: {place / RECORD} is damaged ({reason}); distil the student again.") from None
    names += [SIGNATURE] if (place / SIGNATURE).is_file() else []
    if (place / CARD).is_file():
        try:
            card = (place / CARD).read_text(encoding="utf-8")
        except UnicodeDecodeError as error:
            raise PhregError(f"push: {place / CARD} is no UTF-8 ({error}); correct it, or remove it.") from None
    if PICTURE not in names:
        card = "".join(line for line in card.splitlines(True) if f"]({PICTURE})" not in line)
    card = card.replace(f"local-dir:{PLACE}", str(name)).replace(PLACE, str(name))
    return Contents(kind, {name: place / name for name in names}, card)
