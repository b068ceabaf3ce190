"""Memory of the fake GPU: allocations at aligned addresses, filled with a byte that no test writes."""

import ctypes
import struct
from collections import deque
from dataclasses import dataclass

from tests.fake_gpu.cuda_types import Refused, cudaError_t

assert struct.calcsize("P") == 8, "addresses of 64 bits"
# Allocated memory is filled with the first byte, freed memory with the second.
POISON, FREED = 0xA5, 0x5A
# Bytes, the alignment of cudaMalloc: "Device Memory Accesses" in the CUDA C++ Programming Guide.
ALIGNMENT = 256
# Freed memory that is kept from Python's allocator: no address is used again at once, and late writes are seen.
KEPT = 64


@dataclass
class Region:
    """``start``: its address. ``part``: its bytes. ``index``: the GPU. ``pinned``: page-locked memory of the host."""

    start: int
    part: object
    index: int
    pinned: bool

    def holds(self, pointer, size):
        return self.start <= pointer and pointer + size <= self.start + len(self.part)


class Memory:
    """All allocations. ``used``: bytes of the GPU's own memory; pinned memory counts if the two share it.

    ``written_late``: how much freed memory was written to. On a real machine both reads and writes may end the process.
    """

    def __init__(self, size, shared):
        self.size, self.shared, self.used, self.regions = size, shared, 0, {}
        self._freed, self.written_late = deque(), 0

    def count(self, pinned):
        return sum(region.pinned == pinned for region in self.regions.values())

    def allocate(self, size, index, pinned=False):
        counts = self.shared or not pinned
        if counts and size > self.size - self.used:
            raise Refused(cudaError_t.cudaErrorMemoryAllocation)
        buffer = (ctypes.c_uint8 * (size + ALIGNMENT))()
        ctypes.memset(buffer, POISON, size + ALIGNMENT)
        address = ctypes.addressof(buffer)
        start = address + -address % ALIGNMENT
        self.regions[start] = Region(start, (ctypes.c_uint8 * size).from_buffer(buffer, start - address), index, pinned)
        self.used += size if counts else 0
        return start

    def free(self, pointer, pinned=False):
        region = self.regions.get(int(pointer))
        if region is None or region.pinned != pinned:
            raise Refused(cudaError_t.cudaErrorInvalidValue)
        del self.regions[region.start]
        ctypes.memset(region.start, FREED, len(region.part))
        self._freed.append(region)
        self.check_freed(KEPT)
        self.used -= len(region.part) if self.shared or not pinned else 0
        return region

    def check_freed(self, keep=0):
        """Let go of freed memory but for the latest; count what was written to after it was freed."""
        while len(self._freed) > keep:
            part = self._freed.popleft().part
            self.written_late += bytes(part) != bytes([FREED]) * len(part)
        return self.written_late

    def find(self, pointer, size, pinned=False):
        """Return the allocation that holds ``size`` bytes from ``pointer`` on, or None."""
        for region in self.regions.values():
            if region.pinned == pinned and region.holds(pointer, size):
                return region
        return None
