"""The door over memory alone: what a miss, a write, an expiry and an invalidation do."""

import asyncio
import random
import sys

import pytest

from headrace.cache import Cache, CachePolicy, MemoryConfig, Strategy
from headrace.errors import CallerError, InvalidKey, NotOpen
from headrace.events import LoadFailed
from tests.loaders import Source, until


def policy_cache(clock, witness=None, **options) -> Cache:
    options.setdefault("jitter", 0)
    return Cache(clock=clock, observer=witness, policies=[CachePolicy(**options)], rng=random.Random(1))


async def test_a_miss_loads_and_a_hit_does_not(cache, source):
    """The loader runs for the first call alone."""
    assert await cache.get_or_load("k", source) == "value"
    assert await cache.get_or_load("k", source) == "value"
    assert source.runs == 1


@pytest.mark.parametrize("value", [None, 0, "", False, [], {}])
async def test_every_value_is_a_value(cache, value):
    """None and other empty values are cached like any other."""
    source = Source(value)
    await cache.get_or_load("k", source)
    assert await cache.get_or_load("k", source) == value
    assert source.runs == 1
    assert await cache.get("k", "absent") == value


async def test_a_loader_may_be_a_plain_function(cache):
    """A loader that returns a value instead of an awaitable is one too."""
    assert await cache.get_or_load("k", lambda: 7) == 7


async def test_a_value_goes_with_its_ttl(cache, clock, source):
    """A value is fresh up to its TTL and loaded again after it."""
    await cache.get_or_load("k", source, ttl=10)
    clock.advance(9.9)
    await cache.get_or_load("k", source, ttl=10)
    assert source.runs == 1
    clock.advance(0.2)
    await cache.get_or_load("k", source, ttl=10)
    assert source.runs == 2


async def test_ttl_none_is_for_ever(cache, clock):
    """TTL None does not expire."""
    await cache.set("k", 1, ttl=None)
    clock.advance(10_000_000)
    assert await cache.get("k") == 1


async def test_ttl_zero_is_not_at_all(cache, source):
    """TTL 0 stores nothing and removes what was there."""
    await cache.set("k", 1)
    await cache.set("k", 2, ttl=0)
    assert await cache.get("k") is None
    await cache.get_or_load("k", source, ttl=0)
    await cache.get_or_load("k", source, ttl=0)
    assert source.runs == 2


@pytest.mark.parametrize("ttl", [-1, float("nan")])
async def test_an_impossible_ttl_is_refused(cache, ttl):
    """A negative TTL is an error of the caller."""
    with pytest.raises(CallerError, match="time to live"):
        await cache.set("k", 1, ttl=ttl)


async def test_the_memory_ttl_rules_keys_without_a_policy(clock):
    """What no policy matches lives for MemoryConfig.ttl."""
    async with Cache(memory=MemoryConfig(ttl=5), clock=clock) as cache:
        await cache.set("k", 1)
        clock.advance(4.9)
        assert await cache.get("k") == 1
        clock.advance(0.2)
        assert await cache.get("k") is None


@pytest.mark.parametrize("key", ["", "x" * 1025, "\n", "}x", 7, None, b"k"])
async def test_a_key_that_cannot_name_an_entry_is_refused(cache, key, source):
    """Keys are printable strings of 1 to 1024 bytes."""
    with pytest.raises(InvalidKey):
        await cache.get_or_load(key, source)
    with pytest.raises(InvalidKey):
        await cache.set(key, 1)


@pytest.mark.parametrize("tag", ["", "\ud800", 7, None])
async def test_a_tag_that_cannot_be_one_is_refused(cache, tag):
    """Tags are held to the rules of keys when they are given and when they are invalidated."""
    with pytest.raises(InvalidKey):
        await cache.set("k", 1, tags=[tag])
    with pytest.raises(InvalidKey):
        await cache.invalidate_tag("good", tag)


async def test_many_at_once(cache):
    """get_many answers in the order of the keys and leaves out what is not there."""
    await cache.set_many({"b": 2, "a": 1, "n": None})
    assert list((await cache.get_many(["a", "x", "n", "b", "a"])).items()) == [("a", 1), ("n", None), ("b", 2)]


async def test_delete_counts_what_was_there(cache):
    """delete removes every key and says how many there were."""
    await cache.set_many({"a": 1, "b": 2})
    assert await cache.delete("a", "b", "c") == 2
    assert await cache.get_many(["a", "b"]) == {}
    assert await cache.delete() == 0


