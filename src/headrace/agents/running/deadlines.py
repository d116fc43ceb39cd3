"""The deadlines of all executions of a process: one wheel, one timer of the event loop.

Intuition: the hands of a clock. What is due within a second waits on a wheel of 1/64 s, the rest on coarser wheels;
when a coarse wheel moves on, its bucket is dealt out to the finer ones. To wait and to stop waiting is O(1), and costs
an execution two links and a float: it is its own entry. A timer of the loop for each would be seven times that, and
cancelled ones would stay in the loop's heap. Source: G. Varghese and T. Lauck, Hashed and Hierarchical Timing Wheels,
SOSP 1987.

The cache has such a wheel too, for its expiries. It is made for the other question: it stands on the nodes that
eviction links, is asked once a second, and never has to say when it wants to be asked. This one rings at most 1/64 s
late, and never early.
"""

import asyncio
from collections.abc import Iterator
from itertools import islice
from math import ceil
from typing import Protocol

from headrace.clock import Clock

TICKS_PER_S = 64
"""A power of two, so that a tick is an exact float."""

_BITS = 6
_BUCKETS = 1 << _BITS
_LEVELS = 3
"""Wheels of 1/64 s, 1 s and 64 s: an hour and eight minutes. What is further away is dealt out again on the way."""
_RINGS_A_TURN = 500
"""Deadlines that one turn of the loop attends to; the next ones follow in the next turn."""


class Due(Protocol):
    """Something with a deadline: its own entry in the wheel."""

    due_at: float
    """Monotonic seconds."""
    earlier: "Due | None"
    later: "Due | None"
    """Its neighbours; None while it does not wait."""

    def overdue(self) -> None:
        """The deadline has passed. It does not wait any more, and may wait for another one."""


class _Bucket:
    """The ends of a row of entries, linked into a ring."""

    __slots__ = ("due_at", "earlier", "later")

    def __init__(self) -> None:
        self.due_at = 0.0
        self.earlier: Due | None = self
        self.later: Due | None = self

    def overdue(self) -> None:
        """Nothing that waits."""

    def append(self, entry: Due) -> None:
        last = self.earlier
        assert last is not None, "a bucket is always in its own ring"
        entry.earlier, entry.later = last, self
        last.later = self.earlier = entry

    def drain(self) -> Iterator[Due]:
        """Take out one entry after the other."""
        while (entry := self.later) is not self and entry is not None:
            _unlink(entry)
            yield entry

    @property
    def is_empty(self) -> bool:
        return self.later is self


class Wheel:
    """Entries by deadline. Pure: time comes in with each call."""

    def __init__(self, now: float) -> None:
        self._tick = int(now * TICKS_PER_S)
        self._levels = [[_Bucket() for _ in range(_BUCKETS)] for _ in range(_LEVELS)]
        self._passed = _Bucket()

    def add(self, entry: Due) -> float:
        """Let an entry that does not wait wait; when the wheel wants to be asked because of it."""
        return self._place(entry, self._tick + 1) / TICKS_PER_S

    def remove(self, entry: Due) -> None:
        """Let it wait no longer, if it did."""
        if entry.later is not None:
            _unlink(entry)

    def passed(self, now: float, *, limit: int) -> list[Due]:
        """Up to `limit` entries whose deadlines have passed, earliest tick first. They do not wait any more."""
        self._advance(int(now * TICKS_PER_S))
        return list(islice(self._passed.drain(), limit))

    def next_at(self) -> float | None:
        """When it wants to be asked; a time that has passed when there is more already, None when nothing waits."""
        tick = self._next_tick() if self._passed.is_empty else self._tick
        return None if tick is None else tick / TICKS_PER_S

    def _advance(self, target: int) -> None:
        while (tick := self._next_tick()) is not None and tick <= target:
            self._tick = tick
            for level in range(_LEVELS - 1, 0, -1):
                if tick & ((1 << level * _BITS) - 1) == 0:
                    for entry in self._taken(level, tick):
                        self._place(entry, tick)
            for entry in self._taken(0, tick):
                self._passed.append(entry)
        self._tick = max(self._tick, target)

    def _taken(self, level: int, tick: int) -> list[Due]:
        return list(self._levels[level][(tick >> level * _BITS) % _BUCKETS].drain())

    def _place(self, entry: Due, first: int) -> int:
        """Put it where it will be found in time, not before the tick `first`; the tick at which it is looked at."""
        tick = max(ceil(entry.due_at * TICKS_PER_S), first)
        # The last wheel's furthest bucket takes what is beyond it, until there.
        tick = min(tick, self._tick + (1 << _LEVELS * _BITS) - 1)
        level = 0
        while tick - self._tick >= 1 << (level + 1) * _BITS:
            level += 1
        shift = level * _BITS
        self._levels[level][(tick >> shift) % _BUCKETS].append(entry)
        return (tick >> shift) << shift

    def _next_tick(self) -> int | None:
        """The next tick with anything to do, on whichever wheel. Looks at 192 buckets at most."""
        found = None
        for level, buckets in enumerate(self._levels):
            shift = level * _BITS
            here = self._tick >> shift
            for ahead in range(1, _BUCKETS + 1):
                if not buckets[(here + ahead) % _BUCKETS].is_empty:
                    tick = (here + ahead) << shift
                    found = tick if found is None else min(found, tick)
                    break
        return found


class Deadlines:
    """The wheel of a process and the loop's timer that turns it."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._wheel = Wheel(clock.monotonic())
        self._timer: asyncio.TimerHandle | None = None
        self._rings_at = 0.0

    def add(self, entry: Due) -> None:
        """Call `entry.overdue` when its deadline has passed, up to 1/64 s late."""
        self._ring_by(self._wheel.add(entry))

    def remove(self, entry: Due) -> None:
        """Do not call it, if it waits."""
        self._wheel.remove(entry)

    def close(self) -> None:
        """Ring no more."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _ring_by(self, at: float) -> None:
        if self._timer is not None:
            if at >= self._rings_at:
                return
            self._timer.cancel()
        self._rings_at = at
        self._timer = asyncio.get_running_loop().call_later(max(0.0, at - self._clock.monotonic()), self._ring)

    def _ring(self) -> None:
        self._timer = None
        for entry in self._wheel.passed(self._clock.monotonic(), limit=_RINGS_A_TURN):
            entry.overdue()
        next_at = self._wheel.next_at()
        if next_at is not None:
            self._ring_by(next_at)


def _unlink(entry: Due) -> None:
    earlier, later = entry.earlier, entry.later
    assert earlier is not None, "only what waits is taken out"
    assert later is not None, "only what waits is taken out"
    earlier.later, later.earlier = later, earlier
    entry.earlier = entry.later = None
