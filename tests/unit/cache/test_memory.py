"""The in-memory cache: what it keeps, for how long, and what it refuses."""

import threading

import pytest

from headrace.cache import MemoryCache
from headrace.errors import CallerError
from headrace.testing import FakeClock

POLICIES = ["adaptive", "lru", "s3fifo", "sieve", "wtinylfu"]


@pytest.fixture
def clock():
    """Time that stands still."""
    return FakeClock()


@pytest.fixture(params=POLICIES)
def policy(request):
    """Every eviction policy."""
    return request.param


def test_a_value_is_found_until_its_time_has_come(clock):
    """The default TTL, a TTL of its own, and no TTL at all."""
    cache = MemoryCache(ttl=10.0, clock=clock)
    cache.set("default", 1)
    cache.set("short", 2, ttl=5.0)
    cache.set("for ever", 3, ttl=None)
    clock.advance(5.0)
    assert (cache.get("default"), cache.get("short"), cache.get("for ever")) == (1, None, 3)
    clock.advance(10**6)
    assert (cache.get("default"), cache.get("for ever")) == (None, 3)


def test_none_is_a_value():
    """It is told apart from absence by the default."""
    cache = MemoryCache()
    cache.set("key", None)
    assert cache.get("key", "absent") is None
    assert cache.get("other", "absent") == "absent"


def test_a_peek_leaves_no_trace(clock):
    """It finds what a read would find, but is counted neither as a hit or a miss nor as a use."""
    cache = MemoryCache(2, ttl=10, policy="lru", clock=clock)
    cache.set("old", 1)
    cache.set("new", 2)
    before = cache.statistics()
    assert (cache.peek("old"), cache.peek("absent"), cache.peek("absent", 0)) == (1, None, 0)
    assert cache.statistics() == before
    cache.set("newest", 3)
    assert "old" not in cache
    clock.advance(10)
    assert cache.peek("new") is None


def test_a_ttl_of_zero_is_not_stored_and_removes_what_was_there():
    """Zero means expired at once, not the default."""
    cache = MemoryCache()
    cache.set("key", 1)
    assert cache.set("key", 2, ttl=0) is False
    assert "key" not in cache
    assert len(cache) == 0


@pytest.mark.parametrize("ttl", [-1.0, float("nan")])
def test_a_ttl_that_is_no_time_is_refused(ttl):
    """Negative and NaN are the caller's mistake, and what was stored stays."""
    cache = MemoryCache()
    cache.set("key", 1)
    with pytest.raises(CallerError, match="ttl"):
        cache.set("key", 2, ttl=ttl)
    assert cache.get("key") == 1


@pytest.mark.parametrize(
    "arguments", [{"entries_max": 0}, {"weight_max": 0}, {"policy": "magic"}, {"ttl": -5.0}], ids=str
)
def test_bounds_that_nothing_could_meet_are_refused(arguments):
    """At construction, with a fix."""
    with pytest.raises(CallerError) as caught:
        MemoryCache(**arguments)
    assert caught.value.fix


def test_it_never_holds_more_entries_than_allowed(policy):
    """Whatever the policy, at any moment, also after shrinking."""
    cache = MemoryCache(50, policy=policy)
    for key in range(500):
        cache.set(key % 170, key)
        cache.get(key % 7)
        assert len(cache) <= 50
    cache.resize(entries_max=10)
    assert len(cache) == 10
    assert cache.statistics().evictions >= 120


def test_it_never_holds_more_weight_than_allowed(policy):
    """A value heavier than the bound is refused, and an older value of its key is gone."""
    cache = MemoryCache(1000, weight_max=100, policy=policy)
    for key in range(200):
        cache.set(key, key, weight=1 + key % 30)
        assert cache.statistics().weight <= 100
    cache.set("heavy", 1, weight=100)
    assert cache.set("heavy", 2, weight=101) is False
    assert "heavy" not in cache


