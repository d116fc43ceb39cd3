"""Redis slow, deaf, killed, restarted, flushed: what the callers of the cache see of it, and for how long."""

import asyncio
import itertools
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest

from headrace.cache import CachePolicy, Strategy
from headrace.errors import CacheUnavailable
from headrace.events import TierRecovered, TierUnavailable, WriteDropped
from tests.redis_servers import CLOCK, IMPATIENT_S, at_once, deaf, settled, until, until_found


def start(work) -> asyncio.Task:
    return asyncio.get_running_loop().create_task(work)


async def usable(cache) -> None:
    """Return when values reach the shared tier again."""
    async with asyncio.timeout(60):
        for number in itertools.count():
            await cache.set("probe", number)
            if await cache.get("probe") == number and cache.statistics().remote_available:
                return
            await asyncio.sleep(0.02)


@asynccontextmanager
async def killed(server) -> AsyncIterator[None]:
    """Without the server, and with an empty one afterwards."""
    server.stop()
    try:
        yield
    finally:
        await asyncio.to_thread(server.start)


async def test_a_dead_server_never_breaks_a_caller(open_cache, server, witness):
    """With Redis gone every call still answers: reads load, writes stay in memory, and each tier is told of once."""
    cache = await open_cache(remote={"degraded_ttl": 60})
    await cache.set("before", 1)
    server.stop()
    assert await cache.get_or_load("k", lambda: "loaded") == "loaded"
    await cache.set("w", 2)
    assert await cache.get("w") == 2
    assert await cache.get_many(["w", "x"]) == {"w": 2}
    assert await cache.delete("w") == 1
    assert await cache.get("w") is None
    await cache.invalidate_tag("t")
    await cache.invalidate_pattern("b*")
    assert await cache.get("before") is None
    await until(lambda: len(witness.seen(TierUnavailable)) == 2, "both are told of")
    assert sorted(event.tier.split()[0] for event in witness.seen(TierUnavailable)) == ["invalidation", "remote"]
    assert witness.seen(WriteDropped)
    assert cache.statistics().remote_available is False


async def test_opening_without_a_server_works(open_cache, server, witness):
    """A cache opens although Redis is away, loads by itself, and uses it when it comes."""
    server.stop()
    cache = await open_cache(memory=None)
    assert await cache.get_or_load("k", lambda: 1) == 1
    await asyncio.to_thread(server.start)
    await usable(cache)
    recovered = [event for event in witness.seen(TierRecovered) if event.tier != "invalidation"]
    assert len(recovered) == 1
    assert recovered[0].down_s > 0


async def test_a_restart_is_survived(open_cache, server):
    """After kill -9 and a restart the same cache works again by itself."""
    cache = await open_cache(memory=None)
    for _ in range(3):
        await usable(cache)
        server.stop()
        assert await cache.get_or_load("k", lambda: 1) == 1
        await asyncio.to_thread(server.start)
    await usable(cache)


async def test_a_deaf_server_costs_one_timeout(open_cache, server, witness):
    """A server that stops answering fails the calls on the way after the timeout and later ones at once."""
    cache = await open_cache(memory=None)
    await usable(cache)
    async with deaf(server, cache):
        started = CLOCK.monotonic()
        assert await cache.get("k", "miss") == "miss"
        assert 0.75 * IMPATIENT_S < CLOCK.monotonic() - started < 50 * IMPATIENT_S
        await until(lambda: witness.seen(TierUnavailable), "told")
        for _ in range(100):
            assert at_once(cache.get("k", "miss")) == "miss"
    await usable(cache)


async def test_killed_connections_fail_what_is_on_the_way_and_nothing_else(open_cache, server):
    """With the connection killed again and again no call hangs, raises or gets another call's reply."""
    cache = await open_cache(memory=None)
    keys = [f"k{number}" for number in range(50)]
    await cache.set_many({key: key for key in keys})
    running = True

    async def read_on(key: str) -> int:
        reads = 0
        while running:
            assert await cache.get(key) in {key, None}
            reads += 1
            await asyncio.sleep(0)  # a call that fails at once does not give way
        return reads

    readers = [start(read_on(key)) for key in keys]
    with server.client() as client:
        for _ in range(20):
            for line in await asyncio.to_thread(client.client_list):
                if line["name"] == "headrace":
                    await asyncio.to_thread(client.client_kill_filter, _id=line["id"])
            await asyncio.sleep(0.01)
    await usable(cache)
    running = False
    assert min(await asyncio.gather(*readers)) > 0
    assert await cache.get_many(keys) == {key: key for key in keys}


