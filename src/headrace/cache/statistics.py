"""What a cache has done so far, in numbers that only grow."""

import threading
from typing import Any

import msgspec


class CacheStatistics(msgspec.Struct, frozen=True, kw_only=True):
    """Counts since the cache was made, in this process."""

    memory_hits: int = 0
    memory_misses: int = 0
    remote_hits: int = 0
    remote_misses: int = 0
    """Answers of the shared tier without a usable value; failures are not among them."""
    remote_errors: int = 0
    """Calls to the shared tier that failed: timeout, lost connection, refusal."""
    loads: int = 0
    """Loader runs that were started."""
    load_errors: int = 0
    coalesced: int = 0
    """Calls that waited for a load that another call had started."""
    lease_waits: int = 0
    """Loads for which this process waited for another one's lease."""
    refreshes: int = 0
    """Reloads behind a hit."""
    stale_served: int = 0
    installs_refused: int = 0
    """Values not kept because their key was invalidated while they were being fetched."""
    entries_rejected: int = 0
    """Foreign, broken, altered or outdated bytes in the shared tier."""
    writes_dropped: int = 0
    """Writes that did not reach the shared tier."""
    entries: int = 0
    """Entries in memory now."""
    remote_available: bool | None = None
    """None: no shared tier is configured."""

    @property
    def hit_rate(self) -> float | None:
        """Share of reads that either tier answered, 0 to 1; None before the first read."""
        hits = self.memory_hits + self.remote_hits
        misses = self.remote_misses + self.remote_errors if self.remote_available is not None else self.memory_misses
        return hits / (hits + misses) if hits + misses else None


class Counts:
    """The counters off the memory tier's hit path; exact under threads."""

    __slots__ = ("_lock", "_numbers")

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._numbers: dict[str, int] = {}

    def add(self, name: str, number: int = 1) -> None:
        """Count `number` more of `name`, a field of `CacheStatistics`."""
        with self._lock:
            self._numbers[name] = self._numbers.get(name, 0) + number

    def statistics(self, **now: Any) -> CacheStatistics:
        """The counts so far together with what is true `now`."""
        with self._lock:
            numbers: dict[str, Any] = {**self._numbers, **now}
        return CacheStatistics(**numbers)