def test_what_is_asked_for_often_outlives_a_scan(policy):
    """A hundred keys in constant use survive ten thousand that are seen once; LRU and SIEVE may lose some."""
    cache = MemoryCache(200, policy=policy)
    for _ in range(5):
        for key in range(100):
            if cache.get(("hot", key)) is None:
                cache.set(("hot", key), key)
    found = 0
    for scanned in range(10_000):
        cache.set(("cold", scanned), scanned)
        hot = ("hot", scanned % 100)
        if cache.get(hot) is None:
            cache.set(hot, 0)
        else:
            found += 1
    assert found >= (9_000 if policy in {"adaptive", "s3fifo", "wtinylfu"} else 5_000)


def test_tags_name_groups(clock):
    """Invalidating a tag removes its members and nobody else; a replaced value has its own tags only."""
    cache = MemoryCache(clock=clock)
    cache.set("a", 1, tags=("x", "y"))
    cache.set("b", 2, tags=("x",))
    cache.set("c", 3)
    cache.set("a", 4, tags=("y",))
    assert cache.invalidate_tag("x") == 1
    assert (cache.get("a"), cache.get("b"), cache.get("c")) == (4, None, 3)
    assert cache.invalidate_tag("unknown") == 0


def test_delete_says_whether_there_was_a_value(clock):
    """An expired one does not count."""
    cache = MemoryCache(clock=clock)
    cache.set("a", 1)
    cache.set("b", 1, ttl=1.0)
    clock.advance(2.0)
    assert (cache.delete("a"), cache.delete("b"), cache.delete("c")) == (True, False, False)


def test_delete_where_removes_what_matches():
    """For patterns: every key for which the predicate holds."""
    cache = MemoryCache()
    for key in range(100):
        cache.set(key, key)
    assert cache.delete_where(lambda key: key % 2 == 0) == 50
    assert len(cache) == 50
    assert 1 in cache
    assert 2 not in cache


def test_statistics_add_up(clock):
    """Hits, misses, sets, evictions, expirations and their rate."""
    cache = MemoryCache(2, ttl=10.0, policy="lru", clock=clock)
    for key in "abc":
        cache.set(key, key)
    cache.get("c")
    cache.get("a")
    clock.advance(20.0)
    cache.get("c")
    statistics = cache.statistics()
    assert (statistics.hits, statistics.misses, statistics.sets, statistics.evictions) == (1, 2, 3, 1)
    assert statistics.hit_rate == pytest.approx(1 / 3)
    assert MemoryCache().statistics().hit_rate is None


def test_expired_entries_give_their_memory_back_without_being_asked_for(clock):
    """Later writes collect them, a bounded number each."""
    cache = MemoryCache(10_000, ttl=1.0, clock=clock)
    for key in range(1000):
        cache.set(key, key)
    clock.advance(3600.0)
    for key in range(1000):
        cache.set(("new", key), key, ttl=None)
    assert len(cache) == 1000
    assert cache.statistics().expirations == 1000


def test_clear_forgets_everything(policy):
    """And the cache works on."""
    cache = MemoryCache(10, policy=policy)
    for key in range(20):
        cache.set(key, key, tags=("t",))
    cache.clear()
    assert (len(cache), cache.invalidate_tag("t"), cache.statistics().weight) == (0, 0, 0)
    cache.set("a", 1)
    assert cache.get("a") == 1


def test_a_key_that_calls_the_cache_does_no_harm(policy):
    """A finalizer or a comparison may use the cache in the middle of its own call."""
    cache = MemoryCache(5, policy=policy)

    class Nosy:
        def __del__(self):
            cache.set("from a finalizer", 1)
            cache.get("anything")

    for key in range(50):
        cache.set(key, Nosy())
        assert len(cache) <= 5
    cache.clear()
    assert cache.get("from a finalizer") in {None, 1}


def test_eight_threads_leave_it_whole(policy):
    """Values belong to their keys, the bound holds, and what was counted is what was done."""
    cache = MemoryCache(100, policy=policy)
    wrong = []

    def work(seed):
        number = seed
        for _ in range(4000):
            number = (number * 1_103_515_245 + 12_345) % 2**31
            key = number % 300
            if number % 3 == 0:
                cache.set(key, key * 7)
            elif number % 31 == 0:
                cache.delete(key)
            elif cache.get(key, key * 7) != key * 7:
                wrong.append(key)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []
    assert len(cache) <= 100
    assert cache.statistics().size == len(cache)
