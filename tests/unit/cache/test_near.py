"""This process's own copies: what is kept, for how long, and what a refused write leaves behind."""

import pytest

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


@pytest.mark.parametrize("how", ["write", "load"])
def test_what_was_fetched_before_a_write_that_was_not_kept_is_turned_away(clock, how):
    """A read from between a change elsewhere and our own write, which is slower than that write, is not kept: it is
    older than what is shared now, and the echo of our write would not drop it."""
    near, policy = Near(MemoryConfig(), clock, is_copy=True), CachePolicy()
    (writing,) = near.begin_writes(["k"])
    near.forget(["k"])
    reading = near.epoch("k")
    if how == "write":
        near.end_writes([Write("k", entry("ours", clock.monotonic()), writing, policy)])
    else:
        near.drop("k")
    assert near.install("k", entry("theirs, from before", clock.monotonic()), reading, policy) is False
    assert near.lookup("k") is None


@pytest.mark.parametrize("first_to_end", [0, 1])
def test_of_two_writes_at_once_the_one_that_began_later_is_kept(clock, first_to_end):
    """Whichever ends first: they reach the shared tier in the order in which they begin."""
    near, now = Near(MemoryConfig(), clock, is_copy=True), clock.monotonic()
    epochs = [near.begin_writes(["k"])[0] for _ in range(2)]
    writes = [Write("k", entry(number, now), epoch, CachePolicy()) for number, epoch in enumerate(epochs)]
    near.end_writes([writes[first_to_end]])
    near.end_writes([writes[1 - first_to_end]])
    assert near.lookup("k") is (writes[1].entry if first_to_end == 0 else None)


def test_a_write_that_ends_turns_away_what_is_made_from_the_value_before_it(clock):
    """Also one that began before that was looked at: with memory alone it would be lost."""
    near, policy, now = Near(MemoryConfig(), clock, is_copy=False), CachePolicy(), clock.monotonic()
    (writing,) = near.begin_writes(["k"])
    near.begin_writes(["k"])
    looked = near.epoch("k")
    near.end_writes([Write("k", entry("written", now), writing, policy)])
    assert near.exchange(Write("k", entry("made from nothing", now), looked, policy)) is False
    assert near.lookup("k").value == "written"


@pytest.mark.parametrize("how", ["forgotten", "doubted", "tag", "everything", "heard again"])
def test_a_change_during_a_write_turns_it_away(clock, how):
    """Nobody knows which of the two came last."""
    near = Near(MemoryConfig(), clock, is_copy=True)
    (writing,) = near.begin_writes(["k"])
    match how:
        case "forgotten":
            near.forget(["k"])
        case "doubted":
            near.expire(["k"])
        case "tag":
            near.forget_tags(["t"])
        case "everything":
            near.forget_all()
        case _:
            near.limit_freshness(None)
    near.end_writes([Write("k", entry("ours", clock.monotonic()), writing, CachePolicy())])
    assert near.lookup("k") is None


def test_what_was_fetched_before_a_renewal_is_turned_away(clock):
    """A slow read that brings what was shared before a renewal does not take the place of the renewed value."""
    near, policy, now = Near(MemoryConfig(), clock, is_copy=True), CachePolicy(), clock.monotonic()
    old, renewed = entry("old", now), entry("renewed", now)
    slow = near.epoch("k")
    assert near.install("k", old, near.epoch("k"), policy) is True
    assert near.install("k", renewed, near.epoch("k"), policy, is_renewal=True) is True
    assert near.install("k", old, slow, policy) is False
    assert near.lookup("k") is renewed


def test_what_was_read_does_not_turn_away_the_load_that_is_to_renew_it(clock):
    """A load under way first keeps what the shared tier has: a version that its own process wrote, or another one."""
    near, policy, now = Near(MemoryConfig(), clock, is_copy=True), CachePolicy(), clock.monotonic()
    near.end_writes([Write("k", entry("old", now), near.begin_writes(["k"])[0], policy)])
    loading, shared, renewed = near.epoch("k"), entry("old", now), entry("renewed", now)
    shared.version, renewed.version = 1, 2
    assert near.install("k", shared, near.epoch("k"), policy) is True
    assert near.install("k", renewed, loading, policy, is_renewal=True) is True
    assert near.lookup("k") is renewed
    assert near.statistics().hits == 1


def test_reads_of_one_value_at_once_are_all_kept(clock):
    """Two reads of a cold key do not turn each other away."""
    near, now = Near(MemoryConfig(), clock, is_copy=True), clock.monotonic()
    first, second = near.epoch("k"), near.epoch("k")
    assert near.install("k", entry("v", now), first, CachePolicy()) is True
    assert near.install("k", entry("v", now), second, CachePolicy()) is True
