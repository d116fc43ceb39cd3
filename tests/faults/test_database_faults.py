"""Shards that are dead, late, frozen or not who they should be, while the others serve."""

import asyncio
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from dataclasses import replace

import psycopg
import pytest

from headrace.agents.config import AgentsConfig
from headrace.agents.stores.postgres import PostgresStore
from headrace.clock import SystemClock
from headrace.database import Database, DatabaseConfig, ShardConfig, Sharded
from headrace.database.postgres.nodes import Node
from headrace.embedded import EmbeddedPostgres, started
from headrace.errors import ConfigError, DatabaseUnavailable, HeadraceError, OutcomeUnknown
from headrace.events import Event, ShardRecovered, ShardUnavailable
from tests.failovers import ask, frozen

BOUND_S = 60.0
CLOSED_WITHIN_S = 15.0
"""A frozen server would hold up its closing without end."""


class Notes:
    """Keeps every event."""

    def __init__(self) -> None:
        self.events: list[Event] = []

    def on(self, event: Event) -> None:
        self.events.append(event)


@pytest.fixture(scope="module")
def servers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[EmbeddedPostgres, EmbeddedPostgres]]:
    """A Postgres that runs, and one that is prepared and down."""
    directory = tmp_path_factory.mktemp("postgres")
    with started(EmbeddedPostgres(directory / "live", name="live")) as live:
        late = EmbeddedPostgres(directory / "late", name="late")
        with started(late):
            pass
        yield live, late


@pytest.fixture
def config(servers: tuple[EmbeddedPostgres, EmbeddedPostgres]) -> DatabaseConfig:
    """Both as shards, with nothing in the one that runs."""
    live, late = servers
    with psycopg.connect(live.url, autocommit=True) as connection:
        connection.execute("DROP SCHEMA public CASCADE")
        connection.execute("CREATE SCHEMA public")
    shards = (ShardConfig(name="live", dsn=live.url), ShardConfig(name="late", dsn=late.url))
    return DatabaseConfig(shards=shards, connections_max=4, acquire_timeout_s=5.0)


def tenant_on(database: Database, shard: str) -> str:
    return next(name for name in map(str, range(1000)) if database.locate(name).shard == shard)


def is_available(database: Database, shard: str) -> bool:
    return database.statistics().shards[shard].available


async def until_available(database: Database, shard: str, *, expected: bool) -> None:
    async with asyncio.timeout(BOUND_S):
        while is_available(database, shard) is not expected:
            await asyncio.sleep(0.02)


async def until_idle(database: Database, connections: int) -> None:
    async with asyncio.timeout(BOUND_S):
        while database.statistics().shards["live"].idle < connections:
            await asyncio.sleep(0.02)


@asynccontextmanager
async def stored(database: Database) -> AsyncIterator[PostgresStore]:
    store = PostgresStore(database, AgentsConfig(), writer="test", clock=SystemClock(), observer=Notes())
    await store.open()
    try:
        yield store
    finally:
        await store.close()


@asynccontextmanager
async def running(server: EmbeddedPostgres) -> AsyncIterator[None]:
    """The server, started and stopped beside the loop."""
    context = started(server)
    await asyncio.to_thread(context.__enter__)
    try:
        yield
    finally:
        await asyncio.to_thread(context.__exit__, None, None, None)


async def test_a_dead_shard_keeps_no_other_from_serving(config):
    """The store opens, the tenants of the live shard are served, those of the dead one are told what is down."""
    async with Database(config) as database, stored(database) as store:
        assert await store.agents(tenant_on(database, "live"), offset=0, limit=10) == ([], 0)
        with pytest.raises(DatabaseUnavailable, match="Shard late does not answer"):
            await store.agents(tenant_on(database, "late"), offset=0, limit=10)


async def test_a_dead_shard_is_known_without_being_asked_for(config):
    """Right after the open, before anybody used it: what health says of it is true."""
    notes = Notes()
    async with Database(config, observer=notes) as database:
        assert (is_available(database, "live"), is_available(database, "late")) == (True, False)
    assert [event.shard for event in notes.events if isinstance(event, ShardUnavailable)] == ["late"]


