"""This process's own copies: what is kept, for how long, and what a refused write leaves behind."""

from headrace.cache.config import MemoryConfig
from headrace.cache.entry import Entry
from headrace.cache.near import Near, Write
from headrace.cache.policy import CachePolicy


def entry(value: object, now: float, *, fresh_s: float = 100.0, stale_s: float = 50.0) -> Entry:
    return Entry(
        value, attention_at=now + fresh_s, fresh_until=now + fresh_s, stale_until=now + fresh_s + stale_s, tags=("t",)
    )


def test_a_write_that_cannot_be_kept_leaves_no_older_copy(clock):
    """The echo of one's own write does not drop the copy, so a refused copy of it must take the older one along."""
    near, policy = Near(MemoryConfig(), clock, is_copy=True), CachePolicy()
    near.install("k", entry("older", clock.monotonic()), near.epoch("k"), policy)
    (epoch,) = near.begin_writes(["k"])
    near.forget_tags(["another"])
    near.end_writes([Write("k", entry("newer", clock.monotonic()), epoch, policy)])
    assert near.lookup("k") is None


def test_of_two_overlapping_writes_the_later_one_stays(clock):
    """The write that began last is the one that is kept, whichever ends first."""
    near, policy = Near(MemoryConfig(), clock, is_copy=True), CachePolicy()
    (first,) = near.begin_writes(["k"])
    (second,) = near.begin_writes(["k"])
    near.end_writes([Write("k", entry("second", clock.monotonic()), second, policy)])
    near.end_writes([Write("k", entry("first", clock.monotonic()), first, policy)])
    held = near.lookup("k")
    assert held is None or held.value == "second"


def test_a_copy_is_bounded_by_the_memory_tiers_ttl(clock):
    """A copy of a shared entry lives for MemoryConfig.ttl; an entry that exists here alone lives its own TTL."""
    for is_copy, lives in ((True, False), (False, True)):
        near = Near(MemoryConfig(ttl=10), clock, is_copy=is_copy)
        near.install("k", entry(1, clock.monotonic()), near.epoch("k"), CachePolicy())
        clock.advance(11)
        assert (near.lookup("k") is not None) is lives


def test_ageing_shortens_freshness_and_keeps_what_may_stand_in(clock):
    """When changes may have gone unheard a copy is no longer fresh, but is stale for as long as it would have been."""
    near = Near(MemoryConfig(), clock, is_copy=True)
    near.install("k", entry(1, clock.monotonic()), near.epoch("k"), CachePolicy())
    hits = near.statistics().hits
    near.age(2.0)
    held = near.memory.get("k")
    now = clock.monotonic()
    assert (held.fresh_until, held.attention_at, held.stale_until) == (now + 2, now + 2, now + 52)
    assert near.statistics().hits == hits + 1


def test_limited_freshness_holds_for_what_comes_next(clock):
    """While the channel is away copies are fresh for the limit at most, also of what was being read or written when it
    was lost; what was read while it was away is turned away once it is back."""
    near = Near(MemoryConfig(), clock, is_copy=True)
    before = near.epoch("k")
    near.limit_freshness(1.0)
    assert near.install("k", entry(1, clock.monotonic()), before, CachePolicy()) is True
    assert near.lookup("k").fresh_until == clock.monotonic() + 1
    during = near.epoch("k")
    near.limit_freshness(None)
    assert near.install("k", entry(1, clock.monotonic()), during, CachePolicy()) is False
    near.install("k", entry(1, clock.monotonic()), near.epoch("k"), CachePolicy())
    assert near.lookup("k").fresh_until == clock.monotonic() + 100
