"""The two-tier cache: in memory, in front of Redis, coherent and stampede-proof."""

from headrace.cache.cache import Cache
from headrace.cache.config import MemoryConfig, RemoteConfig
from headrace.cache.memory import MemoryCache, MemoryStatistics
from headrace.cache.policy import CachePolicy, Strategy
from headrace.cache.statistics import CacheStatistics
from headrace.cache.sync_cache import SyncCache

__all__ = [
    "Cache",
    "CachePolicy",
    "CacheStatistics",
    "MemoryCache",
    "MemoryConfig",
    "MemoryStatistics",
    "RemoteConfig",
    "Strategy",
    "SyncCache",
]