async def test_tags_invalidate_their_entries(cache):
    """invalidate_tag removes what carries one of the tags and nothing else."""
    await cache.set("a", 1, tags=["red"])
    await cache.set("b", 2, tags=["red", "blue"])
    await cache.set("c", 3, tags=["green"])
    assert await cache.invalidate_tag("red") == 2
    assert await cache.get_many(["a", "b", "c"]) == {"c": 3}


async def test_one_string_is_not_a_list_of_tags(cache):
    """tags="red" would mean r, e and d; it is refused."""
    with pytest.raises(CallerError, match="not several"):
        await cache.set("a", 1, tags="red")


async def test_patterns_are_globs_over_the_whole_key(cache):
    """invalidate_pattern matches whole keys by glob, not by substring."""
    await cache.set_many({"agent:1": 1, "agent:22": 2, "reagent:1": 3, "agent": 4})
    assert await cache.invalidate_pattern("agent:?") == 1
    assert await cache.invalidate_pattern("agent:*") == 1
    assert sorted(await cache.get_many(["agent:1", "agent:22", "reagent:1", "agent"])) == ["agent", "reagent:1"]


async def test_clear_forgets_everything(cache):
    """After clear nothing is found."""
    await cache.set_many({"a": 1, "b": 2})
    await cache.clear()
    assert await cache.get_many(["a", "b"]) == {}
    assert cache.statistics().entries == 0


async def test_the_first_policy_that_matches_rules(clock):
    """Policies are asked in order; globs, not substrings."""
    policies = [
        CachePolicy(match="user:*", ttl=10, jitter=0),
        CachePolicy(match="user:vip:*", ttl=99, jitter=0),
        CachePolicy(match="*", ttl=50, jitter=0),
    ]
    async with Cache(clock=clock, policies=policies) as cache:
        await cache.set_many({"user:vip:1": 1, "super-user:1": 2})
        clock.advance(20)
        assert await cache.get_many(["user:vip:1", "super-user:1"]) == {"super-user:1": 2}


async def test_negative_ttl_rules_a_loaded_none(clock):
    """A loaded None lives for negative_ttl, everything else for ttl."""
    async with policy_cache(clock, ttl=100, negative_ttl=5, stale_max=0) as cache:
        none, some = Source(None), Source(1)
        await cache.get_or_load("none", none)
        await cache.get_or_load("some", some)
        clock.advance(6)
        await cache.get_or_load("none", none)
        await cache.get_or_load("some", some)
        assert (none.runs, some.runs) == (2, 1)


async def test_jitter_only_shortens(clock):
    """Of many keys written at once some expire early, by at most the jitter, and none late."""
    async with policy_cache(clock, ttl=100, jitter=0.2, early_refresh=0, stale_max=0) as cache:
        keys = [f"k{number}" for number in range(200)]
        await cache.set_many(dict.fromkeys(keys, 1))
        clock.advance(79.9)
        assert len(await cache.get_many(keys)) == 200
        clock.advance(10)
        assert 20 < len(await cache.get_many(keys)) < 180
        clock.advance(10.2)
        assert await cache.get_many(keys) == {}


async def test_a_stale_value_stands_in_for_a_failed_load(clock, witness, source):
    """Up to stale_max past the TTL an older value answers when the loader fails; later its error does."""
    async with policy_cache(clock, witness, ttl=10, stale_max=50, early_refresh=0) as cache:
        await cache.get_or_load("k", source)
        source.error = OSError("database away")
        clock.advance(20)
        assert await cache.get_or_load("k", source) == "value"
        assert witness.seen(LoadFailed) == [LoadFailed(key="k", error="OSError: database away", stale=True)]
        assert cache.statistics().stale_served == 1
        clock.advance(41)
        with pytest.raises(OSError, match="database away"):
            await cache.get_or_load("k", source)


async def test_a_failed_load_is_not_repeated_at_once(clock, source):
    """After a stale value stood in, the next attempt waits for retry_after."""
    async with policy_cache(clock, ttl=10, stale_max=50, retry_after=2, early_refresh=0) as cache:
        await cache.get_or_load("k", source)
        source.error = OSError("away")
        clock.advance(20)
        for _ in range(5):
            await cache.get_or_load("k", source)
        assert source.runs == 2
        clock.advance(2.1)
        await cache.get_or_load("k", source)
        assert source.runs == 3


async def test_a_value_that_stood_in_keeps_its_tags(clock, source):
    """A stale value that was kept on by a caller who named no tags still goes with its tag."""
    async with policy_cache(clock, ttl=10, stale_max=50, early_refresh=0) as cache:
        await cache.set("k", "old", tags=["t"])
        source.error = OSError("away")
        clock.advance(20)
        assert await cache.get_or_load("k", source) == "old"
        assert await cache.invalidate_tag("t") == 1
        with pytest.raises(OSError, match="away"):
            await cache.get_or_load("k", source)


