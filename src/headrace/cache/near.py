"""This process's own copies: the in-memory tier behind its fence."""

import sys
import threading
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

import msgspec

from headrace.cache.config import MemoryConfig
from headrace.cache.entry import FOREVER, Entry
from headrace.cache.fence import Epoch, Fence
from headrace.cache.memory import MemoryCache, MemoryStatistics
from headrace.cache.policy import CachePolicy, glob_pattern
from headrace.clock import Clock

ENTRY_BYTES = 600
"""What an entry costs beside its key and value: two objects, a dict slot, a place in the policy."""


def estimated_bytes(key: str, value: object) -> int:
    """About what an entry takes: the value's msgpack length stands for it, its own size where it has none."""
    try:
        size = len(msgspec.msgpack.encode(value))
    except (TypeError, ValueError, OverflowError, RecursionError, msgspec.MsgspecError):
        size = sys.getsizeof(value)
    return ENTRY_BYTES + len(key) + size


def _nothing(_key: str) -> None:
    return None


class Write(NamedTuple):
    """A value that a caller wrote, ready to be kept."""

    key: str
    entry: Entry
    epoch: Epoch
    policy: CachePolicy


class Near:
    """The memory tier of a cache. Every removal raises the fence first, so that no older value is installed after
    it."""

    def __init__(self, config: MemoryConfig | None, clock: Clock, *, is_copy: bool) -> None:
        self._clock = clock
        self._is_copy = is_copy
        self._lock = threading.Lock()
        self._fence = Fence()
        """Turns away what is being read or loaded."""
        self._writes = Fence()
        """Turns away what is being written. A write that ends turns away reads, but not the newer write beside it."""
        self._config = config
        self._fresh_max_s: float | None = None
        self.memory: MemoryCache | None = None
        self.lookup: Callable[[str], Entry | None] = _nothing
        if config is not None:
            self.memory = MemoryCache(
                config.entries_max, ttl=None, policy=config.policy, weight_max=config.weight_max, clock=clock
            )
            self.lookup = self.memory.get

    def epoch(self, key: str) -> Epoch:
        """What to note before a value of `key` is fetched."""
        return self._fence.epoch(key)

    def holds(self, key: str, epoch: Epoch) -> bool:
        """Whether a value fetched since `epoch` is still good."""
        return self._fence.holds(key, epoch)

    def install(self, key: str, entry: Entry, epoch: Epoch, policy: CachePolicy, *, is_renewal: bool = False) -> bool:
        """Keep a value that was fetched since `epoch`; False if its key was invalidated meanwhile.

        One that was loaded in the place of another turns away what is being fetched: that may be the one before. Where
        there was none, nothing is turned away, so that a cold start keeps all that it reads; and what was only read
        turns nothing away, least of all the load that is to renew it.
        """
        with self._lock:
            if not self._fence.holds(key, epoch):
                return False
            if is_renewal:
                self._fence.raise_for(key)
            self._keep(key, entry, policy)
            return True

    def begin_writes(self, keys: Sequence[str]) -> list[Epoch]:
        """Turn away what is being fetched now, and note the epochs of writes that begin."""
        with self._lock:
            for key in keys:
                self._change(key)
            return [self._writes.epoch(key) for key in keys]

    def end_writes(self, writes: Sequence[Write]) -> None:
        """Keep what was written, unless its key was changed since; what was fetched meanwhile is turned away again.

        Also where the write is not kept: a read from before it may come in behind it, and the echo of one's own write
        does not drop a copy. Where there is no shared tier a write has no duration, and nothing can have come between.
        """
        with self._lock:
            kept = [not self._is_copy or self._writes.holds(write.key, write.epoch) for write in writes]
            for write, is_kept in zip(writes, kept, strict=True):
                self._fence.raise_for(write.key)
                if is_kept:
                    self._keep(write.key, write.entry, write.policy)
                else:
                    self._drop(write.key)

    def exchange(self, write: Write) -> bool:
        """Keep a value that was made from the one before it; False if its key was changed since that was looked at.

        Its epoch is that of the look, which also a write that ends turns away.
        """
        with self._lock:
            if not self._fence.holds(write.key, write.epoch):
                return False
            self._fence.raise_for(write.key)
            self._keep(write.key, write.entry, write.policy)
            return True

    def drop(self, key: str) -> None:
        """Hold nothing for a key whose shared entry was just written by this process, but could not be kept here.

        What is held may be older, or is being fetched, and the echo of one's own write does not drop it.
        """
        with self._lock:
            self._fence.raise_for(key)
            self._drop(key)

    def _change(self, key: str) -> None:
        self._fence.raise_for(key)
        self._writes.raise_for(key)

    def _change_all(self) -> None:
        self._fence.raise_for_all()
        self._writes.raise_for_all()

    def _drop(self, key: str) -> None:
        if self.memory is not None:
            self.memory.delete(key)

    def _keep(self, key: str, entry: Entry, policy: CachePolicy) -> None:
        if self.memory is None or self._config is None:
            return
        longest = policy.memory_ttl
        if longest is None and self._is_copy:
            longest = self._config.ttl
        now = self._clock.monotonic()
        if self._fresh_max_s is not None:
            entry.age(now + self._fresh_max_s)
        life_s = min(entry.stale_until - now, FOREVER if longest is None else longest)
        if life_s <= 0:
            self._drop(key)
            return
        self.memory.set(
            key,
            entry,
            ttl=None if life_s == FOREVER else life_s,
            weight=1 if self._config.weight_max is None else estimated_bytes(key, entry.value),
            tags=entry.tags,
        )

    def limit_freshness(self, seconds: float | None) -> None:
        """While changes elsewhere may go unheard, copies are fresh for so long at most; None: all are heard again.

        What was read while they were not is turned away, for it would be kept without that bound. What is being read
        or written when the silence begins is not: it is kept within the bound, as everything else is.
        """
        with self._lock:
            if seconds is None:
                self._change_all()
            self._fresh_max_s = seconds

    def age(self, seconds: float) -> None:
        """Let every copy be fresh for so long at most; it may still stand in where a stale value may.

        Looks at every entry, so call it in a thread.
        """
        memory = self.memory
        if memory is None:
            return
        until = self._clock.monotonic() + seconds

        def age_one(key: str) -> bool:
            self._age(memory, key, until)
            return False

        memory.delete_where(age_one)

    def expire(self, keys: Iterable[str]) -> None:
        """Let the copies of keys that may have changed be fresh no longer; each may still stand in where a stale value
        may."""
        now = self._clock.monotonic()
        with self._lock:
            for key in keys:
                self._change(key)
                if self.memory is not None:
                    self._age(self.memory, key, now)

    @staticmethod
    def _age(memory: MemoryCache, key: str, until: float) -> None:
        entry: Entry | None = memory.peek(key)
        if entry is not None:
            entry.age(until)

    def forget(self, keys: Iterable[str]) -> int:
        """Drop keys; how many were held."""
        dropped = 0
        with self._lock:
            for key in keys:
                self._change(key)
                if self.memory is not None and self.memory.delete(key):
                    dropped += 1
        return dropped

    def forget_tags(self, tags: Iterable[str]) -> int:
        """Drop every entry with one of these tags. Which keys are being fetched with them is unknown, so all are
        turned away."""
        with self._lock:
            self._change_all()
            return sum(self.memory.invalidate_tag(tag) for tag in tags) if self.memory is not None else 0

    def forget_matching(self, glob: str) -> int:
        """Drop every key that matches."""
        with self._lock:
            self._change_all()
        return self.memory.delete_where(glob_pattern(glob).match) if self.memory is not None else 0

    def forget_all(self) -> None:
        """Drop everything."""
        with self._lock:
            self._change_all()
            if self.memory is not None:
                self.memory.clear()

    def statistics(self) -> MemoryStatistics | None:
        """The memory tier's own counts."""
        return None if self.memory is None else self.memory.statistics()
