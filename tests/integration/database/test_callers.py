"""Callers that share connections and trips get nothing of each other: no setting, no transaction, no error."""

import asyncio

import psycopg
import pytest

from headrace.database import Database, DatabaseConfig
from headrace.errors import CallerError, DatabaseUnavailable, StatementFailed, StatementRefused


@pytest.fixture
async def one(database, database_config):
    """One shard, one connection: whoever comes next has it."""
    config = DatabaseConfig(shards=database_config.shards[:1], connections_max=1, slots=1, acquire_timeout_s=20.0)
    await database.nodes["shard-0"].execute("DROP TABLE IF EXISTS headrace_shard_map")
    async with Database(config) as one:
        await one.execute("CREATE TABLE t (k int PRIMARY KEY, v text)")
        yield one
    await database.nodes["shard-0"].execute("DROP TABLE IF EXISTS headrace_shard_map")


def read(database, sql, *params):
    return database.fetch(sql, *params, read_only=True)


async def all_of(*calls):
    return await asyncio.gather(*calls, return_exceptions=True)


async def inside(database, sql):
    async with database.transaction() as transaction:
        await transaction.execute(sql)


STATE = """
SELECT coalesce(current_setting('a.b', true), ''),
       (SELECT count(*) FROM pg_locks WHERE locktype = 'advisory' AND pid = pg_backend_pid()),
       to_regclass('pg_temp.mine'), (SELECT count(*) FROM pg_listening_channels())"""
ANYBODYS_LOCKS = "SELECT count(*) FROM pg_locks WHERE locktype = 'advisory'"


@pytest.mark.parametrize(
    "sql",
    [
        "SET a.b = 'mine'",
        "SELECT set_config('a.b', 'mine', false)",
        "SELECT pg_advisory_lock(7)",
        "CREATE TEMP TABLE mine (k int)",
        "LISTEN mine",
    ],
)
@pytest.mark.parametrize("how", [Database.execute, Database.fetch, read, inside])
async def test_what_a_caller_does_to_its_session_ends_with_its_loan(one, sql, how):
    """The next caller finds neither its setting nor its lock, table or channel."""
    await how(one, sql)

    assert tuple(await one.fetch_one(STATE)) == ("", 0, None, 0)
    async with asyncio.timeout(20):
        while await one.fetch_value(ANYBODYS_LOCKS):  # a session that was closed ends in its own time
            await asyncio.sleep(0.01)


async def test_a_setting_for_a_transaction_is_not_that_of_a_shared_trip(one):
    """Row security often hangs on one: the reads that leave together must not see it."""
    setting = "SELECT set_config('a.tenant', 'mine', true)"
    answers = await all_of(read(one, setting), *(read(one, "SELECT current_setting('a.tenant', true)") for _ in "abc"))
    assert answers[0] == [("mine",)]
    assert all(rows[0][0] in {None, ""} for rows in answers[1:])


async def test_a_transaction_that_met_an_error_does_not_look_committed(one):
    """Postgres turns the COMMIT into a ROLLBACK without a word; who swallowed the error is told at the end."""

    async def swallows():
        async with one.transaction() as transaction:
            await transaction.execute("INSERT INTO t VALUES (1)")
            with pytest.raises(StatementFailed):
                await transaction.execute("INSERT INTO t VALUES (1)")

    with pytest.raises(StatementFailed, match="nothing of it was kept") as caught:
        await swallows()
    assert caught.value.sqlstate == "25P02"
    assert await one.fetch("SELECT k FROM t") == []


async def test_an_error_may_be_met_behind_a_savepoint(one):
    """What was done before it is committed."""
    async with one.transaction() as transaction:
        await transaction.execute("INSERT INTO t VALUES (1)")
        await transaction.execute("SAVEPOINT s")
        with pytest.raises(StatementFailed):
            await transaction.execute("INSERT INTO t VALUES (1)")
        await transaction.execute("ROLLBACK TO s")
    assert await one.fetch("SELECT k FROM t") == [(1,)]


@pytest.mark.parametrize("sql", ["COMMIT", "ROLLBACK"])
async def test_a_transaction_that_ended_itself_says_so(one, sql):
    """The block could not keep its promise any more."""
    with pytest.raises(CallerError, match="has ended it"):
        await inside(one, sql)


async def test_a_transaction_takes_nothing_after_its_end(one):
    """Its connection is in another transaction by then, which must not get the statement."""
    async with one.transaction() as mine:
        await mine.execute("INSERT INTO t VALUES (1)")

    async def loses():
        async with one.transaction():
            with pytest.raises(CallerError, match="is over"):
                await mine.execute("INSERT INTO t VALUES (2)")
            raise KeyError

    with pytest.raises(KeyError):
        await loses()
    with pytest.raises(CallerError, match="is over"):
        await mine.fetch("SELECT 1")