async def test_a_dead_shard_does_not_fill_the_log(config, caplog):
    """Why the first attempts failed is logged; that it is still down is not said again with every further one."""
    async with Database(config) as database:
        assert "No such file" in caplog.text
        lines = len(caplog.records)
        for _ in range(3):
            await database.nodes["late"].probe()
        assert len(caplog.records) == lines


async def test_what_a_client_is_told_of_a_dead_shard_holds_nothing_of_its_dsn(config):
    """Neither socket, user nor password travel in an error."""
    shards = (config.shards[0], replace(config.shards[1], dsn="host=/nowhere user=someone password = hunter2"))
    async with Database(replace(config, shards=shards)) as database:
        with pytest.raises(DatabaseUnavailable) as caught:
            await database.fetch("SELECT 1", key=tenant_on(database, "late"))
    for secret in ("/nowhere", "someone", "hunter2"):
        assert secret not in str(caught.value)


async def test_a_shard_that_comes_late_is_found_and_prepared(config, servers):
    """Nobody asks for it meanwhile; its schema is there before its first statement."""
    notes = Notes()
    async with Database(config, observer=notes) as database, stored(database) as store, running(servers[1]):
        await until_available(database, "late", expected=True)
        assert await store.agents(tenant_on(database, "late"), offset=0, limit=10) == ([], 0)
        assert await database.fetch_value("SELECT shard FROM headrace_shard_map", key=tenant_on(database, "late"))
        assert [type(event) for event in notes.events] == [ShardUnavailable, ShardRecovered]  # it goes before we do


@pytest.fixture
def strange(tmp_path) -> EmbeddedPostgres:
    """A Postgres of a test's own, so that what it keeps is in nobody else's way."""
    return EmbeddedPostgres(tmp_path / "late", name="late")


async def test_a_late_shard_with_another_map_serves_nothing(config, strange):
    """It is refused when it is reached, on every call, while the others go on; and it is not counted as available."""
    shards = (config.shards[0], ShardConfig(name="late", dsn=strange.url))
    async with running(strange), Database(replace(config, shards=shards[1:])) as alone:
        assert is_available(alone, "late")
    async with Database(replace(config, shards=shards)) as database, running(strange):
        refusal = None
        async with asyncio.timeout(BOUND_S):
            while refusal is None:
                try:
                    await database.fetch("SELECT 1", key=tenant_on(database, "late"))
                except DatabaseUnavailable:
                    continue
                except ConfigError as error:
                    refusal = error
        assert "keeps a map of 4096 slots (late: 4096)" in str(refusal)
        await database.nodes["late"].probe()
        assert not is_available(database, "late")
        assert await database.fetch_value("SELECT 1", key=tenant_on(database, "live")) == 1


async def test_a_call_that_waits_is_served_by_a_server_that_comes_back(config, servers, caplog):
    """However late in its time: nobody else has to call for a connection to be tried again."""
    patient = replace(config, acquire_timeout_s=100.0)
    node = Node(config.shards[1], patient, clock=SystemClock(), observer=Notes())
    await node.open()
    waiting = asyncio.ensure_future(node.fetch("SELECT 1"))
    try:
        async with asyncio.timeout(BOUND_S):
            # The connection of the pool, and that of the call.
            while caplog.text.count("reconnection attempt") < 2:
                await asyncio.sleep(0.02)
            async with running(servers[1]):
                assert await waiting == [(1,)]
    finally:
        await node.close()
        await asyncio.gather(waiting, return_exceptions=True)


async def test_a_shard_that_freezes_is_found_without_being_used(config, servers):
    """It accepts connections and answers nothing; thawed, it is found again."""
    async with Database(replace(config, shards=config.shards[:1])) as database:
        with frozen(servers[0]):
            await until_available(database, "live", expected=False)
        await until_available(database, "live", expected=True)


async def test_a_frozen_shard_does_not_hold_up_the_closing(config, servers):
    """A question that is still open is given up at once."""
    async with asyncio.timeout(BOUND_S):
        database = await Database(replace(config, shards=config.shards[:1])).__aenter__()
        with frozen(servers[0]):
            await until_available(database, "live", expected=False)
            async with asyncio.timeout(CLOSED_WITHIN_S):
                await database.__aexit__(None, None, None)


