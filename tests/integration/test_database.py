"""The Database door on two real Postgres servers."""

import asyncio
import uuid
from dataclasses import replace

import pytest

from headrace.clock import SystemClock
from headrace.database import Database
from headrace.database.migrations import Migration, migrate
from headrace.errors import (
    CallerError,
    ConfigError,
    HeadraceError,
    NotOpen,
    Overloaded,
    StatementFailed,
    StatementTimeout,
)
from headrace.events import Event, MigrationApplied, ShardUnavailable, Silent


class Notes:
    """Keeps every event."""

    def __init__(self):
        self.events: list[Event] = []

    def on(self, event):
        self.events.append(event)


def key_on(database, shard):
    """A key that lives on the shard."""
    return next(key for key in range(1000) if database.locate(key).shard == shard)


async def test_a_key_names_its_shard(database):
    """What is written under a key is read under it, and stands on one shard alone."""
    for node in database.nodes.values():
        await node.execute("CREATE TABLE t (k bigint PRIMARY KEY, v text)")
    for key in range(20):
        assert await database.execute("INSERT INTO t VALUES ($1, $2)", key, f"v{key}", key=key) == 1
    assert await database.fetch_value("SELECT v FROM t WHERE k = $1", 7, key=7) == "v7"
    counts = [(await node.fetch("SELECT count(*) FROM t"))[0].count for node in database.nodes.values()]
    assert sum(counts) == 20
    assert all(counts)
    assert sorted(row.k for row in await database.fetch_everywhere("SELECT k FROM t")) == list(range(20))


async def test_our_slots_are_what_postgres_computes(database):
    """The database can evaluate the slot of a key of any supported type by itself."""
    node = database.nodes["shard-0"]
    for key, function in (
        ("Mühlgraben, a key beyond twelve bytes", "hashtextextended($1::text, 0)"),
        (-(2**40), "hashint8extended($1::bigint, 0)"),
        (uuid.UUID(int=2**100 + 7), "uuid_hash_extended($1::uuid, 0)"),
    ):
        rows = await node.fetch(f"SELECT {function} & 4095", (key,))
        assert rows[0][0] == database.locate(key).slot


async def test_a_statement_without_key_is_refused(database):
    """With more than one shard nobody can guess where it belongs."""
    with pytest.raises(CallerError, match="names no key"):
        await database.fetch("SELECT 1")


async def test_a_closed_database_says_so(database_config):
    """Use before opening is the caller's mistake and is told as such."""
    with pytest.raises(NotOpen):
        await Database(database_config).fetch("SELECT 1", key=1)


async def test_a_transaction_commits_or_vanishes(database):
    """An exception in the block undoes all of it."""
    await database.execute("CREATE TABLE t (v int)", key=1)

    async def fails():
        async with database.transaction(key=1) as transaction:
            await transaction.execute("INSERT INTO t VALUES (1)")
            raise RuntimeError

    with pytest.raises(RuntimeError):
        await fails()
    async with database.transaction(key=1) as transaction:
        await transaction.execute("INSERT INTO t VALUES (2)")
    assert [tuple(row) for row in await database.fetch("SELECT v FROM t", key=1)] == [(2,)]


async def test_a_refused_statement_names_its_constraint(database):
    """The caller learns SQLSTATE and constraint without knowing the driver, and the shard counts as healthy."""
    await database.execute("CREATE TABLE t (v int CONSTRAINT small CHECK (v < 10))", key=1)
    with pytest.raises(StatementFailed) as caught:
        await database.execute("INSERT INTO t VALUES (11)", key=1)
    assert (caught.value.sqlstate, caught.value.constraint) == ("23514", "small")
    assert database.statistics().shards[database.locate(1).shard].available


async def test_a_statement_over_its_limit_is_cut_off(database_config):
    """The server enforces the limit; the connection stays usable."""
    async with Database(replace(database_config, statement_timeout_s=5.0)) as database:
        with pytest.raises(StatementTimeout):
            await database.fetch("SELECT pg_sleep(600)", key=1)
        assert await database.fetch_value("SELECT 1", key=1) == 1


async def test_execute_many_is_one_transaction(database):
    """One bad row undoes the others."""
    await database.execute("CREATE TABLE t (v int NOT NULL)", key=1)
    await database.execute_many("INSERT INTO t VALUES ($1)", [(1,), (2,)], key=1)
    with pytest.raises(StatementFailed):
        await database.execute_many("INSERT INTO t VALUES ($1)", [(3,), (None,)], key=1)
    assert await database.fetch_value("SELECT count(*) FROM t", key=1) == 2


