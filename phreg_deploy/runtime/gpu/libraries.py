"""Read from a shared object's ELF header which libraries it needs."""

from __future__ import annotations

import struct
from pathlib import Path


def needed_libraries(path: Path) -> list[str]:
    """The libraries that a 64-bit shared object names in its header (DT_NEEDED); the object is not loaded.

    Raises:
        OSError, ValueError, struct.error: the file cannot be read, or is no such object.
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
        needed = []
        # Type 6 is SHT_DYNAMIC, whose link is the section with its names; tag 1 is DT_NEEDED.
        for dynamic in (s for s in sections if s[1] == 6):
            names = read(sections[dynamic[6]][4], sections[dynamic[6]][5])
            entries = struct.iter_unpack("<qQ", read(dynamic[4], dynamic[5] // 16 * 16))
            needed += [names[at:].split(b"\0", 1)[0].decode() for tag, at in entries if tag == 1]
        return needed
