"""dogpile.cache on headrace.

    region = make_region().configure(
        "headrace",
        expiration_time=300,
        arguments={"url": "redis://cache:6379/0", "ttl": 3600, "lock_timeout": 30.0},
    )

Values are packed by `packing.py`, not pickled; a region's own `serializer` takes its place. The mutex is one over all
processes, so that an expired value is made once: it is a key that a process adds for `lock_timeout` seconds, after
which others no longer wait for a process that died.
"""

# dogpile is typed, but need not be installed where this is checked.
# mypy: disable-error-code="import-not-found,import-untyped,misc"

import random
import secrets
import threading
import weakref
from collections.abc import Iterable, Mapping
from typing import Any

from dogpile.cache import register_backend
from dogpile.cache.api import NO_VALUE, BytesBackend, CacheMutex, CantDeserializeException
from msgspec import UNSET

from headrace.cache.integrations.packing import Packer, Unreadable
from headrace.cache.integrations.settings import OPTIONS, shared_cache
from headrace.cache.sync_cache import SyncCache
from headrace.clock import Clock, SystemClock
from headrace.errors import CacheUnavailable

PACKER = Packer()
FREE = ""
FREE_TTL_S = 1.0
PAUSE_FIRST_S = 0.002
PAUSE_MAX_S = 0.05


def unpack(data: bytes) -> Any:
    """The value in `data`; raises what makes dogpile create it again if there is none."""
    try:
        return PACKER.unpack(data)
    except Unreadable as error:
        raise CantDeserializeException(str(error)) from error


class HeadraceBackend(BytesBackend):
    """A dogpile back end. Arguments, apart from the options of `settings.py`:

    `url`: of Redis, or nothing for this process's memory alone. `cache`: a SyncCache to use instead. `ttl`: seconds
    that entries are kept at all, None for ever; more than the region's `expiration_time`, so that an expired value can
    answer while a new one is made. `distributed_lock`: whether creators wait for those of other processes (True).
    `lock_timeout`: seconds after which a creator counts as dead (30). `lock_wait_max`: seconds that one waits at most
    before it creates by itself (60).
    """

    serializer = staticmethod(PACKER.pack)
    deserializer = staticmethod(unpack)

    def __init__(self, arguments: Mapping[str, Any]) -> None:
        options = {"namespace": "dogpile", **{name: arguments[name] for name in OPTIONS if name in arguments}}
        given = arguments.get("cache")
        self._cache: SyncCache = given if given is not None else shared_cache(arguments.get("url") or "", options)
        self._ttl: float | None = arguments.get("ttl")
        self._is_distributed: bool = arguments.get("distributed_lock", True)
        self._lock_timeout_s: float = arguments.get("lock_timeout", 30.0)
        self._lock_wait_max_s: float = arguments.get("lock_wait_max", 60.0)

    def has_lock_timeout(self) -> bool:
        """Whether two creators may run because the first took longer than `lock_timeout`."""
        return self._is_distributed

    def get_mutex(self, key: str) -> "Mutex | None":
        """The mutex of a key over all processes; None (dogpile's own, of this process) if it is not to be one."""
        if not self._is_distributed:
            return None
        return Mutex(self._cache, f"@mutex:{key}", timeout_s=self._lock_timeout_s, wait_max_s=self._lock_wait_max_s)

    def get_serialized(self, key: str) -> Any:
        """The bytes of `key`, or NO_VALUE."""
        return self._cache.get(key, NO_VALUE, type=bytes)

    def get_serialized_multi(self, keys: Iterable[str]) -> list[Any]:
        """The bytes of each key, or NO_VALUE, in one round trip."""
        wanted = list(keys)
        found = self._cache.get_many(wanted, type=bytes)
        return [found.get(key, NO_VALUE) for key in wanted]

    def set_serialized(self, key: str, value: bytes) -> None:
        """Store bytes."""
        self._cache.set(key, value, ttl=self._ttl, type=bytes)

    def set_serialized_multi(self, mapping: Mapping[str, bytes]) -> None:
        """Store several in one round trip."""
        if mapping:
            self._cache.set_many(mapping, ttl=self._ttl, type=bytes)

    def delete(self, key: str) -> None:
        """Remove a key."""
        self._cache.delete(key)

    def delete_multi(self, keys: Iterable[str]) -> None:
        """Remove keys in one round trip."""
        self._cache.delete(*keys)