async def test_a_frozen_shard_holds_up_nobody_without_end(config, servers):
    """A call that it has taken and does not answer ends soon after any statement would have been cut off."""
    limits = replace(config, shards=config.shards[:1], statement_timeout_s=5.0)
    async with Database(limits) as database:
        # Several connections, so that one is idle whatever else is asked in the moment of the freeze.
        await asyncio.gather(*(database.execute("SELECT pg_sleep(0.2)") for _ in range(4)))
        await until_idle(database, 2)
        with frozen(servers[0]):
            async with asyncio.timeout(BOUND_S):
                with pytest.raises(OutcomeUnknown):
                    await database.execute("SELECT 1")
        await until_available(database, "live", expected=True)


async def test_a_point_read_that_is_never_answered_does_not_hold_up_the_closing(config, servers):
    """Nor does any other call that is under way: its connection is cut."""
    tables = {"t": Sharded(key="k", batch_by="k")}
    limits = replace(config, shards=config.shards[:1], tables=tables)
    async with asyncio.timeout(2 * BOUND_S):
        database = await Database(limits).__aenter__()
        await database.execute("CREATE TABLE t (k int PRIMARY KEY)")
        with frozen(servers[0]):
            reads = [asyncio.ensure_future(database.fetch("SELECT * FROM t WHERE k = $1", k)) for k in range(3)]
            await asyncio.wait(reads, timeout=0.1)
            async with asyncio.timeout(CLOSED_WITHIN_S):
                await database.__aexit__(None, None, None)
            told = await asyncio.gather(*reads, return_exceptions=True)
    assert all(isinstance(error, HeadraceError) for error in told)


async def test_closing_does_not_hide_that_an_outcome_is_unknown(config, servers):
    """The commit was sent; that nobody can be asked any more does not make it undone."""
    alone = replace(config, shards=config.shards[:1], resolve_unknown=True)
    database = await Database(alone).__aenter__()
    for sql in (
        "CREATE TABLE t (k int)",
        "CREATE FUNCTION late() RETURNS trigger LANGUAGE plpgsql AS 'BEGIN PERFORM pg_sleep(25); RETURN NEW; END'",
        "CREATE CONSTRAINT TRIGGER late AFTER INSERT ON t DEFERRABLE INITIALLY DEFERRED FOR EACH ROW"
        " EXECUTE FUNCTION late()",
    ):
        await database.execute(sql)
    writing = asyncio.ensure_future(database.execute("INSERT INTO t VALUES (1)"))
    async with asyncio.timeout(BOUND_S):
        sql = "SELECT 1 FROM pg_stat_activity WHERE wait_event = 'PgSleep' AND query = 'COMMIT'"
        while not await database.fetch(sql, read_only=True):
            await asyncio.sleep(0.01)
        await database.__aexit__(None, None, None)
        with pytest.raises(OutcomeUnknown):
            await writing
    ask(servers[0], "SELECT pg_terminate_backend(pid, 10000) FROM pg_stat_activity WHERE query = 'COMMIT'")


async def test_a_shard_that_is_only_read_leaves_no_marks(config):
    """It could not write them, and what nobody writes has no unknown outcome."""
    shards = (replace(config.shards[0], read_only=True),)
    async with Database(replace(config, shards=config.shards[:1])):
        pass
    async with (
        Database(replace(config, shards=shards, resolve_unknown=True)) as database,
        database.transaction() as tx,
    ):
        assert await tx.fetch("SELECT 1") == [(1,)]


async def test_a_pool_that_cannot_grow_is_not_called_busy(config, servers):
    """Fewer are at work than there may be, and no other can be made: the shard is what is missing."""
    node = Node(config.shards[0], config, clock=SystemClock(), observer=Notes())
    await node.open()
    try:
        await node._pool.wait()  # asked sooner, it would make a second one
        await node.fetch("SELECT 1")
        async with asyncio.timeout(BOUND_S), node.transaction() as transaction:
            await transaction.fetch("SELECT 1")
            with frozen(servers[0]), pytest.raises(DatabaseUnavailable, match="no connection within"):
                await node.fetch("SELECT 1")
    finally:
        await node.close()
