"""The bearer token: where it comes from, and how it is compared."""

from __future__ import annotations

import hashlib
import hmac
import os
from pathlib import Path

from phreg_deploy.errors import PhregError

VARIABLE = "PHREG_SERVE_TOKEN"
# A shorter token could be guessed.
SHORTEST = 16


def read_token(file: Path | None) -> str | None:
    """Read the token from a file, or else from the environment variable ``PHREG_SERVE_TOKEN``; None without either.

    Raises:
        PhregError: a file that cannot be read, a token that is too short, or one that a header cannot hold.
    """
    if file is None:
        token, where = os.environ.get(VARIABLE), VARIABLE
        if token is None:
            return None
    else:
        where = str(file)
        try:
            token = file.read_text()
        except (OSError, UnicodeDecodeError) as error:
            raise PhregError(f"token: {file} cannot be read ({error}); expected a file with the token.") from None
    token = token.strip()
    if len(token) < SHORTEST or not token.isascii() or not token.isprintable() or " " in token:
        raise PhregError(
            f"token: {where} holds {len(token)} characters, expected at least {SHORTEST} printable ones of ASCII "
            "without spaces. Make one: python3 -c 'import secrets; print(secrets.token_urlsafe(32))'"
        )
    return token


class TokenCheck:
    """Compares the ``Authorization`` of requests with the token, in a time that does not depend on either."""

    def __init__(self, token: str) -> None:
        self._digest = hashlib.sha256(token.encode()).digest()

    def passes(self, authorization: bytes | None) -> bool:
        """Whether the header is ``Bearer`` and the token."""
        scheme, _, given = (authorization or b"").partition(b" ")
        same = hmac.compare_digest(hashlib.sha256(given.strip()).digest(), self._digest)
        return same and scheme.lower() == b"bearer"
