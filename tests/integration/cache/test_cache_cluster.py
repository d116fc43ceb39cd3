"""The cache over a real Redis Cluster: keys of many slots, redirections, slots that move and primaries that die."""

import asyncio

from headrace.cache import Cache, RemoteConfig
from headrace.cache.topology import slot_of
from tests.redis_servers import CLOCK, PATIENT, RedisCluster, Witness, until, wait_until


def config(cluster: RedisCluster, **options) -> RemoteConfig:
    return RemoteConfig(url=cluster.url, **{**PATIENT, **options})


async def test_calls_over_many_slots(start_cluster):
    """Everything works over keys that live on different primaries."""
    cluster = start_cluster()
    async with Cache(remote=config(cluster), memory=None) as a, Cache(remote=config(cluster)) as b:
        values = {f"agent:{number}": number for number in range(300)}
        await a.set_many(values)
        assert await b.get_many(values) == values
        held = [server.call("DBSIZE") for server in cluster.primaries]
        assert min(held) > 50
        assert await a.delete("agent:0", "agent:1", "agent:2", "absent") == 3
        assert await a.invalidate_pattern("agent:1*") == 110
        left = await a.get_many(values)
        assert len(left) == 300 - 3 - 110
        await a.set("tagged", 1, tags=["t"])
        assert await a.get("tagged") == 1
        await a.invalidate_tag("t")
        assert await a.get("tagged") is None
        await a.clear()
        assert await a.get_many(values) == {}


async def test_odd_keys_keep_entry_and_lease_in_one_slot(start_cluster):
    """Braces and other odd characters in a key do not part what must stay together."""
    cluster = start_cluster()
    async with Cache(remote=config(cluster)) as cache:
        for key in ("{", "{}", "a{b}c", "a}b", "{a}{b}", "é{ü}"):
            keyspace = cache._shared.keyspace
            assert slot_of(keyspace.name(key)) == slot_of(keyspace.lease(key))
            assert await cache.get_or_load(key, lambda: 1) == 1
            assert await cache.delete(key) == 1


async def test_a_slot_that_moves_is_followed(start_cluster):
    """Keys of a slot are found before, while and after it moves to another primary."""
    cluster = start_cluster()
    async with Cache(remote=config(cluster), memory=None) as cache:
        values = {f"k{number}": number for number in range(200)}
        await cache.set_many(values)
        slots = [slot_of(cache._shared.keyspace.name(key)) for key in values]
        reading = True

        async def read_on() -> None:
            while reading:
                assert await cache.get_many(values) == values

        reader = asyncio.get_running_loop().create_task(read_on())

        def move_some() -> None:
            for slot in slots[:20]:
                others = [server for server in cluster.primaries if server is not cluster.owner(slot)]
                cluster.move(slot, others[0])

        await asyncio.to_thread(move_some)
        reading = False
        await reader
        assert await cache.get_many(values) == values
        assert cache.statistics().remote_errors == 0


async def test_a_dead_primary_costs_its_slots_until_its_replica_takes_over(start_cluster):
    """While a primary is dead its keys degrade to misses and loads; after the failover everything works again."""
    cluster = await asyncio.to_thread(start_cluster, replicas=1)
    witness = Witness()
    async with Cache(remote=config(cluster), memory=None, observer=witness) as cache:
        keys = [f"k{number}" for number in range(100)]
        await cache.set_many(dict.fromkeys(keys, 1))
        await asyncio.to_thread(
            wait_until,
            lambda: all("master_link_status:up" in s.raw("INFO", "replication") for s in cluster.replicas),
            "",
        )
        await asyncio.to_thread(cluster.lose, cluster.primaries[0])
        assert await cache.get_or_load("k1", lambda: 1) == 1
        await asyncio.gather(*(cache.get_or_load(key, lambda: 1) for key in keys))

        async def all_work() -> bool:
            errors = cache.statistics().remote_errors
            await cache.set_many(dict.fromkeys(keys, 2))
            return await cache.get_many(keys) == dict.fromkeys(keys, 2) and cache.statistics().remote_errors == errors

        deadline = CLOCK.monotonic() + 60
        while not await all_work():
            assert CLOCK.monotonic() < deadline, f"the cluster never came back: {witness.events}"
            await asyncio.sleep(0.1)


async def test_the_cluster_may_come_later(start_cluster):
    """A cache that is opened while no node answers loads by itself and uses the cluster once it is there."""
    cluster = start_cluster()
    for server in cluster.servers:
        server.stop()
    async with Cache(remote=config(cluster), memory=None) as cache:
        assert await cache.get_or_load("k", lambda: 1) == 1
        assert cache.statistics().remote_available is False
        for server in cluster.servers:
            await asyncio.to_thread(server.start)
        await until(lambda: cache.statistics().remote_available, "connected")
        async with asyncio.timeout(60):
            while await cache.get("k") != 2:
                await asyncio.sleep(0.05)
                await cache.set("k", 2)


async def test_a_cluster_of_more_nodes_than_connections_is_used_in_part(start_cluster):
    """Nodes beyond the bound are as if away: their keys are loaded, the others shared, and upkeep goes on."""
    cluster = await asyncio.to_thread(start_cluster)
    async with Cache(remote=config(cluster, connections_max=2)) as cache:
        keys = [f"k{number}" for number in range(30)]
        assert [await cache.get_or_load(key, lambda: 1) for key in keys] == [1] * 30
        assert cache.statistics().remote_errors > 0
        async with Cache(remote=config(cluster), memory=None) as other:
            assert 5 < len(await other.get_many(keys)) < 30
        keeper = cache._shared._tracking._keeper
        await cache._shared._remote._refresh_slots()
        assert not keeper.done()
