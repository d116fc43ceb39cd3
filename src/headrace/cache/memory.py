"""The in-memory tier: a bounded, expiring, thread-safe dict with a modern eviction policy.

A hit takes no lock: it looks the entry up, compares its deadline with the clock, writes the entry into a small ring
and returns the value. Everything else (insertion, eviction, expiry, tags) happens under one lock on the calls that
change the cache; they first tell the policy about the hits in the ring. The ring is lossy: of more than RING hits
between two changes, the policy hears of the last RING. That is Caffeine's read buffer, sized for a language with one
lock.

Why the hit is safe without a lock. Under the GIL a thread can lose control only where the interpreter looks for it: at
calls, at backward jumps, and where an object is destroyed. The counter is read, raised and written back with nothing
of that kind in between, interpreted or compiled, so no hit is lost. The deadline is read before the value and both
belong to one entry; a change writes the value first, so a hit sees a pair that was true at one moment. Without the
GIL the values remain right, since every change of structure is under the lock, but two threads may then raise a
counter to the same number: statistics become lower bounds.

Keys compare as dict keys do: 1, 1.0 and True are one key.
"""

import math
import threading
from collections import deque
from collections.abc import Callable, Hashable, Iterable
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, Final, cast, final

from msgspec import UNSET, UnsetType

from headrace.cache.policies import POLICIES
from headrace.cache.policies.node import NO_QUEUE, spread
from headrace.cache.timer_wheel import FOREVER, IDLE, Timer, TimerWheel
from headrace.clock import Clock, SystemClock
from headrace.errors import BugError, CallerError

if TYPE_CHECKING:
    from mypy_extensions import i64

RING: Final = 1024
"""Hits that wait for the policy at most, a power of two: the bound of what a change tells it."""
RING_MASK: Final = RING - 1
EXPIRY_STEPS: Final = 32
"""Timers that one change touches at most. Each change adds one timer at most, so expiry always catches up."""
SHRINK_STEPS: Final = 1024
"""Evictions of a `resize` before other writers get their turn."""
UNBOUNDED: Final = 1 << 60
LIFETIME_MAX: Final = 1e9
"""Seconds, 31 years, beyond which a time to live is for ever."""
OWN: Final = UNSET


@dataclass(frozen=True, kw_only=True)
class MemoryStatistics:
    """What happened to a MemoryCache since it was made, and what is in it now."""

    hits: int
    misses: int
    """Reads that found nothing, or only an expired value."""
    sets: int
    """Values stored."""
    evictions: int
    """Values that had to go, or were not let in, because of the bounds."""
    expirations: int
    """Values whose time had come."""
    size: int
    """Entries now; expired ones that were not collected yet are among them."""
    weight: int
    hit_rate: float | None
    """hits / (hits + misses), or None before the first read."""


class Entry(Timer):
    """A key, its value and everything that is known of them."""

    __slots__ = ("key", "tags")

    def __init__(
        self, key: Any, key_hash: int, value: Any, deadline: float, weight: int, tags: tuple[str, ...]
    ) -> None:
        super().__init__(key_hash, weight, deadline)
        self.key = key
        self.value = value
        self.tags = tags


NOBODY: Final = Entry(None, 0, None, 0.0, 0, ())
"""Stands in the ring where no hit is recorded."""


