"""Rows that are read as they come: a stream changes nothing, and one that is left costs nobody anything."""

import asyncio
from dataclasses import replace

import pytest

from headrace.database import Database
from headrace.errors import StatementRefused

INSERT = "INSERT INTO t VALUES (1) RETURNING k"
ACTIVE = "SELECT 1 FROM pg_stat_activity WHERE state = 'active' AND query LIKE '%generate_series(1, 99%'"


@pytest.fixture
async def one(database, database_config):
    """One shard and one connection."""
    async with Database(replace(database_config, connections_max=1)) as one:
        await one.execute("CREATE TABLE t (k int PRIMARY KEY)", key=key_of(one))
        yield one


def key_of(database):
    return next(name for name in map(str, range(1000)) if database.locate(name).shard == "shard-0")


async def streamed(database, sql):
    async with database.stream(sql, key=key_of(database)) as rows:
        return [row async for row in rows]


@pytest.mark.parametrize(
    "sql",
    [
        INSERT,
        "UPDATE t SET k = 1 RETURNING k",
        "/* a */ DELETE FROM t RETURNING k",
        f"WITH written AS ({INSERT}) SELECT k FROM written",
        f"EXPLAIN ANALYZE {INSERT}",
        "CALL p()",
    ],
)
async def test_what_changes_something_is_not_streamed(one, sql):
    """A stream may be left half-read, or break: nobody would know what was kept."""
    await one.execute("CREATE PROCEDURE p() LANGUAGE sql AS 'INSERT INTO t VALUES (1)'", key=key_of(one))
    await one.execute("INSERT INTO t VALUES (7)", key=key_of(one))
    with pytest.raises(StatementRefused, match="read-only"):
        await streamed(one, sql)
    assert await one.fetch("SELECT k FROM t", key=key_of(one)) == [(7,)]


@pytest.mark.parametrize("sql", ["WITH a AS (SELECT 1 AS k) SELECT k FROM a", "VALUES (1)", "(SELECT 1)"])
async def test_every_form_of_a_query_is_streamed(one, sql):
    """Only what it does counts, not its first word."""
    assert await streamed(one, sql) == [(1,)]


@pytest.mark.parametrize(
    "sql",
    [
        "SELECT generate_series(1, 99000000) AS n, repeat('x', 1000)",
        "WITH many AS (SELECT generate_series(1, 99000000) AS n) SELECT n, repeat('x', 1000) FROM many",
    ],
)
async def test_a_stream_that_is_left_ends_on_the_server_and_keeps_its_connection(one, database, sql, caplog):
    """What nobody reads any more is not computed, and the next caller gets the connection as it is."""
    before = await one.fetch("SELECT pg_backend_pid()", key=key_of(one))
    async with asyncio.timeout(60):
        async with one.stream(sql, key=key_of(one)) as rows:
            assert (await anext(aiter(rows))).n == 1
        assert await database.nodes["shard-0"].fetch(f"{ACTIVE} AND pid = {before[0][0]}") == []
        assert await one.fetch("SELECT pg_backend_pid()", key=key_of(one)) == before
    assert "closing returned connection" not in caplog.text


async def test_a_caller_who_is_cancelled_leaves_its_stream_as_well(one, database, caplog):
    """Also while it waits for rows that take long."""
    before = await one.fetch("SELECT pg_backend_pid()", key=key_of(one))
    slow = "SELECT generate_series(1, 99000000) AS n, pg_sleep(0.01)"
    reading = asyncio.ensure_future(streamed(one, slow))
    node = database.nodes["shard-0"]
    async with asyncio.timeout(60):
        while not await node.fetch(f"{ACTIVE} AND pid = {before[0][0]}"):
            await asyncio.sleep(0.01)
        reading.cancel()
        assert isinstance((await asyncio.gather(reading, return_exceptions=True))[0], asyncio.CancelledError)
        assert await node.fetch(f"{ACTIVE} AND pid = {before[0][0]}") == []
        assert await one.fetch("SELECT pg_backend_pid()", key=key_of(one)) == before
    assert "closing returned connection" not in caplog.text
