"""Reading a value, deciding, and writing the outcome, as if nobody else were there.

In the shared tier this is a compare-and-swap: a script writes the new entry only while the old one is still there,
recognised by its header, which holds a random version. Like every write it takes the lease away, so that a load under
way cannot put an older value back. Whoever loses the race decides again on what the winner wrote. Updates of one key
queue up within a process, so that only one a process is in the race.

An outcome that depends on all processes cannot be had without the tier they share: other than reads and writes, an
update raises when it is away.
"""

import asyncio
import threading
import weakref
from collections.abc import Awaitable, Callable, Sequence
from typing import Any, Final

from msgspec import UNSET, UnsetType

from headrace.cache.codec import FOREVER_MS, HEAD_BYTES, Envelope, Tags
from headrace.cache.entry import FOREVER, Entry, attention_after, fresh_for
from headrace.cache.filling import Request
from headrace.cache.flight import running_loop
from headrace.cache.lease import Script
from headrace.cache.near import Near, Write
from headrace.cache.shared import SharedTier
from headrace.clock import Clock
from headrace.errors import CacheUnavailable, Overloaded

ATTEMPTS_MAX = 200
"""Races that one update may lose. In each of them another process made progress."""
PAUSE_MAX_S = 0.002

SWAP: Final = Script("""
if redis.call('GETRANGE', KEYS[1], 0, ARGV[4]) ~= ARGV[1] then return 0 end
redis.call('DEL', KEYS[2])
if ARGV[3] == '' then redis.call('SET', KEYS[1], ARGV[2]) else redis.call('SET', KEYS[1], ARGV[2], 'PX', ARGV[3]) end
return 1
""")

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
        if running_loop() is self._home:
            return await self._update_shared(self._shared, request, change)
        work = self._update_shared(self._shared, request, change)
        return await asyncio.wrap_future(asyncio.run_coroutine_threadsafe(work, self._home))

    # -- memory alone -------------------------------------------------------------------------------------------------

    def _update_here(self, request: Request, change: Change) -> Any:
        key, policy = request.key, request.policy
        with self._lock:
            for _ in range(ATTEMPTS_MAX):
                epoch = self._near.begin_writes([key])[0]
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
        key = request.key
        async with self._queues.setdefault(key, asyncio.Lock()):
            # A write of this process that is still queued would be overlooked, and overwrite the outcome later.
            await self._flush()
            for _ in range(ATTEMPTS_MAX):
                tags = await self._tokens(shared, request)
                data = await self._read(shared, key)
                found = await shared.checked(key, shared.opened(key, data, request.type))
                left_ms = _left_ms(found, int(self._clock.wall() * 1000)) if isinstance(found, Envelope) else 0
                before = found if left_ms > 0 else None
                old = before.value if isinstance(before, Envelope) else UNSET
                value = change(old)
                if value is UNSET:
                    return old
                # Half a millisecond more than is left, so that rounding never shortens the life of a busy counter.
                left_s = None if old is UNSET else FOREVER if left_ms == FOREVER else (left_ms + 0.5) / 1000
                fresh_s = self._fresh_s(request, value, left_s)
                if fresh_s <= 0:
                    await self._forget([key])
                    return value
                if not request.tags and isinstance(before, Envelope):
                    tags = before.tags
                if await self._swap(shared, request, data, value, fresh_s, tags):
                    self._near.forget([key])
                    return value
                await asyncio.sleep(PAUSE_MAX_S * self._rng())
        raise _too_busy(key)

    @staticmethod
    async def _tokens(shared: SharedTier, request: Request) -> Tags:
        tags = await shared.tokens(request.tags)
        if tags is None:
            raise CacheUnavailable(f"{request.key!r} cannot be updated: its tags cannot be read.")
        return tags

    @staticmethod
    async def _read(shared: SharedTier, key: str) -> Any:
        reply = shared.fetch(key)
        if reply is None:
            raise CacheUnavailable(f"{key!r} cannot be updated: the shared cache is away.")
        return await reply

    async def _swap(
        self, shared: SharedTier, request: Request, data: Any, value: Any, fresh_s: float, tags: Tags
    ) -> bool:
        """Write the value if the key still holds what `data` is the copy of."""
        policy, key = request.policy, request.key
        sealed = shared.seal(
            key,
            value,
            fresh_s=fresh_s,
            stale_s=policy.stale_s,
            tags=tags,
            serializer=policy.serializer,
            type=request.type,
        )
        names = (shared.keyspace.name(key), shared.keyspace.lease(key))
        head = data[:HEAD_BYTES] if isinstance(data, bytes) else b""
        life = "" if sealed.life_ms is None else sealed.life_ms
        return bool(await SWAP.run(shared._remote, names, head, sealed.data, life, HEAD_BYTES - 1))

    def _fresh_s(self, request: Request, value: Any, left_s: float | None) -> float:
        """Seconds to live: what the call says, else what is left of the value before, else what the policy says."""
        if not isinstance(request.ttl, UnsetType):
            return FOREVER if request.ttl is None else request.ttl
        return fresh_for(request.policy, value=value, rng=self._rng) if left_s is None else left_s


def _left_ms(envelope: Envelope, now_ms: int) -> float:
    if envelope.fresh_ms == FOREVER_MS:
        return FOREVER
    return envelope.created_ms + envelope.fresh_ms - now_ms


def _too_busy(key: str) -> Overloaded:
    return Overloaded(
        f"{key!r} was changed {ATTEMPTS_MAX} times while it was being updated.",
        fix="Spread what is counted over several keys.",
    )
