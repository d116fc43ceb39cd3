"""Which entry goes when the cache is full. Pure: no clock, no lock, no key, no value."""

from headrace.cache.policies.eviction import EvictionPolicy
from headrace.cache.policies.lru import Lru
from headrace.cache.policies.node import Node, Queue
from headrace.cache.policies.sieve import Sieve

POLICIES: dict[str, type[EvictionPolicy]] = {"adaptive": Sieve, "lru": Lru, "sieve": Sieve}
"""Every policy by the name that `MemoryCache(policy=...)` takes."""

__all__ = ["POLICIES", "EvictionPolicy", "Lru", "Node", "Queue", "Sieve"]