async def test_ten_nodes_may_migrate_at_once(database):
    """The advisory lock lets one apply it and the others find it done."""
    notes = Notes()
    migration = Migration("0001_t.sql", "CREATE TABLE t (); CREATE TABLE u ()")
    node = database.nodes["shard-0"]
    await asyncio.gather(*(migrate(node, [migration], clock=SystemClock(), observer=notes) for _ in range(4)))
    assert [type(event) for event in notes.events] == [MigrationApplied]


async def test_a_failing_migration_leaves_nothing(database):
    """Its statements and its record are one transaction."""
    node = database.nodes["shard-0"]
    migration = Migration("0001_t.sql", "CREATE TABLE t (); SELECT 1/0")
    with pytest.raises(StatementFailed):
        await migrate(node, [migration], clock=SystemClock(), observer=Silent())
    assert (await node.fetch("SELECT to_regclass('t')"))[0][0] is None


async def test_a_pool_whose_connections_are_all_busy_is_overloaded(database_config):
    """The shard is well and stays so in the statistics; nobody is told that it went away."""
    notes = Notes()
    config = replace(database_config, connections_max=1, acquire_timeout_s=5.0)
    async with Database(config, observer=notes) as database:
        async with database.transaction(key=1) as transaction:
            await transaction.fetch("SELECT 1")
            with pytest.raises(Overloaded, match=r"1 busy connections.* within 5 s"):
                await database.fetch("SELECT 1", key=1, read_only=True)
            await database.nodes[database.locate(1).shard].probe()
        assert all(shard.available for shard in database.statistics().shards.values())
        assert await database.fetch_value("SELECT 1", key=1) == 1
    assert not [event for event in notes.events if isinstance(event, ShardUnavailable)]


async def test_closing_under_a_statement_tells_of_no_outage(database_config):
    """Its connection is cut, by us: the shard is well, and nobody is to be called for it."""
    notes = Notes()
    async with Database(database_config, observer=notes) as database:
        node = database.nodes[database.locate(1).shard]
        asked = asyncio.gather(database.fetch("SELECT pg_sleep(25)", key=1, read_only=True), return_exceptions=True)
        async with asyncio.timeout(20):
            while not node.busy:
                await asyncio.sleep(0.01)
    [answer] = await asked
    assert isinstance(answer, HeadraceError)
    assert not [event for event in notes.events if isinstance(event, ShardUnavailable)]


async def kept(database):
    """Who each shard says that it is, where it keeps a map."""
    names = {}
    for node in database.nodes.values():
        if (await node.fetch("SELECT to_regclass('headrace_shard_map') IS NOT NULL"))[0][0]:
            names[node.name] = (await node.fetch("SELECT shard FROM headrace_shard_map"))[0][0]
    return names


async def test_every_shard_keeps_the_map(database, database_config):
    """From the first open on, also when many processes are the first; a later open finds itself in agreement."""

    async def opened():
        async with Database(database_config) as other:
            return await other.fetch_value("SELECT 1", key=1)

    assert await asyncio.gather(*(opened() for _ in range(4))) == [1] * 4
    assert await kept(database) == {"shard-0": "shard-0", "shard-1": "shard-1"}
    assert await opened() == 1


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda a, b: {"shards": (a,)}, r"shard-1: \d+\); .*\(shard-0: 4096\)"),
        (lambda a, b: {"shards": (a, replace(b, name="other"))}, "other"),
        (lambda a, b: {"shards": (a, replace(b, active=False))}, r"\(shard-0: 4096\)"),
        (lambda a, b: {"shards": (a, replace(b, weight=5.0))}, "slots would be looked for on another shard"),
        (lambda a, b: {"shards": (replace(a, dsn=b.dsn), replace(b, dsn=a.dsn))}, "holds shard 'shard-1'"),
        (lambda a, b: {"slots": 8}, "of 8 slots"),
    ],
)
async def test_a_configuration_that_would_hide_data_is_refused(database, database_config, change, said):
    """At open, before anything is served, with what is kept, what is configured and the fix."""
    async with Database(database_config):
        pass
    with pytest.raises(ConfigError, match=said):
        await Database(replace(database_config, **change(*database_config.shards))).__aenter__()


async def test_a_refused_configuration_leaves_no_trace(database, database_config):
    """A new shard does not learn a map that the old ones refuse."""
    first, second = database_config.shards
    async with Database(replace(database_config, shards=(first,))):
        pass
    with pytest.raises(ConfigError):
        await Database(replace(database_config, shards=(second, first))).__aenter__()
    assert await kept(database) == {"shard-0": "shard-0"}
    await database.nodes["shard-0"].execute("DROP TABLE headrace_shard_map")
