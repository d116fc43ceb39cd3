"""Reads that share a round trip and writes that share a commit, on a real Postgres."""

import asyncio
import os
import select
import signal
from dataclasses import replace

import psycopg
import pytest
from psycopg import pq

from headrace.database import Database, DatabaseConfig
from headrace.database.postgres import copying, pipeline
from headrace.errors import (
    CallerError,
    DatabaseUnavailable,
    OutcomeUnknown,
    StatementFailed,
    StatementTimeout,
)


@pytest.fixture
async def one(database, database_config):
    """One shard, one connection: everything that comes at the same time shares it."""
    config = DatabaseConfig(
        shards=database_config.shards[:1], connections_max=1, slots=1, acquire_timeout_s=20.0, resolve_wait_s=30.0
    )
    await database.nodes["shard-0"].execute("DROP TABLE IF EXISTS headrace_shard_map")
    async with Database(config) as one:
        await one.execute("CREATE TABLE t (k int PRIMARY KEY, v int)")
        yield one
    await database.nodes["shard-0"].execute("DROP TABLE IF EXISTS headrace_shard_map")


def read(database, sql, *params):
    return database.fetch(sql, *params, read_only=True)


def insert(database, k, v=0):
    return database.execute("INSERT INTO t VALUES ($1, $2)", k, v, grouped=True)


async def keys(database):
    return [row.k for row in await database.fetch("SELECT k FROM t ORDER BY k")]


async def all_of(calls):
    return await asyncio.gather(*calls, return_exceptions=True)


# -- reads ------------------------------------------------------------------------------------------------------------


async def test_a_read_that_fails_does_not_touch_the_others(one):
    """Those behind it in the round trip are answered all the same, each by its own statement."""
    for _ in range(3):  # the third time the statements are prepared
        answers = await all_of(read(one, "SELECT 10 / $1::int AS q", number % 4) for number in range(20))

        failed = [number for number, answer in enumerate(answers) if isinstance(answer, StatementFailed)]
        assert failed == [0, 4, 8, 12, 16]
        assert answers[0].sqlstate == "22012"
        assert [answers[number][0].q for number in (1, 2, 3, 19)] == [10, 5, 3, 3]


async def test_statements_of_every_kind_share_a_trip(one):
    """Different texts, types, numbers of rows, and none."""
    await one.execute("INSERT INTO t VALUES (1, 10), (2, 20)")
    for _ in range(3):
        answers = await all_of(
            [
                read(one, "SELECT * FROM t ORDER BY k"),
                read(one, "SELECT v FROM t WHERE k = $1", 2),
                read(one, "SELECT $1::text AS a, $2::int[] AS b", "x", [1, None]),
                read(one, "SELECT v FROM t WHERE k = $1", 2**40),
                read(one, "SET application_name = 'me'"),
                read(one, "SELECT no_such_column"),
                read(one, "SELECT $1::int", object()),
                read(one, "SELECT $1", "a\0b"),
                read(one, "COPY t TO STDOUT"),
            ]
        )
        assert [[tuple(row) for row in rows] for rows in answers[:5]] == [
            [(1, 10), (2, 20)],
            [(20,)],
            [("x", [1, None])],
            [],
            [],
        ]
        assert all(isinstance(answer, StatementFailed) for answer in answers[5:])


async def test_a_prepared_statement_outlives_changes_of_its_table(one):
    """What the server refuses to run as it was prepared is prepared anew, and the rows have the new columns."""
    await one.execute("INSERT INTO t VALUES (1, 10)")
    for _ in range(3):
        await read(one, "SELECT * FROM t WHERE k = $1", 1)

    await one.execute("ALTER TABLE t ADD w text DEFAULT 'new'")

    rows = await read(one, "SELECT * FROM t WHERE k = $1", 1)
    assert rows[0].asdict() == {"k": 1, "v": 10, "w": "new"}


async def test_a_prepared_statement_that_was_deallocated_is_made_again(one):
    """DEALLOCATE and DISCARD are anybody's right."""
    for _ in range(3):
        await read(one, "SELECT $1::int AS a", 1)

    await one.execute("DEALLOCATE ALL")

    answers = await all_of(read(one, "SELECT $1::int AS a", number) for number in range(5))
    assert [rows[0].a for rows in answers] == [0, 1, 2, 3, 4]


