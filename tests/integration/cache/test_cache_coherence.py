"""Copies in memory follow what other processes do, and silence is not taken for consent."""

import asyncio
import random
from functools import partial

import pytest

from headrace.cache import Cache, CachePolicy, RemoteConfig, Strategy
from headrace.errors import UnencodableValue
from headrace.events import TierRecovered, TierUnavailable
from headrace.testing import FakeClock, TcpProxy
from tests.redis_servers import (
    CLOCK,
    IMPATIENT_S,
    PATIENT,
    RedisServer,
    Witness,
    deaf,
    is_idle,
    settled,
    until,
    until_found,
    wait_until,
)


def start(work) -> asyncio.Task:
    return asyncio.get_running_loop().create_task(work)


def is_fresh(cache: Cache, key: str) -> bool:
    entry = cache.entry_lookup(key)
    return entry is not None and entry.fresh_until > cache.now()


def is_turned_away(cache: Cache, key: str, epoch: tuple[int, int]) -> bool:
    return not cache._near.holds(key, epoch)


async def assert_coherent(server: RedisServer, caches: list[Cache], keys: list[str]) -> int:
    """Every copy in every memory is what a reader without memory gets; how many copies there were."""
    async with Cache(remote=RemoteConfig(url=server.url, **PATIENT), memory=None) as truth:
        shared = await truth.get_many(keys)
    copies = 0
    for cache in caches:
        for key in keys:
            entry = cache.entry_lookup(key)
            if entry is not None and entry.fresh_until > cache.now():
                copies += 1
                assert entry.value == shared.get(key, "gone"), key
    return copies


@pytest.mark.parametrize("how", ["set", "delete", "pattern", "tag", "clear", "flushall", "foreign"])
async def test_a_change_elsewhere_drops_the_copy(open_cache, server, how):
    """A copy goes when another process writes, deletes, invalidates or flushes, or anybody touches the entry."""
    a, b = await open_cache(), await open_cache()
    await a.set("k", "old", tags=["t"])
    await settled(b)  # what b reads before it has heard of this write is not kept
    assert await b.get("k") == "old"
    assert b.entry_lookup("k") is not None
    match how:
        case "set":
            await a.set("k", "new")
        case "delete":
            await a.delete("k")
        case "pattern":
            await a.invalidate_pattern("k*")
        case "tag":
            await a.invalidate_tag("t")
        case "clear":
            await a.clear()
        case "flushall":
            await asyncio.to_thread(server.call, "FLUSHALL")
        case _:
            await asyncio.to_thread(server.call, "UNLINK", b._shared.keyspace.name("k"))
    await until(lambda: b.entry_lookup("k") is None, "the copy went")
    await until_found(lambda: b.get("k"), "new" if how == "set" else None)


async def test_ones_own_write_keeps_its_copy(open_cache):
    """The echo of a write of our own is recognised by its version: the copy stays, and is not read again."""
    cache = await open_cache()
    for number in range(50):
        await cache.set(f"k{number}", number)
    await settled(cache)
    before = cache.statistics()
    for number in range(50):
        assert await cache.get(f"k{number}") == number
    assert cache.statistics().remote_hits == before.remote_hits


async def test_anothers_write_right_after_ones_own_is_seen(open_cache):
    """The echo of our own write never hides that somebody wrote after us."""
    a, b = await open_cache(), await open_cache()
    for number in range(200):
        await asyncio.gather(a.set("k", ["a", number]), b.set("k", ["b", number]))
    await settled(a, b)
    assert await a.get("k") == await b.get("k")


async def test_a_read_from_before_a_renewal_is_turned_away(open_cache):
    """It may bring what was shared before, and the echo of one's own renewal would not drop that."""
    clock = FakeClock()
    policies = [CachePolicy(ttl=50, stale_max=100, jitter=0, early_refresh=0)]
    cache = await open_cache(policies=policies, remote={"tracking": False}, clock=clock)
    await cache.set("k", "old")
    clock.advance(60)
    reading = cache._near.epoch("k")
    assert await cache.get_or_load("k", lambda: "renewed") == "renewed"
    assert is_turned_away(cache, "k", reading)
    assert cache.entry_lookup("k").value == "renewed"


