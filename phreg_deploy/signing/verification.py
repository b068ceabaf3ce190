"""Verify the signature of a student or a bundle before anything of it is read."""

from __future__ import annotations

import base64
import json
import re
from pathlib import Path
from typing import Any

from phreg_deploy.arguments import refuse_url
from phreg_deploy.bundle.bundle import Bundle
from phreg_deploy.bundle.manifest import ENGINES, ENGINES_SIGNATURE, MANIFEST, SIGNATURE
from phreg_deploy.errors import PhregError
from phreg_deploy.extras import SIGN, require
from phreg_deploy.files.atomic import write_atomic
from phreg_deploy.files.temporary import scratch_folder
from phreg_deploy.hub.download import local_path
from phreg_deploy.json_files import is_regular
from phreg_deploy.signing.contents import UNSIGNED, list_present
from phreg_deploy.signing.signature import Signed, hashing_config

# Bytes of a signature. One of ours has about 200 for each file.
MOST_BYTES = 8 << 20


def verify_signature(folder: Path | str, public_key: Path | str) -> Signed:
    """Verify that every file of a student or a bundle is as the holder of the private key signed it.

    Files that are not signed are refused too, but for the model card, its picture and files of git, which are not read.
    Nothing of the folder is parsed but ``model.sig`` and ``engines.sig``.

    Args:
        folder: a folder, or ``hf-hub:org/name``, which is downloaded. Its manifest is read to know what to download.
        public_key: in PEM, of the pair whose private key signed it.

    Raises:
        PhregError: no signature, one of another key, a file that was changed, added or removed since; a key that cannot
            be read; nothing there.
        BackendMissing: the extra ``sign`` is not installed.
    """
    require("a signature", sign=SIGN)
    place, key = local_path(folder), Path(public_key)
    if not place.is_dir():
        raise PhregError(
            f"signature: got {folder}, where there is no folder; expected a student or a bundle. A timm model has no "
            "signature: for its name leave out --public-key, and unset PHREG_PUBLIC_KEY."
        )
    verifier = _verifier(key)
    names = _verify(verifier, place, UNSIGNED, place / SIGNATURE, key)
    files, written = names, [SIGNATURE]
    engines = place / ENGINES
    # A link to nothing is refused as well.
    if (engines.is_symlink() or engines.exists()) and list_present(engines, ()):
        plans = _verify(verifier, engines, (), place / ENGINES_SIGNATURE, key)
        files = [*names, *(f"{ENGINES}/{name}" for name in plans)]
        written.append(ENGINES_SIGNATURE)
    return Signed("bundle" if MANIFEST in names else "student", str(place), files, written)


def read_signed(folder: Path | str, public_key: Path | str | None, hashes: bool = True) -> Bundle:
    """Read a bundle, with a key after its signature was verified; ``hashes``: verify those in its manifest.

    Raises as ``Bundle.read`` and ``verify_signature``.
    """
    if public_key is not None:
        refuse_url(str(folder))
        verify_signature(folder, public_key)
    bundle = Bundle.read(folder)
    if hashes:
        bundle.verify()
    return bundle


def _verifier(key: Path) -> Any:
    from model_signing import verifying

    if not key.is_file():
        raise PhregError(f"signature: there is no file {key}; expected a public key in PEM.")
    try:
        return verifying.Config().use_elliptic_key_verifier(public_key=key)
    # cryptography raises errors of many types for keys of other kinds.
    except Exception as error:
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise PhregError(
            f"signature: {key} cannot be used ({reason}); expected a public key of the curve P-256, P-384 or P-521."
        ) from None


def _verify(verifier: Any, folder: Path, left_out: tuple[str, ...], signature: Path, key: Path) -> list[str]:
    """Verify one signature over a folder; return the names of the files that it is over."""
    from cryptography.exceptions import InvalidSignature

    present = list_present(folder, left_out)
    data = _read(signature, folder)
    with scratch_folder("phreg-verify") as place:
        # What is verified here is what is parsed below.
        copy = place / SIGNATURE
        write_atomic(copy, data)
        try:
            verifier.set_hashing_config(hashing_config(left_out)).verify(folder, copy)
            signed = _signed_names(data)
        except InvalidSignature:
            raise _other_key(signature, key) from None
        # The library raises what JSON, pydantic and base64 raise for a damaged signature.
        except Exception as error:
            reason = " ".join(str(error).split())
            if reason.startswith("Key mismatch"):
                raise _other_key(signature, key) from None
            if reason.startswith("Signature mismatch"):
                difference = _difference(reason, data, present)
                raise PhregError(
                    f"signature: {folder} is not what {key} signed: {difference}. Copy it again."
                ) from None
            reason = reason[:200] or type(error).__name__
            raise PhregError(
                f"signature: {signature} cannot be read ({reason}); it is damaged, or another program's. Copy it again."
            ) from None
    unsigned = ", ".join(sorted(set(present) - set(signed))[:5])
    if unsigned:
        raise PhregError(f"signature: {signature} leaves out {unsigned}; sign it with `phreg-deploy sign`.")
    return sorted(signed)


def _read(signature: Path, folder: Path) -> bytes:
    again = "Sign it after `build`, or remove its engines" if folder.name == ENGINES else "Ask for a signed one"
    try:
        if not is_regular(signature):
            raise PhregError(f"signature: {signature} is no regular file; copy the folder again.")
        with open(signature, "rb") as file:
            data = file.read(MOST_BYTES + 1)
    except FileNotFoundError:
        raise PhregError(f"signature: {folder} is not signed: there is no {signature.name}. {again}.") from None
    except OSError as error:
        raise PhregError(f"signature: {signature} cannot be read ({error.strerror}).") from None
    if len(data) > MOST_BYTES:
        raise PhregError(f"signature: {signature} has more than {MOST_BYTES >> 20} MB; it is none of ours.")
    return data


def _other_key(signature: Path, key: Path) -> PhregError:
    return PhregError(
        f"signature: {signature} was not made with the private key of {key}, or was changed since. Use the public key "
        "of whoever signed it, or do not use the folder."
    )


def _signed_names(data: bytes) -> list[str]:
    """The names in a signature that was verified: of the in-toto statement in its DSSE envelope."""
    statement = json.loads(base64.b64decode(json.loads(data)["dsseEnvelope"]["payload"]))
    return [str(resource["name"]) for resource in statement["predicate"]["resources"]]


def _difference(reason: str, data: bytes, present: list[str]) -> str:
    """Say which files were changed, added or removed."""
    signed = set(_signed_names(data))
    parts = {
        # The library prints a list of texts, with backslashes or without.
        "changed": re.findall(r"Hash mismatch for \\?'([^'\\]*)", reason),
        "added": sorted(set(present) - signed),
        "removed": sorted(signed - set(present)),
    }
    named = {how: ", ".join(names[:5]) for how, names in parts.items() if names}
    return "; ".join(f"{how}: {names}" for how, names in named.items()) or reason[:200]
