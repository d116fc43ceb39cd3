"""Cached queries on real Postgres servers: what is kept, what is refused and why, and who sees which write when."""

import asyncio
import datetime
import decimal
import uuid
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import psycopg
import pytest

from headrace.cache import Cache, RemoteConfig
from headrace.database import (
    Database,
    DatabaseConfig,
    QueryPolicy,
    Reference,
    ShardConfig,
    Sharded,
)
from headrace.embedded import EmbeddedPostgres, started
from headrace.errors import CallerError, NotOpen
from headrace.events import QueryNotCached
from tests.query_caches import (
    ITEM,
    LONG,
    MAJORS,
    STREAMED,
    Notes,
    cached,
    follow,
    postgres,
    renew,
    stats,
    until,
    until_read,
)
from tests.redis_servers import PATIENT, RedisServer


@pytest.fixture(scope="module", params=MAJORS)
def server(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[EmbeddedPostgres]:
    """A Postgres with `wal_level = logical`."""
    with started(postgres(tmp_path_factory.mktemp("postgres") / "pg", request.param)) as running:
        yield running


@pytest.fixture
def url(server: EmbeddedPostgres) -> str:
    """Its database, with the tables above."""
    renew(server.url)
    return server.url


@pytest.fixture
def outside(url: str) -> Iterator[psycopg.Connection]:
    """Somebody who knows nothing of headrace."""
    with psycopg.connect(url, autocommit=True) as connection:
        yield connection


@pytest.fixture
def notes() -> Notes:
    """The events of the database under test."""
    return Notes()


@pytest.fixture
async def database(url: str, notes: Notes) -> AsyncIterator[Database]:
    """One that follows changes where a policy has a use for it."""
    async with cached(url, notes) as database:
        yield database


async def test_a_result_is_read_once(database: Database) -> None:
    """Asked again, in any layout, it comes from the cache, whole."""
    first = await database.fetch(ITEM, 1, cache=LONG)
    second = await database.fetch(ITEM, 1, cache=LONG)
    third = await database.fetch("select ID,  name, price\nFROM items -- one\nwhere id = $1", 1, cache=LONG)

    assert first == second == [(1, "item 1", decimal.Decimal("0.33"))]
    assert second[0].price == decimal.Decimal("0.33")
    assert third == first
    assert (stats(database).loads, stats(database).hits, stats(database).misses) == (1, 2, 1)


async def test_a_caller_may_change_the_list_that_it_gets(database: Database) -> None:
    """It is its own; others get theirs."""
    (await database.fetch(ITEM, 1, cache=LONG)).clear()
    (await database.fetch(ITEM, 1, cache=LONG)).clear()

    assert len(await database.fetch(ITEM, 1, cache=LONG)) == 1


async def test_many_callers_share_one_load(database: Database) -> None:
    """A hundred who ask at once are answered by one query."""
    await database.fetch(ITEM, 2, cache=LONG)
    before = stats(database).loads

    answers = await asyncio.gather(*(database.fetch(ITEM, 1, cache=LONG) for _ in range(100)))

    assert all(rows == answers[0] for rows in answers)
    assert stats(database).loads == before + 1


async def test_literals_that_differ_in_case_are_two_queries(database: Database) -> None:
    """'a' is not 'A', and the parameter 1 is not True."""
    for sql, value in (("SELECT 'a' FROM items LIMIT 1", "a"), ("SELECT 'A' FROM items LIMIT 1", "A")):
        assert await database.fetch_value(sql, cache=LONG) == value
        assert await database.fetch_value(sql, cache=LONG) == value
    typed = "SELECT pg_typeof($1)::text FROM items LIMIT 1"
    for parameter in (1, True, 1.5, b"1"):
        plain = await database.fetch_value(typed, parameter)
        assert await database.fetch_value(typed, parameter, cache=LONG) == plain


@pytest.mark.parametrize("apart_by", ["options", "role", "environment"])
async def test_two_tenants_with_different_search_paths_never_share(
    url: str, outside: psycopg.Connection, apart_by: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One text, one shared cache, two schemas: two results, wherever the search_path comes from."""
    for tenant in ("anna", "bert"):
        outside.execute(f"DROP SCHEMA IF EXISTS {tenant} CASCADE; CREATE SCHEMA {tenant}")
        outside.execute(f"CREATE TABLE {tenant}.own (id int PRIMARY KEY, v text)")
        outside.execute(f"INSERT INTO {tenant}.own VALUES (1, '{tenant}')")
        outside.execute(f"GRANT ALL ON SCHEMA {tenant} TO public; GRANT ALL ON {tenant}.own TO public")
        outside.execute(f"DROP ROLE IF EXISTS role_{tenant}; CREATE ROLE role_{tenant} LOGIN SUPERUSER")
        outside.execute(f"ALTER ROLE role_{tenant} SET search_path = {tenant}")
    async with Cache() as cache:
        for _ in range(2):
            for tenant in ("anna", "bert"):
                dsn = url
                if apart_by == "options":
                    dsn += f"&options=-csearch_path%3D{tenant}"
                elif apart_by == "role":
                    dsn = url.replace("user=headrace", f"user=role_{tenant}")
                else:
                    monkeypatch.setenv("PGOPTIONS", f"-csearch_path={tenant}")
                async with cached(dsn, cache=cache) as database:
                    assert await database.fetch_value("SELECT v FROM own WHERE id = $1", 1, cache=LONG) == tenant
                    assert await database.fetch_value("SELECT v FROM own WHERE id = $1", 1, cache=LONG) == tenant


@pytest.mark.parametrize(
    ("sql", "why"),
    [
        ("SELECT now(), id FROM items", r"now\(\) depends on more than its arguments"),
        ("SELECT current_timestamp FROM items", "current_timestamp is another at every moment"),
        ("SELECT id, random() FROM items", r"random\(\) is volatile"),
        ("SELECT 'today'::date FROM items", "'today' may be read as a moment"),
        ("SELECT id FROM items FOR UPDATE", "locks rows"),
        ("SELECT ctid FROM items", "where a row is stored"),
        ("SELECT * FROM items TABLESAMPLE system (10)", "by chance"),
        ("WITH gone AS (DELETE FROM notes RETURNING 1) SELECT * FROM gone", "may write"),
        ("UPDATE items SET name = name RETURNING id", "not a SELECT"),
        ("SELECT oid FROM pg_class LIMIT 1", "system catalog"),
        ("SELECT table_name FROM information_schema.tables LIMIT 1", "catalog|depends on more|volatile"),
        ("SELECT * FROM kept", "materialized view"),
        ("SELECT * FROM today", "current_date is another"),
        ("SELECT reads_items()", "stable, not immutable"),
        ("SELECT items.drawn FROM items", r"drawn\(\) is volatile"),
        ("SELECT current_setting('TimeZone') FROM items", "depends on more than its arguments"),
        ("SELECT id FROM secrets", "row security"),
    ],
)
async def test_what_must_not_be_cached_runs_and_says_why(database: Database, notes: Notes, sql: str, why: str) -> None:
    """The caller gets the rows all the same; an event and `explain_cache` tell the reason."""
    plain = len(await database.fetch(sql))

    rows = [len(await database.fetch(sql, cache=LONG)) for _ in range(2)]
    verdict = await database.explain_cache(sql, cache=LONG)

    assert rows == [plain, plain] or "TABLESAMPLE" in sql
    assert not verdict.cacheable
    assert verdict.reason is not None
    told = notes.of(QueryNotCached)
    assert [event.query for event in told] == [sql]
    assert told[0].reason == verdict.reason
    with pytest.raises(AssertionError, match=why):
        raise AssertionError(verdict.reason)
    assert (stats(database).hits, stats(database).loads, stats(database).refused) == (0, 0, 2)


async def test_a_temporary_table_is_nobody_elses(database: Database) -> None:
    """It belongs to one session: its rows are kept from all others, also where it hides a table."""
    hidden = "CREATE TEMP TABLE items AS SELECT 1 AS id, ''mine'' AS name, 1.0 AS price"
    making = f"CREATE FUNCTION hide() RETURNS void LANGUAGE plpgsql AS $$BEGIN EXECUTE '{hidden}'; END$$"
    async with Cache() as cache:
        config = DatabaseConfig(shards=database.config.shards, connections_max=1, acquire_timeout_s=20.0)
        async with Database(config, cache=cache) as alone:
            await alone.fetch(ITEM, 1, cache=LONG)
            await alone.execute(making)
            await alone.fetch("SELECT hide()")
            seen = [await alone.fetch_value("SELECT name FROM items WHERE id = $1", 1, cache=LONG) for _ in range(2)]

            assert seen == ["mine", "mine"]
            assert stats(alone).hits == 0
        async with Database(config, cache=cache) as other:
            assert await other.fetch_value("SELECT name FROM items WHERE id = $1", 1, cache=LONG) == "item 1"


async def test_what_is_harmless_is_cached(database: Database) -> None:
    """Immutable functions of one's own, views, functions whose answer the key determines, row security by role."""
    for sql in (
        "SELECT twice(id) FROM items WHERE id = $1",
        "SELECT to_char(price, '999.99'), lower(name), json_agg(id) FROM items WHERE id = $1 GROUP BY 1, 2",
        "SELECT * FROM dear WHERE id = $1",
        "SELECT 'nowhere', 'the update', count(*) FROM items WHERE id = $1",
        "WITH few AS (SELECT * FROM items) SELECT * FROM few WHERE id = $1",
        "SELECT * FROM parts WHERE id = $1",
    ):
        verdict = await database.explain_cache(sql, 50, cache=LONG)
        assert verdict.cacheable, (sql, verdict.reason)
        assert await database.fetch(sql, 50, cache=LONG) == await database.fetch(sql, 50)
    by_role = QueryPolicy(staleness_max=60.0, ttl=600.0, row_security_by_role=True)
    await database.fetch("SELECT id FROM secrets", cache=by_role)
    await database.fetch("SELECT id FROM secrets", cache=by_role)
    assert stats(database).hits == 1
    assert (await database.explain_cache("SELECT * FROM dear", cache=LONG)).tables == ("dear", "items")


async def test_a_parameter_that_means_the_present_is_refused(database: Database) -> None:
    """'now' as a parameter is read by Postgres as the moment of the query."""
    sql = "SELECT id FROM parts WHERE day < $1::text::date"

    await database.fetch(sql, "tomorrow", cache=LONG)

    assert stats(database).refused == 1


async def test_a_large_result_is_not_kept(url: str) -> None:
    """It would push out everything else; the text is left alone for a while."""
    async with cached(url, result_rows_max=10) as database:
        for _ in range(3):
            assert len(await database.fetch("SELECT * FROM items", cache=LONG)) == 100

        found = stats(database)
        assert (found.hits, found.loads, found.too_large, found.refused) == (0, 1, 1, 2)


@pytest.mark.parametrize("follow_changes", [True, False])
async def test_own_writes_are_seen_at_once(url: str, follow_changes: bool) -> None:
    """By a single statement, in a transaction, in many rows, or with its rows returned: the next read has them."""
    sql = "SELECT name FROM items WHERE id = 1"
    async with cached(url, follow_changes=follow_changes) as database:

        async def write(name: str, how: str) -> None:
            update = "UPDATE items SET name = $1 WHERE id = 1"
            if how == "execute":
                await database.execute(update, name)
            elif how == "returning":
                await database.fetch(update + " RETURNING id", name)
            elif how == "many":
                await database.execute_many(update, [(name,)])
            else:
                async with database.transaction() as transaction:
                    await transaction.execute(update, name)

        for number in range(5):
            for how in ("execute", "returning", "many", "transaction"):
                await database.fetch(sql, cache=LONG)
                await write(f"{how} {number}", how)
                assert await database.fetch_value(sql, cache=LONG) == f"{how} {number}"


async def test_writes_to_other_tables_leave_a_result_alone(database: Database) -> None:
    """Own writes invalidate by table."""
    for _ in range(2):
        await database.fetch(ITEM, 1, cache=LONG)
    before = stats(database).hits

    await database.execute("INSERT INTO notes VALUES ('x')")
    await database.fetch(ITEM, 1, cache=LONG)

    assert stats(database).hits == before + 1


async def test_inside_a_transaction_that_wrote_nothing_is_cached(database: Database) -> None:
    """Nobody may find there what was true before; a rolled back write changes nothing for others."""
    await database.fetch(ITEM, 1, cache=LONG)
    before = stats(database)

    async with database.transaction() as transaction:
        await transaction.execute("UPDATE items SET name = 'x' WHERE id = 1")
        await database.fetch(ITEM, 1, cache=LONG)
        inside = await database.explain_cache(ITEM, 1, cache=LONG)

    assert stats(database).hits == before.hits
    assert stats(database).refused == before.refused + 1
    assert inside.reason == "the call stands inside a transaction that has written"


@pytest.fixture
def redis(tmp_path: Path) -> Iterator[RedisServer]:
    """A real Redis."""
    server = RedisServer(tmp_path / "redis").start()
    yield server
    server.stop()


async def test_processes_share_results_through_the_shared_tier(
    url: str, outside: psycopg.Connection, redis: RedisServer
) -> None:
    """What one loaded another reads from Redis, whatever its types; a change is refused by both."""
    outside.execute("CREATE TYPE mood AS ENUM ('well', 'ill')")
    outside.execute(
        "CREATE TABLE kinds AS SELECT 1 AS id, 1.50::numeric AS n, '2026-01-02 03:04:05.6+02'::timestamptz AS t, "
        "'[1,5)'::int4range AS r, array[1, NULL, 3] AS a, '{\"x\": [1, 2]}'::jsonb AS j, decode('00ff', 'hex') AS b, "
        "'well'::mood AS m, '11111111-1111-1111-1111-111111111111'::uuid AS u, '1 day 2:00'::interval AS i"
    )
    outside.execute("ALTER TABLE kinds ADD PRIMARY KEY (id)")
    sql = "SELECT * FROM kinds"
    remote = RemoteConfig(url=redis.url, **PATIENT)
    async with (
        Cache(remote=remote) as one,
        Cache(remote=remote) as two,
        cached(url, cache=one) as first,
        cached(url, cache=two) as second,
    ):
        loaded = await first.fetch(sql, cache=LONG)
        shared = await second.fetch(sql, cache=LONG)

        assert shared == loaded == await first.fetch(sql)
        assert [type(value) for value in shared[0]] == [type(value) for value in loaded[0]]
        assert isinstance(shared[0].u, uuid.UUID)
        assert isinstance(shared[0].t, datetime.datetime)
        assert (stats(first).loads, stats(second).loads) == (1, 0)
        await first.execute("UPDATE kinds SET n = 2")
        assert (await first.fetch(sql, cache=LONG))[0].n == 2


async def test_a_flushed_redis_costs_loads_and_nothing_else(
    url: str, outside: psycopg.Connection, redis: RedisServer
) -> None:
    """What a result saw travels with it; nothing that Redis forgets makes an old one new."""
    async with Cache(remote=RemoteConfig(url=redis.url, **PATIENT)) as cache, cached(url, cache=cache) as database:

        async def name() -> object:
            return (await database.fetch(ITEM, 1, cache=STREAMED))[0].name

        for number in range(10):
            await follow(database, ITEM, 1)
            outside.execute(f"UPDATE items SET name = 'v{number}' WHERE id = 1")
            redis.call("FLUSHALL")
            await until_read(name, f"v{number}")
            redis.call("FLUSHALL")
            assert await name() == f"v{number}"
        assert stats(database).loads >= 10


async def test_times_are_shown_in_the_zone_of_the_session(url: str, redis: RedisServer) -> None:
    """What another process could not show alike is not shared with it."""
    sql = "SELECT '2026-01-02 03:04:05+02'::timestamptz AS t FROM items LIMIT 1"
    dsn = url + "&options=-cTimeZone%3DAsia/Tokyo"
    async with (
        Cache(remote=RemoteConfig(url=redis.url, **PATIENT)) as one,
        Cache(remote=RemoteConfig(url=redis.url, **PATIENT)) as two,
        cached(dsn, cache=one) as first,
        cached(dsn, cache=two) as second,
    ):
        for database in (first, second):
            plain = await database.fetch_value(sql)
            shown = [await database.fetch_value(sql, cache=LONG) for _ in range(2)]
            assert [value.isoformat() for value in shown] == [plain.isoformat()] * 2


async def test_each_shard_has_its_own_results(url: str, notes: Notes, outside: psycopg.Connection) -> None:
    """A key's result comes from its shard, a reference table's from one of them; what several answer is refused."""
    outside.execute("DROP DATABASE IF EXISTS second WITH (FORCE)")
    outside.execute("CREATE DATABASE second")
    other_url = url.replace("/headrace?", "/second?")
    with psycopg.connect(other_url, autocommit=True) as second:
        second.execute("CREATE TABLE items (id int PRIMARY KEY, name text, price numeric(8, 2))")
        second.execute("INSERT INTO items SELECT n, 'second ' || n, 1 FROM generate_series(1, 100) AS n")
        second.execute("CREATE TABLE notes (note text)")
    config = DatabaseConfig(
        shards=(ShardConfig(name="pg", dsn=url), ShardConfig(name="other", dsn=other_url)),
        tables={"items": Sharded(key="id"), "notes": Reference()},
        acquire_timeout_s=20.0,
    )
    async with Cache() as cache, Database(config, cache=cache, observer=notes) as database:
        for _ in range(2):
            for key in range(1, 21):
                rows = await database.fetch(ITEM, key, cache=LONG)
                assert rows[0].name == f"{'item' if database.locate(key).shard == 'pg' else 'second'} {key}"
            assert await database.fetch("SELECT * FROM notes", cache=LONG) == []
        assert (stats(database).loads, stats(database).hits) == (21, 21)
        await database.execute("INSERT INTO notes VALUES ('n')")
        assert await database.fetch_value("SELECT note FROM notes", cache=LONG) == "n"

        assert await database.fetch_value("SELECT count(*) FROM items", cache=LONG) == 200
        assert [event.reason for event in notes.of(QueryNotCached)] == ["it is not answered by one shard alone"]
    active = "SELECT 1 FROM pg_replication_slots WHERE database = 'second' AND active"
    await until(lambda: outside.execute(active).fetchone() is None)  # the server notices a moment after the closing
    outside.execute("DROP DATABASE second WITH (FORCE)")


async def test_a_database_without_a_cache_says_so(url: str) -> None:
    """Asking for cached rows there is the caller's mistake."""
    async with Database(DatabaseConfig(shards=(ShardConfig(name="pg", dsn=url),))) as database:
        with pytest.raises(CallerError, match="no cache"):
            await database.fetch("SELECT 1", cache=LONG)


async def test_an_error_of_a_load_reaches_its_callers_and_is_not_kept(database: Database) -> None:
    """Division by zero is told to everybody who asked, each time."""
    sql = "SELECT 1 / (id - 1) FROM items WHERE id = $1"
    await database.fetch(sql, 2, cache=LONG)
    for _ in range(2):
        answers = await asyncio.gather(*(database.fetch(sql, 1, cache=LONG) for _ in range(5)), return_exceptions=True)
        assert [type(answer).__name__ for answer in answers] == ["StatementFailed"] * 5


async def test_a_caller_may_change_the_values_that_it_gets(database: Database, outside: psycopg.Connection) -> None:
    """Lists and JSON are its own, too, whether it loaded them or found them."""
    outside.execute("CREATE TABLE docs AS SELECT 1 AS id, '{\"x\": [1]}'::jsonb AS j, array[1, 2] AS a")
    for _ in range(3):
        row = (await database.fetch("SELECT j, a FROM docs", cache=LONG))[0]
        assert row.asdict() == {"j": {"x": [1]}, "a": [1, 2]}
        row.j["x"].append(9)
        row.a.clear()
    assert stats(database).hits == 2


async def test_a_large_result_is_large_in_every_time_zone(url: str) -> None:
    """What only this process can show counts with all its bytes."""
    dsn = url + "&options=-cTimeZone%3DAsia/Tokyo"
    sql = "SELECT repeat('x', 20000) AS v, '2026-01-01'::timestamptz AS t FROM items LIMIT 3"
    async with cached(dsn, result_bytes_max=50_000) as database:
        await database.fetch(sql, cache=LONG)
        assert (stats(database).too_large, stats(database).memory_bytes) == (1, 0)
        await database.fetch(sql.replace("20000", "10000"), cache=LONG)
        await database.fetch(sql.replace("20000", "10000"), cache=LONG)
        assert stats(database).memory_bytes > 30_000


@pytest.mark.parametrize(
    ("setting", "value"),
    [
        ("DateStyle%3DGerman", "'2026-02-01'::date"),
        ("DateStyle%3DSQL,DMY", "'2026-02-01'::date"),
        ("TimeZone%3DAsia/Tokyo", "'2026-02-01 03:00'::timestamptz"),
    ],
)
async def test_what_others_cannot_read_is_not_shared(url: str, redis: RedisServer, setting: str, value: str) -> None:
    """Two processes with dates in a form that only their connections know neither confuse nor evict each other."""
    dsn = url + f"&options=-c{setting}"
    sql = f"SELECT {value} AS d FROM items LIMIT 1"
    async with (
        Cache(remote=RemoteConfig(url=redis.url, **PATIENT)) as one,
        Cache(remote=RemoteConfig(url=redis.url, **PATIENT)) as two,
        cached(dsn, cache=one) as first,
        cached(dsn, cache=two) as second,
    ):
        plain = await first.fetch(sql)
        for _ in range(10):
            assert await first.fetch(sql, cache=LONG) == plain
            assert await second.fetch(sql, cache=LONG) == plain
        assert (stats(first).loads, stats(second).loads) == (2, 2)


async def test_own_writes_by_another_name_are_seen_at_once(database: Database, outside: psycopg.Connection) -> None:
    """Through a view, a parent table, TRUNCATE CASCADE or a name in escapes."""
    outside.execute("CREATE VIEW all_items AS SELECT * FROM items; CREATE TABLE lines (id int REFERENCES items)")
    outside.execute("CREATE TABLE whole (id int PRIMARY KEY, v text); CREATE TABLE part () INHERITS (whole)")
    outside.execute("INSERT INTO part VALUES (1, 'a'); INSERT INTO lines VALUES (1)")
    for sql, write in (
        ("SELECT name FROM items WHERE id = 1", "UPDATE all_items SET name = 'x' WHERE id = 1"),
        ("SELECT name FROM items WHERE id = 1", "UPDATE U&\"\\0069tems\" SET name = 'y' WHERE id = 1"),
        ("SELECT v FROM part", "UPDATE whole SET v = 'b'"),
        ("SELECT count(*) FROM lines", "TRUNCATE items CASCADE"),
    ):
        before = await database.fetch(sql, cache=LONG)
        await database.execute(write)
        assert await database.fetch(sql, cache=LONG) == await database.fetch(sql) != before


async def test_functions_behind_aggregates_and_casts_count(database: Database, outside: psycopg.Connection) -> None:
    """Neither stands in the text under its own name."""
    outside.execute(
        "CREATE TYPE drawn_one AS (n float); CREATE FUNCTION step(float, int) RETURNS float LANGUAGE sql AS"
        " 'SELECT random()'; CREATE AGGREGATE lot(int) (sfunc = step, stype = float);"
        " CREATE FUNCTION draw(int) RETURNS drawn_one LANGUAGE sql AS 'SELECT ROW(random())::drawn_one';"
        " CREATE CAST (int AS drawn_one) WITH FUNCTION draw(int)"
    )
    for sql, why in (("SELECT lot(id) FROM items", "aggregate lot"), ("SELECT id::drawn_one FROM items", "cast to")):
        verdict = await database.explain_cache(sql, cache=LONG)
        assert not verdict.cacheable
        assert why in (verdict.reason or "")


async def test_closing_tells_those_who_wait(url: str, outside: psycopg.Connection) -> None:
    """A call whose query is under way when the database closes fails, and is not taken for a cancelled one."""
    async with cached(url) as database:
        await database.fetch(ITEM, 1, cache=LONG)
        outside.execute("BEGIN; LOCK items IN ACCESS EXCLUSIVE MODE")
        waiting = asyncio.get_running_loop().create_task(database.fetch(ITEM, 2, cache=LONG))
        # Not the change stream, which may wait for a stronger lock on the table, to publish it.
        waits = "SELECT 1 FROM pg_stat_activity WHERE wait_event_type = 'Lock' AND query = %s"

        def is_waiting() -> bool:
            outside.execute("SELECT pg_stat_clear_snapshot()")  # a transaction sees activity as it first did
            return outside.execute(waits, (ITEM,)).fetchone() is not None

        await until(is_waiting)
    outside.execute("ROLLBACK")

    with pytest.raises(NotOpen, match="closed while the query ran"):
        await waiting


async def test_a_new_shard_map_ends_what_was_read_under_the_old_one(database: Database) -> None:
    """Keys may have another home: their rows may stand at the old one for a while, unchanged."""
    await database.fetch(ITEM, 1, cache=LONG)
    await database.fetch(ITEM, 1, cache=LONG)
    assert (stats(database).loads, stats(database).hits) == (1, 1)

    database._adopt(database.shard_map)
    await database.fetch(ITEM, 1, cache=LONG)

    assert (stats(database).loads, stats(database).hits) == (2, 1)