async def test_random_writers_agree_after_settling(open_cache, server):
    """Three processes write, delete, load and read at random; when they rest, no copy differs from the shared tier."""
    caches = [await open_cache() for _ in range(3)]
    keys = [f"k{number}" for number in range(40)]
    rng = random.Random(11)

    async def work(cache: Cache) -> None:
        for step in range(400):
            key = rng.choice(keys)
            match rng.randrange(10):
                case 0:
                    await cache.set(key, step)
                case 1:
                    await cache.delete(key)
                case 2:
                    await cache.set(key, step, tags=[f"t{step % 3}"])
                case 3 if step % 20 == 0:
                    await cache.invalidate_tag(f"t{step % 3}")
                case 4:
                    await cache.get_or_load(key, lambda step=step: f"loaded {step}")
                case _:
                    await cache.get(key)

    await asyncio.gather(*(work(cache) for cache in caches for _ in range(4)))
    await settled(*caches)
    await assert_coherent(server, caches, keys)
    await caches[0].set(keys[0], "last")
    await settled(*caches)
    for cache in caches:  # now that all is quiet, what each reads is kept
        await cache.get_many(keys)
    assert await assert_coherent(server, caches, keys) >= len(caches)


async def test_they_agree_although_connections_are_killed_and_the_server_is_flushed(open_cache, server):
    """The same with every connection killed at random and FLUSHALL in between."""
    caches = [await open_cache() for _ in range(3)]
    keys = [f"k{number}" for number in range(20)]
    rng = random.Random(5)
    working = True

    async def work(cache: Cache) -> None:
        step = 0
        while working:
            step += 1
            key = rng.choice(keys)
            match rng.randrange(6):
                case 0:
                    await cache.set(key, step)
                case 1:
                    await cache.delete(key)
                case _:
                    await cache.get_or_load(key, lambda step=step: f"loaded {step}")
            await asyncio.sleep(0)

    workers = [start(work(cache)) for cache in caches for _ in range(2)]
    with server.client() as client:
        for round_number in range(25):
            for line in await asyncio.to_thread(client.client_list):
                if line["name"] == "headrace" and rng.random() < 0.5:
                    await asyncio.to_thread(client.client_kill_filter, _id=line["id"])
            if round_number % 8 == 0:
                await asyncio.to_thread(client.flushall)
            await asyncio.sleep(0.02)
    working = False
    await asyncio.gather(*workers)
    for cache in caches:
        await until(lambda cache=cache: not cache._shared._deferred.is_owed, "all invalidations were delivered")
    await settled(*caches)
    # What was loaded while a connection for calls was away is in one memory alone, and fresh for so long.
    bound = CLOCK.monotonic() + RemoteConfig().degraded_ttl
    await until(lambda: CLOCK.monotonic() > bound, "what could not be shared has gone stale")
    await assert_coherent(server, caches, keys)


async def test_a_lost_channel_bounds_how_long_copies_stay_fresh(open_cache, server, witness):
    """When the channel goes silent, copies answer for degraded_ttl at most and the observer is told."""
    cache = await open_cache(remote={"degraded_ttl": 0.3})
    await cache.set("k", 1)
    await settled(cache)
    async with deaf(server, cache):
        await until(lambda: any(event.tier == "invalidation" for event in witness.seen(TierUnavailable)), "noticed")
        await until(lambda: cache.entry_lookup("k").fresh_until <= cache.now() + 0.3, "bounded, and not for 300 s")
        await until(lambda: cache.entry_lookup("k").fresh_until <= cache.now(), "no longer fresh")
        assert await cache.get_or_load("k", lambda: 2) == 2
    await until(lambda: any(event.tier == "invalidation" for event in witness.seen(TierRecovered)), "whole again")


async def test_copies_are_checked_after_a_gap(open_cache, server):
    """What changed while the channel was away is noticed when it is back."""
    a = await open_cache()
    async with TcpProxy(server.socket) as proxy:
        # Longer than the test waits: what makes a copy stale is the check.
        b = await open_cache(remote={"url": f"redis://{proxy.address}/0", "degraded_ttl": 100.0})
        await a.set("k", "old")
        await settled(b)
        assert await b.get("k") == "old"
        assert is_fresh(b, "k")
        await proxy.stop()
        await a.set("k", "new")
        await proxy.start()
        await until(lambda: not is_fresh(b, "k"), "the gap was noticed")
        await settled(b)
        await until(lambda: is_idle(b), "the connection for calls stands, too")
        assert await b.get("k") == "new"


