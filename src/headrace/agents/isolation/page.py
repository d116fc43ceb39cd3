"""A page of memory that a worker writes and its host reads: since when the worker's loop is busy, and with what.

Intuition: a dead man's handle. A loop that hangs cannot say so any more, but what it wrote last can be read. It names
a culprit sooner than the deadline would; a worker that lies on it gains nothing, as the deadline still comes.
"""

import mmap
import os
import struct
import time

BYTES = mmap.PAGESIZE
_SINCE = struct.Struct("=d")
_NUMBER = struct.Struct("=q")
_BOTH = struct.Struct("=dq")


def create() -> tuple[int, "Page"]:
    """A new page, and the descriptor through which a worker can map it too."""
    descriptor = os.memfd_create("headrace-worker", os.MFD_CLOEXEC)
    os.ftruncate(descriptor, BYTES)
    return descriptor, Page(descriptor)


class Page:
    """The page as this process sees it. Both processes are on one machine, and so on one monotonic clock."""

    __slots__ = ("_memory",)

    def __init__(self, descriptor: int) -> None:
        self._memory = mmap.mmap(descriptor, BYTES)

    def mark_busy(self) -> None:
        """The loop begins a round."""
        _SINCE.pack_into(self._memory, 0, time.clock_gettime(time.CLOCK_MONOTONIC))

    def mark_idle(self) -> None:
        """The loop waits."""
        _SINCE.pack_into(self._memory, 0, 0.0)

    def mark_step(self, number: int) -> None:
        """A step of this execution begins, in a round that has begun."""
        _NUMBER.pack_into(self._memory, _SINCE.size, number)

    def read(self) -> tuple[float, int]:
        """Since when the loop is busy, 0 when it waits; and the execution whose step began last."""
        since, number = _BOTH.unpack_from(self._memory)
        return since, number

    def close(self) -> None:
        """Unmap it."""
        self._memory.close()
