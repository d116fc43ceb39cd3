"""The door over memory alone: what a miss, a write, an expiry and an invalidation do."""

import asyncio
import random
import sys
import threading
from collections.abc import AsyncIterator, Callable

import pytest

from headrace.cache import Cache, CachePolicy, MemoryConfig, Strategy
from headrace.errors import CallerError, InvalidKey, LoadTimeout, NotOpen, RecursiveLoad
from headrace.events import LoadFailed


class Source:
    """A loader that counts its runs and returns what it was told last."""

    def __init__(self, value: object = "value") -> None:
        self.value = value
        self.runs = 0
        self.error: Exception | None = None

    async def __call__(self) -> object:
        self.runs += 1
        await asyncio.sleep(0)
        if self.error is not None:
            raise self.error
        return self.value


@pytest.fixture
def source() -> Source:
    return Source()


@pytest.fixture
async def cache(clock) -> AsyncIterator[Cache]:
    async with Cache(clock=clock) as cache:
        yield cache


def policy_cache(clock, witness=None, **options) -> Cache:
    options.setdefault("jitter", 0)
    return Cache(clock=clock, observer=witness, policies=[CachePolicy(**options)], rng=random.Random(1))


def start(work) -> asyncio.Task:
    return asyncio.get_running_loop().create_task(work)


async def until(condition: Callable[[], bool]) -> None:
    """Give way to the loop until the condition holds."""
    for _ in range(1000):
        if condition():
            return
        await asyncio.sleep(0)
    raise AssertionError("the condition never came true")


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


async def test_concurrent_misses_share_one_load(cache, source):
    """A hundred callers of a cold key cost one load."""
    values = await asyncio.gather(*(cache.get_or_load("k", source) for _ in range(100)))
    assert values == ["value"] * 100
    assert source.runs == 1
    assert cache.statistics().coalesced == 99


async def test_cancelling_the_first_caller_leaves_the_others_their_value(cache):
    """The load belongs to the cache: the caller that began it may leave."""
    gate = asyncio.Event()

    async def load() -> str:
        await gate.wait()
        return "value"

    callers = [start(cache.get_or_load("k", load)) for _ in range(10)]
    await until(lambda: cache.statistics().loads == 1)
    callers[0].cancel()
    await asyncio.wait([callers[0]])
    gate.set()
    assert callers[0].cancelled()
    assert await asyncio.gather(*callers[1:]) == ["value"] * 9


async def test_the_load_ends_with_its_last_waiter(cache):
    """When every caller was cancelled the loader is cancelled too, and a later caller starts afresh."""
    ended = asyncio.Event()

    async def load() -> None:
        try:
            await asyncio.Event().wait()
        finally:
            ended.set()

    callers = [start(cache.get_or_load("k", load)) for _ in range(3)]
    await until(lambda: cache.statistics().loads == 1)
    for caller in callers:
        caller.cancel()
    await asyncio.wait(callers)
    await asyncio.wait_for(ended.wait(), 5)
    assert await cache.get_or_load("k", Source("fresh")) == "fresh"


async def test_an_exception_reaches_all_and_is_not_cached(cache, source):
    """Ten waiters get what the loader raised; the next call loads again."""
    source.error = ValueError("no such user")
    outcomes = await asyncio.gather(*(cache.get_or_load("k", source) for _ in range(10)), return_exceptions=True)
    assert [str(outcome) for outcome in outcomes] == ["no such user"] * 10
    source.error = None
    assert await cache.get_or_load("k", source) == "value"
    assert source.runs == 2


async def test_a_load_keeps_the_callers_context(cache):
    """Context variables of the caller are seen by the loader."""
    import contextvars

    tenant = contextvars.ContextVar("tenant", default="nobody")
    tenant.set("acme")

    async def load() -> str:
        await asyncio.sleep(0)
        return tenant.get()

    assert await cache.get_or_load("k", load) == "acme"


async def test_a_loader_that_asks_for_its_own_key_is_told(cache):
    """A load that would wait for itself raises instead of hanging."""

    async def load() -> object:
        return await cache.get_or_load("k", load)

    with pytest.raises(RecursiveLoad, match="k -> k"):
        await cache.get_or_load("k", load)


async def test_loaders_that_wait_for_each_other_are_told(cache):
    """A cycle over several keys and tasks is found as well, and breaks at one place."""
    both = asyncio.Barrier(2)

    async def load_a() -> object:
        await both.wait()
        return await cache.get_or_load("b", load_b)

    async def load_b() -> object:
        await both.wait()
        return await cache.get_or_load("a", load_a)

    outcomes = await asyncio.gather(
        cache.get_or_load("a", load_a), cache.get_or_load("b", load_b), return_exceptions=True
    )
    assert any(isinstance(outcome, RecursiveLoad) for outcome in outcomes)


