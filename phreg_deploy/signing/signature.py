"""Sign a student or a bundle: ``model.sig``, and ``engines.sig`` where there are TensorRT engines."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from phreg_deploy.bundle.manifest import ENGINES, ENGINES_SIGNATURE, SIGNATURE
from phreg_deploy.errors import FORCE, PhregError
from phreg_deploy.extras import SIGN, require
from phreg_deploy.files.atomic import write_atomic
from phreg_deploy.files.temporary import scratch_folder
from phreg_deploy.signing.contents import UNSIGNED, list_present, list_signed
from phreg_deploy.spec import Stored

PASSWORD = "PHREG_KEY_PASSWORD"


@dataclass(frozen=True)
class Signed(Stored):
    """What a signature is over.

    ``kind``: "student" or "bundle". ``files``: their names; engines as ``engines/NAME``. ``signatures``: the files that
    hold the signatures.
    """

    kind: str
    folder: str
    files: list[str]
    signatures: list[str]


def sign(folder: Path | str, key: Path | str, *, password: str | None = None, force: bool = False) -> Signed:
    """Write a detached signature over every file of a student or a bundle that is read.

    The model card, its picture and files of git are left out, since people edit them. A bundle's hashes are verified
    first. TensorRT engines get a signature of their own, so they may be removed, and are not pushed.

    Args:
        key: a private key of the curve P-256, P-384 or P-521, in PEM.
        password: of the key, if it is encrypted.
        force: replace a signature that is there.

    Raises:
        PhregError: neither a student nor a bundle, a damaged one, or one with other files; a signature that is there;
            a key that cannot be read or is of another kind; a folder that cannot be written to.
        BackendMissing: the extra ``sign`` is not installed.
    """
    folder, key = Path(folder), Path(key)
    require("a signature", sign=SIGN)
    kind, names = list_signed(folder)
    signer = _signer(key, password)
    for name in (SIGNATURE, ENGINES_SIGNATURE):
        if (folder / name).exists() and not force:
            raise PhregError(f"sign: {folder / name} is there already; replace it with {FORCE}.")
    engines = list_present(folder / ENGINES, ()) if (folder / ENGINES).is_dir() else []
    written = [SIGNATURE]
    _write(signer, folder, UNSIGNED, folder / SIGNATURE)
    if engines:
        _write(signer, folder / ENGINES, (), folder / ENGINES_SIGNATURE)
        written.append(ENGINES_SIGNATURE)
    else:
        (folder / ENGINES_SIGNATURE).unlink(missing_ok=True)
    return Signed(kind, str(folder), [*names, *(f"{ENGINES}/{name}" for name in engines)], written)


def hashing_config(left_out: tuple[str, ...]) -> Any:
    """How the library hashes a folder: sha256 by file, through links, as the cache of the hub has them."""
    from model_signing import hashing

    config = hashing.Config().use_file_serialization(hashing_algorithm="sha256", allow_symlinks=True)
    return config.set_ignored_paths(paths=left_out, ignore_git_paths=True).set_allow_symlinks(True)


def _signer(key: Path, password: str | None) -> Any:
    from model_signing import signing

    if not key.is_file():
        raise PhregError(f"sign: there is no file {key}; expected a private key in PEM.")
    try:
        # The library hands the password to cryptography, which takes bytes.
        secret: Any = None if password is None else password.encode()
        return signing.Config().use_elliptic_key_signer(private_key=key, password=secret)
    # cryptography raises errors of many types for keys of other kinds.
    except Exception as error:
        if isinstance(error, TypeError) and password is None:
            raise PhregError(f"sign: {key} is encrypted; set {PASSWORD} to its password.") from None
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise PhregError(
            f"sign: {key} cannot be used ({reason}); expected a private key of the curve P-256, P-384 or P-521 in PEM"
            f"{'' if password is None else f', and its password in {PASSWORD}'}."
        ) from None


def _write(signer: Any, folder: Path, left_out: tuple[str, ...], target: Path) -> None:
    with scratch_folder("phreg-sign") as place:
        signer.set_hashing_config(hashing_config(left_out)).sign(folder, place / SIGNATURE)
        write_atomic(target, (place / SIGNATURE).read_bytes())