async def test_more_statements_than_are_kept_prepared(one):
    """The server holds a bounded number of them."""
    for _ in range(3):
        await all_of(read(one, f"SELECT {number} AS a") for number in range(300))

    kept = await one.fetch_value("SELECT count(*) FROM pg_prepared_statements WHERE name LIKE 'headrace_%'")

    assert 0 < kept <= 200


async def test_making_room_among_statements_that_are_gone_harms_nobody(one):
    """The oldest one that has to leave was deallocated by somebody else: reads and writes go on."""
    for _ in range(3):
        await all_of(read(one, f"SELECT {number} AS a") for number in range(200))
    await one.execute("DEALLOCATE ALL")
    writes = [f"INSERT INTO t VALUES ($1, {number})" for number in range(3)]
    for k in range(2):
        assert await all_of(one.execute(sql, 10 * k + n, grouped=True) for n, sql in enumerate(writes)) == [1] * 3

    for _ in range(3):
        await all_of(read(one, f"SELECT {number} AS b") for number in range(200))
    await one.execute("DEALLOCATE ALL")
    for _ in range(2):
        answers = await all_of(read(one, f"SELECT {number} AS c") for number in range(20))

    assert [rows[0].c for rows in answers] == list(range(20))
    assert await keys(one) == [0, 1, 2, 10, 11, 12]


async def test_a_read_over_its_limit_is_cut_off_alone(database_config):
    """The time limit is each statement's own, not that of the trip."""
    sleeps = [*[0.3] * 14, 600, 0.3]
    async with Database(replace(database_config, connections_max=1, statement_timeout_s=4.0)) as database:
        answers = await all_of(database.fetch("SELECT pg_sleep($1)", s, key=1, read_only=True) for s in sleeps)

    assert isinstance(answers.pop(14), StatementTimeout)
    assert all(len(rows) == 1 for rows in answers)


async def test_reads_that_nobody_waits_for_are_cancelled_on_the_server(one, database, monkeypatch):
    """Their connection is free again for the next call."""
    monkeypatch.setattr(pipeline, "_CANCEL_S", 30.0)  # a slow server is none that is frozen
    tasks = [asyncio.ensure_future(read(one, "SELECT pg_sleep(600)")) for _ in range(3)]
    sleeping = "SELECT count(*) FROM pg_stat_activity WHERE query LIKE 'SELECT pg_sleep(600)%' AND state = 'active'"
    watching = database.nodes["shard-0"]
    async with asyncio.timeout(30):
        while not (await watching.fetch(sleeping))[0][0]:
            await asyncio.sleep(0.01)

    for task in tasks:
        task.cancel()

    async with asyncio.timeout(60):
        assert await one.fetch_value("SELECT 1") == 1
        while (await watching.fetch(sleeping))[0][0]:
            await asyncio.sleep(0.01)


async def test_a_slow_statement_travels_alone_until_it_is_quick(database_config):
    """Once its text has held up a trip, others do not wait for it again."""
    async with Database(replace(database_config, connections_max=2)) as database:
        slow = "SELECT pg_sleep($1)"
        await database.fetch(slow, 0.6, key=1, read_only=True)

        slept = asyncio.ensure_future(database.fetch(slow, 600, key=1, read_only=True))
        async with asyncio.timeout(20):
            answers = await all_of(database.fetch("SELECT $1::int AS a", n, key=1, read_only=True) for n in range(40))
        assert [rows[0].a for rows in answers] == list(range(40))
        slept.cancel()
        await asyncio.gather(slept, return_exceptions=True)


# -- writes -----------------------------------------------------------------------------------------------------------


async def test_writes_of_one_turn_share_a_commit(one):
    """One transaction wrote all rows."""
    assert await all_of(insert(one, k) for k in range(100)) == [1] * 100

    assert await one.fetch_value("SELECT count(DISTINCT xmin::text) FROM t") == 1
    assert await keys(one) == list(range(100))


async def test_a_constraint_error_in_one_of_100_fails_that_caller_alone(one):
    """The other 99 are committed."""
    await insert(one, 57)

    answers = await all_of(insert(one, k) for k in range(100))

    assert [k for k, answer in enumerate(answers) if answer != 1] == [57]
    assert isinstance(answers[57], StatementFailed)
    assert answers[57].constraint == "t_pkey"
    assert await keys(one) == list(range(100))


