"""Which shared libraries a file needs, read from its ELF header without loading it."""

from __future__ import annotations

import struct
from pathlib import Path


def needed_libraries(path: Path) -> list[str]:
    """The libraries that a shared object of 64 bits names in its header (DT_NEEDED), without opening it for real.

    Raises:
        OSError, ValueError, struct.error: it cannot be read, or is no such file.
    """
    with open(path, "rb") as file:

        def read(start: int, size: int) -> bytes:
            file.seek(start)
            return file.read(size)

        head = read(0, 64)
        if head[:6] != b"\x7fELF\x02\x01":
            raise ValueError(f"{path} is no 64-bit little-endian shared object")
        table, size, count = *struct.unpack_from("<Q", head, 40), *struct.unpack_from("<HH", head, 58)
        sections = [struct.unpack("<IIQQQQIIQQ", read(table + i * size, 64)) for i in range(count)]
        found = []
        for dynamic in (s for s in sections if s[1] == 6):  # SHT_DYNAMIC, whose link is the table of its names
            names = read(sections[dynamic[6]][4], sections[dynamic[6]][5])
            entries = struct.iter_unpack("<qQ", read(dynamic[4], dynamic[5] // 16 * 16))
            found += [names[at:].split(b"\0", 1)[0].decode() for tag, at in entries if tag == 1]  # DT_NEEDED
        return found
