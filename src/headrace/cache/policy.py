"""Which rules hold for a key: the first `CachePolicy` whose glob matches it."""

import enum
import fnmatch
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from headrace.errors import ConfigError

SERIALIZERS = ("msgpack", "json", "raw")
_MEMO_MAX = 4096


class Strategy(enum.Enum):
    """How a key is written and renewed."""

    CACHE_ASIDE = "cache-aside"
    """Loads fill both tiers. `set` writes both; when the shared tier is away the value stays in memory only."""
    WRITE_THROUGH = "write-through"
    """As cache-aside, and where `stale_max` is 0, `set` raises CacheUnavailable unless the shared tier took the
    value."""
    WRITE_BEHIND = "write-behind"
    """`set` returns once the write is queued (and spooled, if a spool is configured); it reaches the shared tier
    later."""
    REFRESH_AHEAD = "refresh-ahead"
    """From `refresh_at` of the TTL on, a hit starts one reload behind it; up to `stale_max` after the TTL the old
    value answers while the reload runs."""
    TTL = "ttl"
    """As cache-aside, and a value is never served past its TTL, not even when the loader fails."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CachePolicy:
    """The rules for all keys that match a glob. Times are in seconds."""

    match: str = "*"
    """Glob over the whole key, case-sensitive: `*` any run, `?` one character, `[ab]` a set, `[!ab]` its
    complement."""
    strategy: Strategy = Strategy.WRITE_THROUGH
    """How keys are written and renewed."""
    ttl: float | None = 3600.0
    """How long a value is fresh; None: for ever. A `ttl` given in a call overrides it and is taken at its word."""
    memory_ttl: float | None = None
    """Longest life of this process's own copy of a shared value; None: `MemoryConfig.ttl`."""
    refresh_at: float = 0.8
    """Share of the TTL after which REFRESH_AHEAD reloads."""
    stale_max: float = 300.0
    """How long past its TTL a value may still answer when the loader fails or is late."""
    negative_ttl: float | None = None
    """TTL of a loaded None; None: the same as `ttl`."""
    load_timeout: float | None = None
    """A load that takes longer is cancelled and counts as failed (LoadTimeout). A plain function in a thread cannot be
    cancelled: those who wait for it get LoadTimeout after so long, or after 60 s where this is None, and whoever asks
    next loads for himself."""
    load_timeout_soft: float | None = None
    """A load that takes longer goes on behind while a stale value, if there is one, answers."""
    retry_after: float = 1.0
    """After a failed load that a stale value answered for, the next attempt waits this long."""
    early_refresh: float = 1.0
    """XFetch's beta: how eagerly a value that is dear to load is renewed shortly before its TTL; 0: never."""
    jitter: float = 0.1
    """Share of the policy's TTL that is taken off at random, so that keys written together do not expire together."""
    serializer: str = "msgpack"
    """Format in the shared tier: msgpack, json or raw (bytes)."""

    def __post_init__(self) -> None:
        if self.serializer not in SERIALIZERS:
            raise ConfigError(f"CachePolicy.serializer is {self.serializer!r}; it is one of {', '.join(SERIALIZERS)}.")
        strategy: Any = self.strategy  # a plain string would be taken for none of them, in silence
        if not isinstance(strategy, Strategy):
            names = ", ".join(f"Strategy.{one.name}" for one in Strategy)
            raise ConfigError(f"CachePolicy.strategy is {strategy!r}; it is one of {names}.")
        for name in ("ttl", "memory_ttl", "negative_ttl", "stale_max", "retry_after", "early_refresh"):
            value = getattr(self, name)
            if not (value is None and name.endswith("ttl")) and (value is None or not value >= 0):
                raise ConfigError(f"CachePolicy.{name} is {value}; it must be 0 or more.")
        for name in ("load_timeout", "load_timeout_soft"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise ConfigError(f"CachePolicy.{name} is {value}; it must be above 0 seconds.")
        if not 0 < self.refresh_at <= 1:
            raise ConfigError(f"CachePolicy.refresh_at is {self.refresh_at}; it must be above 0 and at most 1.")
        if not 0 <= self.jitter < 1:
            raise ConfigError(f"CachePolicy.jitter is {self.jitter}; it must be at least 0 and below 1.")

    @property
    def stale_s(self) -> float:
        """How long past its TTL a value is kept at all."""
        return 0.0 if self.strategy is Strategy.TTL else self.stale_max


def glob_pattern(glob: str) -> re.Pattern[str]:
    """The glob as an anchored pattern; `*` crosses every character, also `:` and newlines."""
    return re.compile(fnmatch.translate(glob))


class PolicyTable:
    """Finds the policy of a key; asked at a miss or a write only, never on a hit."""

    __slots__ = ("_default", "_memo", "_rules")

    def __init__(self, policies: Sequence[CachePolicy], *, default: CachePolicy) -> None:
        self._rules = [(glob_pattern(policy.match), policy) for policy in policies]
        self._default = default
        self._memo: dict[str, CachePolicy] = {}

    def match(self, key: str) -> CachePolicy:
        """The first policy whose glob covers `key`, else the default."""
        if not self._rules:
            return self._default
        policy = self._memo.get(key)
        if policy is None:
            policy = next((policy for pattern, policy in self._rules if pattern.match(key)), self._default)
            if len(self._memo) >= _MEMO_MAX:
                self._memo.clear()
            self._memo[key] = policy
        return policy
