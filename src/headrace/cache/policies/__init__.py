"""Which entry goes when the cache is full. Pure: no clock, no lock, no key, no value."""

from headrace.cache.policies.adaptive import Adaptive
from headrace.cache.policies.eviction import EvictionPolicy
from headrace.cache.policies.lru import Lru
from headrace.cache.policies.node import Node
from headrace.cache.policies.s3fifo import S3Fifo
from headrace.cache.policies.sieve import Sieve
from headrace.cache.policies.wtinylfu import WTinyLfu

POLICIES: dict[str, type[EvictionPolicy]] = {
    "adaptive": Adaptive,
    "lru": Lru,
    "s3fifo": S3Fifo,
    "sieve": Sieve,
    "wtinylfu": WTinyLfu,
}
"""Every policy by the name that `MemoryCache(policy=...)` takes."""

__all__ = ["POLICIES", "Adaptive", "EvictionPolicy", "Lru", "Node", "S3Fifo", "Sieve", "WTinyLfu"]