@final
class MemoryCache:
    """A cache in this process's memory.

    `entries_max` and `weight_max` bound what it holds at any moment. `ttl` is the default time to live in seconds;
    None means for ever and 0 means expired at once, that is, not stored. `policy` is one of "adaptive", "lru",
    "s3fifo", "sieve", "wtinylfu". Values are handed out as they are, not copied: treat them as immutable.

    Safe to share between threads. A call from inside another call of the same thread (a key's `__eq__`, a finalizer, a
    signal handler) reads at once and changes the cache when the outer call is done; a `delete` in there answers
    whether the key was present.

    Expiry needs no thread: an expired value is never returned, and its memory is given back by later changes. The work
    of one change is bounded: it tells the policy of RING hits at most, looks at EXPIRY_STEPS timers, and evicts what
    has to go for the new entry, one for one where weights are equal.
    """

    def __init__(
        self,
        entries_max: int = 10_000,
        *,
        ttl: float | None = 300.0,
        policy: str = "adaptive",
        weight_max: int | None = None,
        clock: Clock | None = None,
    ) -> None:
        if policy not in POLICIES:
            message = f"policy={policy!r} is not an eviction policy."
            raise CallerError(message, fix=f"Choose one of {', '.join(sorted(POLICIES))}.")
        self._monotonic: Callable[[], float] = (clock if clock is not None else SystemClock()).monotonic
        self._entries_max = _checked_bound("entries_max", entries_max)
        self._weight_max = UNBOUNDED if weight_max is None else _checked_bound("weight_max", weight_max)
        self._ttl = _checked_ttl(ttl)
        self._policy_name = policy
        self._policy = POLICIES[policy]()
        self._entries: dict[Any, Entry] = {}
        self._wheel = TimerWheel(self._monotonic())
        self._tagged: dict[str, set[Entry]] = {}
        self._weight = 0
        self._ring: list[Entry] = [NOBODY] * RING
        self._hits: i64 = 0
        self._hits_told: i64 = 0
        self._misses: i64 = 0
        self._sets = 0
        self._evictions = 0
        self._expirations = 0
        self._lock = threading.RLock()
        self._busy = False
        self._removed: Timer = IDLE
        self._deferred: deque[Callable[[], object]] = deque()

    # -- reading ------------------------------------------------------------------------------------------------------

    def get(self, key: Hashable, default: Any = None) -> Any:
        """The value of `key`, or `default` if there is none or its time has come."""
        entry = self._entries.get(key)
        if entry is None:
            self._misses += 1
            return default
        deadline = entry.deadline
        # Reading the clock is half the price of a hit: what never expires is spared it.
        if deadline != FOREVER:
            monotonic = self._monotonic
            if deadline <= monotonic():
                self._misses += 1
                self._collect(entry)
                return default
        hits = self._hits
        self._hits = hits + 1
        self._ring[hits & RING_MASK] = entry
        return entry.value

    def peek(self, key: Hashable, default: Any = None) -> Any:
        """What `get` would return. Counts neither as a hit or a miss nor as a use."""
        entry = self._entries.get(key)
        if entry is None or entry.deadline <= self._monotonic():
            return default
        return entry.value

    def __contains__(self, key: Hashable) -> bool:
        """Whether `get` would find a value. Counts neither as a hit nor as a use."""
        entry = self._entries.get(key)
        return entry is not None and entry.deadline > self._monotonic()

    def __len__(self) -> int:
        """Entries held, those among them that expired and were not collected yet."""
        return len(self._entries)

    def statistics(self) -> MemoryStatistics:
        """Counts since the start. Exact when no other thread is in the middle of a call."""
        hits = int(self._hits)
        reads = hits + int(self._misses)
        return MemoryStatistics(
            hits=hits,
            misses=self._misses,
            sets=self._sets,
            evictions=self._evictions,
            expirations=self._expirations,
            size=len(self._entries),
            weight=self._weight,
            hit_rate=hits / reads if reads else None,
        )

    # -- changing -----------------------------------------------------------------------------------------------------

    def set(
        self,
        key: Hashable,
        value: Any,
        *,
        ttl: float | UnsetType | None = OWN,
        weight: int = 1,
        tags: Iterable[str] = (),
    ) -> bool:
        """Store `value` under `key`; whether it was stored.

        `ttl` in seconds, None for ever, unset: the cache's own. `weight` counts against `weight_max`, in whatever unit
        that is meant. `tags` name groups for `invalidate_tag`. A value that may not live (`ttl=0`) or is heavier than
        `weight_max` is not stored, and what was under the key before is removed.
        """
        lifetime = self._ttl if ttl is OWN else _checked_ttl(ttl)
        if weight != 1:
            _checked_bound("weight", weight)
        labels = _checked_tags(tags) if tags else ()
        key_hash = spread(hash(key))
        if not self._enter():
            self._deferred.append(partial(self.set, key, value, ttl=ttl, weight=weight, tags=labels))
            return True
        before: object = None
        try:
            now = self._monotonic()
            self._settle(now)
            entry = self._entries.get(key)
            if entry is not None and entry.deadline <= now:
                self._remove(entry)
                self._expirations += 1
                entry = None
            if lifetime <= 0.0 or weight > self._weight_max:
                self._refuse(entry, weight)
                return False
            if entry is not None and entry.weight == weight:
                before = entry.value
                self._replace(entry, value, now + lifetime, labels)
            else:
                if entry is not None:
                    self._remove(entry)
                self._insert(Entry(key, key_hash, value, now + lifetime, weight, labels))
            self._sets += 1
            return True
        finally:
            self._leave(before)

    def delete(self, key: Hashable) -> bool:
        """Remove `key`; whether it had a value."""
        if not self._enter():
            self._deferred.append(partial(self.delete, key))
            return key in self
        try:
            now = self._monotonic()
            self._settle(now)
            entry = self._entries.get(key)
            if entry is None:
                return False
            self._remove(entry)
            if entry.deadline <= now:
                self._expirations += 1
                return False
            return True
        finally:
            self._leave(None)

    def delete_where(self, predicate: Callable[[Any], object]) -> int:
        """Remove every key for which `predicate` is true; how many had a value.

        Looks at all keys that are there when it starts, calls `predicate` without holding the lock and lets other
        writers in between removals. A key stored meanwhile may be seen or not.
        """
        chosen = [key for key in list(self._entries) if predicate(key)]
        removed = 0
        for key in chosen:
            if self.delete(key):
                removed += 1
        return removed

    def invalidate_tag(self, tag: str) -> int:
        """Remove every entry stored with `tag`; how many had a value. Costs what it removes."""
        if not self._enter():
            self._deferred.append(partial(self.invalidate_tag, tag))
            return len(self._tagged.get(tag, ()))
        try:
            now = self._monotonic()
            self._settle(now)
            removed = 0
            for entry in list(self._tagged.get(tag, ())):
                self._remove(entry)
                if entry.deadline <= now:
                    self._expirations += 1
                else:
                    removed += 1
            return removed
        finally:
            self._leave(None)

    def clear(self) -> None:
        """Remove everything. The counts of the statistics go on."""
        if not self._enter():
            self._deferred.append(self.clear)
            return
        try:
            self._settle(self._monotonic())
            for entry in list(self._entries.values()):
                self._remove(entry)
        finally:
            self._leave(None)

    def resize(self, *, entries_max: int | UnsetType = UNSET, weight_max: int | UnsetType | None = UNSET) -> None:
        """Change the bounds.

        Shrinking evicts at once, and lets other writers in after every SHRINK_STEPS evictions.
        """
        if entries_max is not UNSET:
            _checked_bound("entries_max", entries_max)
        if weight_max is not UNSET and weight_max is not None:
            _checked_bound("weight_max", weight_max)
        if not self._enter():
            self._deferred.append(partial(self.resize, entries_max=entries_max, weight_max=weight_max))
            return
        if entries_max is not UNSET:
            self._entries_max = entries_max
        if weight_max is not UNSET:
            self._weight_max = UNBOUNDED if weight_max is None else weight_max
        self._leave(None)
        while self._shrink():
            pass

    def validate(self) -> None:
        """Raise BugError unless all parts agree with each other. O(n), under the lock: for tests."""
        with self._lock:
            self._policy.validate()
            entries = list(self._entries.values())
            ordered = {id(node) for node in self._policy.nodes()}
            if ordered != {id(entry) for entry in entries}:
                raise BugError(f"{len(entries)} entries are listed and {len(ordered)} others are ordered.")
            if len(entries) > self._entries_max or self._weight > self._weight_max:
                raise BugError(f"{len(entries)} entries of weight {self._weight} exceed the bounds.")
            if sum(entry.weight for entry in entries) != self._weight:
                raise BugError(f"the entries do not weigh {self._weight} together.")
            tagged = {(tag, id(entry)) for entry in entries for tag in entry.tags}
            if tagged != {(tag, id(entry)) for tag, group in self._tagged.items() for entry in group}:
                raise BugError("the tags of the entries and the index of tags differ.")
            if not all(self._tagged.values()):
                raise BugError("the index of tags keeps a tag without entries.")
            self._wheel.validate({id(entry) for entry in entries if entry.deadline != FOREVER})

    # -- under the lock -----------------------------------------------------------------------------------------------

    def _enter(self) -> bool:
        """Take the lock, unless this thread is in the middle of a change already."""
        self._lock.acquire()
        if self._busy:
            self._lock.release()
            return False
        self._busy = True
        return True

    def _leave(self, before: object) -> None:
        """Give the lock back, and do what was asked for from inside this call.

        Values die after that, since their finalizers may be code that calls us; `before`, a value that was replaced,
        is held by the caller until this returns.
        """
        removed = self._removed
        self._removed = IDLE
        self._busy = False
        try:
            while self._deferred:
                self._deferred.popleft()()
        finally:
            self._lock.release()
        while removed is not IDLE:
            rest = removed.later
            removed.later = IDLE
            removed = rest

    def _settle(self, now: float) -> None:
        """Bring policy and wheel up to date: at most RING hits and EXPIRY_STEPS timers."""
        if self._hits != self._hits_told:
            self._tell_hits()
        if self._wheel.advance(now):
            self._expire(now)

    def _expire(self, now: float) -> None:
        wheel = self._wheel
        for _turn in range(EXPIRY_STEPS):
            timer = wheel.due()
            if timer is None:
                return
            if timer.deadline > now:
                wheel.schedule(timer)
                continue
            try:
                self._remove(cast("Entry", timer))
            except BaseException:
                # The key's own code failed: try again another time.
                wheel.schedule(timer)
                raise
            self._expirations += 1

    def _tell_hits(self) -> None:
        hits = self._hits
        ring = self._ring
        policy = self._policy
        for index in range(max(self._hits_told, hits - RING), hits):
            entry = ring[index & RING_MASK]
            # A hit may be recorded after its entry was removed by another thread.
            if entry.queue is not NO_QUEUE:
                policy.hit(entry)
            ring[index & RING_MASK] = NOBODY
        self._hits_told = hits

    def _collect(self, entry: Entry) -> None:
        """Remove an entry that a reader found expired, unless another thread was faster."""
        if not self._enter():
            return
        try:
            now = self._monotonic()
            self._settle(now)
            if entry.queue is not NO_QUEUE and entry.deadline <= now:
                self._remove(entry)
                self._expirations += 1
        finally:
            self._leave(None)

    def _refuse(self, entry: Entry | None, weight: int) -> None:
        if entry is not None:
            self._remove(entry)
        if weight > self._weight_max:
            self._evictions += 1
        else:
            self._expirations += 1

    def _insert(self, entry: Entry) -> None:
        self._make_room(1, entry.weight)
        self._entries[entry.key] = entry
        self._weight += entry.weight
        self._policy.insert(entry)
        self._wheel.schedule(entry)
        if entry.tags:
            self._index(entry)

    def _replace(self, entry: Entry, value: Any, deadline: float, tags: tuple[str, ...]) -> None:
        entry.value = value
        # A deadline that moved away finds the timer waiting too early and is scheduled again then.
        sooner = deadline < entry.deadline
        entry.deadline = deadline
        if sooner:
            self._wheel.cancel(entry)
            self._wheel.schedule(entry)
        if entry.tags != tags:
            self._unindex(entry)
            entry.tags = tags
            self._index(entry)
        self._policy.hit(entry)

    def _make_room(self, entries: int, weight: int) -> None:
        while len(self._entries) + entries > self._entries_max or self._weight + weight > self._weight_max:
            self._evict()

    def _shrink(self) -> bool:
        """Evict at most SHRINK_STEPS entries that are over the bounds; whether there may be more."""
        if not self._enter():
            return False
        try:
            self._settle(self._monotonic())
            for _turn in range(SHRINK_STEPS):
                if len(self._entries) <= self._entries_max and self._weight <= self._weight_max:
                    return False
                self._evict()
            return True
        finally:
            self._leave(None)

    def _evict(self) -> None:
        entry = cast("Entry", self._policy.evict())
        try:
            self._unlist(entry)
        except BaseException:
            # The key's own code failed: the entry stays, and so does the order of everything else.
            self._policy.insert(entry)
            raise
        self._detach(entry)
        self._evictions += 1

    def _remove(self, entry: Entry) -> None:
        self._unlist(entry)
        self._policy.remove(entry)
        self._detach(entry)

    def _unlist(self, entry: Entry) -> None:
        """Take the entry out of the dict: the only step of a removal that runs code of the key."""
        found = self._entries.pop(entry.key, None)
        if found is entry:
            return
        if found is not None:
            self._entries[found.key] = found
        # A key that changes while it is cached cannot be found again, but its entry must not stay for ever.
        listed: dict[Any, Entry] = {}
        for other in list(self._entries.values()):
            if other is not entry and listed.setdefault(other.key, other) is not other:
                self._policy.remove(other)
                self._detach(other)
        self._entries = listed

    def _detach(self, entry: Entry) -> None:
        self._weight -= entry.weight
        self._wheel.cancel(entry)
        if entry.tags:
            self._unindex(entry)
        # Removed entries hang on the link that the wheel no longer needs until the lock is free.
        entry.later = self._removed
        self._removed = entry

    def _index(self, entry: Entry) -> None:
        for tag in entry.tags:
            group = self._tagged.get(tag)
            if group is None:
                self._tagged[tag] = {entry}
            else:
                group.add(entry)

    def _unindex(self, entry: Entry) -> None:
        for tag in entry.tags:
            group = self._tagged[tag]
            group.discard(entry)
            if not group:
                del self._tagged[tag]


def _checked_bound(name: str, bound: int) -> int:
    # `__index__` refuses 1.5 and "1" with a TypeError, compiled or not.
    if not 1 <= bound.__index__() <= UNBOUNDED:
        raise CallerError(f"{name}={bound!r} is out of range.", fix=f"Give {name} a whole number from 1 to 2**60.")
    return bound


def _checked_ttl(ttl: float | None) -> float:
    if ttl is None:
        return FOREVER
    seconds = float(ttl)
    if math.isnan(seconds) or seconds < 0.0:
        raise CallerError(
            f"ttl={ttl!r} is not a time to live.",
            fix="Give seconds of 0 or more, or None for a value that never expires.",
        )
    return FOREVER if seconds > LIFETIME_MAX else seconds


def _checked_tags(tags: Iterable[str]) -> tuple[str, ...]:
    if isinstance(tags, str):
        raise CallerError(f"tags={tags!r} is a string, not several.", fix=f"Write tags=({tags!r},).")
    return tuple(dict.fromkeys(tags))