class Mutex(CacheMutex):
    """One holder of a name over all threads and processes; of this process alone while Redis is away.

    Threads queue up within their process first, so that only one a process asks Redis. May be released by another
    thread than the one that acquired it.
    """

    def __init__(
        self, cache: SyncCache, name: str, *, timeout_s: float, wait_max_s: float, clock: Clock | None = None
    ) -> None:
        self._cache = cache
        self._name = name
        self._timeout_s = timeout_s
        self._wait_max_s = wait_max_s
        self._clock = clock if clock is not None else SystemClock()
        self._rng = random.Random()  # noqa: S311 - for pauses, not for secrets
        self._queue = _QUEUES.setdefault((id(cache), name), _Queue())
        self._token = FREE
        self._waits = threading.local()

    def acquire(self, wait: bool = True) -> bool:  # noqa: FBT001, FBT002 - dogpile calls it so
        """Become the holder; False if another is, after `lock_wait_max` seconds or, without `wait`, at once."""
        is_held = self._acquire(wait=wait)
        self._waits.is_in_vain = wait and not is_held
        return is_held

    def _acquire(self, *, wait: bool) -> bool:
        deadline = self._clock.monotonic() + (self._wait_max_s if wait else 0.0)
        if not self._queue.lock.acquire(timeout=self._wait_max_s if wait else 0.0):
            return False
        is_held = False
        try:
            is_held = self._acquire_shared(deadline)
        finally:
            if not is_held:
                self._queue.lock.release()
        return is_held

    def _acquire_shared(self, deadline: float) -> bool:
        token = secrets.token_hex(8)
        pause_s = PAUSE_FIRST_S

        def take(holder: Any) -> Any:
            return token if holder is UNSET or holder == FREE else UNSET

        while True:
            try:
                holder = self._cache.update(self._name, take, ttl=self._timeout_s, type=str)
            except CacheUnavailable:
                self._token = FREE
                return True
            if holder == token:
                self._token = token
                return True
            if self._clock.monotonic() + pause_s > deadline:
                return False
            threading.Event().wait(pause_s * (0.5 + self._rng.random()))
            pause_s = min(pause_s * 1.6, PAUSE_MAX_S)

    def release(self) -> None:
        """Let the next one in. Does nothing for a mutex that is not held, or that this thread waited for in vain:
        dogpile releases that too."""
        if getattr(self._waits, "is_in_vain", False):
            self._waits.is_in_vain = False
            return
        if not self._queue.lock.locked():
            return
        token, self._token = self._token, FREE
        try:
            if token != FREE:
                # Freed by a short-lived mark instead of a delete: only the mark can be written on condition.
                self._cache.update(
                    self._name, lambda holder: FREE if holder == token else UNSET, ttl=FREE_TTL_S, type=str
                )
        except CacheUnavailable:
            pass  # it runs out by itself
        finally:
            self._queue.lock.release()

    def locked(self) -> bool:
        """Whether anybody holds it now."""
        if self._queue.lock.locked():
            return True
        try:
            holder = self._cache.update(self._name, lambda _: UNSET, type=str)
        except CacheUnavailable:
            return False
        return holder is not UNSET and holder != FREE


class _Queue:
    """The threads of this process that want one mutex."""

    __slots__ = ("__weakref__", "lock")

    def __init__(self) -> None:
        self.lock = threading.Lock()


_QUEUES: "weakref.WeakValueDictionary[tuple[int, str], _Queue]" = weakref.WeakValueDictionary()

register_backend("headrace", __name__, "HeadraceBackend")  # type: ignore[no-untyped-call]
