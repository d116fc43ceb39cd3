"""The same cache without `await`: for Flask, Django, Celery and scripts.

A hit is the same lookup and comparison as in `cache.py`, in the calling thread; it crosses to no other. What needs the
shared tier runs on the event loop of this process's portal while the caller waits, in bounds. Loaders are plain
functions and run in the thread that calls, once for all threads and processes that ask meanwhile.
"""

import asyncio
import atexit
import functools
import os
import random
import threading
import weakref
from collections.abc import Callable, Coroutine, Iterable, Mapping, Sequence
from types import TracebackType
from typing import Any, Self, TypeVar

from msgspec import UNSET

from headrace.cache.cache import Cache, Ttl
from headrace.cache.config import MemoryConfig, RemoteConfig
from headrace.cache.decorators import decorate
from headrace.cache.entry import Entry
from headrace.cache.memory import MemoryCache
from headrace.cache.policy import CachePolicy
from headrace.cache.portal import PORTAL, at_once
from headrace.cache.statistics import CacheStatistics
from headrace.clock import Clock
from headrace.errors import ConfigError, NotOpen
from headrace.events import Observer

F = TypeVar("F", bound=Callable[..., Any])
T = TypeVar("T")
V = TypeVar("V")


class SyncCache:
    """A `Cache` for threads that run no event loop.

        cache = SyncCache(remote=RemoteConfig(url="redis://cache:6379/0"))
        user = cache.get_or_load("user:42", lambda: load_user(42))

    It takes what `Cache` takes, and `wait_max`: seconds that one call may wait for the shared tier, the time of
    loaders not counted. It opens itself at its first use and closes itself at exit, unless `with` or `close` does.
    After a fork the child opens a cache of its own, with nothing in memory: make it when a module is imported, also in
    a preloaded gunicorn application.
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
        wait_max: float = 30.0,
    ) -> None:
        if not wait_max > 0:
            raise ConfigError(f"wait_max is {wait_max}; it must be above 0 seconds.")
        self._make = functools.partial(
            Cache,
            memory=memory,
            remote=remote,
            policies=policies,
            namespace=namespace,
            clock=clock,
            observer=observer,
            rng=rng,
        )
        self._wait_max_s = wait_max
        self._has_remote = remote is not None
        self._left_behind: list[Cache] = []
        self._is_closed = False
        self._begin(self._make())
        _ALL.add(self)

    def _begin(self, cache: Cache) -> None:
        self._cache = cache
        self._lookup = cache.entry_lookup
        self._now = cache.now
        self._home: asyncio.AbstractEventLoop | None = None
        self._lock = threading.Lock()

    def after_fork(self) -> None:
        """Begin anew in a child process. Called by the interpreter; see `portal.py` for why nothing is closed."""
        self._left_behind.append(self._cache)
        self._begin(self._make())

    # -- life ---------------------------------------------------------------------------------------------------------

    def __enter__(self) -> Self:
        self.open()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def open(self) -> None:
        """Connect now instead of at the first use; returns at once if it is open."""
        PORTAL.refuse_own_thread()
        with self._lock:
            if self._home is not None:
                return
            home = PORTAL.hold()
            try:
                PORTAL.run(self._cache.open(), wait_max_s=self._wait_max_s)
            except BaseException:  # an interrupt too must not leave the loop held; it is raised again
                PORTAL.release(home)
                raise
            self._home, self._is_closed = home, False
            _OPEN.add(self)

    def close(self) -> None:
        """End loads, deliver what waits to be written, disconnect, and forget what is in memory.

        Further calls raise NotOpen, until `open` is called.
        """
        PORTAL.refuse_own_thread()
        with self._lock:
            home, self._home, self._is_closed = self._home, None, True
            if home is None:
                return
            _OPEN.discard(self)
            try:
                PORTAL.run(self._cache.close(), wait_max_s=self._wait_max_s)
            finally:
                PORTAL.release(home, wait=True)

    def _ready(self) -> Cache:
        """The cache, open, for a caller who may wait."""
        if self._home is None:
            if self._is_closed:
                raise NotOpen("The cache was closed.", fix="Call `open()`, or close it later.")
            self.open()
        elif self._has_remote:
            PORTAL.refuse_own_thread()
        return self._cache

    def _outcome(self, work: Coroutine[Any, Any, T]) -> T:
        return PORTAL.run(work, wait_max_s=self._wait_max_s) if self._has_remote else at_once(work)

    # -- reading ------------------------------------------------------------------------------------------------------

    def get(self, key: str, default: Any = None, *, type: Any = Any) -> Any:
        """The value of `key`, or `default`. `type` checks and converts what comes from the shared tier, as msgspec
        does."""
        entry = self._lookup(key)
        if entry is not None and entry.attention_at > self._now():
            return entry.value
        return self._outcome(self._ready().find(key, entry, default, type=type))

    def get_or_load(
        self,
        key: str,
        loader: Callable[[], V],
        *,
        ttl: Ttl = UNSET,
        tags: Iterable[str] = (),
        type: Any = Any,
    ) -> V:
        """The value of `key`; if there is none, what `loader()` returns, loaded once for all who ask meanwhile.

        The loader runs in the thread of one of those who ask. What it raises reaches all of them and is not cached; if
        its thread is interrupted, another takes over. Raises RecursiveLoad if the load would wait for itself, and
        LoadTimeout after the policy's `load_timeout` (60 s where it has none) of waiting for another thread's loader;
        a stale value that the policy allows answers instead. On a thread that runs an event loop of its own it uses
        memory alone, and what it loads is fresh for `RemoteConfig.degraded_ttl` at most.
        """
        entry = self._lookup(key)
        if entry is not None and entry.attention_at > self._now():
            value: V = entry.value
            return value
        loaded: V = self.load_blocking(key, entry, loader, ttl=ttl, tags=tags, type=type)
        return loaded

    def get_many(self, keys: Iterable[str], *, type: Any = Any) -> dict[str, Any]:
        """The values that are there, in the order of the keys; keys without one are left out."""
        wanted = list(dict.fromkeys(keys))
        values = self._cache.held(wanted)
        if len(values) < len(wanted):
            missing = [key for key in wanted if key not in values]
            values.update(self._outcome(self._ready().find_many(missing, type=type)))
        return {key: values[key] for key in wanted if key in values}

    # -- writing ------------------------------------------------------------------------------------------------------

    def set(self, key: str, value: Any, *, ttl: Ttl = UNSET, tags: Iterable[str] = (), type: Any = Any) -> None:
        """Store `value` in both tiers by the strategy of the key's policy. `ttl=0` removes it.

        Raises UnencodableValue if it cannot be written to the shared tier, CacheUnavailable only under WRITE_THROUGH
        with `stale_max=0`.
        """
        self._outcome(self._ready().set(key, value, ttl=ttl, tags=tags, type=type))

    def set_many(self, mapping: Mapping[str, Any], *, ttl: Ttl = UNSET, type: Any = Any) -> None:
        """Store several values, as `set` does each, in one round trip."""
        self._outcome(self._ready().set_many(mapping, ttl=ttl, type=type))

    def update(
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
        is. It must be quick, may be called several times, and cannot use the cache: it runs on the event loop's
        thread. A value that was there keeps its expiry and tags unless they are given. Returns what is under the key
        afterwards; UNSET if nothing is. Raises CacheUnavailable when the shared tier is away.
        """
        return self._outcome(self._ready().update(key, change, ttl=ttl, tags=tags, type=type))

    def delete(self, *keys: str) -> int:
        """Remove keys from both tiers; how many were there. No load that is under way puts an old value back."""
        return self._outcome(self._ready().delete(*keys))

    def invalidate_tag(self, *tags: str) -> int:
        """Make every entry with one of these tags a miss, everywhere; how many this process held in memory."""
        return self._outcome(self._ready().invalidate_tag(*tags))

    def invalidate_pattern(self, glob: str) -> int:
        """Remove every key that matches the glob from both tiers; how many there were."""
        return self._outcome(self._ready().invalidate_pattern(glob))

    def clear(self) -> None:
        """Forget everything in this namespace, in both tiers, at once."""
        self._outcome(self._ready().clear())

    def flush(self) -> None:
        """Return when everything that waited to be written has reached the shared tier.

        Raises CacheUnavailable if some of it cannot be delivered now; it stays queued.
        """
        self._outcome(self._ready().flush())

    # -- decorating ---------------------------------------------------------------------------------------------------

    def cached(
        self,
        template: str | None = None,
        *,
        ttl: Ttl = UNSET,
        tags: Iterable[str] = (),
        key: Callable[..., str] | None = None,
    ) -> Callable[[F], F]:
        """Put a function behind the cache: `@cache.cached("user:{user_id}")`; as `Cache.cached`.

        Coroutine functions can be decorated too: they may be awaited on any event loop.
        """

        def decorator(function: F) -> F:
            decorated: Any = decorate(self, function, template=template, ttl=ttl, tags=tags, key=key)
            return decorated  # type: ignore[no-any-return]

        return decorator

    def entry_lookup(self, key: str) -> Entry | None:
        """The memory tier's lookup, also after a fork."""
        return self._lookup(key)

    @property
    def now(self) -> Callable[[], float]:
        """The monotonic clock that entries are measured by."""
        return self._now

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
        """What follows the memory tier's miss, or a hit on an `entry` that wants attention."""
        cache = self._ready()
        home = PORTAL.hold()
        try:
            return cache.load_blocking(key, entry, loader, ttl=ttl, tags=tags, type=type)
        finally:
            PORTAL.release(home)

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
        """As `load_blocking`, for a coroutine on an event loop of its own."""
        cache = self._ready() if self._home is not None else await asyncio.to_thread(self._ready)
        home = PORTAL.hold()
        try:
            return await cache.load_async(key, entry, loader, ttl=ttl, tags=tags, type=type)
        finally:
            PORTAL.release(home)

    # -- looking ------------------------------------------------------------------------------------------------------

    @property
    def memory(self) -> MemoryCache | None:
        """The in-memory tier of this process, for those who resize or watch it."""
        return self._cache.memory

    def statistics(self) -> CacheStatistics:
        """What this cache has done so far in this process."""
        return self._cache.statistics()


_ALL: "weakref.WeakSet[SyncCache]" = weakref.WeakSet()
_OPEN: set[SyncCache] = set()


def _after_fork() -> None:
    PORTAL.after_fork()
    _OPEN.clear()
    for cache in list(_ALL):
        cache.after_fork()


def _close_all() -> None:
    for cache in list(_OPEN):
        cache.close()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)
atexit.register(_close_all)
