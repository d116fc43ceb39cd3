"""A cached value with the three moments of its life: when it wants attention, when it goes stale, when it is gone.

    stored ──────────────── attention_at ───────── fresh_until ─────────── stale_until
           answer at once                answer,               answer only if the policy lets a
                                         renew behind          stale value stand in, else reload

A hit compares one number with the clock: `attention_at`. Everything else is decided behind that comparison.
"""

import math
from collections.abc import Callable
from typing import Any

from headrace.cache.policy import CachePolicy, Strategy

FOREVER = math.inf


class Entry:
    """What the in-memory tier holds. Moments are on the monotonic clock of this process."""

    __slots__ = ("attention_at", "fresh_until", "load_s", "stale_until", "tags", "value", "version")

    def __init__(
        self,
        value: Any,
        *,
        attention_at: float,
        fresh_until: float,
        stale_until: float,
        load_s: float = 0.0,
        version: int = 0,
        tags: tuple[str, ...] = (),
    ) -> None:
        self.value = value
        self.attention_at = attention_at
        self.fresh_until = fresh_until
        self.stale_until = stale_until
        self.load_s = load_s
        self.version = version
        self.tags = tags

    def age(self, until: float) -> None:
        """Be fresh no longer than `until`, and stale as long afterwards as before."""
        if until < self.fresh_until:
            self.stale_until = min(self.stale_until, until + self.stale_until - self.fresh_until)
            self.fresh_until = until
            self.attention_at = min(self.attention_at, until)


def fresh_for(policy: CachePolicy, *, value: Any, rng: Callable[[], float]) -> float:
    """Seconds that a newly written value is fresh by its policy alone: negative TTL first, then jitter."""
    ttl = policy.negative_ttl if value is None and policy.negative_ttl is not None else policy.ttl
    if ttl is None:
        return FOREVER
    return ttl * (1.0 - policy.jitter * rng())


def attention_after(policy: CachePolicy, *, fresh_s: float, load_s: float, rng: Callable[[], float]) -> float:
    """Seconds until a value should be renewed behind a hit, counted from its writing.

    REFRESH_AHEAD has a fixed share of the TTL. The others use XFetch (Vattani et al., "Optimal probabilistic cache
    stampede prevention", VLDB 2015): the lead is the measured load time x beta x an exponential draw, so that the
    dearer a value, the earlier one process, and seldom two, renews it. One draw a process and entry stands for a draw
    a read.
    """
    if fresh_s == FOREVER:
        return FOREVER
    if policy.strategy is Strategy.REFRESH_AHEAD:
        return fresh_s * policy.refresh_at
    if policy.strategy is Strategy.TTL or policy.early_refresh == 0.0:
        return fresh_s
    lead = load_s * policy.early_refresh * -math.log(1.0 - rng())
    return max(fresh_s - lead, fresh_s * 0.5)
