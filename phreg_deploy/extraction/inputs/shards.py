"""Shards: equal parts of a list of images, the same in every process."""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass

from phreg_deploy.errors import PhregError

MOST_SHARDS = 100_000


@dataclass(frozen=True)
class Shard:
    """Part ``number`` (from 1) of ``count`` parts."""

    number: int
    count: int

    @classmethod
    def parse(cls, text: str) -> Shard:
        """Read "3/16". Raises ``PhregError`` for anything else, or a number outside the count."""
        match = re.fullmatch(r"(\d{1,6})/(\d{1,6})", text.strip())
        if match is None or not 1 <= int(match[1]) <= int(match[2]) <= MOST_SHARDS:
            raise PhregError(f"shard: got {text!r}, expected a part and the number of parts, from 1/16 to 16/16.")
        return cls(int(match[1]), int(match[2]))

    def __str__(self) -> str:
        return f"{self.number}/{self.count}"

    @property
    def name(self) -> str:
        """In file names: ``03-of-16``."""
        return f"{self.number:0{len(str(self.count))}d}-of-{self.count}"

    def holds(self, key: str) -> bool:
        """Whether an image belongs to this shard: BLAKE2b of its relative path, modulo the number of shards.

        So an image stays in its shard when others are added, and shards have equal sizes up to chance.
        """
        digest = hashlib.blake2b(key.encode("utf-8", "surrogateescape"), digest_size=8).digest()
        return int.from_bytes(digest, "big") % self.count == self.number - 1
