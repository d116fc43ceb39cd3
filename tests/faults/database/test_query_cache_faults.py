"""The query cache keeps its promise while the stream, the network, Redis or the primary fail."""

import asyncio
import contextlib
import os
import signal
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from pathlib import Path

import psycopg
import pytest

from headrace.cache import Cache
from headrace.database import Database, DatabaseConfig, QueryCacheConfig, QueryPolicy, ShardConfig
from headrace.embedded import EmbeddedPostgres, started
from headrace.errors import DatabaseUnavailable, HeadraceError
from headrace.testing import TcpProxy
from tests.failovers import hold_commits_for
from tests.query_caches import old_hit, read_in_time, stats, until, until_read
from tests.redis_servers import RedisServer
from tests.stale_reads import Least, Run, cut_all, flush, freeze_decoding, kill_decoding, mute_all, prepare

POLICY = QueryPolicy(staleness_max=0.75, ttl=60.0)
"""With a bound that heartbeats keep on a busy machine, too."""
TIGHT = QueryPolicy(staleness_max=0.25, ttl=60.0)
READS, WITHIN_S = 4000, 20.0
SQL = "SELECT n FROM counter_0 WHERE id = $1"


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[EmbeddedPostgres]:
    """A Postgres with `wal_level = logical`."""
    directory = tmp_path_factory.mktemp("postgres")
    with started(EmbeddedPostgres(directory / "pg", name="pg")) as running:
        yield running


@pytest.fixture
def url(server: EmbeddedPostgres) -> str:
    """Its database with new tables."""
    prepare(server.url)
    return server.url


@pytest.fixture
def redis(tmp_path: Path) -> Iterator[RedisServer]:
    """A real Redis."""
    running = RedisServer(tmp_path / "redis").start()
    yield running
    running.stop()


@asynccontextmanager
async def proxied(server: EmbeddedPostgres) -> AsyncIterator[tuple[str, TcpProxy]]:
    """The server behind a network that can fail."""
    socket = server._sockets / ".s.PGSQL.5432"
    async with TcpProxy(str(socket)) as proxy:
        yield f"postgresql://headrace@{proxy.address}/headrace", proxy


@asynccontextmanager
async def following(dsn: str, *, acquire_timeout_s: float = 10.0) -> AsyncIterator[Database]:
    """A database whose stream vouches for the first result."""
    config = DatabaseConfig(
        shards=(ShardConfig(name="pg", dsn=dsn),),
        query_cache=QueryCacheConfig(heartbeat_s=0.05),
        acquire_timeout_s=acquire_timeout_s,
    )
    async with Cache() as cache, Database(config, cache=cache) as database:
        await database.fetch(SQL, 1, cache=POLICY)
        await until(lambda: mode(database) == "change stream")
        await old_hit(database, POLICY, SQL, 1)
        yield database


def mode(database: Database) -> str:
    return stats(database).shards["pg"].invalidation


async def value(database: Database) -> object:
    return await database.fetch_value(SQL, 1, cache=POLICY)


@pytest.mark.slow
@pytest.mark.parametrize("fault", ["quiet", "killed", "frozen", "cut", "mute", "flushed"])
async def test_no_read_is_older_than_promised(
    server: EmbeddedPostgres, url: str, redis: RedisServer, fault: str
) -> None:
    """Four writers, two of them outside, and two caches: whatever fails, no read breaks the bound or lacks its own."""
    least = Least(reads=400, hits=100, writes=11, faults=0 if fault == "quiet" else 1)
    async with proxied(server) as (dsn, proxy):
        faults = {
            "quiet": lambda: None,
            "killed": lambda: kill_decoding(url),
            "frozen": lambda: freeze_decoding(url, 0.5),
            "cut": lambda: cut_all(proxy),
            "mute": lambda: mute_all(proxy, 0.5),
            "flushed": lambda: flush(redis),
        }
        report = await Run(dsn, url, redis, TIGHT).run(
            READS, fault=faults[fault](), every_s=0.1, every_reads=200, least=least, within_s=WITHIN_S
        )

    assert report.stale == []
    assert report.unseen == []
    assert report.reads >= least.reads
    assert report.writes >= least.writes
    assert report.hits >= least.hits
    assert report.faults >= least.faults