async def test_an_invalidation_is_delivered_when_the_server_returns(open_cache, server):
    """What was deleted while Redis could not be reached is not believed until the delete was delivered."""
    a, b = await open_cache(memory=None), await open_cache(memory=None)
    await a.set_many({"deleted": "old", "kept": 1})
    await a.set("tagged", "old", tags=["t"])
    async with deaf(server, a):
        await a.delete("deleted")
        await a.invalidate_tag("t")

    async def found_by_both() -> list[dict[str, object]]:
        assert await a.get("deleted") is None
        assert await a.get("tagged") is None
        return [await cache.get_many(["deleted", "tagged", "kept"]) for cache in (a, b)]

    await until_found(found_by_both, [{"kept": 1}] * 2)


async def test_too_many_owed_invalidations_clear_the_namespace(open_cache, server):
    """Beyond deferred_max single keys are not remembered: everything is cleared on return, so nothing old survives."""
    a, b = await open_cache(remote={"deferred_max": 10}, memory=None), await open_cache(memory=None)
    await a.set_many({f"k{number}": "old" for number in range(50)})
    async with deaf(server, a):
        await asyncio.gather(*(a.delete(f"k{number}") for number in range(20)))
    await usable(a)
    await until_found(lambda: b.get_many([f"k{number}" for number in range(50)]), {})


async def test_a_write_that_was_lost_is_not_overtaken_by_the_old_value(open_cache, server):
    """After a failed set the old shared value is not served by this process, and is removed on return."""
    cache = await open_cache(memory=None)
    await cache.set("k", "old")
    async with deaf(server, cache):
        await cache.set("k", "new")
    await usable(cache)
    for _ in range(200):
        assert await cache.get("k") in {None, "new"}
        await asyncio.sleep(0.001)


async def test_strict_write_through_says_that_it_failed(open_cache, server):
    """WRITE_THROUGH with stale_max=0 raises when the shared tier did not take the value; others do not."""
    policies = [
        CachePolicy(match="strict:*", strategy=Strategy.WRITE_THROUGH, stale_max=0),
        CachePolicy(match="*", strategy=Strategy.WRITE_THROUGH),
    ]
    cache = await open_cache(policies=policies)
    server.stop()
    await cache.set("lenient:1", 1)
    with pytest.raises(CacheUnavailable, match="strict:1"):
        await cache.set("strict:1", 1)


async def test_stale_copies_answer_reads_while_the_server_is_away(open_cache, server):
    """get serves an expired copy within stale_max when the shared tier cannot be asked."""
    cache = await open_cache(policies=[CachePolicy(ttl=0.05, stale_max=60, jitter=0)])
    while cache.entry_lookup("k") is None:  # a write is not kept here if meanwhile invalidations began to be heard
        await cache.set("k", "old")
    server.stop()
    await until(lambda: cache.entry_lookup("k").fresh_until < cache.now(), "the copy went stale")
    assert await cache.get("k") == "old"
    assert cache.statistics().stale_served == 1


async def test_a_flood_is_bounded(open_cache, server):
    """More calls than pending_max on the way fail at once instead of queueing without end."""
    cache = await open_cache(remote={"pending_max": 100}, memory=None)
    await usable(cache)
    outcomes = await asyncio.gather(*(cache.get("probe", "miss") for _ in range(1000)))
    assert outcomes.count("miss") >= 800
    assert cache.statistics().remote_errors >= 800
    await usable(cache)


async def test_a_readonly_server_degrades(open_cache, server, witness):
    """A server that refuses writes costs the write, not the caller."""
    cache = await open_cache(memory=None)
    await cache.set("k", 1)
    with server.client() as client:
        client.replicaof("127.0.0.1", "1")
        await cache.set("k", 2)
        assert witness.seen(WriteDropped)
        client.replicaof("no", "one")
    await usable(cache)


