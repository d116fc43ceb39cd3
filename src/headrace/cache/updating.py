"""Reading a value, deciding, and writing the outcome, as if nobody else were there.

In the shared tier this is a compare-and-swap (`exchange.py`): the new entry is written only while the old one, its
generation and its tags still stand. Like every write it takes the lease away, so that a load under way cannot put an
older value back. Whoever loses the race decides again on what the winner wrote, or on nothing after a `clear`. Updates
of one key queue up within a process, so that only one a process is in the race.

An outcome that depends on all processes cannot be had without the tier they share: other than reads and writes, an
update raises when it is away.
"""

import asyncio
import threading
import weakref
from collections.abc import Awaitable, Callable, Sequence
from typing import Any

from msgspec import UNSET, UnsetType

from headrace.cache.codec import FOREVER_MS, Envelope, Tags
from headrace.cache.entry import FOREVER, Entry, attention_after, fresh_for
from headrace.cache.exchange import Basis
from headrace.cache.filling import Request
from headrace.cache.flight import running_loop
from headrace.cache.near import Near, Write
from headrace.cache.shared import SharedTier
from headrace.clock import Clock
from headrace.errors import CacheUnavailable, Overloaded

ATTEMPTS_MAX = 200
"""Races that one update may lose. In each of them another process made progress."""
PAUSE_MAX_S = 0.002

Change = Callable[[Any], Any]
Forget = Callable[[Sequence[str]], Awaitable[int]]


class Updater:
    """The updates of one open cache."""

    def __init__(
        self,
        *,
        near: Near,
        shared: SharedTier | None,
        home: asyncio.AbstractEventLoop,
        clock: Clock,
        rng: Callable[[], float],
        forget: Forget,
        flush: Callable[[], Awaitable[None]],
    ) -> None:
        self._near = near
        self._shared = shared
        self._home = home
        self._clock = clock
        self._rng = rng
        self._forget = forget
        self._flush = flush
        self._lock = threading.RLock()
        self._queues: weakref.WeakValueDictionary[str, asyncio.Lock] = weakref.WeakValueDictionary()

    async def update(self, request: Request, change: Change) -> Any:
        """What is under the key after `change` decided; UNSET: nothing."""
        if self._shared is None:
            return self._update_here(request, change)
        work = self._update_shared(self._shared, request, change)
        if running_loop() is not self._home:
            return await asyncio.wrap_future(asyncio.run_coroutine_threadsafe(work, self._home))
        try:
            return await work
        except CacheUnavailable:
            await asyncio.sleep(0)  # whoever tries again at once must not keep the loop from connecting
            raise

    # -- memory alone -------------------------------------------------------------------------------------------------

    def _update_here(self, request: Request, change: Change) -> Any:
        key, policy = request.key, request.policy
        with self._lock:
            for _ in range(ATTEMPTS_MAX):
                self._near.begin_writes([key])
                epoch = self._near.epoch(key)
                before, now = self._near.lookup(key), self._clock.monotonic()
                if before is not None and now >= before.fresh_until:
                    before = None
                value = change(UNSET if before is None else before.value)
                if value is UNSET:
                    return UNSET if before is None else before.value
                left_s = None if before is None else before.fresh_until - now
                fresh_s = self._fresh_s(request, value, left_s)
                attention_s = attention_after(policy, fresh_s=fresh_s, load_s=0.0, rng=self._rng)
                fresh_until = now + fresh_s
                entry = Entry(
                    value,
                    attention_at=now + attention_s,
                    fresh_until=fresh_until,
                    stale_until=fresh_until + (policy.stale_s if fresh_s > 0 else 0.0),
                    tags=request.tags or (() if before is None else before.tags),
                )
                if self._near.exchange(Write(key, entry, epoch, policy)):
                    return value
        raise _too_busy(key)

    # -- the shared tier ----------------------------------------------------------------------------------------------

    async def _update_shared(self, shared: SharedTier, request: Request, change: Change) -> Any:
        key, basis = request.key, None
        async with self._queues.setdefault(key, asyncio.Lock()):
            # A write of this process that is still queued would be overlooked, and overwrite the outcome later.
            await self._flush()
            for _ in range(ATTEMPTS_MAX):
                basis = await shared.exchange.look(key, request.type, request.tags)
                if basis is not None:
                    left_ms = _left_ms(basis.envelope, int(self._clock.wall() * 1000))
                    old = basis.envelope.value if basis.envelope is not None and left_ms > 0 else UNSET
                    value = change(old)
                    if value is UNSET:
                        return old
                    # Half a millisecond more than is left, so that rounding never shortens the life of a busy counter.
                    left_s = None if old is UNSET else FOREVER if left_ms == FOREVER else (left_ms + 0.5) / 1000
                    fresh_s = self._fresh_s(request, value, left_s)
                    if fresh_s <= 0:
                        await self._forget([key])
                        return value
                    # The tags of a value that no longer counts go with it.
                    tags = () if old is UNSET and not request.tags else basis.tags
                    try:
                        if await self._swap(shared, request, basis, value, fresh_s, tags):
                            return value
                    finally:
                        # Written by us, by whoever was faster, or, if it was given up, perhaps.
                        self._near.forget([key])
                await asyncio.sleep(PAUSE_MAX_S * self._rng())
        if basis is None:
            raise CacheUnavailable(f"{key!r} cannot be updated: an invalidation of it could not be delivered.")
        raise _too_busy(key)

    @staticmethod
    async def _swap(
        shared: SharedTier, request: Request, basis: Basis, value: Any, fresh_s: float, tags: Tags
    ) -> bool:
        policy = request.policy
        sealed = shared.seal(
            request.key,
            value,
            fresh_s=fresh_s,
            stale_s=policy.stale_s,
            tags=tags,
            serializer=policy.serializer,
            type=request.type,
        )
        return await shared.exchange.swap(basis, sealed)

    def _fresh_s(self, request: Request, value: Any, left_s: float | None) -> float:
        """Seconds to live: what the call says, else what is left of the value before, else what the policy says."""
        if not isinstance(request.ttl, UnsetType):
            return FOREVER if request.ttl is None else request.ttl
        return fresh_for(request.policy, value=value, rng=self._rng) if left_s is None else left_s


def _left_ms(envelope: Envelope | None, now_ms: int) -> float:
    if envelope is None:
        return 0.0
    if envelope.fresh_ms == FOREVER_MS:
        return FOREVER
    return envelope.created_ms + envelope.fresh_ms - now_ms


def _too_busy(key: str) -> Overloaded:
    return Overloaded(
        f"{key!r} was changed {ATTEMPTS_MAX} times while it was being updated.",
        fix="Spread what is counted over several keys.",
    )
