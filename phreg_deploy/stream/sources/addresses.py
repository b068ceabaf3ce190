"""Addresses of network streams."""

from __future__ import annotations

import re

NETWORK = re.compile(r"(rtsps?|rtmps?|https?|udp|tcp|srt)://", re.IGNORECASE)


def public_name(place: str) -> str:
    """An address without its user and password, for messages; other places as they are."""
    return re.sub(r"(?<=://)[^/@]*@", "", place)
