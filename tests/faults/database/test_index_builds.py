"""A process that is killed while it makes or drops an index, on the embedded Postgres."""

import asyncio
import signal
import subprocess
import sys
from collections.abc import Iterator

import psycopg
import pytest

from headrace.clock import SystemClock
from headrace.database import Database, DatabaseConfig, ShardConfig
from headrace.database.indexes import journal
from headrace.database.indexes.advice import State
from headrace.database.indexes.index import Index
from headrace.embedded import EmbeddedPostgres, started
from headrace.events import Event, IndexLeftoverDropped

WITHIN_S = 60.0
INDEX = Index("orders", ("tenant",))
# What the process that is killed does: it follows the advice to make one index, or to drop it.
APPLY = """
import asyncio, sys
from headrace.database import Database, DatabaseConfig, Index, IndexAdvice, ShardConfig
from headrace.database.indexes.advice import Verdict

async def main(dsn, verdict):
    making = IndexAdvice.creating(Index("orders", ("tenant",)))
    dropping = IndexAdvice(
        verdict=Verdict.DROP, name=making.name, table="orders", sql=making.undo, undo=making.sql, reason="a trial"
    )
    shards = (ShardConfig(name="a", dsn=dsn),)
    config = DatabaseConfig(shards=shards, connections_max=4, acquire_timeout_s=20, lock_timeout_s=60)
    async with Database(config) as database:
        await database.indexes.apply(making if verdict == "create" else dropping, ["SELECT 1 FROM orders"])

asyncio.run(main(*sys.argv[1:]))
"""


class Events:
    """Everything that was told."""

    def __init__(self) -> None:
        self.told: list[Event] = []
        self.on = self.told.append


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A Postgres."""
    with started(
        EmbeddedPostgres(tmp_path_factory.mktemp("pg") / "a", name="a", settings={"fsync": False})
    ) as running:
        yield running.url


@pytest.fixture
def config(server: str) -> DatabaseConfig:
    """One shard with some orders."""
    with psycopg.connect(server, autocommit=True) as connection:
        connection.execute("DROP SCHEMA public CASCADE")
        connection.execute("CREATE SCHEMA public")
        connection.execute("CREATE TABLE orders (id bigint, tenant int)")
        connection.execute("INSERT INTO orders SELECT n, n % 10 FROM generate_series(1, 1000) n")
    return DatabaseConfig(shards=(ShardConfig(name="a", dsn=server),), connections_max=4, acquire_timeout_s=20)


async def wait_for(url: str, sql: str) -> None:
    """Return when the server answers yes; fail when it does not in time."""
    ends = SystemClock().monotonic() + WITHIN_S
    while True:
        async with await psycopg.AsyncConnection.connect(url, autocommit=True) as connection:
            row = await (await connection.execute(sql)).fetchone()
            if row is not None and row[0]:
                return
        assert SystemClock().monotonic() < ends, sql
        await asyncio.sleep(0.02)


async def killed_while_it_waits(url: str, verdict: str) -> None:
    """The process got as far as an invalid index, waits for a transaction of somebody else, and is killed.

    Its backend goes on waiting: Postgres does not notice that nobody is there any more. It is ended, too.
    """
    with psycopg.connect(url) as holder:
        holder.execute("UPDATE orders SET tenant = 0 WHERE id = 1")
        process = subprocess.Popen([sys.executable, "-c", APPLY, url, verdict])
        try:
            is_invalid = f"indexrelid = to_regclass('{INDEX.name}') AND NOT indisvalid"
            await wait_for(url, f"SELECT count(*) = 1 FROM pg_index WHERE {is_invalid}")
            await wait_for(url, "SELECT count(*) = 1 FROM pg_stat_activity WHERE wait_event_type = 'Lock'")
        finally:
            process.send_signal(signal.SIGKILL)
            process.wait(WITHIN_S)
        with psycopg.connect(url, autocommit=True) as connection:
            connection.execute(
                "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE query ~ 'INDEX CONCURRENTLY'"
                " AND pid <> pg_backend_pid()"
            )
        await wait_for(url, "SELECT count(*) = 0 FROM pg_locks WHERE locktype = 'advisory'")


async def settled(url: str) -> None:
    """Nothing in the journal is under way any more."""
    await wait_for(
        url, "SELECT count(*) = 0 FROM headrace_index_history WHERE state IN ('building', 'built', 'dropping')"
    )


async def test_what_a_killed_build_left_is_dropped_at_the_next_start(server, config):
    """With an event, and a line in the history that says why."""
    await killed_while_it_waits(server, "create")
    await wait_for(server, f"SELECT NOT indisvalid FROM pg_index WHERE indexrelid = '{INDEX.name}'::regclass")
    events = Events()

    async with Database(config, observer=events) as database:
        await settled(server)
        [change] = await database.indexes.history()

    assert change.state is State.FAILED
    assert "the process ended while it was built" in change.reason
    assert [each for each in events.told if isinstance(each, IndexLeftoverDropped)] == [
        IndexLeftoverDropped("a", INDEX.name)
    ]
    await wait_for(server, f"SELECT to_regclass('{INDEX.name}') IS NULL")


async def test_a_drop_that_was_killed_half_way_is_finished(server, config):
    """The index is of no use to anybody any more, and still written to."""
    with psycopg.connect(server, autocommit=True) as connection:
        connection.execute(INDEX.sql())
    await killed_while_it_waits(server, "drop")
    await wait_for(server, f"SELECT NOT indisvalid FROM pg_index WHERE indexrelid = '{INDEX.name}'::regclass")

    async with Database(config) as database:
        await settled(server)
        [change] = await database.indexes.history()

    assert change.state is State.DROPPED
    await wait_for(server, f"SELECT to_regclass('{INDEX.name}') IS NULL")


async def test_what_another_process_is_still_building_is_left_alone(server, config):
    """Its lock says that it is alive; a start does not take its index away."""
    with psycopg.connect(server) as holder:
        holder.execute("UPDATE orders SET tenant = 0 WHERE id = 1")
        process = subprocess.Popen([sys.executable, "-c", APPLY, server, "create"])
        try:
            await wait_for(server, f"SELECT count(*) = 1 FROM pg_index WHERE indexrelid = to_regclass('{INDEX.name}')")
            async with Database(config) as database:
                found = await database.indexes.recover()
            holder.rollback()
            code = await asyncio.to_thread(process.wait, WITHIN_S)
        finally:
            process.kill()
            process.wait(WITHIN_S)

    assert found == []
    assert code == 0


async def test_an_index_that_was_built_and_not_measured_stays(server, config):
    """It is valid; that nobody measured it is said."""
    database = Database(config)
    database.indexes.tend = asyncio.Event().wait  # or it would be the one who finds it
    async with database:
        with psycopg.connect(server, autocommit=True) as connection:
            connection.execute(INDEX.sql())
        node = database.nodes["a"]
        await journal.make_journal(node)
        await journal.begin(
            node, name=INDEX.name, table="orders", sql=INDEX.sql(), state=State.BUILDING, reason="killed here"
        )
        [change] = await database.indexes.recover()
        [after] = await database.indexes.history()

    assert change.name == INDEX.name
    assert after.state is State.KEPT
    assert "not measured" in after.reason