async def test_the_comparison_notices_what_is_stale(url: str, redis: RedisServer) -> None:
    """With a bound of nothing, and results that live for a quarter of a second, it finds what it is there to find."""
    run = Run(url, url, redis, TIGHT)
    run._acknowledged[0] = [(1.0, 1), (2.0, 2)]
    run._own[0, 0] = [(2.0, 2)]
    run._reads = [(2.2, 0, 0, 1), (2.2, 0, 0, 2), (2.3, 1, 0, 1), (9.0, 1, 0, 0)]

    run._compare()

    assert len(run._report.stale) == 2
    assert len(run._report.unseen) == 1


async def test_a_change_that_is_told_before_it_is_visible_is_not_lost(url: str) -> None:
    """A committer that waits for a standby is in the log, and told, but not seen by anybody: what is read meanwhile
    is not good for longer than until then."""
    with psycopg.connect(url, autocommit=True) as outside:
        async with following(url) as database:
            await asyncio.to_thread(hold_commits_for, url, "nobody")
            pids: list[int] = []
            writer = threading.Thread(target=write_and_wait, args=(url, pids))
            try:
                writer.start()
                waits = "SELECT 1 FROM pg_stat_activity WHERE wait_event = 'SyncRep'"
                await until(lambda: outside.execute(waits).fetchall())
                told = stats(database).loads
                # It was told: results are read again and again, because none of them saw it.
                async with asyncio.timeout(30):
                    while stats(database).loads < told + 3:
                        assert await database.fetch_value(SQL, 1, cache=POLICY) == 0
                        await asyncio.sleep(0.01)
                outside.execute("SELECT pg_cancel_backend(%s)", (pids[0],))
                await until(lambda: not writer.is_alive())

                await read_in_time(lambda: value(database), 77, bound_s=POLICY.staleness_max)
            finally:
                await asyncio.to_thread(hold_commits_for, url, "")
                writer.join()
            await old_hit(database, POLICY, SQL, 1)
            assert await database.fetch_value(SQL, 1, cache=POLICY) == 77


def write_and_wait(url: str, pids: list[int]) -> None:
    """A write whose commit waits for a standby that there is not."""
    with psycopg.connect(url, autocommit=True) as connection:
        pids.append(connection.info.backend_pid)
        connection.execute("UPDATE counter_0 SET n = 77")


async def test_a_frozen_stream_is_lag_and_not_freshness(url: str) -> None:
    """While nothing is told, old results are refused, the lag is shown, and after a thaw they are good again."""
    with psycopg.connect(url, autocommit=True) as outside:
        async with following(url) as database:
            thaw = asyncio.ensure_future(freeze_decoding(url, 1.5)())
            await until(lambda: (stats(database).shards["pg"].lag_s or 0) > POLICY.staleness_max)
            # Beside the loop: what is stopped may hold a lock, and the loop is to thaw it.
            await asyncio.to_thread(outside.execute, "UPDATE counter_0 SET n = 5")
            await read_in_time(lambda: value(database), 5, bound_s=POLICY.staleness_max)
            await thaw
            await until(lambda: (stats(database).shards["pg"].lag_s or 9) < POLICY.staleness_max)
            await old_hit(database, POLICY, SQL, 1)


