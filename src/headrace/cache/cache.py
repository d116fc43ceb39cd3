"""The door: two tiers, one set of calls.

The path of a hit is a lookup, a comparison with the clock and a return; it awaits nothing and knows no policy.
Everything else happens behind it: `filling.py` for what a miss costs, `shared.py` for the shared tier, `flight.py` for
one load at a time.

Values in memory are the objects themselves, not copies: treat what comes out of the cache as immutable.
"""

import asyncio
import random
from collections.abc import Awaitable, Callable, Coroutine, Iterable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TypeVar, overload

from msgspec import UNSET, UnsetType

from headrace.cache.config import MemoryConfig, RemoteConfig
from headrace.cache.decorators import decorate
from headrace.cache.entry import Entry
from headrace.cache.filling import Filler, Request
from headrace.cache.keyspace import Keyspace, check_key
from headrace.cache.memory import MemoryCache
from headrace.cache.near import Near
from headrace.cache.policy import CachePolicy, PolicyTable, Strategy, glob_pattern
from headrace.cache.shared import SharedTier
from headrace.cache.spool import Spool
from headrace.cache.statistics import CacheStatistics, Counts
from headrace.cache.updating import Updater
from headrace.cache.write_behind import WriteBehind
from headrace.clock import Clock, SystemClock
from headrace.errors import CallerError, NotOpen
from headrace.events import Observer, Silent

F = TypeVar("F", bound=Callable[..., Any])
V = TypeVar("V")
Ttl = float | UnsetType | None
DEFAULT_TTL_S = 300.0


