"""Statements without a key on two real Postgres servers: what they write, what is refused, what a dead shard does."""

import asyncio
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path

import psycopg
import pytest

from headrace.database import Database, DatabaseConfig, ShardConfig
from headrace.database.config import Reference, Sharded
from headrace.database.planning.route import AllShards, Gather, OneShard
from headrace.embedded import EmbeddedPostgres, started
from headrace.errors import (
    BackendError,
    ConfigError,
    DatabaseUnavailable,
    ResultTooLarge,
    StatementFailed,
    StatementRefused,
    StatementTimeout,
)

TABLES = {"items": Sharded(key="tenant"), "parts": Sharded(key="tenant"), "kinds": Reference()}
SCHEMA = (
    "CREATE TABLE items (tenant bigint NOT NULL, id bigint NOT NULL, n int CHECK (n < 100), PRIMARY KEY (tenant, id))",
    "CREATE TABLE parts (tenant bigint NOT NULL, item bigint, weight numeric)",
    "CREATE TABLE kinds (id int PRIMARY KEY, name text)",
)


# What a Database asks its shards now and then by itself.
OWN = "^SELECT 1$|set_config|superuser_reserved|pg_prepared_xacts|headrace_(shard_map|decisions|index_history)"
# Neither an autovacuum, nor what a Database that was closed before has left for the server to end.
OF_THIS_POOL = "application_name = current_setting('application_name')"


@pytest.fixture
def config(database_config: DatabaseConfig) -> DatabaseConfig:
    return replace(database_config, tables=TABLES, block_rows=10)


@pytest.fixture
async def routed(database: Database, config: DatabaseConfig) -> AsyncIterator[Database]:
    """Two shards with empty tables; `database` has emptied them."""
    for node in database.nodes.values():
        for sql in SCHEMA:
            await node.execute(sql)
    async with Database(config) as routed:
        yield routed


def keys_on(database: Database, shard: str, count: int) -> list[int]:
    return [key for key in range(1000) if database.locate(key).shard == shard][:count]


async def counts(database: Database, table: str) -> list[int]:
    sql = f"SELECT count(*) FROM {table}"
    return [(await node.fetch(sql, read_only=True))[0][0] for node in database.nodes.values()]


async def test_a_key_in_the_text_needs_no_key_in_the_call(routed: Database) -> None:
    """Each row is written to and read from the shard of its key."""
    for key in range(20):
        assert await routed.execute("INSERT INTO items VALUES ($1, $2, $3)", key, 1, key) == 1
    assert await routed.fetch_value("SELECT n FROM items WHERE tenant = $1", 7) == 7
    assert await routed.execute("UPDATE items SET n = n + 1 WHERE tenant = $1", 7) == 1
    assert await routed.fetch_one("SELECT n FROM items WHERE tenant = 7") == (8,)
    assert all(await counts(routed, "items"))
    assert await routed.explain("SELECT * FROM items WHERE tenant = $1", 7) == OneShard(routed.locate(7).shard)


async def test_a_split_insert_writes_each_row_once_where_it_belongs(routed: Database) -> None:
    """Its RETURNING gives the rows of all shards; without everywhere=True nothing is written."""
    sql = "INSERT INTO items (n, tenant, id) VALUES ($1,$2,1),($1,$3,1),(5,$4,1) RETURNING tenant"
    keys = [*keys_on(routed, "shard-0", 2), *keys_on(routed, "shard-1", 1)]
    with pytest.raises(StatementRefused, match="2 shards"):
        await routed.execute(sql, 3, *keys)
    assert sorted(row[0] for row in await routed.fetch(sql, 3, *keys, everywhere=True)) == sorted(keys)
    assert await counts(routed, "items") == [2, 1]