async def test_a_lost_slot_leaves_nothing_that_is_good(url: str) -> None:
    """The connection of the stream is killed while somebody writes: the new stream vouches for nothing from before."""
    with psycopg.connect(url, autocommit=True) as outside:
        async with following(url) as database:
            for number in range(1, 6):
                await kill_decoding(url)()
                outside.execute("UPDATE counter_0 SET n = %s", (number,))
                await read_in_time(lambda: value(database), number, bound_s=POLICY.staleness_max)
                await until(lambda: mode(database) == "change stream")
            await old_hit(database, POLICY, SQL, 1)
        await until(lambda: not outside.execute("SELECT 1 FROM pg_replication_slots").fetchall())


async def test_a_table_that_leaves_the_publication_is_not_trusted(url: str) -> None:
    """Somebody alters the publication under a stream that lives: it ends, and adds what it needs again."""
    with psycopg.connect(url, autocommit=True) as outside:
        async with following(url) as database:
            outside.execute("ALTER PUBLICATION headrace DROP TABLE counter_0")
            outside.execute("UPDATE counter_0 SET n = 3")
            await until_read(lambda: value(database), 3)
            await until(lambda: outside.execute("SELECT 1 FROM pg_publication_tables").fetchall())
            await old_hit(database, POLICY, SQL, 1)


async def test_a_server_that_is_away_makes_results_fail_and_not_age(server: EmbeddedPostgres, url: str) -> None:
    """Within the bound a result still answers; after it the caller is told that the shard is away."""
    async with proxied(server) as (dsn, proxy), following(dsn, acquire_timeout_s=5.0) as database:
        await proxy.stop()
        refused = 0
        async with asyncio.timeout(30):
            while not refused:
                try:
                    assert await database.fetch_value(SQL, 1, cache=POLICY) == 0
                except DatabaseUnavailable:
                    refused += 1
                await asyncio.sleep(0.01)
        with contextlib.suppress(HeadraceError):
            await database.fetch_value(SQL, 1, cache=POLICY)
        await proxy.start()
        async with asyncio.timeout(60):
            while True:
                with contextlib.suppress(HeadraceError):
                    await database.fetch_value(SQL, 1, cache=POLICY)
                    break
                await asyncio.sleep(0.05)


async def test_closing_does_not_wait_for_a_frozen_server(server: EmbeddedPostgres, url: str) -> None:
    """A stream that hears nothing any more is ended from this side."""
    async with proxied(server) as (dsn, proxy):
        async with following(dsn) as database:
            await until(lambda: mode(database) == "change stream")
            proxy.deaf()
            began = asyncio.get_running_loop().time()
        assert asyncio.get_running_loop().time() - began < 15
        proxy.heal()


async def test_a_promoted_standby_starts_from_nothing(tmp_path_factory: pytest.TempPathFactory) -> None:
    """After a failover ids and clocks are another server's: results of the old one are refused, however young."""
    directory = await asyncio.to_thread(tmp_path_factory.mktemp, "failover")
    async with (
        asyncio.timeout(110),
        promoted(directory) as (proxy, dsn, promote),
        following(dsn, acquire_timeout_s=5.0) as database,
    ):
        new_url = await promote(proxy)
        with await asyncio.to_thread(psycopg.connect, new_url, autocommit=True) as outside:
            outside.execute("UPDATE counter_0 SET n = 41")
            async with asyncio.timeout(60):
                while True:
                    with contextlib.suppress(HeadraceError):
                        if await database.fetch_value(SQL, 1, cache=POLICY) == 41:
                            break
                    await asyncio.sleep(0.02)
            await until(lambda: mode(database) == "change stream", 60)
            await old_hit(database, POLICY, SQL, 1)
            assert await database.fetch_value(SQL, 1, cache=POLICY) == 41