async def test_a_statement_that_waits_when_its_transaction_ends_is_refused(one):
    """A task that outlives the block, with its turn still to come."""
    tasks = []
    async with one.transaction() as transaction:
        tasks += [asyncio.ensure_future(transaction.execute(f"INSERT INTO t VALUES ({k})")) for k in range(3)]
        while not transaction.texts:
            await asyncio.sleep(0)

    told = await all_of(*tasks)

    assert told[0] == 1
    assert [type(answer) for answer in told[1:]] == [CallerError] * 2
    assert await one.fetch("SELECT k FROM t") == [(0,)]


async def test_a_transaction_that_is_left_open_is_refused(one):
    """It would be rolled back with the loan, and its caller would think that it was written."""
    for sql in ("BEGIN", "BEGIN; INSERT INTO t VALUES (1)"):
        with pytest.raises(StatementRefused, match="leaves a transaction open"):
            await one.execute(sql)
    assert await one.fetch("SELECT k FROM t") == []


async def test_a_connection_that_died_before_the_commit_left_nothing(one, database):
    """COMMIT was never sent, so nobody is in doubt."""

    async def idles():
        async with one.transaction() as transaction:
            await transaction.execute("INSERT INTO t VALUES (1)")
            pid = (await transaction.fetch("SELECT pg_backend_pid()"))[0][0]
            node = database.nodes["shard-0"]
            assert (await node.fetch("SELECT pg_terminate_backend($1, 25000)", (pid,)))[0][0]

    with pytest.raises(DatabaseUnavailable) as caught:
        await idles()
    assert type(caught.value) is DatabaseUnavailable


# -- values and texts that cannot be sent -----------------------------------------------------------------------------


def nested():
    value = []
    for _ in range(3000):
        value = [value]
    return value


TOO_MANY = "SELECT " + "+".join(f"${number}::int" for number in range(1, 70_001))
UNSENDABLE = {
    "half a pair": ("SELECT $1::text", "\ud800"),
    "in the text": ("SELECT '\ud800'",),
    "too many": (TOO_MANY, *[1] * 70_000),
    "too deep": ("SELECT $1", nested()),
    "copy": ("; COPY t TO STDOUT",),
}


@pytest.mark.parametrize("bad", UNSENDABLE.values(), ids=UNSENDABLE)
async def test_what_cannot_be_sent_fails_its_own_read(one, bad):
    """The others of the trip are answered, and the shard counts as well."""
    answers = await all_of(read(one, "SELECT 1"), read(one, *bad), read(one, "SELECT $1::int", 2))
    assert [answers[0], answers[2]] == [[(1,)], [(2,)]]
    assert isinstance(answers[1], StatementFailed)
    assert one.statistics().shards["shard-0"].available


async def test_what_cannot_be_sent_fails_its_own_write(one):
    """The others of the commit are written; alone it is refused in the same way."""
    insert = "INSERT INTO t VALUES ($1, $2)"
    answers = await all_of(*(one.execute(insert, k, "x\ud800" if k == 1 else "x", grouped=True) for k in range(3)))
    assert [answers[0], answers[2]] == [1, 1]
    assert isinstance(answers[1], StatementFailed)
    with pytest.raises(StatementFailed):
        await one.execute(insert, 4, "\ud800")
    assert await one.fetch("SELECT k FROM t ORDER BY k") == [(0,), (2,)]


# -- prepared statements ----------------------------------------------------------------------------------------------


async def test_a_table_that_somebody_alters_breaks_no_statement(one, database_config):
    """What the driver prepared for it is prepared anew, by the same call."""
    for _ in range(8):
        await one.fetch("SELECT * FROM t WHERE k = $1", 1)
    with psycopg.connect(database_config.shards[0].dsn) as other:
        other.execute("ALTER TABLE t ADD w int")

    await one.execute("INSERT INTO t VALUES (1, 'x', 2)")
    assert await one.fetch("SELECT * FROM t WHERE k = $1", 1) == [(1, "x", 2)]


async def test_statements_that_the_server_does_not_support_leak_nothing(one):
    """Their error looks like that of a stale statement; what is prepared stays, and is bounded."""
    for turn in range(4):
        for _ in range(3):
            await all_of(*(read(one, f"SELECT {turn} AS a{number}") for number in range(70)))
        refused = await all_of(read(one, "SELECT count(*) FROM t FOR UPDATE"))
        assert refused[0].sqlstate == "0A000"
    kept = "SELECT count(*) FROM pg_prepared_statements WHERE name LIKE 'headrace%'"
    assert await one.fetch_value(kept) <= 200