class Cache:
    """A cache in memory (L1) in front of a shared one (L2); either may be left out.

        async with Cache(remote=RemoteConfig(url="redis://cache:6379/0")) as cache:
            user = await cache.get_or_load("user:42", lambda: load_user(42))

    `policies`: the first whose glob matches a key rules it; a key without one is kept for `MemoryConfig.ttl`, never
    served stale. `namespace` separates applications in one Redis. Times are in seconds; `ttl=None` is for ever,
    `ttl=0` not at all. A failure of the shared tier is never the caller's: reads fall back to the loader, and the
    observer is told.
    """

    def __init__(
        self,
        *,
        memory: MemoryConfig | None = MemoryConfig(),  # noqa: B008 - frozen
        remote: RemoteConfig | None = None,
        policies: Sequence[CachePolicy] = (),
        namespace: str = "headrace",
        clock: Clock | None = None,
        observer: Observer | None = None,
        rng: random.Random | None = None,
    ) -> None:
        self._clock = clock if clock is not None else SystemClock()
        self._observer = observer if observer is not None else Silent()
        self._rng_given = rng
        self._rng = rng if rng is not None else random.Random()  # noqa: S311 - for jitter, not for secrets
        self._counts = Counts()
        self._remote_config = remote
        self._namespace = Keyspace(namespace).namespace
        self._near = Near(memory, self._clock, is_copy=remote is not None)
        self._given_policies = tuple(policies)
        default_ttl = memory.ttl if memory is not None else DEFAULT_TTL_S
        self._policies = PolicyTable(
            policies,
            default=CachePolicy(
                strategy=Strategy.CACHE_ASIDE, ttl=default_ttl, stale_max=0, jitter=0, early_refresh=0
            ),
        )
        self._shared: SharedTier | None = None
        self._behind: WriteBehind | None = None
        self._filler: Filler | None = None
        self._updater: Updater | None = None
        self._remote_hits = (0, 0)
        self._loop: asyncio.AbstractEventLoop | None = None
        self.entry_lookup: Callable[[str], Entry | None] = self._near.lookup
        self.now: Callable[[], float] = self._clock.monotonic

    # -- life ---------------------------------------------------------------------------------------------------------

    async def __aenter__(self) -> Self:
        await self.open()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self.close()

    async def open(self) -> None:
        """Connect the shared tier, if there is one. A tier that is away does not keep the cache from opening."""
        if self._filler is not None:
            raise CallerError("The cache is open already.", fix="Open it once, and share it.")
        try:
            await self._open_rooms()
        except BaseException:  # whatever it was, nothing may be left connected; it is raised again
            await self._close_rooms()
            raise

    async def _open_rooms(self) -> None:
        self._loop = asyncio.get_running_loop()
        if self._rng_given is None:
            # A fork copies a generator's state; workers that expire and retry in step are what jitter is against.
            self._rng.seed()
        if self._remote_config is not None:
            self._shared = SharedTier(
                self._remote_config,
                namespace=self._namespace,
                clock=self._clock,
                observer=self._observer,
                counts=self._counts,
                rng=self._rng,
                near=self._near,
                tokens=random.SystemRandom() if self._rng_given is None else self._rng_given,
            )
            await self._shared.open()
            is_behind = any(policy.strategy is Strategy.WRITE_BEHIND for policy in self._given_policies)
            if is_behind or self._remote_config.spool_directory is not None:
                self._behind = await self._open_behind(self._shared, self._remote_config)
        self._filler = Filler(
            near=self._near,
            shared=self._shared,
            home=self._loop,
            clock=self._clock,
            observer=self._observer,
            counts=self._counts,
            rng=self._rng,
            request=self._request,
            behind=self._behind,
        )
        self._updater = Updater(
            near=self._near,
            shared=self._shared,
            home=self._loop,
            clock=self._clock,
            rng=self._rng.random,
            forget=self._filler.forget,
            flush=self._filler.flush,
        )

    async def _open_behind(self, shared: SharedTier, config: RemoteConfig) -> WriteBehind:
        spool = None
        if config.spool_directory is not None:
            spool = Spool(Path(config.spool_directory), sync=config.spool_sync, namespace=self._namespace)
        behind = WriteBehind(
            shared,
            queue_max=config.write_behind_max,
            spool=spool,
            clock=self._clock,
            counts=self._counts,
            observer=self._observer,
        )
        await behind.open()
        return behind

    async def close(self) -> None:
        """End loads, deliver what waits to be written, disconnect, and forget what is in memory."""
        filler, self._filler = self._filler, None
        self._updater = None
        if filler is None:
            return
        await filler.close()
        await self._close_rooms()
        self._near.forget_all()

    async def _close_rooms(self) -> None:
        if self._behind is not None:
            await self._behind.close()
            self._behind = None
        if self._shared is not None:
            await self._shared.close()
            self._remote_hits = (self._remote_hits[0] + self._shared.hits, self._remote_hits[1] + self._shared.misses)
            self._shared = None

    # -- reading ------------------------------------------------------------------------------------------------------

    async def get(self, key: str, default: Any = None, *, type: Any = Any) -> Any:
        """The value of `key`, or `default`. `type` checks and converts what comes from the shared tier, as msgspec
        does."""
        entry = self.entry_lookup(key)
        if entry is not None and entry.attention_at > self.now():
            return entry.value
        return await self.find(key, entry, default, type=type)

    def find(self, key: str, entry: Entry | None, default: Any, *, type: Any = Any) -> Coroutine[Any, Any, Any]:
        """What follows the memory tier's miss in `get`."""
        if self._filler is None or key.__class__ is not str:
            check_key(key)
        return self._open_filler().find(key, entry, type, default)

    @overload
    async def get_or_load(
        self,
        key: str,
        loader: Callable[[], Awaitable[V]],
        *,
        ttl: Ttl = UNSET,
        tags: Iterable[str] = (),
        type: Any = Any,
    ) -> V: ...

    @overload
    async def get_or_load(
        self, key: str, loader: Callable[[], V], *, ttl: Ttl = UNSET, tags: Iterable[str] = (), type: Any = Any
    ) -> V: ...

    async def get_or_load(
        self,
        key: str,
        loader: Callable[[], Any],
        *,
        ttl: Ttl = UNSET,
        tags: Iterable[str] = (),
        type: Any = Any,
    ) -> Any:
        """The value of `key`; if there is none, what `loader()` returns, loaded once for all who ask meanwhile.

        `loader` takes no arguments and returns a value or an awaitable of it. What it raises reaches every waiter and
        is not cached. A caller that is cancelled leaves the load to the others. Raises RecursiveLoad if the load would
        wait for itself, LoadTimeout if it overruns the policy's limit.
        """
        entry = self.entry_lookup(key)
        if entry is not None and entry.attention_at > self.now():
            return entry.value
        return await self.load_async(key, entry, loader, ttl=ttl, tags=tags, type=type)

    async def get_many(self, keys: Iterable[str], *, type: Any = Any) -> dict[str, Any]:
        """The values that are there, in the order of the keys; keys without one are left out."""
        wanted = list(dict.fromkeys(keys))
        values = self.held(wanted)
        if len(values) < len(wanted):
            values.update(await self.find_many([key for key in wanted if key not in values], type=type))
        return {key: values[key] for key in wanted if key in values}

    def held(self, keys: Iterable[str]) -> dict[str, Any]:
        """The values that memory alone can answer with, without a wait."""
        values: dict[str, Any] = {}
        for key in keys:
            entry = self.entry_lookup(key)
            if entry is not None and entry.attention_at > self.now():
                values[key] = entry.value
        return values

    async def find_many(self, keys: Iterable[str], *, type: Any = Any) -> dict[str, Any]:
        """What follows the memory tier's misses in `get_many`."""
        return await self._open_filler().find_many([check_key(key) for key in keys], type)

    # -- writing ------------------------------------------------------------------------------------------------------

    async def set(self, key: str, value: Any, *, ttl: Ttl = UNSET, tags: Iterable[str] = (), type: Any = Any) -> None:
        """Store `value` in both tiers by the strategy of the key's policy. `ttl=0` removes it.

        Raises UnencodableValue if it cannot be written to the shared tier, CacheUnavailable only under WRITE_THROUGH
        with `stale_max=0`.
        """
        request = self._request(key, ttl=ttl, tags=tags, type=type)
        await self._open_filler().put([(request, value)])

    async def set_many(self, mapping: Mapping[str, Any], *, ttl: Ttl = UNSET, type: Any = Any) -> None:
        """Store several values, as `set` does each, in one round trip."""
        await self._open_filler().put(
            [(self._request(key, ttl=ttl, type=type), value) for key, value in mapping.items()]
        )

    async def update(
        self,
        key: str,
        change: Callable[[Any], Any],
        *,
        ttl: Ttl = UNSET,
        tags: Iterable[str] = (),
        type: Any = Any,
    ) -> Any:
        """Replace the value of `key` by `change(value)`, with no other write in between, over all processes.

        `change` is given UNSET where there is no value and returns the new value, or UNSET to leave everything as it
        is; it must be quick, and may be called several times. A value that was there keeps its expiry and tags unless
        they are given. Returns what is under the key afterwards; UNSET if nothing is.

        An invalidation of the key by this process that is on its way is waited for, up to 30 s from its beginning.

        Raises CacheUnavailable when the shared tier is away or such an invalidation does not arrive, Overloaded when
        others keep changing the key, and whatever `change` raises.
        """
        request = self._request(key, ttl=ttl, tags=tags, type=type)
        self._open_filler()
        assert self._updater is not None
        return await self._updater.update(request, change)

    async def delete(self, *keys: str) -> int:
        """Remove keys from both tiers; how many were there. No load that is under way puts an old value back.

        With the shared tier away this process keeps in mind what it owes there, does not believe what is there under
        these keys, and delivers on its return; other processes read the old value until then. With
        `RemoteConfig.spool_directory` that is on disk before this returns and outlives the process, as it is for tags,
        patterns and `clear`. Without it, a process that is killed before it could deliver leaves the old value for
        others until its TTL is over.
        """
        return await self._open_filler().forget([check_key(key) for key in keys])

    async def invalidate_tag(self, *tags: str) -> int:
        """Make every entry with one of these tags a miss, everywhere; how many this process held in memory."""
        return await self._open_filler().forget_tags([check_key(tag) for tag in tags])

    async def invalidate_pattern(self, glob: str) -> int:
        """Remove every key that matches the glob from both tiers; how many there were.

        Walks all keys of the shared tier in bounded batches; for what is invalidated often, tags cost less.
        """
        glob_pattern(glob)
        return await self._open_filler().forget_matching(check_key(glob))

    async def clear(self) -> None:
        """Forget everything in this namespace, in both tiers, at once."""
        await self._open_filler().forget_all()

    async def flush(self) -> None:
        """Return when everything that waited to be written has reached the shared tier.

        Raises CacheUnavailable if some of it cannot be delivered now; it stays queued.
        """
        await self._open_filler().flush()

    # -- decorating ---------------------------------------------------------------------------------------------------

    def cached(
        self,
        template: str | None = None,
        *,
        ttl: Ttl = UNSET,
        tags: Iterable[str] = (),
        key: Callable[..., str] | None = None,
    ) -> Callable[[F], F]:
        """Put a function behind the cache: `@cache.cached("user:{user_id}")`, for async and plain functions.

        The template (and each tag) names parameters of the function; see `headrace.cache.decorators` for what a part
        may be. `key` builds the key from the call's arguments instead. The annotated return type checks what comes
        from the shared tier. A plain function may be called from any thread. On a thread that runs an event loop it
        cannot wait for the shared tier: it loads into memory alone, and what it loads is fresh for
        `RemoteConfig.degraded_ttl` at most, because nobody tells of changes to what the shared tier does not have.
        Call it by `asyncio.to_thread` there.
        """

        def decorator(function: F) -> F:
            decorated: Any = decorate(self, function, template=template, ttl=ttl, tags=tags, key=key)
            return decorated  # type: ignore[no-any-return]

        return decorator

    async def load_async(
        self,
        key: str,
        entry: Entry | None,
        loader: Callable[[], Any],
        *,
        ttl: Ttl = UNSET,
        tags: Iterable[str] = (),
        type: Any = Any,
    ) -> Any:
        """What follows the memory tier's miss, or a hit on an `entry` that wants attention."""
        request = self._request(key, ttl=ttl, tags=tags, type=type)
        return (await self._open_filler().find_or_load(request, entry, loader)).value

    def load_blocking(
        self,
        key: str,
        entry: Entry | None,
        loader: Callable[[], Any],
        *,
        ttl: Ttl = UNSET,
        tags: Iterable[str] = (),
        type: Any = Any,
    ) -> Any:
        """As `load_async`, for a caller in a plain function."""
        request = self._request(key, ttl=ttl, tags=tags, type=type)
        return self._open_filler().find_or_load_blocking(request, entry, loader).value

    # -- looking ------------------------------------------------------------------------------------------------------

    @property
    def memory(self) -> MemoryCache | None:
        """The in-memory tier, for those who resize or watch it."""
        return self._near.memory

    def statistics(self) -> CacheStatistics:
        """What this cache has done so far in this process."""
        memory = self._near.statistics()
        available = self._shared.is_available if self._shared is not None else None
        if self._shared is None and self._remote_config is not None:
            available = False
        return self._counts.statistics(
            memory_hits=memory.hits if memory else 0,
            memory_misses=memory.misses if memory else 0,
            entries=memory.size if memory else 0,
            remote_available=available,
            remote_hits=self._remote_hits[0] + (self._shared.hits if self._shared else 0),
            remote_misses=self._remote_hits[1] + (self._shared.misses if self._shared else 0),
        )

    # -- inside -------------------------------------------------------------------------------------------------------

    def _request(self, key: str, *, ttl: Ttl = UNSET, tags: Iterable[str] = (), type: Any = Any) -> Request:
        if not isinstance(ttl, UnsetType) and ttl is not None and not ttl >= 0:
            raise CallerError(
                f"ttl={ttl!r} is not a time to live.", fix="Give seconds of 0 or more, or None for ever."
            )
        labels = () if tags == () else _checked_tags(tags)
        return Request(check_key(key), self._policies.match(key), ttl, labels, type)

    def _open_filler(self) -> Filler:
        if self._filler is None:
            raise NotOpen(
                "The cache is not open.", fix="Use it inside `async with cache:`, or call `await cache.open()`."
            )
        return self._filler


def _checked_tags(tags: Iterable[str]) -> tuple[str, ...]:
    if isinstance(tags, str):
        raise CallerError(f"tags={tags!r} is a string, not several.", fix=f"Write tags=({tags!r},).")
    return tuple(dict.fromkeys(check_key(tag) for tag in tags))
