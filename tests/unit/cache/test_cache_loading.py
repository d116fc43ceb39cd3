"""Loads behind the door: who shares one, who may leave it, what ends it, and what it may not overwrite."""

import asyncio
import random
import threading

import pytest

from headrace.cache import Cache, CachePolicy
from headrace.errors import LoadTimeout, NotOpen, RecursiveLoad
from tests.loaders import Source, start, until


def policy_cache(clock, witness=None, **options) -> Cache:
    options.setdefault("jitter", 0)
    return Cache(clock=clock, observer=witness, policies=[CachePolicy(**options)], rng=random.Random(1))


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
    await asyncio.wait_for(ended.wait(), 60)
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


async def test_closing_ends_loads_and_tells_their_callers(clock):
    """A caller that waits when the cache closes gets NotOpen, not a cancellation."""
    cache = Cache(clock=clock)
    await cache.open()
    caller = start(cache.get_or_load("k", lambda: asyncio.Event().wait()))
    await until(lambda: cache.statistics().loads == 1)
    await cache.close()
    with pytest.raises(NotOpen, match="closed while"):
        await caller


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
        assert leave.wait(60)
        return name.upper()

    calls = [start(asyncio.to_thread(slow, "x")) for _ in range(4)]
    await asyncio.to_thread(entered.wait, 60)
    while len(cache._filler._flights._table["slow:x"].waiters) < 4:
        await asyncio.sleep(0.001)
    leave.set()
    assert await asyncio.gather(*calls) == ["X"] * 4
    assert runs == ["x"]


async def change(cache: Cache, key: str, value: object, how: int) -> None:
    """Replace or invalidate a value in one of the five ways that there are."""
    match how:
        case 0:
            await cache.set(key, value, tags=["t"])
        case 1:
            await cache.invalidate_tag("t")
        case 2:
            await cache.invalidate_pattern("k*")
        case 3:
            await cache.clear()
        case _:
            await cache.delete(key)


@pytest.mark.parametrize("seed", range(20))
async def test_no_interleaving_keeps_an_old_value(clock, seed):
    """Loads and changes in a hundred random orders a seed: what stays is the source's last value, or nothing."""
    rng = random.Random(seed)

    async def pause() -> None:
        for _ in range(rng.randrange(4)):
            await asyncio.sleep(0)

    async with Cache(clock=clock) as cache:
        for round_number in range(100):
            key, truth = f"k{round_number}", [0]

            async def load(truth=truth) -> int:
                await pause()
                value = truth[-1]
                await pause()
                return value

            async def read(key=key, load=load) -> None:
                await pause()
                await cache.get_or_load(key, load, tags=["t"])

            async def write(key=key, truth=truth) -> None:
                await pause()
                truth.append(truth[-1] + 1)
                await change(cache, key, truth[-1], rng.randrange(5))

            work = [read() for _ in range(6)] + [write() for _ in range(3)]
            rng.shuffle(work)
            await asyncio.gather(*work)
            assert await cache.get(key) in {None, truth[-1]}, f"seed {seed}, round {round_number}"


@pytest.fixture
async def stuck():
    """A plain loader that does not return before the test ends."""
    entered, release = threading.Event(), threading.Event()

    def load() -> str:
        entered.set()
        release.wait(60)
        return "late"

    load.entered = entered
    yield load
    release.set()


async def test_a_thread_waits_for_a_stuck_plain_loader_until_the_hard_limit(clock, stuck):
    """Threads and coroutines that wait for another thread's loader get LoadTimeout; the next caller loads himself."""
    async with policy_cache(clock, ttl=60, load_timeout=0.05) as cache:
        decorated = cache.cached("k", ttl=60)(stuck)
        first = start(asyncio.to_thread(decorated))
        await asyncio.to_thread(stuck.entered.wait, 60)
        with pytest.raises(LoadTimeout, match="'k'"):
            await asyncio.to_thread(decorated)
        assert await cache.get_or_load("k", Source("fresh")) == "fresh"
        first.cancel()


async def test_a_stale_value_stands_in_for_a_stuck_plain_loader(clock, stuck):
    """Who has waited long enough for another thread's loader gets the stale value that the policy allows."""
    async with policy_cache(clock, ttl=10, stale_max=60, load_timeout=0.05) as cache:
        await cache.set("k", "old")
        clock.advance(20)
        decorated = cache.cached("k")(stuck)
        first = start(asyncio.to_thread(decorated))
        await asyncio.to_thread(stuck.entered.wait, 60)
        assert await cache.get_or_load("k", Source("fresh")) == "old"
        assert cache.statistics().stale_served == 1
        assert await cache.get_or_load("k", Source("fresh")) == "fresh"
        first.cancel()


async def test_a_stale_value_stands_in_for_threads_too(clock, stuck):
    """The same for a thread that waits."""
    async with policy_cache(clock, ttl=10, stale_max=60, load_timeout=0.05) as cache:
        await cache.set("k", "old")
        clock.advance(20)
        decorated = cache.cached("k")(stuck)
        first = start(asyncio.to_thread(decorated))
        await asyncio.to_thread(stuck.entered.wait, 60)
        assert await asyncio.to_thread(decorated) == "old"
        first.cancel()