async def test_a_write_on_several_shards_is_undone_on_all_when_one_refuses(routed: Database) -> None:
    """The constraint on the second shard keeps the first from being changed."""
    (first,), (second,) = keys_on(routed, "shard-0", 1), keys_on(routed, "shard-1", 1)
    await routed.execute("INSERT INTO items VALUES ($1, 1, 1)", first)
    await routed.execute("INSERT INTO items VALUES ($1, 1, 99)", second)
    with pytest.raises(StatementRefused, match="names no key"):
        await routed.execute("UPDATE items SET n = n + 1")
    with pytest.raises(StatementFailed) as caught:
        await routed.execute("UPDATE items SET n = n + 1", everywhere=True)
    assert caught.value.sqlstate == "23514"
    assert await routed.fetch_value("SELECT n FROM items WHERE tenant = $1", first) == 1
    assert await routed.execute("UPDATE items SET n = 0", everywhere=True) == 2


async def test_a_reference_table_stays_the_same_on_every_shard(routed: Database) -> None:
    """A write reaches all of them; if they differ already it is refused and undone."""
    assert await routed.execute("INSERT INTO kinds VALUES ($1, $2), (2, 'b')", 1, "a") == 2
    assert await counts(routed, "kinds") == [2, 2]
    await routed.nodes["shard-1"].execute("DELETE FROM kinds WHERE id = 2")
    with pytest.raises(BackendError, match="different numbers"):
        await routed.execute("DELETE FROM kinds WHERE id < 9")
    assert await counts(routed, "kinds") == [2, 1]


async def test_rows_of_execute_many_go_to_their_shards(routed: Database) -> None:
    """Rows of several shards need everywhere=True, since no transaction covers them."""
    rows = [(key, 1, 1) for key in range(10)]
    with pytest.raises(StatementRefused, match="no transaction in common"):
        await routed.execute_many("INSERT INTO items VALUES ($1, $2, $3)", rows)
    assert await counts(routed, "items") == [0, 0]
    await routed.execute_many("INSERT INTO items VALUES ($1, $2, $3)", rows, everywhere=True)
    assert sum(await counts(routed, "items")) == 10


async def test_a_changed_table_is_read_with_its_new_columns(routed: Database) -> None:
    """DDL through the door makes it learn the tables again."""
    await routed.execute("INSERT INTO items VALUES (1, 1, 1), (2, 1, 2)", everywhere=True)
    sql = "SELECT * FROM items ORDER BY n"
    assert [row.n for row in await routed.fetch(sql)] == [1, 2]
    await routed.execute("ALTER TABLE items ADD COLUMN extra int DEFAULT 7", everywhere=True)
    assert [tuple(row) for row in await routed.fetch(sql)] == [(1, 1, 1, 7), (2, 1, 2, 7)]


async def test_a_table_that_somebody_else_changed_is_not_read_under_its_old_names(routed: Database) -> None:
    """The first call after that says so, the next ones are right."""
    await routed.execute("INSERT INTO items VALUES (1, 1, 1), (2, 1, 2)", everywhere=True)
    sql = "SELECT * FROM items ORDER BY id, tenant"
    assert (await routed.fetch(sql))[0].n == 1
    for node in routed.nodes.values():
        await node.execute("ALTER TABLE items DROP COLUMN n, ADD COLUMN m int DEFAULT 7")
    with pytest.raises(StatementFailed, match="tables were changed"):
        await routed.fetch(sql)
    assert [(row.id, row.m) for row in await routed.fetch(sql)] == [(1, 7), (1, 7)]


async def test_shards_with_different_columns_do_not_answer_as_one(routed: Database) -> None:
    """A column that stands on one of them only would shift the others' values, or their names."""
    await routed.execute_many("INSERT INTO items VALUES ($1, 1, 1)", [(key,) for key in range(9)], everywhere=True)
    await routed.nodes["shard-1"].execute("ALTER TABLE items ADD COLUMN m int DEFAULT 7")
    with pytest.raises(StatementFailed, match="tables were changed"):
        await routed.fetch("SELECT * FROM items")


async def test_fetch_everywhere_only_reads(routed: Database) -> None:
    """It may ask a shard twice, which would write twice."""
    await routed.execute("INSERT INTO items VALUES (1, 1, 1)")
    for sql in (
        "DELETE FROM items RETURNING id",
        "INSERT INTO items VALUES (2, 1, 1)",
        "WITH gone AS (DELETE FROM unknown RETURNING id) SELECT * FROM gone",
        "TRUNCATE items",
    ):
        with pytest.raises(StatementRefused):
            await routed.fetch_everywhere(sql)
    assert sum(await counts(routed, "items")) == 1


