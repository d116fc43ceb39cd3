"""Expiry of the in-memory cache: never late for a reader, never much work for a writer, nothing kept alive."""

import gc
import random
import weakref
from collections.abc import Iterator

import pytest

from headrace.cache import MemoryCache
from headrace.cache.memory import EXPIRY_STEPS, RING
from headrace.testing import FakeClock


class Value:
    """Something whose death can be watched."""


@pytest.fixture
def clock() -> FakeClock:
    """Time that stands still."""
    return FakeClock()


@pytest.fixture
def no_collector() -> Iterator[None]:
    """Objects die when the last reference goes, or not at all."""
    gc.collect()
    gc.disable()
    yield
    gc.enable()


def test_one_write_collects_a_bounded_number_of_entries(clock):
    """Ten thousand that expire at once are given back EXPIRY_STEPS a write, and none of them is ever seen."""
    cache = MemoryCache(20_000, ttl=10.0, clock=clock)
    for key in range(10_000):
        cache.set(key, key)
    clock.advance(11.0)
    assert not any(key in cache for key in range(10_000))
    collected = []
    while cache.statistics().expirations < 10_000:
        before = cache.statistics().expirations
        cache.set("new", 1, ttl=None)
        collected.append(cache.statistics().expirations - before)
    assert max(collected) == EXPIRY_STEPS
    assert len(collected) <= 10_000 // EXPIRY_STEPS + 1
    assert len(cache) == 1
    cache.validate()


@pytest.mark.parametrize("span", [50.0, 5_000.0, 200_000.0, 700_000.0, 5_000_000.0])
def test_every_wheel_gives_back_what_is_due_and_keeps_the_rest(clock, span):
    """Deadlines from seconds to months, at steps of any length: a second after its deadline an entry is gone."""
    rng = random.Random(int(span))
    cache = MemoryCache(1000, clock=clock)
    deadlines = {}
    for key in range(300):
        ttl = rng.uniform(0.1, span)
        cache.set(key, key, ttl=ttl)
        deadlines[key] = clock.monotonic() + ttl
    while deadlines:
        clock.advance(rng.uniform(0.0, span / 8))
        now = clock.monotonic()
        for _ in range(2 * 300 // EXPIRY_STEPS + 1):
            cache.delete("nothing")
        deadlines = {key: deadline for key, deadline in deadlines.items() if deadline > now - 1.0}
        waiting = {key for key, deadline in deadlines.items() if deadline > now}
        assert len(waiting) <= len(cache) <= len(deadlines)
        assert all(key in cache for key in waiting)
        cache.validate()


def test_a_value_that_is_stored_again_lives_by_its_new_deadline(clock):
    """Later, sooner, for ever and back."""
    cache = MemoryCache(clock=clock)
    cache.set("key", 1, ttl=10.0)
    cache.set("key", 2, ttl=100.0)
    clock.advance(50.0)
    assert cache.get("key") == 2
    cache.set("key", 3, ttl=5.0)
    clock.advance(6.0)
    assert cache.get("key") is None
    cache.set("key", 4, ttl=5.0)
    cache.set("key", 5, ttl=None)
    clock.advance(10_000_000.0)
    cache.delete("nothing")
    assert cache.get("key") == 5
    cache.set("key", 6, ttl=1.0)
    clock.advance(1.0)
    assert "key" not in cache
    cache.validate()


def test_a_time_to_live_of_centuries_is_for_ever(clock):
    """No number of seconds is too large."""
    cache = MemoryCache(clock=clock)
    for key, ttl in enumerate([1e10, 1e300, float("inf")]):
        assert cache.set(key, key, ttl=ttl)
    clock.advance(2e9)
    assert [cache.get(key) for key in range(3)] == [0, 1, 2]
    cache.validate()


@pytest.mark.usefixtures("no_collector")
@pytest.mark.parametrize("policy", ["adaptive", "lru", "s3fifo", "sieve", "wtinylfu"])
def test_a_value_that_leaves_dies_at_once(clock, policy):
    """Deleted, replaced, evicted, expired, invalidated or cleared: no list, ring, tag or wheel keeps it alive."""
    cache = MemoryCache(4, ttl=10.0, policy=policy, clock=clock)

    def stored(key: object) -> "weakref.ref[Value]":
        value = Value()
        cache.set(key, value, tags=("group",))
        for _ in range(3):
            assert cache.get(key) is value
        return weakref.ref(value)

    watched = stored("deleted")
    cache.delete("deleted")
    assert watched() is None
    watched = stored("replaced")
    cache.set("replaced", None)
    assert watched() is None
    watched = stored("tagged")
    cache.invalidate_tag("group")
    assert watched() is None
    watched = stored("expired")
    clock.advance(11.0)
    assert cache.get("expired") is None
    assert watched() is None
    watched = stored("cleared")
    cache.clear()
    assert watched() is None
    many = [stored(key) for key in range(20)]
    assert sum(value() is not None for value in many) == len(cache) == 4
    cache.resize(entries_max=1)
    assert sum(value() is not None for value in many) == 1


@pytest.mark.usefixtures("no_collector")
def test_hits_that_were_not_told_yet_keep_at_most_a_ring_of_values_alive(clock):
    """And the next change lets go of them."""
    cache = MemoryCache(2 * RING, clock=clock)
    for key in range(2 * RING):
        cache.set(key, Value())
    watched = [weakref.ref(cache.get(key)) for key in range(2 * RING)]
    cache.clear()
    assert all(value() is None for value in watched)


def test_tags_do_not_outlive_their_entries(clock):
    """However many tags come and go, what is kept of them belongs to entries that are there."""
    cache = MemoryCache(10, ttl=5.0, clock=clock)
    for key in range(1000):
        cache.set(key, key, tags=(f"tag {key}", "all"))
        clock.advance(0.1)
        cache.validate()
    assert cache.invalidate_tag("tag 1") == 0
    assert cache.invalidate_tag("all") == 10
    assert cache.invalidate_tag("all") == 0
    cache.validate()


def test_clear_and_resize_work_on_what_is_large(clock):
    """A hundred thousand entries, each in some queue of links, come down without deep recursion."""
    cache = MemoryCache(100_000, clock=clock)
    for key in range(100_000):
        cache.set(key, [key])
    cache.resize(entries_max=10)
    assert len(cache) == 10
    cache.resize(entries_max=100_000)
    for key in range(100_000):
        cache.set(key, [key])
    cache.clear()
    assert len(cache) == 0
    cache.validate()