async def test_a_full_server_degrades(open_cache, server, witness):
    """A server out of memory refuses the value; the caller is not told, the observer is."""
    cache = await open_cache(remote={"degraded_ttl": 60})
    with server.client() as client:
        client.config_set("maxmemory", "1")
        await cache.set("k", 1)
        assert await cache.get("k") == 1
        assert "OOM" in witness.seen(WriteDropped)[0].reason
        client.config_set("maxmemory", "0")
    await usable(cache)


@pytest.mark.parametrize("how", ["killed", "deaf"])
@pytest.mark.parametrize("tags", [(), ("t",)], ids=["plain", "tagged"])
async def test_the_set_that_finds_the_server_gone_stays_in_memory(open_cache, server, how, tags):
    """The first write into the outage is kept like the ones after it, for `degraded_ttl`, and is gone once Redis is
    back."""
    cache = await open_cache(remote={"degraded_ttl": 60}, policies=[CachePolicy(ttl=60, jitter=0)])
    other = await open_cache(memory=None)
    await cache.set("k", "old", tags=tags)
    await settled(cache)
    async with deaf(server, cache) if how == "deaf" else killed(server):
        await cache.set("k", "new", tags=tags)
        assert await cache.get("k") == "new"
    await usable(cache)
    await until(lambda: not cache._shared._deferred.is_owed, "what was owed was delivered")
    await settled(cache)
    assert await cache.get("k") == await other.get("k")


async def test_the_load_that_finds_the_server_gone_is_kept(open_cache, server):
    """The first load into the outage is kept in memory like the ones after it."""
    cache = await open_cache(remote={"degraded_ttl": 60}, policies=[CachePolicy(ttl=60, jitter=0)])

    async def load() -> str:
        server.stop()
        return "loaded"

    assert await cache.get_or_load("k", load) == "loaded"
    assert await cache.get("k") == "loaded"


async def test_a_read_that_spans_an_outage_is_not_kept(open_cache, server):
    """A value that was fetched before changes went unheard is not installed once they are heard of again."""
    cache = await open_cache()
    epoch = cache._near.epoch("k")
    server.stop()
    await until(lambda: not cache._shared._tracking._whole, "the loss was noticed")
    await asyncio.to_thread(server.start)
    await until(lambda: cache._shared._tracking._whole, "changes are heard of again")
    assert cache._near.holds("k", epoch) is False


async def test_many_reads_are_answered_by_stale_copies_too(open_cache, server):
    """get_many serves expired copies like get when the shared tier cannot be asked, and leaves real misses out."""
    cache = await open_cache(policies=[CachePolicy(ttl=0.05, stale_max=60, jitter=0)])
    while cache.entry_lookup("k") is None:  # a write is not kept here if meanwhile invalidations began to be heard
        await cache.set("k", "old")
    server.stop()
    await until(lambda: cache.entry_lookup("k").fresh_until < cache.now(), "the copy went stale")
    assert await cache.get_many(["k", "x"]) == {"k": "old"}
    assert cache.statistics().stale_served == 1


async def test_a_change_that_nobody_can_be_asked_about_leaves_a_stale_copy(open_cache, server):
    """Whether a push echoes our own write cannot be asked when the server dies behind it: the copy is fresh no longer,
    but still stands in."""
    cache = await open_cache(policies=[CachePolicy(ttl=60, stale_max=60, jitter=0)])
    await cache.set("k", "old")
    await settled(cache)
    tracking = cache._shared._tracking
    (channel,) = tracking._channels.values()
    server.stop()
    tracking.on_push(channel, [b"invalidate", [cache._shared.keyspace.entry("k")]])
    await until(tracking._check.done, "it was asked")
    assert cache.entry_lookup("k").fresh_until <= cache.now()
    assert await cache.get("k") == "old"
    assert cache.statistics().stale_served == 1


async def test_a_failed_strict_write_is_not_read_back(open_cache, server):
    """A value whose `set` raised is not what this process reads afterwards."""
    cache = await open_cache(policies=[CachePolicy(strategy=Strategy.WRITE_THROUGH, stale_max=0)])
    await cache.set("k", "old")
    server.stop()
    for _ in range(2):
        with pytest.raises(CacheUnavailable):
            await cache.set("k", "new")
        assert await cache.get("k", "nothing") == "nothing"
