"""Django's cache framework on headrace.

    CACHES = {
        "default": {
            "BACKEND": "headrace.cache.integrations.django.HeadraceCache",
            "LOCATION": "redis://cache:6379/0",     # "": this process's memory alone
            "TIMEOUT": 300,
            "OPTIONS": {
                "memory": {"entries_max": 50_000},  # fields of MemoryConfig; None: no copies in memory
                "remote": {"timeout": 0.2},         # fields of RemoteConfig but `url`
                "policies": [{"match": "*:report:*", "stale_max": 600}],  # CachePolicy or its fields; match sees
                "namespace": "shop",                #     the key with Django's prefix and version
                "wait_max": 10.0,
            },
        }
    }

Nothing is pickled. What can be stored is what `packing.py` and `django_values.py` pack; a query set, a function or a
class is refused. As in Django's own back ends each `get` makes the value anew, so it may be changed freely.
"""

# Django has no types of its own.
# mypy: disable-error-code="import-not-found,import-untyped,misc"

import difflib
from collections.abc import Callable, Iterable, Mapping
from pickle import PickleError  # noqa: TID251 - the exception alone, for those who catch it
from typing import Any

from django.core.cache.backends.base import DEFAULT_TIMEOUT, BaseCache
from django.core.exceptions import ImproperlyConfigured
from msgspec import UNSET

from headrace.cache.integrations.django_values import PACKER
from headrace.cache.integrations.packing import Unreadable
from headrace.cache.integrations.settings import OPTIONS, shared_cache
from headrace.cache.sync_cache import SyncCache
from headrace.errors import CacheUnavailable, ConfigError, UnencodableValue

_DJANGOS_OPTIONS = ("MAX_ENTRIES", "CULL_FREQUENCY")
_MISSING = object()


class NotStorable(UnencodableValue, PickleError):
    """A value that cannot be stored; also what code expects that was written for Django's own back ends."""

    code = "value-not-storable"
    fix = "Cache what it is made of: numbers, strings, bytes, dates, UUIDs, lists, dicts, tuples and sets."


