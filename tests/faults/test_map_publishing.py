"""A process that changes the shard map dies half-way: the change is made or not, and everybody agrees which."""

import asyncio
import signal
import sys
from contextlib import suppress
from dataclasses import replace

import psycopg
import pytest

from headrace.database import Database, DatabaseConfig, ShardConfig
from headrace.database.kept_map import _LOCK, read_map
from headrace.embedded import EmbeddedPostgres, started
from headrace.errors import DatabaseUnavailable

BOUND_S = 60.0
PUBLISHER = """
import asyncio, sys
from dataclasses import replace
from headrace.database import Database, DatabaseConfig, ShardConfig

async def main():
    shards = tuple(ShardConfig(name=f"shard-{n}", dsn=url) for n, url in enumerate(sys.argv[1:]))
    async with Database(DatabaseConfig(shards=shards, acquire_timeout_s=20.0, lock_timeout_s=60.0)) as database:
        moved = ("shard-1", *database.shard_map.shards[1:])
        print("ready", flush=True)
        await asyncio.to_thread(sys.stdin.readline)
        await database._keeper.publish(replace(database.shard_map, epoch=2, shards=moved))
        print("published", flush=True)

asyncio.run(main())
"""


@pytest.fixture(scope="module")
def servers(tmp_path_factory):
    """Two Postgres that run."""
    directory = tmp_path_factory.mktemp("postgres")
    with (
        started(EmbeddedPostgres(directory / "a", name="shard-0")) as first,
        started(EmbeddedPostgres(directory / "b", name="shard-1")) as second,
    ):
        yield first, second


@pytest.fixture
def config(servers):
    """Both as new shards."""
    for server in servers:
        with psycopg.connect(server.url, autocommit=True) as connection:
            connection.execute("DROP SCHEMA public CASCADE")
            connection.execute("CREATE SCHEMA public")
    shards = tuple(ShardConfig(name=server.name, dsn=server.url) for server in servers)
    return DatabaseConfig(shards=shards, connections_max=4, map_look_s=0.1)


async def epoch(connection):
    """What the shard keeps, to whoever may read what is committed."""
    return (await (await connection.execute("SELECT epoch FROM headrace_shard_map")).fetchone())[0]


async def waits_for_lock(connection):
    """Whether somebody stands before the lock that this connection holds."""
    query = "SELECT count(*) FROM pg_locks WHERE locktype = 'advisory' AND NOT granted"
    return bool((await (await connection.execute(query)).fetchone())[0])


@pytest.mark.parametrize(("stopped_at", "in_force"), [("shard-0", 1), ("shard-1", 2)])
async def test_a_publisher_killed_between_two_shards(servers, config, stopped_at, in_force):
    """Killed before the home shard's row: nothing has happened. After it: the map is in force, and the next who comes
    tells the other shard. Processes that run meanwhile agree with those that come.
    """
    urls = [server.url for server in servers]
    blocked = next(server for server in servers if server.name == stopped_at)
    async with (
        Database(config) as running,
        await psycopg.AsyncConnection.connect(blocked.url, autocommit=True) as holder,
        await psycopg.AsyncConnection.connect(blocked.url, autocommit=True) as observer,
    ):
        publisher = await asyncio.create_subprocess_exec(
            sys.executable, "-c", PUBLISHER, *urls, stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE
        )
        assert await publisher.stdout.readline() == b"ready\n"
        await holder.execute("SELECT pg_advisory_lock(%s)", (_LOCK,))
        publisher.stdin.write(b"\n")
        async with asyncio.timeout(BOUND_S):
            while not await waits_for_lock(observer):
                await asyncio.sleep(0.01)
        publisher.send_signal(signal.SIGKILL)
        await publisher.communicate()
        # The server's side of the dead connection still waits; it has to end without having done anything.
        await observer.execute(
            "SELECT pg_terminate_backend(pid) FROM pg_locks WHERE locktype = 'advisory' AND NOT granted"
        )
        await holder.execute("SELECT pg_advisory_unlock(%s)", (_LOCK,))
        async with Database(config) as later:
            assert later.shard_map.epoch == in_force
            async with asyncio.timeout(BOUND_S):
                while running.shard_map != later.shard_map:
                    await asyncio.sleep(0.01)
            kept = [await read_map(node) for node in later.nodes.values()]
        assert [each.shard_map for each in kept] == [later.shard_map] * 2
        assert later.shard_map.shards[0] == ("shard-1" if in_force == 2 else "shard-0")


async def test_a_shard_that_was_down_during_a_change_is_told_when_it_is_back(servers, config):
    """The change does not wait for it, and it serves nothing before it keeps the map that is in force."""
    async with Database(config) as running:
        with psycopg.connect(servers[1].url, autocommit=True) as connection:
            name = connection.execute("SELECT current_database()").fetchone()[0]
            other = connection.info.dsn + " dbname=postgres"
        with psycopg.connect(other, autocommit=True) as admin:
            admin.execute(f'ALTER DATABASE "{name}" ALLOW_CONNECTIONS false')
            try:
                sessions = "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = %s"
                async with asyncio.timeout(BOUND_S):
                    while running.nodes["shard-1"].available:
                        admin.execute(sessions, (name,))  # each time: one that had just been let in may show only now
                        await running.nodes["shard-1"].probe()
                shards = ("shard-1", *running.shard_map.shards[1:])
                await running._keeper.publish(replace(running.shard_map, epoch=2, shards=shards))
                assert running.shard_map.epoch == 2
            finally:
                admin.execute(f'ALTER DATABASE "{name}" ALLOW_CONNECTIONS true')
        async with asyncio.timeout(BOUND_S):
            while True:
                if running.nodes["shard-1"].available:
                    with suppress(DatabaseUnavailable):
                        kept = await read_map(running.nodes["shard-1"])
                        if kept.shard_map.epoch == 2:
                            break
                await asyncio.sleep(0.05)
