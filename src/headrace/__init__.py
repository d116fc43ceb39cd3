"""headrace: the performance layer for Python back ends.

A tiered cache, an HTTP edge, an agent runtime, sharded Postgres and a monitor that watches them; each usable alone.
The names below load their room, and its drivers, when they are first used.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from headrace.agents import AgentHost
    from headrace.cache import Cache, CachePolicy, MemoryCache, RemoteConfig, Strategy
    from headrace.config import Config, load_config
    from headrace.database import Database, DatabaseConfig, ShardConfig
    from headrace.errors import BackendError, BugError, CallerError, HeadraceError
    from headrace.monitor import Monitor
    from headrace.server import Headrace

__version__ = "0.1.0"

__all__ = [
    "AgentHost",
    "BackendError",
    "BugError",
    "Cache",
    "CachePolicy",
    "CallerError",
    "Config",
    "Database",
    "DatabaseConfig",
    "Headrace",
    "HeadraceError",
    "MemoryCache",
    "Monitor",
    "RemoteConfig",
    "ShardConfig",
    "Strategy",
    "load_config",
]

_ROOM = {
    "agents": ("AgentHost",),
    "cache": ("Cache", "CachePolicy", "MemoryCache", "RemoteConfig", "Strategy"),
    "config": ("Config", "load_config"),
    "database": ("Database", "DatabaseConfig", "ShardConfig"),
    "errors": ("BackendError", "BugError", "CallerError", "HeadraceError"),
    "monitor": ("Monitor",),
    "server": ("Headrace",),
}


def __getattr__(name: str) -> Any:
    for room, names in _ROOM.items():
        if name in names:
            return getattr(import_module(f"headrace.{room}"), name)
    raise AttributeError(f"module 'headrace' has no attribute {name!r}")


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