class HeadraceCache(BaseCache):
    """A Django cache backend.

    `add`, `incr`, `decr` and `touch` are atomic over all processes, `incr` and `decr` keep the expiry, and
    `get_or_set` runs a callable default once for all who ask meanwhile. When Redis is away, reads are misses or come
    from memory, writes stay in memory, `add` and `touch` return False and `incr` raises CacheUnavailable: what they
    answer depends on what other processes did.
    """

    def __init__(self, location: str, params: Mapping[str, Any]) -> None:
        super().__init__(dict(params))
        self._cache = _cache(location, params.get("OPTIONS", {}))

    # -- reading ------------------------------------------------------------------------------------------------------

    def get(self, key: Any, default: Any = None, version: int | None = None) -> Any:
        """The value of `key`, made anew, or `default`."""
        return self._opened(self._cache.get(self._name(key, version), _MISSING, type=bytes), default)

    def get_many(self, keys: Iterable[Any], version: int | None = None) -> dict[Any, Any]:
        """The values that are there, in one round trip."""
        names = {self._name(key, version): key for key in keys}
        found = self._cache.get_many(names, type=bytes)
        values = {names[name]: self._opened(data, _MISSING) for name, data in found.items()}
        return {key: value for key, value in values.items() if value is not _MISSING}

    def has_key(self, key: Any, version: int | None = None) -> bool:
        """Whether `get` would find a value."""
        return self._cache.get(self._name(key, version), _MISSING, type=bytes) is not _MISSING

    def get_or_set(
        self, key: Any, default: Any, timeout: float | None = DEFAULT_TIMEOUT, version: int | None = None
    ) -> Any:
        """The value of `key`; if there is none, `default` or what it returns, which is then stored."""

        def load() -> bytes:
            return self._packed(default() if callable(default) else default)

        name, ttl = self._name(key, version), self._ttl(timeout)
        value = self._opened(self._cache.get_or_load(name, load, ttl=ttl, type=bytes), _MISSING)
        if value is _MISSING:  # packed by another release
            self._cache.delete(name)
            value = self._opened(self._cache.get_or_load(name, load, ttl=ttl, type=bytes), None)
        return value

    @staticmethod
    def _opened(data: Any, default: Any) -> Any:
        if data is _MISSING:
            return default
        try:
            return PACKER.unpack(data)
        except Unreadable:
            return default

    # -- writing ------------------------------------------------------------------------------------------------------

    def set(self, key: Any, value: Any, timeout: float | None = DEFAULT_TIMEOUT, version: int | None = None) -> None:
        """Store a value. A timeout of None is for ever, one of 0 or less removes."""
        self._cache.set(self._name(key, version), self._packed(value), ttl=self._ttl(timeout), type=bytes)

    def set_many(
        self, data: Mapping[Any, Any], timeout: float | None = DEFAULT_TIMEOUT, version: int | None = None
    ) -> list[Any]:
        """Store several values in one round trip; always [], because what Redis does not take stays in memory."""
        packed = {self._name(key, version): self._packed(value) for key, value in data.items()}
        if packed:
            self._cache.set_many(packed, ttl=self._ttl(timeout), type=bytes)
        return []

    def add(self, key: Any, value: Any, timeout: float | None = DEFAULT_TIMEOUT, version: int | None = None) -> bool:
        """Store a value unless the key has one; whether it was stored."""
        packed, ttl, outcomes = self._packed(value), self._ttl(timeout), [False]

        def change(old: Any) -> Any:
            outcomes.append(old is UNSET)
            return packed if old is UNSET else UNSET

        return self._updated(self._name(key, version), change, ttl) and outcomes[-1]

    def touch(self, key: Any, timeout: float | None = DEFAULT_TIMEOUT, version: int | None = None) -> bool:
        """Give a value a new timeout; False if there is none."""
        outcomes = [False]

        def change(old: Any) -> Any:
            outcomes.append(old is not UNSET)
            return old

        return self._updated(self._name(key, version), change, self._ttl(timeout)) and outcomes[-1]

    def _updated(self, name: str, change: Callable[[Any], Any], ttl: float | None) -> bool:
        try:
            self._cache.update(name, change, ttl=ttl, type=bytes)
        except CacheUnavailable:
            return False
        return True

    def incr(self, key: Any, delta: int = 1, version: int | None = None) -> int:
        """Add to a number; ValueError if the key has none."""

        def change(old: Any) -> Any:
            return UNSET if old is UNSET else self._packed(PACKER.unpack(old) + delta)

        after = self._cache.update(self._name(key, version), change, type=bytes)
        if after is UNSET:
            raise ValueError(f"Key {key!r} not found")
        number: int = PACKER.unpack(after)
        return number

    def delete(self, key: Any, version: int | None = None) -> bool:
        """Remove a key; whether it was there."""
        return self._cache.delete(self._name(key, version)) > 0

    def delete_many(self, keys: Iterable[Any], version: int | None = None) -> None:
        """Remove keys in one round trip."""
        names = [self._name(key, version) for key in keys]
        if names:
            self._cache.delete(*names)

    def clear(self) -> None:
        """Remove everything in the namespace, of all prefixes and versions."""
        self._cache.clear()

    # -- inside -------------------------------------------------------------------------------------------------------

    def _name(self, key: Any, version: int | None) -> str:
        name: str = self.make_and_validate_key(key, version=version)
        return name

    def _ttl(self, timeout: Any) -> float | None:
        if timeout is DEFAULT_TIMEOUT:
            timeout = self.default_timeout
        return None if timeout is None else max(0.0, float(timeout))

    @staticmethod
    def _packed(value: Any) -> bytes:
        try:
            return PACKER.pack(value)
        except UnencodableValue as error:
            raise NotStorable(error.message, fix=error.fix) from error


def _cache(location: str, options: Mapping[str, Any]) -> SyncCache:
    for name in options:
        if name not in OPTIONS and name not in _DJANGOS_OPTIONS:
            near = difflib.get_close_matches(name, OPTIONS, n=1)
            raise ImproperlyConfigured(
                f"OPTIONS of a headrace cache has {name!r}; it knows {', '.join(OPTIONS)}."
                + (f" Did you mean {near[0]!r}?" if near else "")
            )
    settings = {"namespace": "django", **{name: options[name] for name in OPTIONS if name in options}}
    memory = settings.get("memory", {})
    if isinstance(memory, Mapping) and "MAX_ENTRIES" in options:
        settings["memory"] = {"entries_max": options["MAX_ENTRIES"], **memory}
    try:
        return shared_cache(location, settings)
    except ConfigError as error:
        raise ImproperlyConfigured(str(error)) from error
