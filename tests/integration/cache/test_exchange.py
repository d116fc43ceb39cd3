"""Updates against invalidations that come between their read and their write, on one node and on a cluster."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable

import pytest
from msgspec import UNSET

from headrace.cache import Cache, CachePolicy, RemoteConfig, Strategy
from headrace.cache.updating import ATTEMPTS_MAX
from headrace.errors import CacheUnavailable
from headrace.testing import TcpProxy
from tests.redis_servers import CLOCK, PATIENT, until

POLICIES = [CachePolicy(match="b:*", strategy=Strategy.WRITE_BEHIND, jitter=0), CachePolicy(ttl=60, jitter=0)]
SWAPS = ("EVALSHA", "EVAL")


@pytest.fixture(params=["single", "cluster"])
async def pair(request: pytest.FixtureRequest) -> AsyncIterator[tuple[Cache, Cache]]:
    """Two processes on one shared tier, as far as coherence goes; the second has no memory of its own."""
    if request.param == "single":
        url = request.getfixturevalue("start_redis")().url
    else:
        url = request.getfixturevalue("start_cluster")(primaries=3, replicas=0).url
    remote = RemoteConfig(url=url, **PATIENT)
    async with Cache(remote=remote, policies=POLICIES) as one, Cache(remote=remote, memory=None) as two:
        yield one, two


class Counter:
    """Counts up, and remembers what it was given."""

    def __init__(self) -> None:
        self.given: list[object] = []

    def __call__(self, old: object) -> object:
        self.given.append(old)
        return 1 if old is UNSET else old + 1  # type: ignore[operator]


def before_the_write(cache: Cache, act: Callable[[], Awaitable[object]]) -> None:
    """Once, when the cache is about to swap, do something first."""
    remote = cache._shared._remote
    call = remote.call

    async def call_late(key: bytes, *command: object) -> object:
        if command[0] in SWAPS:
            remote.call = call
            await act()
        return await call(key, *command)

    remote.call = call_late


@pytest.mark.parametrize("how", ["clear", "tag", "delete", "pattern"])
async def test_an_update_that_straddles_an_invalidation_decides_again(pair, how):
    """Another process's invalidation between the read and the write: the outcome is made from nothing, and all see
    it."""
    one, two = pair
    await one.set("n", 41, tags=["t"])
    acts = {
        "clear": two.clear,
        "tag": lambda: two.invalidate_tag("t"),
        "delete": lambda: two.delete("n"),
        "pattern": lambda: two.invalidate_pattern("n*"),
    }
    before_the_write(one, acts[how])
    count = Counter()
    assert await one.update("n", count) == 1
    assert count.given == [41, UNSET]
    assert [await one.get("n"), await two.get("n")] == [1, 1]


@pytest.mark.parametrize("how", ["clear", "tag"])
async def test_a_first_update_that_straddles_an_invalidation_is_not_lost(pair, how):
    """Where there was nothing, what is written is neither under a dead name nor with a dead tag."""
    one, two = pair
    await two.set("other", 1, tags=["t"])
    before_the_write(one, two.clear if how == "clear" else lambda: two.invalidate_tag("t"))
    count = Counter()
    assert await one.update("n", count, tags=["t"]) == 1
    assert count.given == [UNSET, UNSET]
    assert await two.get("n") == 1
    await two.invalidate_tag("t")
    assert await two.get("n") is None


async def test_the_tag_of_a_value_that_is_replaced_is_checked_too(pair):
    """An update that gives tags of its own does not build on a value whose tag was invalidated meanwhile."""
    one, two = pair
    await one.set("n", 41, tags=["old"])
    before_the_write(one, lambda: two.invalidate_tag("old"))
    assert await one.update("n", Counter(), tags=["new"]) == 1
    assert await two.get("n") == 1


@pytest.mark.parametrize("how", ["delete", "clear", "pattern", "tag"])
async def test_an_update_beside_an_invalidation_of_its_own_process_is_carried_out(pair, how):
    """One that is on its way is waited for, not taken for a shared tier that is away."""
    one, two = pair
    for _ in range(5):
        await one.set("n", 41, tags=["t"])
        acts = {
            "clear": one.clear,
            "tag": lambda: one.invalidate_tag("t"),
            "delete": lambda: one.delete("n"),
            "pattern": lambda: one.invalidate_pattern("n*"),
        }
        outcome, _ = await asyncio.gather(one.update("n", Counter()), acts[how]())
        assert outcome in {1, 42}
        assert await one.get("n") in {None, outcome}
        await two._shared.learn_generation()
        assert await two.get("n") in {None, outcome}


@pytest.mark.parametrize("how", ["clear", "pattern"])
async def test_an_update_waits_for_an_invalidation_of_its_own_process_however_slow_it_is(server, how):
    """A server that takes its time is not away: the outcome is made from nothing once the invalidation has arrived."""
    async with TcpProxy(server.socket) as proxy:
        remote = RemoteConfig(url=f"redis://{proxy.address}/0", **PATIENT)
        async with Cache(remote=remote, policies=POLICIES) as one:
            await one.set("n", 41)
            one._updater._rng = lambda: 0.0
            start, count = asyncio.get_running_loop().create_task, Counter()
            proxy.deaf()
            invalidating = start(one.clear() if how == "clear" else one.invalidate_pattern("n*"))
            updating = start(one.update("n", count))
            for _ in range(4 * ATTEMPTS_MAX):
                await asyncio.sleep(0)
            assert not invalidating.done()
            assert not updating.done()
            proxy.heal()
            await invalidating
            assert await updating == 1
            assert count.given == [UNSET]


async def test_counts_beside_clears_are_never_of_the_past(pair):
    """Of many updates among many clears, each counts on from an update of the same generation, or from none."""
    one, two = pair
    outcomes: list[int] = []

    async def count(cache: Cache) -> None:
        for _ in range(40):
            outcomes.append(await cache.update("n", Counter()))

    async def clear() -> None:
        for _ in range(10):
            await two.clear()
            await asyncio.sleep(0.003)

    await asyncio.gather(count(one), count(two), clear())
    last = await two.get("n")
    assert last is None or outcomes.count(last) >= 1
    assert await one.update("n", Counter()) == (last or 0) + 1
    # Each clear begins at most one run from 1 on, and no run has a gap or a double.
    runs = outcomes.count(1)
    assert runs <= 11
    assert all(outcomes.count(number) <= runs for number in set(outcomes))
    assert sorted(set(outcomes)) == list(range(1, max(outcomes) + 1))


async def test_a_stale_values_tags_go_with_it(pair):
    """What is past its TTL is no value to an update, and its tags do not hold for the new one."""
    one, two = pair
    await one.set("n", 41, ttl=0.02, tags=["t"])
    written = CLOCK.wall()
    await until(lambda: CLOCK.wall() > written + 0.03, "the value went stale")
    assert await one.update("n", Counter(), ttl=60) == 1
    await two.invalidate_tag("t")
    assert await two.get("n") == 1


async def test_tags_that_cannot_be_read_are_no_reason_to_begin_anew(start_cluster):
    """With the node of a value's tag away, an update says so instead of counting from nothing."""
    cluster = start_cluster(primaries=3, replicas=0)
    remote = RemoteConfig(url=cluster.url, **PATIENT)
    async with Cache(remote=remote, policies=POLICIES) as cache:
        shared = cache._shared
        await cache.set("n", 41, tags=["t"])
        get_many = shared._remote.get_many

        async def fail(names: list[bytes]) -> list[object]:
            return [CacheUnavailable("the node is away") for _ in names]

        shared._remote.get_many = fail
        count = Counter()
        with pytest.raises(CacheUnavailable):
            await cache.update("n", count)
        assert count.given == []
        shared._remote.get_many = get_many
        assert await cache.update("n", count) == 42


async def test_an_update_among_a_stream_of_queued_writes_is_carried_out(pair):
    """What is queued for other keys after an update began does not hold it up for ever."""
    one, _ = pair
    is_over = False

    async def write() -> None:
        number = 0
        while not is_over:
            number += 1
            await one.set(f"b:{number % 50}", number)
            await asyncio.sleep(0)

    writing = asyncio.get_running_loop().create_task(write())
    try:
        async with asyncio.timeout(60):
            await one.flush()
            assert await one.update("n", Counter()) == 1
    finally:
        is_over = True
        await writing