@pytest.mark.parametrize("refused", [range(0, 100, 2), range(100), [98, 99], [0, 1]])
async def test_any_number_may_be_refused(one, refused):
    """Each refusal is its own caller's, wherever in the batch it stands."""
    await all_of(insert(one, k, 1) for k in refused)

    answers = await all_of(insert(one, k, 2) for k in range(100))

    assert [k for k, answer in enumerate(answers) if isinstance(answer, StatementFailed)] == list(refused)
    assert await keys(one) == list(range(100))
    assert await one.fetch_value("SELECT count(*) FROM t WHERE v = 1") == len(refused)


async def test_an_acknowledged_write_is_seen_by_others_at_once(one, database):
    """Whoever is told that it is done finds it done, on any connection."""
    node = database.nodes["shard-0"]

    async def write_and_look(k):
        await insert(one, k)
        return len(await node.fetch("SELECT k FROM t WHERE k = $1", (k,)))

    assert await all_of(write_and_look(k) for k in range(30)) == [1] * 30


async def test_the_writes_of_one_caller_keep_their_order(one):
    """Also of different statements, and over many batches."""
    await insert(one, 1)
    writes = [
        one.execute(f"UPDATE t SET v = v * 2 + {number % 2} WHERE k = $1", 1, grouped=True) for number in range(20)
    ]
    expected = 0
    for number in range(20):
        expected = expected * 2 + number % 2

    assert await all_of(writes) == [1] * 20
    assert await one.fetch_value("SELECT v FROM t") == expected


async def test_a_constraint_of_the_commit_fails_its_row_alone(one):
    """Which row it was shows when each is committed by itself."""
    await one.execute("ALTER TABLE t ADD CONSTRAINT one_v UNIQUE (v) DEFERRABLE INITIALLY DEFERRED")

    answers = await all_of(insert(one, k, 7 if k in {3, 5} else 100 + k) for k in range(10))

    assert [k for k, answer in enumerate(answers) if answer != 1] == [5]
    assert answers[5].constraint == "one_v"
    assert await keys(one) == [0, 1, 2, 3, 4, 6, 7, 8, 9]


async def test_batches_that_lock_each_other_out_are_written_one_by_one(one, database):
    """Two processes that update the same rows in opposite order deadlock; no caller is told so."""
    await all_of(insert(one, k) for k in range(20))
    node, config = database.nodes["shard-0"], replace(one.config, lock_timeout_s=25.0)
    sql = "UPDATE t SET v = v + 1 WHERE k = $1"
    async with Database(config) as up, Database(config) as down:
        async with node.transaction() as holder:  # until both have come to the row in the middle
            await holder.fetch("SELECT k FROM t WHERE k = 10 FOR UPDATE")
            ups = [up.execute(sql, k, grouped=True) for k in range(20)]
            downs = [down.execute(sql, k, grouped=True) for k in reversed(range(20))]
            updates = asyncio.ensure_future(all_of([*ups, *downs]))
            async with asyncio.timeout(20):
                while (await node.fetch("SELECT count(*) FROM pg_locks WHERE NOT granted"))[0][0] < 2:
                    await asyncio.sleep(0.01)
        assert await updates == [1] * 40
    assert await one.fetch_value("SELECT sum(v) FROM t") == 40


async def test_rows_that_a_write_returns_are_counted(one):
    """`execute` says how many rows were touched, RETURNING or not."""
    await all_of(insert(one, k) for k in range(3))

    answers = await all_of(
        one.execute("UPDATE t SET v = 1 WHERE k < $1 RETURNING k", k, grouped=True) for k in range(4)
    )

    assert answers == [0, 1, 2, 3]


@pytest.mark.parametrize("sql", ["COMMIT", "SELECT 1", "  -- x\n ROLLBACK", "CREATE TABLE u ()", "/* a */ VACUUM"])
async def test_what_would_end_the_transaction_of_others_is_refused(one, sql):
    """Only writes of rows may be grouped."""
    with pytest.raises(CallerError, match="can be grouped"):
        await one.execute(sql, grouped=True)


async def backend_at(node, query):
    """The backend that runs this, once there is one."""
    sql = "SELECT pid FROM pg_stat_activity WHERE state = 'active' AND query LIKE $1 AND pid <> pg_backend_pid()"
    async with asyncio.timeout(30):
        while not (rows := await node.fetch(sql, (query,))):
            await asyncio.sleep(0.01)
    return rows[0].pid