async def test_an_invalidation_during_a_load_wins(cache, source):
    """A value that was being loaded when its key was deleted answers its callers and is not kept."""
    gate = asyncio.Event()

    async def load() -> str:
        await gate.wait()
        return "old"

    caller = start(cache.get_or_load("k", load))
    await until(lambda: cache.statistics().loads == 1)
    await cache.delete("k")
    late = await cache.get_or_load("k", Source("new"))
    gate.set()
    assert await caller == "old"
    assert late == "new"
    assert await cache.get("k") == "new"
    assert cache.statistics().installs_refused == 1


@pytest.mark.parametrize("how", ["set", "tag", "pattern", "clear"])
async def test_every_kind_of_change_wins_over_a_load_under_way(cache, how):
    """A write, a tag, a pattern and clear turn a value away that was being loaded when they came."""
    gate = asyncio.Event()

    async def load() -> str:
        await gate.wait()
        return "old"

    caller = start(cache.get_or_load("k", load, tags=["t"]))
    await until(lambda: cache.statistics().loads == 1)
    match how:
        case "set":
            await cache.set("k", "set")
        case "tag":
            await cache.invalidate_tag("t")
        case "pattern":
            await cache.invalidate_pattern("k*")
        case _:
            await cache.clear()
    gate.set()
    await caller
    assert await cache.get("k") == ("set" if how == "set" else None)


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


async def test_a_hard_timeout_ends_the_load(clock):
    """load_timeout cancels the loader and is told as LoadTimeout."""
    async with policy_cache(clock, load_timeout=0.01, stale_max=0) as cache:
        with pytest.raises(LoadTimeout, match="longer than"):
            await cache.get_or_load("k", lambda: asyncio.Event().wait())


async def test_a_loaders_own_timeout_is_its_own(clock):
    """A TimeoutError that the loader raises is not taken for ours."""
    async with policy_cache(clock, load_timeout=5, stale_max=0) as cache:

        async def load() -> None:
            raise TimeoutError("the loader's")

        with pytest.raises(TimeoutError, match="the loader's"):
            await cache.get_or_load("k", load)


async def test_a_soft_timeout_answers_stale_and_lets_the_load_finish(clock):
    """A load over load_timeout_soft goes on behind while the stale value answers."""
    gate = asyncio.Event()

    async def load() -> str:
        await gate.wait()
        return "late"

    async with policy_cache(clock, ttl=10, stale_max=50, load_timeout_soft=0.01, early_refresh=0) as cache:
        await cache.set("k", "stale")
        clock.advance(11)
        assert await cache.get_or_load("k", load) == "stale"
        gate.set()
        await until(lambda: cache.entry_lookup("k").value == "late")


async def test_a_closed_cache_says_so(clock, source):
    """Before open and after close every call that needs the cache raises NotOpen."""
    cache = Cache(clock=clock)
    with pytest.raises(NotOpen):
        await cache.get_or_load("k", source)
    async with cache:
        await cache.set("k", 1)
    with pytest.raises(NotOpen):
        await cache.get("k")


async def test_closing_ends_loads_and_tells_their_callers(clock):
    """A caller that waits when the cache closes gets NotOpen, not a cancellation."""
    cache = Cache(clock=clock)
    await cache.open()
    caller = start(cache.get_or_load("k", lambda: asyncio.Event().wait()))
    await until(lambda: cache.statistics().loads == 1)
    await cache.close()
    with pytest.raises(NotOpen, match="closed while"):
        await caller


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


async def test_loads_coalesce_over_event_loops(cache):
    """A caller in another thread's loop waits for the load that this loop runs."""
    gate = asyncio.Event()
    runs = 0

    async def load() -> str:
        nonlocal runs
        runs += 1
        await gate.wait()
        return "value"

    here = start(cache.get_or_load("k", load))
    await until(lambda: runs == 1)
    elsewhere = start(asyncio.to_thread(asyncio.run, cache.get_or_load("k", load)))
    while cache._filler._flights._table["k"].waiters.__len__() < 2:
        await asyncio.sleep(0.001)
    gate.set()
    assert [await here, await elsewhere] == ["value", "value"]
    assert runs == 1


async def test_many_threads_share_one_blocking_load(cache):
    """Plain functions in many threads load a cold key once."""
    entered, leave = threading.Event(), threading.Event()
    runs = []

    @cache.cached("slow:{name}")
    def slow(name: str) -> str:
        runs.append(name)
        entered.set()
        assert leave.wait(10)
        return name.upper()

    calls = [start(asyncio.to_thread(slow, "x")) for _ in range(4)]
    await asyncio.to_thread(entered.wait, 10)
    while len(cache._filler._flights._table["slow:x"].waiters) < 4:
        await asyncio.sleep(0.001)
    leave.set()
    assert await asyncio.gather(*calls) == ["X"] * 4
    assert runs == ["x"]


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