async def test_an_aggregate_of_the_users_own_sees_all_rows(routed: Database) -> None:
    """Its rows are gathered, whatever they are grouped by."""
    for node in routed.nodes.values():
        await node.execute("CREATE AGGREGATE total(int) (sfunc = int4pl, stype = int, initcond = '0')")
    rows = [(key,) for key in range(20)]
    async with Database(routed.config) as knowing:
        await knowing.execute_many("INSERT INTO items VALUES ($1, 1, 1)", rows, everywhere=True)
        assert await knowing.fetch("SELECT total(n) FROM items") == [(20,)]


async def test_many_results_in_the_order_of_a_language_leave_a_connection_for_ranking(
    routed: Database, config: DatabaseConfig
) -> None:
    """As many streams as connections would otherwise all wait for one more."""
    for node in routed.nodes.values():
        key = keys_on(routed, node.name, 1)[0]
        await node.execute(f"INSERT INTO items SELECT {key}, g, 1 FROM generate_series(1, 400) g")
    async with Database(replace(config, connections_max=2, acquire_timeout_s=100.0)) as few:
        sql = "SELECT id FROM items ORDER BY to_jsonb(id), tenant"
        async with asyncio.timeout(60):
            found = await asyncio.gather(*(few.fetch(sql) for _ in range(4)))
    assert [len(rows) for rows in found] == [800] * 4


async def test_a_stream_reads_only_what_is_asked_for(routed: Database) -> None:
    """Merged in order, block by block; whoever leaves early leaves nothing running."""
    for node in routed.nodes.values():
        keys = keys_on(routed, node.name, 1)
        await node.execute(f"INSERT INTO items SELECT {keys[0]}, g, 1 FROM generate_series(1, 5000) g")
    async with routed.stream("SELECT id FROM items ORDER BY id, tenant") as rows:
        first = [row.id async for row in _first(rows, 25)]
    assert first == sorted([*range(1, 14), *range(1, 14)])[:25]
    active = (
        f"SELECT count(*) FROM pg_stat_activity WHERE state = 'active' AND {OF_THIS_POOL} AND query ~ 'ORDER BY id'"
    )
    for node in routed.nodes.values():
        assert await node.fetch(f"{active} AND pid <> pg_backend_pid()") == [(0,)]
    async with routed.stream("SELECT id FROM items WHERE tenant = $1", keys[0]) as rows:
        assert len([row async for row in rows]) == 5000


@pytest.mark.parametrize(
    "sql",
    [
        "SELECT id FROM items ORDER BY id, tenant",
        "SELECT id FROM items ORDER BY to_jsonb(id), tenant",
        "SELECT i.id FROM items AS i JOIN items AS o ON o.id = i.id + 1 ORDER BY i.id",
        "SELECT n, count(*) FROM items WHERE pg_sleep(0.01) IS NOT NULL GROUP BY n",
    ],
)
@pytest.mark.parametrize("after_s", [0.0, 0.01, 0.05, 0.2])
async def test_a_reader_who_is_cancelled_leaves_clean_connections(routed: Database, sql: str, after_s: float) -> None:
    """Wherever it is: before the first row, in the middle of sorting, between two rows. Nothing runs on."""
    for node in routed.nodes.values():
        key = keys_on(routed, node.name, 1)[0]
        await node.execute(f"INSERT INTO items SELECT {key}, g, 1 FROM generate_series(1, 5000) g")

    async def read() -> None:
        async with routed.stream(sql) as rows:
            async for _ in rows:
                await asyncio.sleep(0)

    await routed.fetch("SELECT id FROM items ORDER BY id, tenant LIMIT 1")
    before = await _backends(routed)
    reading = asyncio.ensure_future(read())
    await asyncio.wait({reading}, timeout=after_s)
    reading.cancel()
    await asyncio.gather(reading, return_exceptions=True)
    for node in routed.nodes.values():
        busy = f"SELECT query FROM pg_stat_activity WHERE state <> 'idle' AND {OF_THIS_POOL}"
        assert await node.fetch(f"{busy} AND pid <> pg_backend_pid() AND query !~ $1", (OWN,)) == []
    assert before <= await _backends(routed)