@asynccontextmanager
async def promoted(directory: Path) -> AsyncIterator[tuple[TcpProxy, str, Callable[..., object]]]:
    """A primary and its standby behind one address; the function kills the one and makes the other answer there."""
    stack = contextlib.ExitStack()

    def begin() -> tuple[EmbeddedPostgres, EmbeddedPostgres]:
        primary = EmbeddedPostgres(directory / "a", name="primary")
        stack.enter_context(started(primary))
        prepare(primary.url)
        standby = EmbeddedPostgres(directory / "b", name="standby", replica_of=primary)
        stack.enter_context(started(standby))
        return primary, standby

    primary, standby = await asyncio.to_thread(begin)

    async def promote(proxy: TcpProxy) -> str:
        def switch() -> None:
            with psycopg.connect(standby.url, autocommit=True) as connection:
                connection.execute("SELECT pg_promote(true, 30)")

        await asyncio.to_thread(switch)
        proxy._upstream = str(standby._sockets / ".s.PGSQL.5432")
        proxy.cut()
        return standby.url

    try:
        async with TcpProxy(str(primary._sockets / ".s.PGSQL.5432")) as proxy:
            yield proxy, f"postgresql://headrace@{proxy.address}/headrace", promote
    finally:
        await asyncio.to_thread(stack.close)


@pytest.fixture
def forgetful(tmp_path: Path) -> Iterator[EmbeddedPostgres]:
    """A Postgres that writes down what nobody waits for as late as it can."""
    with started(EmbeddedPostgres(tmp_path / "pg", name="pg", settings={"wal_writer_delay": "10s"})) as running:
        prepare(running.url)
        yield running


async def test_a_server_that_crashes_gives_transaction_ids_out_again(forgetful: EmbeddedPostgres) -> None:
    """What was read before the crash seems to see transactions that come after it: the new stream vouches for none."""
    quiet = QueryPolicy(staleness_max=1.5, ttl=60.0)
    config = DatabaseConfig(
        shards=(ShardConfig(name="pg", dsn=forgetful.url),),
        query_cache=QueryCacheConfig(heartbeat_s=10.0),
        acquire_timeout_s=20.0,
    )
    async with Cache() as cache, Database(config, cache=cache) as database:
        await database.fetch(SQL, 1, cache=quiet)
        await until(lambda: mode(database) == "change stream")
        first = beaten_at(database)
        await until(lambda: beaten_at(database) > first + 0.25)  # they are half a second apart
        victim = await asyncio.to_thread(lose_ids, forgetful.url, 50)
        assert await database.fetch_value("SELECT n FROM counter_0 WHERE id = $1 AND true", 1, cache=quiet) == 0
        os.kill(victim.info.backend_pid, signal.SIGKILL)
        victim.close()
        await until(lambda: mode(database) != "change stream")
        await asyncio.to_thread(raise_number, forgetful.url)
        loads, since = stats(database).loads, asyncio.get_running_loop().time()
        await until(lambda: mode(database) == "change stream")
        await until(lambda: asyncio.get_running_loop().time() - since > quiet.staleness_max)
        await until(lambda: (stats(database).shards["pg"].lag_s or 9.0) < 0.5)

        assert stats(database).loads == loads
        assert await database.fetch_value("SELECT n FROM counter_0 WHERE id = $1 AND true", 1, cache=quiet) == 41


def beaten_at(database: Database) -> float:
    """When the last heartbeat was sent that came back, a little more or less."""
    return asyncio.get_running_loop().time() - (stats(database).shards["pg"].lag_s or 0.0)


def lose_ids(dsn: str, count: int) -> psycopg.Connection:
    """Give out transaction ids that nothing in the log tells of."""
    victim = psycopg.connect(dsn, autocommit=True)
    with victim.cursor() as cursor:
        for _ in range(count):
            cursor.execute("BEGIN; SELECT pg_current_xact_id(); ROLLBACK")
    return victim


def raise_number(dsn: str) -> None:
    """Write as soon as the server takes it."""
    while True:
        with contextlib.suppress(psycopg.OperationalError), psycopg.connect(dsn, autocommit=True) as connection:
            connection.execute("UPDATE counter_0 SET n = 41 WHERE id = 1")
            return
