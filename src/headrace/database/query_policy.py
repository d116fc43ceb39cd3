"""What can be asked of the query cache: by one call, and of all of it."""

import math
from dataclasses import dataclass

from msgspec import UNSET, UnsetType

from headrace.errors import ConfigError


@dataclass(frozen=True, slots=True, kw_only=True)
class QueryPolicy:
    """How old an answer to one call may be. Times are in seconds."""

    staleness_max: float = 1.0
    """The promise: every change that was visible so long before the call is in the answer. A result older than this is
    used only while the shard's change stream is known to have told of everything up to then; 0: never an older one."""
    ttl: float | UnsetType = UNSET
    """Longest age of a result, however fresh the stream says it is. UNSET: by what it cost to make, at most an
    hour."""
    row_security_by_role: bool = False
    """A promise of the caller: the row security policies of the tables look at nothing but the role. Without it a
    query over tables that have them is not cached, because they may look at settings that no key knows."""

    def __post_init__(self) -> None:
        """Refuse what means nothing."""
        for name in ("staleness_max", "ttl"):
            value = getattr(self, name)
            if not isinstance(value, UnsetType) and not 0 <= value < math.inf:
                raise ConfigError(f"QueryPolicy.{name} is {value}; it must be 0 or more, and finite.")

    @property
    def longest_s(self) -> float:
        """Longest age of a result."""
        return TTL_MAX_S if isinstance(self.ttl, UnsetType) else self.ttl


TTL_MAX_S = 3600.0
"""Longest life of a result whose policy does not say."""


@dataclass(frozen=True, slots=True, kw_only=True)
class QueryCacheConfig:
    """The query cache of one process."""

    follow_changes: bool = True
    """Hear of everybody's writes by logical decoding, where the server has `wal_level = logical` and the role may
    replicate: one temporary slot and two connections a process and shard. False: own writes and TTL only."""
    publication: str = "headrace"
    """The publication that the change stream reads."""
    publish: bool = True
    """Make the publication, and add the tables of cached queries to it (those that this role owns)."""
    heartbeat_s: float = 0.25
    """Between two heartbeats, at most; a third of the smallest `staleness_max` asked for, if that is less."""
    memory_bytes_max: int = 64 * 1024 * 1024
    """Cells of results that this process keeps in memory; beyond it the ones that save the least time a byte go."""
    result_bytes_max: int = 1024 * 1024
    """Cells of one result; a larger one is not kept."""
    result_rows_max: int = 10_000
    """Rows of one result; one with more is not kept."""
    statements_max: int = 1000
    """Texts whose analysis is remembered, a shard."""

    def __post_init__(self) -> None:
        """Refuse what cannot work."""
        for name in ("heartbeat_s", "memory_bytes_max", "result_bytes_max", "result_rows_max", "statements_max"):
            if not getattr(self, name) > 0:
                raise ConfigError(f"database.query_cache.{name} is {getattr(self, name)}; it must be above 0.")
        if not self.publication:
            raise ConfigError("database.query_cache.publication is empty.", fix='Name one, for instance "headrace".')