async def _backends(routed: Database) -> set[int]:
    sql = f"SELECT pid FROM pg_stat_activity WHERE backend_type = 'client backend' AND {OF_THIS_POOL}"
    return {row[0] for node in routed.nodes.values() for row in await node.fetch(sql)}


async def _first(rows, count):
    async for row in rows:
        yield row
        count -= 1
        if not count:
            return


async def test_a_result_beyond_its_limits_fails_and_names_them(routed: Database, config: DatabaseConfig) -> None:
    """In rows or bytes, of the result or of what is gathered; a stream is not bound."""
    for node in routed.nodes.values():
        key = keys_on(routed, node.name, 1)[0]
        await node.execute(f"INSERT INTO items SELECT {key}, g, 1 FROM generate_series(1, 300) g")
    async with Database(replace(config, result_rows_max=500, gather_rows_max=400)) as bounded:
        with pytest.raises(ResultTooLarge, match="500 rows"):
            await bounded.fetch("SELECT * FROM items")
        with pytest.raises(ResultTooLarge, match="400 rows"):
            await bounded.fetch("SELECT count(*) FROM items AS a JOIN items AS b ON a.id = b.id")
        assert len(await bounded.fetch("SELECT * FROM items LIMIT 450")) == 450
        async with bounded.stream("SELECT * FROM items") as rows:
            assert len([row async for row in rows]) == 600
    async with Database(replace(config, result_bytes_max=1000)) as bounded:
        with pytest.raises(ResultTooLarge, match="1000 bytes"):
            await bounded.fetch("SELECT repeat('x', 100) FROM items")


async def test_the_first_error_stops_the_other_shards(routed: Database, config: DatabaseConfig) -> None:
    """A shard that fails at once does not let the caller wait for one that would take long."""
    (bad,), (slow,) = keys_on(routed, "shard-0", 1), keys_on(routed, "shard-1", 1)
    await routed.execute("INSERT INTO items VALUES ($1, 1, 0)", bad)
    await routed.execute("INSERT INTO items VALUES ($1, 1, 1)", slow)
    sql = "SELECT CASE WHEN n = 1 THEN pg_sleep(30)::text ELSE (1 / n)::text END FROM items"
    async with asyncio.timeout(25):
        with pytest.raises(StatementFailed, match="division by zero"):
            await routed.fetch(sql)
    running = f"SELECT count(*) FROM pg_stat_activity WHERE state = 'active' AND {OF_THIS_POOL} AND query ~ 'pg_sleep'"
    assert await routed.nodes["shard-1"].fetch(f"{running} AND pid <> pg_backend_pid()") == [(0,)]


async def test_a_slow_shard_is_cut_off_by_its_own_limit(routed: Database, config: DatabaseConfig) -> None:
    """The statement timeout of each shard bounds the whole call."""
    await routed.execute("INSERT INTO items VALUES (1, 1, 1)")
    async with Database(replace(config, statement_timeout_s=1.0)) as hasty:
        with pytest.raises(StatementTimeout):
            await hasty.fetch("SELECT pg_sleep(20) FROM items")


async def test_explain_says_how_a_statement_is_answered(routed: Database) -> None:
    """Without running it."""
    assert isinstance(await routed.explain("SELECT count(*) FROM items"), AllShards)
    found = await routed.explain("SELECT count(*) FROM items AS i JOIN parts AS p ON p.item = i.id")
    assert isinstance(found, Gather)
    assert "shard keys" in found.gathering.reason


async def test_a_call_with_a_key_is_never_second_guessed(routed: Database) -> None:
    """What the text says does not matter then, nor whether its tables are declared."""
    key = keys_on(routed, "shard-1", 1)[0]
    await routed.execute("CREATE TABLE own (v int)", key=key)
    await routed.execute("INSERT INTO own VALUES (1)", key=key)
    assert await routed.fetch_value("SELECT count(*) FROM own", key=key) == 1
    with pytest.raises(StatementRefused, match="not declared"):
        await routed.fetch("SELECT * FROM own")