async def test_without_tracking_memory_ttl_is_the_bound(open_cache):
    """tracking=False leaves copies to memory_ttl."""
    policies = [CachePolicy(memory_ttl=0.05)]
    a = await open_cache()
    b = await open_cache(remote={"tracking": False}, policies=policies)
    await a.set("k", "old")
    assert await b.get("k") == "old"
    await a.set("k", "new")
    await until(lambda: "k" not in b.memory, "the copy expired")
    assert await b.get("k") == "new"


async def test_coherence_on_a_cluster_whose_slots_move(start_cluster):
    """Copies follow changes on every primary, also of slots that move to another one meanwhile."""
    cluster = await asyncio.to_thread(start_cluster)
    witness = Witness()
    config = RemoteConfig(url=cluster.url, **PATIENT)
    keys = [f"k{number}" for number in range(30)]
    async with Cache(remote=config, observer=witness) as a, Cache(remote=config) as b:
        await a.set_many(dict.fromkeys(keys, 0))
        moving = start(
            asyncio.to_thread(
                lambda: [
                    cluster.move(slot, cluster.primaries[slot % 3])
                    for slot in {_slot(a, key) for key in keys[:12]}
                    if cluster.owner(slot) is not cluster.primaries[slot % 3]
                ]
            )
        )
        rng = random.Random(3)
        step = 0
        while not moving.done() or step < 300:
            step += 1
            cache = rng.choice((a, b))
            key = rng.choice(keys)
            if rng.randrange(4):
                await cache.get(key)
            else:
                await cache.set(key, step)
        await moving
        await settled(a, b)
        async with Cache(remote=config, memory=None) as truth:
            shared = await truth.get_many(keys)
        assert shared.keys() == set(keys)
        for cache in (a, b):
            for key in keys:
                if key in cache.memory:
                    assert await cache.get(key) == shared.get(key), key


def _slot(cache: Cache, key: str) -> int:
    from headrace.cache.topology import slot_of

    return slot_of(cache._shared.keyspace.name(key))


async def test_coherence_over_a_failover(start_cluster):
    """When a primary dies and its replica takes over, copies of its keys do not outlive what is written afterwards."""
    cluster = await asyncio.to_thread(start_cluster, replicas=1)
    config = RemoteConfig(url=cluster.url, **PATIENT)
    keys = [f"k{number}" for number in range(30)]
    async with Cache(remote=config) as a, Cache(remote=config) as b:
        await a.set_many(dict.fromkeys(keys, "old"))
        assert await b.get_many(keys) == dict.fromkeys(keys, "old")
        await asyncio.to_thread(
            wait_until,
            lambda: all("master_link_status:up" in s.raw("INFO", "replication") for s in cluster.replicas),
            "",
        )
        await asyncio.to_thread(cluster.lose, cluster.primaries[0])

        async def all_are_taken() -> bool:
            await a.set_many(dict.fromkeys(keys, "new"))
            if a._shared._deferred.is_owed:
                return False
            async with Cache(remote=config, memory=None) as truth:
                return await truth.get_many(keys) == dict.fromkeys(keys, "new")

        await until_found(all_are_taken, True, timeout_s=80)
        await settled(a, b)
        assert await b.get_many(keys) == dict.fromkeys(keys, "new")


@pytest.mark.parametrize("how", ["delete", "set", "pattern"])
async def test_a_change_by_a_process_that_has_not_heard_of_a_clear_counts(open_cache, how):
    """After another's clear, what a process changes before it has heard of that is changed for all."""
    a, b = await open_cache(), await open_cache(memory=None)  # without memory there is no channel that would tell
    await a.clear()
    assert await a.get_or_load("k", lambda: "old") == "old"
    match how:
        case "delete":
            assert await b.delete("k") == 1
        case "set":
            await b.set("k", "new")
        case _:
            assert await b.invalidate_pattern("k*") == 1
    expected = "new" if how == "set" else None
    assert await b.get("k") == expected
    while await a.get("k") != expected:
        await asyncio.sleep(0.005)


async def test_a_value_that_redis_does_not_have_is_kept_for_a_moment_only(open_cache, server):
    """With calls cut but the channel standing, what was loaded meanwhile stays fresh no longer than degraded_ttl."""
    cache = await open_cache(remote={"degraded_ttl": 30.0})  # and not the 300 s of `MemoryConfig.ttl`
    await settled(cache)
    (calls,) = cache._shared._remote.primaries()

    def cut_calls() -> None:
        with server.client() as client:
            for line in client.client_list():
                if line["name"] == "headrace" and "t" not in line["flags"]:
                    client.client_kill_filter(_id=line["id"])
            client.execute_command("CLIENT", "PAUSE", 60_000, "WRITE")

    async def load() -> str:
        await asyncio.to_thread(cut_calls)  # the value cannot be written when it comes
        calls._timeout_s = IMPATIENT_S
        return "alone"

    assert await cache.get_or_load("k", load) == "alone"
    assert cache._shared._tracking._whole
    assert cache.entry_lookup("k").fresh_until <= cache.now() + 30.0