async def test_a_connection_that_dies_before_the_commit_left_nothing(one, database):
    """So each row is tried by itself, and only the one whose connection dies again is told."""
    writes = [insert(one, k) for k in range(5)]
    writes.append(one.execute("INSERT INTO t SELECT 5, 0 FROM pg_sleep(600)", grouped=True))
    answers = asyncio.ensure_future(all_of(writes))
    node = database.nodes["shard-0"]

    async with asyncio.timeout(60):
        while not answers.done():
            await node.fetch(
                "SELECT pg_terminate_backend(pid) FROM pg_stat_activity"
                " WHERE state = 'active' AND query LIKE '%pg_sleep(600)' AND pid <> pg_backend_pid()"
            )
            await asyncio.sleep(0.01)

    *told, last = await answers
    assert told == [1] * 5
    assert isinstance(last, DatabaseUnavailable)
    assert await keys(one) == [0, 1, 2, 3, 4]


@pytest.mark.parametrize(("poisonous", "kept_min"), [({3}, 9), (set(range(3, 10)), 3)])
async def test_a_row_that_kills_its_connection_takes_nobody_with_it(one, poisonous, kept_min):
    """The others are kept; where more than one does it the rest is not tried: each time may be a crash."""
    await one.execute("CREATE SEQUENCE deaths")
    await one.execute(
        "CREATE FUNCTION die() RETURNS trigger LANGUAGE plpgsql AS"
        " 'BEGIN PERFORM nextval(''deaths''), pg_terminate_backend(pg_backend_pid()); RETURN NEW; END'"
    )
    await one.execute("CREATE TRIGGER die BEFORE INSERT ON t FOR EACH ROW WHEN (NEW.v = 1) EXECUTE FUNCTION die()")

    answers = await all_of(insert(one, k, int(k in poisonous)) for k in range(10))

    kept = [k for k, answer in enumerate(answers) if answer == 1]
    assert len(kept) == kept_min
    assert {type(answers[k]) for k in range(10) if k not in kept} == {DatabaseUnavailable}
    assert await keys(one) == kept
    assert await one.fetch_value("SELECT nextval('deaths')") <= 4


async def test_a_connection_that_dies_in_the_commit_leaves_everyone_in_doubt(one, database):
    """Nobody knows, so nobody is told that it did not happen."""
    await one.execute(
        "CREATE FUNCTION late() RETURNS trigger LANGUAGE plpgsql AS 'BEGIN PERFORM pg_sleep(600); RETURN NEW; END'"
    )
    await one.execute(
        "CREATE CONSTRAINT TRIGGER late AFTER INSERT ON t DEFERRABLE INITIALLY DEFERRED FOR EACH ROW"
        " WHEN (NEW.k = 3) EXECUTE FUNCTION late()"
    )
    answers = asyncio.ensure_future(all_of(insert(one, k) for k in range(5)))
    node = database.nodes["shard-0"]

    await node.fetch("SELECT pg_terminate_backend($1)", (await backend_at(node, "COMMIT"),))

    told = await answers
    assert {type(answer) for answer in told} == {OutcomeUnknown}


async def test_a_row_that_is_tried_alone_is_found_out_about(one, database):
    """Its commit is cut, and asked about as that of any other write: it did not happen."""
    config = replace(one.config, resolve_unknown=True)
    for sql in (
        "ALTER TABLE t ADD CONSTRAINT one_v UNIQUE (v) DEFERRABLE INITIALLY DEFERRED",
        "CREATE FUNCTION late() RETURNS trigger LANGUAGE plpgsql AS 'BEGIN"
        " IF (SELECT count(*) FROM t WHERE xmin = pg_current_xact_id()::xid) = 1 THEN PERFORM pg_sleep(600); END IF;"
        " RETURN NEW; END'",
        "CREATE CONSTRAINT TRIGGER late AFTER INSERT ON t DEFERRABLE INITIALLY DEFERRED FOR EACH ROW"
        " WHEN (NEW.k = 3) EXECUTE FUNCTION late()",
    ):
        await one.execute(sql)
    async with Database(config) as resolving:
        answers = asyncio.ensure_future(all_of(insert(resolving, k, 7 if k in {1, 5} else 100 + k) for k in range(8)))
        sleeping = (
            "SELECT pg_terminate_backend(pid) FROM pg_stat_activity"
            " WHERE wait_event = 'PgSleep' AND query = 'COMMIT' AND state = 'active'"
        )
        async with asyncio.timeout(60):
            while not await database.nodes["shard-0"].fetch(sleeping):
                await asyncio.sleep(0.01)

        told = await answers

        assert [k for k, answer in enumerate(told) if answer != 1] == [3, 5]
        assert "did not happen" in str(told[3])
        assert isinstance(told[3], DatabaseUnavailable)
        assert isinstance(told[5], StatementFailed)
        assert resolving.statistics().shards["shard-0"].unknown == 0
    assert await keys(one) == [0, 1, 2, 4, 6, 7]


