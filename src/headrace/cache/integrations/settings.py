"""A cache from what a framework's settings say about it, one for all who say the same.

Frameworks make a back end for each thread, alias or region. Each of them with a memory tier and connections of its own
would be many caches that know little, so they share.
"""

import dataclasses
import threading
from collections.abc import Mapping
from typing import Any

from headrace.cache.config import MemoryConfig, RemoteConfig
from headrace.cache.policy import CachePolicy, Strategy
from headrace.cache.sync_cache import SyncCache
from headrace.errors import ConfigError

OPTIONS = ("memory", "remote", "policies", "namespace", "wait_max")
"""`memory`, `remote` and each of `policies` are a configuration or a mapping of its fields; `memory` may be None."""

_lock = threading.Lock()
_caches: dict[Any, SyncCache] = {}


def shared_cache(url: str, options: Mapping[str, Any]) -> SyncCache:
    """The cache on the Redis at `url` (empty: memory alone). Raises ConfigError for a setting that breaks a rule."""
    name = (url, _frozen(options))
    with _lock:
        cache = _caches.get(name)
        if cache is None:
            cache = _caches[name] = _made(url, options)
        return cache


def close_shared() -> None:
    """Close and forget all of them, as happens at exit: for tests."""
    with _lock:
        for cache in _caches.values():
            cache.close()
        _caches.clear()


def _made(url: str, options: Mapping[str, Any]) -> SyncCache:
    remote = options.get("remote", {})
    if url and not isinstance(remote, RemoteConfig):
        remote = {"url": url, **remote}
    try:
        return SyncCache(
            memory=_configuration(MemoryConfig, options.get("memory", {})),
            remote=_configuration(RemoteConfig, remote) if url else None,
            policies=[_configuration(CachePolicy, one) for one in options.get("policies", ())],
            **{name: options[name] for name in ("namespace", "wait_max") if name in options},
        )
    except (TypeError, ValueError) as error:  # an unknown field, an unknown strategy
        raise ConfigError(f"The settings of a cache are wrong: {error}.") from error


def _configuration(kind: type, fields: Any) -> Any:
    if fields is None or isinstance(fields, kind):
        return fields
    fields = dict(fields)
    if "strategy" in fields:
        fields["strategy"] = Strategy(fields["strategy"])
    return kind(**fields)


def _frozen(setting: Any) -> Any:
    """A setting as something that can be compared and hashed."""
    if isinstance(setting, Mapping):
        return tuple(sorted((name, _frozen(part)) for name, part in setting.items()))
    if isinstance(setting, (list, tuple)):
        return tuple(map(_frozen, setting))
    if dataclasses.is_dataclass(setting) and not isinstance(setting, type):
        fields = [_frozen(getattr(setting, field.name)) for field in dataclasses.fields(setting)]
        return setting.__class__, tuple(fields)
    return setting