async def test_the_first_load_with_a_new_tag_is_kept(open_cache):
    """That a tag's token is made by the load itself is no invalidation: both tiers keep the value."""
    cache = await open_cache()
    for number in range(20):

        async def load(number: int = number) -> int:
            await asyncio.sleep(0.01)  # time for the server's push of the new token
            return number

        assert await cache.get_or_load(f"k{number}", load, tags=[f"t{number}"]) == number
    await settled(cache)
    assert [number for number in range(20) if cache.entry_lookup(f"k{number}") is None] == []
    assert cache.statistics().installs_refused == 0
    other = await open_cache(memory=None)
    assert len(await other.get_many([f"k{number}" for number in range(20)])) == 20


async def test_loads_that_begin_with_a_tag_together_are_all_kept(open_cache):
    """Loads of one process that all find a tag without a token, and each propose one, are all kept."""
    cache = await open_cache()

    async def load() -> int:
        await asyncio.sleep(0.02)
        return 1

    await asyncio.gather(*(cache.get_or_load(f"k{number}", load, tags=["t"]) for number in range(10)))
    assert cache.statistics().installs_refused == 0
    assert cache.statistics().entries == 10


async def test_a_tag_invalidated_elsewhere_during_a_load_turns_it_away(open_cache):
    """Knowing a tag's token does not make this process deaf to its change."""
    a, b = await open_cache(), await open_cache()
    other = await open_cache(memory=None)
    for number in range(5):
        entered, gate = asyncio.Event(), asyncio.Event()
        epoch = a._near.epoch(f"k{number}")

        async def load(entered: asyncio.Event = entered, gate: asyncio.Event = gate) -> str:
            entered.set()
            await gate.wait()
            return "old"

        loading = asyncio.get_running_loop().create_task(a.get_or_load(f"k{number}", load, tags=["t"]))
        await entered.wait()
        await b.invalidate_tag("t")
        await until(partial(is_turned_away, a, f"k{number}", epoch), "the change was heard of")
        gate.set()
        assert await loading == "old"
        assert a.entry_lookup(f"k{number}") is None
        assert await other.get(f"k{number}") is None
        await settled(a)  # nothing of this round is heard of in the next one


async def test_a_tag_invalidated_elsewhere_drops_what_was_loaded_with_it(open_cache):
    """The copy of a process that itself made the tag's token goes when another process invalidates the tag."""
    a, b = await open_cache(), await open_cache()
    for number in range(5):
        await a.get_or_load("k", lambda number=number: number, tags=["t"])
        assert await a.get("k") == number
        await b.invalidate_tag("t")
        await until(lambda: a.entry_lookup("k") is None, "the copy is dropped")
        await settled(a)  # it may have been found out before it was told of, which would turn the next load away


async def test_a_plain_function_on_the_loops_thread_follows_changes_in_bounds(open_cache):
    """What it loads is in memory alone, where no push reaches it: it is fresh for `degraded_ttl`, not `memory_ttl`."""
    a, b = await open_cache(remote={"degraded_ttl": 0.05}), await open_cache()
    source = {"value": "old"}

    @a.cached("k", ttl=300)
    def load() -> str:
        return source["value"]

    assert load() == "old"
    source["value"] = "new"
    await b.delete("k")
    await until(lambda: load() == "new", "the change is seen")


async def test_a_value_whose_own_code_fails_gives_the_lease_back(open_cache):
    """An exception out of the value itself, while it is being encoded, does not keep others from loading."""
    cache, other = await open_cache(remote={"lease": 60}), await open_cache()

    class Odd(list):
        def __eq__(self, other: object) -> bool:
            raise ZeroDivisionError

        __hash__ = None

    with pytest.raises(ZeroDivisionError):
        await cache.get_or_load("k", lambda: Odd([1]), type=list)
    async with asyncio.timeout(30):
        assert await other.get_or_load("k", lambda: 1) == 1