@pytest.mark.parametrize("is_deferred", [False, True])
async def test_rows_that_others_hold_do_not_wait_for_one_another(one, database, is_deferred):
    """Twenty of them together wait little longer than one would, and the rest of the group no longer either."""
    await all_of(insert(one, k, k) for k in range(30))
    if is_deferred:
        await one.execute("ALTER TABLE t ADD CONSTRAINT one_v UNIQUE (v) DEFERRABLE INITIALLY DEFERRED")
    update = "UPDATE t SET v = CASE WHEN k >= 28 THEN -1 ELSE -10 - k END WHERE k = $1"
    loop = asyncio.get_running_loop()
    async with (
        Database(replace(one.config, lock_timeout_s=1.5)) as hasty,
        database.nodes["shard-0"].transaction() as holder,
    ):
        await holder.fetch("SELECT k FROM t WHERE k < 20 FOR UPDATE")
        began = loop.time()
        answers = await all_of(hasty.execute(update, k, grouped=True) for k in range(30))
        took_s = loop.time() - began

    assert {type(answer) for answer in answers[:20]} == {StatementTimeout}
    assert answers[20:29] == [1] * 9
    assert isinstance(answers[29], StatementFailed) if is_deferred else answers[29] == 1
    assert took_s < 25.0  # one after the other they would have waited for thirty


# -- COPY -------------------------------------------------------------------------------------------------------------


async def _begun_and_not_yet_read(connection, copy):
    """A COPY that the server has agreed to, which nobody here has read. The loop is blocked meanwhile."""
    task = asyncio.ensure_future(copy)
    while connection.pgconn.transaction_status != pq.TransactionStatus.ACTIVE:
        await asyncio.sleep(0)
    assert select.select([connection.fileno()], [], [], 20)[0]
    return task


async def _cancelled(task):
    task.cancel()
    async with asyncio.timeout(60):
        return isinstance((await all_of([task]))[0], asyncio.CancelledError)


async def _no_rows():
    for block in ():
        yield block


async def _read_all(connection, *pieces):
    async for _ in connection.copy_out(*pieces):
        pass


async def test_a_copy_cancelled_as_it_begins_leaves_a_usable_connection(one):
    """In both directions: the connection takes the next statement, and the server none of the rows."""
    rows = ("SELECT repeat('x', 1000) FROM generate_series(1, 20000)",), ()
    async with one.nodes["shard-0"].reading() as connection:
        before = connection.pgconn.backend_pid
        assert await _cancelled(await _begun_and_not_yet_read(connection, connection.copy_in("t", _no_rows())))
        await connection.rollback()
        assert await _cancelled(await _begun_and_not_yet_read(connection, _read_all(connection, *rows)))
        await connection.rollback()

        assert await (await connection.execute("SELECT count(*), pg_backend_pid() FROM t")).fetchall() == [(0, before)]


@pytest.mark.parametrize("has_begun", [False, True])
async def test_a_copy_cancelled_on_a_frozen_server_ends(one, monkeypatch, has_begun):
    """The caller is free after a bounded time, and the connection is closed."""
    monkeypatch.setattr(copying, "END_S", 0.1)
    asked = asyncio.Event()

    async def endless():
        asked.set()
        await asyncio.Event().wait()
        yield b""

    async with one.nodes["shard-0"].reading() as connection:
        pid = connection.pgconn.backend_pid
        copy = await _begun_and_not_yet_read(connection, connection.copy_in("t", endless()))
        if has_begun:
            await asked.wait()
        os.kill(pid, signal.SIGSTOP)
        try:
            assert await _cancelled(copy)
            assert connection.is_hung_up()
        finally:
            os.kill(pid, signal.SIGCONT)

    assert await keys(one) == []


async def test_a_copy_cancelled_again_while_it_is_ended_leaves_no_connection_in_it(one, monkeypatch):
    """Who is cancelled in the middle of that loses the connection, and nothing else."""

    async def cancelled_again(copy, error):
        raise asyncio.CancelledError

    monkeypatch.setattr(psycopg.AsyncCopy, "finish", cancelled_again)

    async with one.nodes["shard-0"].reading() as connection:
        assert await _cancelled(await _begun_and_not_yet_read(connection, connection.copy_in("t", _no_rows())))
        assert connection.closed

    assert await keys(one) == []