async def test_strategy_ttl_never_serves_stale(clock, source):
    """Under TTL the loader's error is the answer, however recent the old value is."""
    async with policy_cache(clock, strategy=Strategy.TTL, ttl=10, stale_max=300) as cache:
        await cache.get_or_load("k", source)
        source.error = OSError("away")
        clock.advance(10.1)
        with pytest.raises(OSError, match="away"):
            await cache.get_or_load("k", source)


async def test_refresh_ahead_renews_behind_a_hit(clock, source):
    """From refresh_at of the TTL on, one hit starts one reload and answers with what there is."""
    async with policy_cache(clock, strategy=Strategy.REFRESH_AHEAD, ttl=100, refresh_at=0.8) as cache:
        await cache.get_or_load("k", source)
        source.value = "renewed"
        clock.advance(79)
        assert await cache.get_or_load("k", source) == "value"
        assert source.runs == 1
        clock.advance(2)
        assert [await cache.get_or_load("k", source), await cache.get_or_load("k", source)] == ["value", "value"]
        await until(lambda: source.runs == 2)
        await until(lambda: cache.entry_lookup("k").value == "renewed")
        clock.advance(70)
        assert await cache.get_or_load("k", source) == "renewed"
        assert cache.statistics().refreshes == 1


async def test_refresh_ahead_serves_stale_while_it_reloads(clock, source):
    """Past the TTL and up to stale_max the old value answers at once and one reload runs behind."""
    async with policy_cache(clock, strategy=Strategy.REFRESH_AHEAD, ttl=10, stale_max=20) as cache:
        await cache.get_or_load("k", source)
        source.value = "renewed"
        clock.advance(15)
        assert await cache.get_or_load("k", source) == "value"
        assert cache.statistics().stale_served == 1
        await until(lambda: cache.entry_lookup("k").value == "renewed")
        await until(lambda: len(cache._filler._flights) == 0)
        clock.advance(31)
        source.value = "third"
        assert await cache.get_or_load("k", source) == "third"


async def test_a_dear_value_is_renewed_early(clock):
    """XFetch: what took long to load is renewed before its TTL, behind a hit."""
    runs = 0

    async def load() -> int:
        nonlocal runs
        runs += 1
        clock.advance(5)
        return runs

    async with policy_cache(clock, ttl=100, early_refresh=2.0) as cache:
        await cache.get_or_load("k", load)
        renewed_after = None
        for second in range(100):
            clock.advance(1)
            await cache.get_or_load("k", load)
            await asyncio.sleep(0)
            await asyncio.sleep(0)
            if runs == 2:
                renewed_after = second
                break
        assert renewed_after is not None
        assert renewed_after >= 49


async def test_a_closed_cache_says_so(clock, source):
    """Before open and after close every call that needs the cache raises NotOpen."""
    cache = Cache(clock=clock)
    with pytest.raises(NotOpen):
        await cache.get_or_load("k", source)
    async with cache:
        await cache.set("k", 1)
    with pytest.raises(NotOpen):
        await cache.get("k")


async def test_statistics_count_what_happened(cache, source):
    """Hits, misses, loads and the hit rate are what the calls were."""
    await cache.get_or_load("k", source)
    await cache.get_or_load("k", source)
    await cache.get("k")
    await cache.get("absent")
    statistics = cache.statistics()
    assert (statistics.memory_hits, statistics.memory_misses, statistics.loads) == (2, 2, 1)
    assert statistics.hit_rate == 0.5
    assert statistics.remote_available is None


async def test_weight_max_bounds_bytes(clock):
    """With weight_max the estimated bytes of all entries stay below it."""
    async with Cache(memory=MemoryConfig(weight_max=100_000), clock=clock) as cache:
        await cache.set_many({f"k{number}": "x" * 1000 for number in range(500)})
        assert 20 < cache.statistics().entries <= 62


def test_importing_the_cache_loads_no_driver():
    """redis-py is imported when a tier is opened, not before."""
    import subprocess

    code = "import sys, headrace.cache; sys.exit('redis' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


async def test_a_cache_can_be_opened_again(clock, source):
    """After close it is empty, and open makes it usable once more; two opens at once are refused."""
    cache = Cache(clock=clock)
    async with cache:
        await cache.get_or_load("k", source)
        with pytest.raises(CallerError, match="open already"):
            await cache.open()
    async with cache:
        assert await cache.get("k") is None
        await cache.get_or_load("k", source)
    assert source.runs == 2