async def test_a_transaction_refuses_rows_of_other_shards(routed: Database) -> None:
    """Written there, nobody would find them again; what it did before is undone with it."""
    (here,), (there,) = keys_on(routed, "shard-0", 1), keys_on(routed, "shard-1", 1)
    sql = "INSERT INTO items VALUES ($1, 1, 1)"

    async def writes_both() -> None:
        async with routed.transaction(key=here) as transaction:
            await transaction.execute(sql, here)
            await transaction.execute(sql, there)

    with pytest.raises(StatementRefused, match="rows are on shard-1"):
        await writes_both()
    assert await counts(routed, "items") == [0, 0]
    async with routed.transaction(key=here) as transaction:
        await transaction.execute(sql, here)
        assert await transaction.fetch("SELECT n FROM items WHERE tenant = $1 FOR UPDATE", here) == [(1,)]
        with pytest.raises(StatementRefused, match="other shards too"):
            await transaction.fetch("SELECT count(*) FROM items")
        await transaction.execute("CREATE TABLE own (v int)")
        await transaction.execute("INSERT INTO own VALUES (1)")
    assert await counts(routed, "items") == [1, 0]


@dataclass
class Pair:
    """Two servers, of which the second can be stopped."""

    config: DatabaseConfig
    stop_second: Callable[[], None]


@pytest.fixture
def pair(tmp_path: Path) -> Iterator[Pair]:
    with ExitStack() as first, ExitStack() as second:
        urls = [
            stack.enter_context(started(EmbeddedPostgres(tmp_path / name, name=name))).url
            for name, stack in (("a", first), ("b", second))
        ]
        shards = tuple(ShardConfig(name=name, dsn=url) for name, url in zip("ab", urls, strict=True))
        yield Pair(DatabaseConfig(shards=shards, tables=TABLES, acquire_timeout_s=5.0), second.close)


async def test_a_dead_shard_fails_what_needs_it_and_nothing_else(pair: Pair) -> None:
    """Its keys are unavailable, others are served, and a partial answer has to be asked for and names it."""
    async with Database(pair.config) as routed:
        for sql in SCHEMA:
            await routed.execute(sql, everywhere=True)
        rows = [(key,) for key in range(20)]
        await routed.execute_many("INSERT INTO items VALUES ($1, 1, 1)", rows, everywhere=True)
        await asyncio.to_thread(pair.stop_second)
        (here,), (gone,) = keys_on(routed, "a", 1), keys_on(routed, "b", 1)
        assert await routed.fetch_value("SELECT n FROM items WHERE tenant = $1", here) == 1
        for sql in (
            f"SELECT n FROM items WHERE tenant = {gone}",
            "SELECT * FROM items",
            "SELECT count(*) FROM items",
            "SELECT * FROM items ORDER BY id LIMIT 1",
        ):
            with pytest.raises(DatabaseUnavailable, match="Shard b"):
                await routed.fetch(sql)
        partial = await routed.fetch_everywhere("SELECT count(*) FROM items", partial=True)
        assert list(partial.missing) == ["b"]
        assert [tuple(row) for row in partial.rows] == [(sum(routed.locate(key).shard == "a" for key in range(20)),)]
        assert not isinstance(partial, list)


async def test_shards_that_sort_text_differently_are_refused(postgres_urls: tuple[str, str]) -> None:
    """What each has sorted could not be merged."""
    urls = []
    with psycopg.connect(postgres_urls[0], autocommit=True) as connection:
        for name, locale in (("sorted_c", "C"), ("sorted_utf", "C.UTF-8")):
            connection.execute(f'DROP DATABASE IF EXISTS "{name}" WITH (FORCE)')
            connection.execute(f"CREATE DATABASE {name} TEMPLATE template0 LOCALE '{locale}'")
            urls.append(postgres_urls[0].replace("/headrace?", f"/{name}?"))
    shards = tuple(ShardConfig(name=f"s{number}", dsn=url) for number, url in enumerate(urls))
    config = DatabaseConfig(shards=shards, tables={"kept": Sharded(key="k")}, acquire_timeout_s=20.0)
    async with Database(config) as routed:
        with pytest.raises(ConfigError, match="sort text differently"):
            await routed.fetch("SELECT * FROM kept")