@pytest.mark.parametrize("is_tracked", [True, False])
@pytest.mark.parametrize("write", ["set", "update"])
async def test_a_write_that_was_given_up_leaves_no_older_copy(open_cache, server, write, is_tracked):
    """Whoever cancels a write does not know whether Redis has it: the copy from before must not go on answering."""
    other = await open_cache(memory=None)
    async with TcpProxy(server.socket) as proxy:
        cache = await open_cache(remote={"url": f"redis://{proxy.address}/0", "tracking": is_tracked})

        def change(_: object = None) -> str:
            proxy.deaf(to_server=False)
            return "new"

        await cache.update("k", lambda _: "old")  # from now on the server knows the script
        if is_tracked:
            await settled(cache)  # the echo does not drop the copy that is made now
        assert await cache.get("k") == "old"
        writing = start(cache.set("k", change()) if write == "set" else cache.update("k", change))
        await until_found(lambda: other.get("k"), "new")
        writing.cancel()
        await asyncio.wait([writing])
        assert writing.cancelled()
        proxy.heal()
        if is_tracked:
            await settled(cache)
        assert await cache.get("k") == "new"


@pytest.mark.parametrize("is_tracked", [True, False])
@pytest.mark.parametrize("write", ["set", "update"])
async def test_a_write_that_is_given_up_at_any_moment_is_there_for_all_or_for_none(open_cache, write, is_tracked):
    """Before it is sent, on its way, answered: this process reads what the others read."""
    cache, other = await open_cache(remote={"tracking": is_tracked}), await open_cache(memory=None)
    turns = 0
    while turns < 2000:
        turns += 1 + turns // 8
        await cache.set("k", "old")
        writing = start(cache.set("k", "new") if write == "set" else cache.update("k", lambda _: "new"))
        for _ in range(turns):
            await asyncio.sleep(0)
        writing.cancel()
        await asyncio.wait([writing])
        await cache.get("another")  # by the same connection, so what was sent has arrived
        if is_tracked:
            await settled(cache)
        assert await cache.get("k") == await other.get("k")


async def test_writes_of_which_one_cannot_be_stored_leave_no_older_copies(open_cache):
    """What was queued before another value was refused is delivered, and this process reads it too."""
    cache = await open_cache(policies=[CachePolicy(match="late:*", strategy=Strategy.WRITE_BEHIND)])
    other = await open_cache(memory=None)
    await cache.set("late:1", "old")
    with pytest.raises(UnencodableValue):
        await cache.set_many({"late:1": "new", "late:2": object()})
    await cache.flush()
    assert await other.get("late:1") == await cache.get("late:1") == "new"


async def test_copies_follow_a_slot_to_a_primary_that_had_none(start_cluster):
    """What was read from a new primary, and changed there before its channel stood, is checked before it answers."""
    cluster = await asyncio.to_thread(start_cluster, idle=1)
    newcomer = cluster.primaries[-1]
    config = RemoteConfig(url=cluster.url, **PATIENT)
    async with Cache(remote=config) as a, Cache(remote=config, memory=None) as b:
        await b.set("k", "old")
        assert len(a._shared._tracking._channels) == 2
        await asyncio.to_thread(cluster.move, _slot(a, "k"), newcomer)
        assert await a.get("k") == "old"
        await b.set("k", "new")
        await until(lambda: len(a._shared._tracking._channels) == 3, "the new primary is heard")
        await settled(a)
        assert await a.get("k") == "new"


async def test_copies_follow_keys_whose_slot_is_still_on_its_way(start_cluster):
    """A primary that takes over its first slot serves keys before the slot is its own; changes there are heard."""
    cluster = await asyncio.to_thread(start_cluster, idle=1)
    newcomer = cluster.primaries[-1]
    config = RemoteConfig(url=cluster.url, **PATIENT)
    async with Cache(remote=config) as a, Cache(remote=config, memory=None) as b:
        await b.set("k", "old")
        slot = _slot(a, "k")
        source = cluster.owner(slot)
        newcomer.call("CLUSTER", "SETSLOT", slot, "IMPORTING", source.id)
        source.call("CLUSTER", "SETSLOT", slot, "MIGRATING", newcomer.id)
        names = source.call("CLUSTER", "GETKEYSINSLOT", slot, 100)
        source.call("MIGRATE", "127.0.0.1", newcomer.port, "", 0, 20_000, "KEYS", *names)
        await settled(a)  # of the migration itself, whose push would drop the copy that is made now
        assert await a.get("k") == "old"
        await b.set("k", "new")
        await until(lambda: len(a._shared._tracking._channels) == 3, "the new primary is heard")
        await settled(a)
        assert await a.get("k") == "new"
