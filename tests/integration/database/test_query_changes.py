"""Writes of others, told by the log: what is noticed, how soon, and what is left behind."""

import asyncio
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import psycopg
import pytest

from headrace.database import (
    Database,
)
from headrace.database.query_cache.changes import ChangeStream
from headrace.embedded import EmbeddedPostgres, started
from headrace.events import ChangesFollowed, ChangesLost
from tests.query_caches import (
    ITEM,
    MAJORS,
    STREAMED,
    Notes,
    cached,
    follow,
    old_hit,
    postgres,
    read_in_time,
    renew,
    stats,
    until,
    until_read,
)


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


async def test_writes_of_others_are_seen_through_the_log(database: Database, outside: psycopg.Connection) -> None:
    """A result that is far older than the bound answers while nothing changed, and not after somebody wrote."""
    await follow(database, ITEM, 1)
    await old_hit(database, STREAMED, ITEM, 1)
    assert await name(database) == "item 1"

    outside.execute("UPDATE items SET name = 'theirs' WHERE id = 1")

    await read_in_time(lambda: name(database), "theirs", bound_s=STREAMED.staleness_max)


async def name(database: Database) -> object:
    """That of the first item, within the bound."""
    return (await database.fetch(ITEM, 1, cache=STREAMED))[0].name


@pytest.mark.parametrize(
    ("sql", "change"),
    [
        ("SELECT count(*) FROM dear", "DELETE FROM items WHERE id > 90"),
        ("SELECT count(*) FROM items", "TRUNCATE items"),
        ("SELECT count(*) FROM items", "BEGIN; SAVEPOINT a; DELETE FROM items WHERE id = 1; RELEASE a; COMMIT"),
        ("SELECT count(*) FROM parts", "INSERT INTO parts VALUES (1, '2026-05-05')"),
        ("SELECT count(*) FROM parts_2026", "INSERT INTO parts VALUES (1, '2026-05-05')"),
        ("SELECT count(*) FROM parts", "INSERT INTO parts_2026 VALUES (1, '2026-05-05')"),
        ("SELECT * FROM notes_2", "ALTER TABLE notes_2 ADD extra int DEFAULT 5"),
        ("SELECT * FROM dear", "CREATE OR REPLACE VIEW dear AS SELECT * FROM items WHERE price > 30"),
        (
            "SELECT count(*) FROM parts",
            "CREATE TABLE p27 (id int, day date, PRIMARY KEY (id, day)); INSERT INTO p27 VALUES (1, '2027-02-02');"
            "ALTER TABLE parts ATTACH PARTITION p27 FOR VALUES FROM ('2027-01-01') TO ('2028-01-01')",
        ),
    ],
    ids=["view", "truncate", "savepoint", "root", "leaf by root", "root by leaf", "column", "new view", "attach"],
)
async def test_every_kind_of_change_is_noticed(
    database: Database, outside: psycopg.Connection, sql: str, change: str
) -> None:
    """Through views, partitions, subtransactions, TRUNCATE and DDL: soon after the commit the old result is gone."""
    await follow(database, sql)
    outside.execute(change)
    after = outside.execute(sql).fetchall()

    async def rows() -> object:
        return list(map(tuple, await database.fetch(sql, cache=STREAMED)))

    await until_read(rows, after)


async def test_a_table_that_comes_in_front_hides_the_other(url: str, outside: psycopg.Connection) -> None:
    """A new table earlier in the search_path changes what a name means; that is DDL, too."""
    outside.execute("DROP SCHEMA IF EXISTS front CASCADE; CREATE SCHEMA front")
    sql = "SELECT count(*) FROM items"
    async with cached(url + "&options=-csearch_path%3Dfront,public") as database:
        await follow(database, sql)
        assert await database.fetch_value(sql, cache=STREAMED) == 100

        outside.execute("CREATE TABLE front.items (id int PRIMARY KEY)")

        await until_equal(database, sql, 0)


async def test_a_second_table_joins_the_stream(database: Database, outside: psycopg.Connection) -> None:
    """A query over a table that was not published begins a new stream that tells of both."""
    await follow(database, ITEM, 1)
    await database.fetch("SELECT count(*) FROM parts", cache=STREAMED)
    published = "SELECT tablename FROM pg_publication_tables WHERE pubname = 'headrace' ORDER BY 1"
    await until(lambda: len(outside.execute(published).fetchall()) == 2)

    assert [row[0] for row in outside.execute(published)] == ["items", "parts"]
    slots = "SELECT 1 FROM pg_replication_slots WHERE temporary"
    await until(lambda: len(outside.execute(slots).fetchall()) <= 2)  # the server notices late that one has ended


async def test_tables_that_the_log_cannot_tell_of_live_by_their_age(
    database: Database, outside: psycopg.Connection
) -> None:
    """Without a replica identity, or unlogged, a table is not published: its UPDATEs must go on to work."""
    for sql, why in (
        ("SELECT count(*) FROM notes", "neither a primary key nor another replica identity"),
        ("SELECT count(*) FROM scratch", "unlogged"),
    ):
        await database.fetch(sql, cache=STREAMED)
        verdict = await database.explain_cache(sql, cache=STREAMED)
        assert verdict.cacheable
        assert verdict.unfollowed is not None
        assert why in verdict.unfollowed
    outside.execute("INSERT INTO notes VALUES ('a')")
    outside.execute("UPDATE notes SET note = 'b'")
    await until_equal(database, "SELECT count(*) FROM notes", 1)


async def test_the_stream_leaves_nothing_behind(url: str, notes: Notes, outside: psycopg.Connection) -> None:
    """Its slot is temporary and named by the process; after closing the server has none."""
    async with cached(url, notes) as database:
        await follow(database, ITEM, 1)
        slots = "SELECT slot_name, temporary FROM pg_replication_slots"
        found: list[tuple[str, bool]] = []

        def is_alone() -> bool:
            found[:] = outside.execute(slots).fetchall()
            return len(found) == 1

        await until(is_alone)  # one whose stream broke is there a moment longer
        [(slot, is_temporary)] = found
        assert (slot.startswith("headrace_"), is_temporary) == (True, True)

    await until(lambda: not outside.execute("SELECT 1 FROM pg_replication_slots").fetchall())
    followed, lost = notes.of(ChangesFollowed), notes.of(ChangesLost)
    assert set(followed) == {ChangesFollowed("pg", 1, None)}
    assert len(followed) <= 1 + len(lost)


async def test_an_unbounded_slot_is_warned_of(url: str, notes: Notes, outside: psycopg.Connection) -> None:
    """Without max_slot_wal_keep_size a process that hangs could fill the disk; statistics and the event say so."""
    [usual] = outside.execute("SHOW max_slot_wal_keep_size").fetchone() or ()
    outside.execute("ALTER SYSTEM SET max_slot_wal_keep_size = -1")
    try:
        await reload(url, "max_slot_wal_keep_size", "-1")
        async with cached(url, notes) as database:
            await follow(database, ITEM, 1)
            warning = stats(database).shards["pg"].warning
            assert warning is not None
            assert "max_slot_wal_keep_size" in warning
    finally:
        outside.execute("ALTER SYSTEM RESET max_slot_wal_keep_size")
        await reload(url, "max_slot_wal_keep_size", usual)


async def reload(url: str, setting: str, value: str) -> None:
    """Return when whoever connects from now on finds this value: only then has the server read its files again."""

    def is_in_force() -> bool:
        with psycopg.connect(url, autocommit=True) as connection:
            return connection.execute(f"SHOW {setting}").fetchone() == (value,)

    with psycopg.connect(url, autocommit=True) as connection:
        connection.execute("SELECT pg_reload_conf()")
    await until(is_in_force)


async def test_a_role_that_may_not_replicate_lives_by_ttl_and_says_so(
    url: str, notes: Notes, outside: psycopg.Connection
) -> None:
    """Never silent: statistics name the mode and Postgres' reason, and the event is told once."""
    outside.execute("DROP ROLE IF EXISTS plain; CREATE ROLE plain LOGIN; GRANT ALL ON items TO plain")
    outside.execute("GRANT CREATE ON DATABASE headrace TO plain")
    async with cached(url.replace("user=headrace", "user=plain"), notes) as database:
        await database.fetch(ITEM, 1, cache=STREAMED)
        await until(lambda: notes.of(ChangesLost))
        found = stats(database).shards["pg"]
        assert found.invalidation == "own writes and TTL only"
        assert found.reason is not None
        outside.execute("UPDATE items SET name = 'theirs' WHERE id = 1")
        await until_read(lambda: name(database), "theirs")
    outside.execute("DROP OWNED BY plain; DROP ROLE plain")


@pytest.fixture
def physical_url(tmp_path: Path) -> Iterator[str]:
    """A Postgres as many are: without logical decoding."""
    with started(EmbeddedPostgres(tmp_path / "pg", name="pg", settings={"wal_level": "replica"})) as running:
        renew(running.url)
        yield running.url


async def test_without_logical_decoding_it_lives_by_ttl(physical_url: str, notes: Notes) -> None:
    """With wal_level = replica the mode is named, and results are never older than the bound."""
    async with cached(physical_url, notes) as database:
        await database.fetch(ITEM, 1, cache=STREAMED)
        await until(lambda: notes.of(ChangesLost))

        assert stats(database).shards["pg"].invalidation == "own writes and TTL only"
        assert stats(database).shards["pg"].reason == "wal_level is replica; it must be logical"
        assert notes.of(ChangesLost) == [ChangesLost("pg", "wal_level is replica; it must be logical")]
        await until_renewed(database)


async def until_renewed(database: Database) -> None:
    """Ask until the result was read again because of its age."""
    loads = stats(database).loads
    async with asyncio.timeout(30):
        while stats(database).loads == loads:
            await asyncio.sleep(0.01)
            await database.fetch(ITEM, 1, cache=STREAMED)


async def test_a_schema_that_takes_the_name_of_another_is_noticed(
    database: Database, outside: psycopg.Connection
) -> None:
    """Deploying by renaming changes no table, and every name means another."""
    for name, value in (("app", "old"), ("app_new", "new")):
        outside.execute(f"CREATE SCHEMA {name}; CREATE TABLE {name}.own (id int PRIMARY KEY, v text)")
        outside.execute(f"INSERT INTO {name}.own VALUES (1, '{value}')")
    try:
        await follow(database, "SELECT v FROM app.own")
        outside.execute("ALTER SCHEMA app RENAME TO app_old; ALTER SCHEMA app_new RENAME TO app")
        await until_equal(database, "SELECT v FROM app.own", "new")
    finally:
        outside.execute("DROP SCHEMA app CASCADE; DROP SCHEMA app_old CASCADE")


@pytest.mark.parametrize(
    ("function", "value"),
    [
        ("CREATE OR REPLACE FUNCTION twice(int) RETURNS int LANGUAGE sql IMMUTABLE AS 'SELECT 3 * $1'", 3),
        ("CREATE FUNCTION abs(int) RETURNS int LANGUAGE sql IMMUTABLE AS 'SELECT 5'", 2),
    ],
    ids=["new body", "another of its name"],
)
async def test_functions_are_part_of_the_structure(
    database: Database, outside: psycopg.Connection, function: str, value: int
) -> None:
    """A query over a function that was replaced is read again, and keeps its answer if the answer is the same."""
    sql = "SELECT twice(abs(id)) FROM items WHERE id = 1"
    await follow(database, sql)
    loads = stats(database).loads
    outside.execute(function)
    await until_equal(database, sql, value)
    async with asyncio.timeout(30):
        while stats(database).loads == loads:
            await asyncio.sleep(0.01)
            await database.fetch(sql, cache=STREAMED)


async def test_an_analysis_does_not_hide_that_an_older_one_is_outdated(
    database: Database, outside: psycopg.Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A view is replaced, and another text over it is analysed before the next look at the structure."""
    outside.execute("CREATE TABLE other (id int PRIMARY KEY, v text); INSERT INTO other VALUES (1, 'other')")
    outside.execute("CREATE VIEW seen AS SELECT id, name AS v FROM items")
    await follow(database, "SELECT v FROM other")
    await follow(database, "SELECT v FROM seen WHERE id = 1")
    may_look, look = asyncio.Event(), ChangeStream._look_at_structure

    async def looking(self: ChangeStream, connection: psycopg.AsyncConnection) -> None:
        await may_look.wait()
        await look(self, connection)

    monkeypatch.setattr(ChangeStream, "_look_at_structure", looking)
    outside.execute("CREATE OR REPLACE VIEW seen AS SELECT id, v FROM other")
    await database.fetch("SELECT id, v FROM seen", cache=STREAMED)
    may_look.set()

    await until_equal(database, "SELECT v FROM seen WHERE id = 1", "other")


@pytest.mark.parametrize("options", ["publish = 'insert'", "publish = 'insert, update, delete'"])
async def test_a_publication_that_leaves_something_out_is_not_used(
    url: str, notes: Notes, outside: psycopg.Connection, options: str
) -> None:
    """Somebody made it before: what it does not tell of would be taken for what did not happen."""
    outside.execute(f"CREATE PUBLICATION headrace FOR ALL TABLES WITH ({options})")
    async with cached(url, notes) as database:
        await database.fetch(ITEM, 1, cache=STREAMED)
        await until(lambda: notes.of(ChangesLost))

        reason = stats(database).shards["pg"].reason
        assert reason is not None
        assert "leaves out" in reason


async def test_a_table_of_which_some_rows_are_published_is_not_trusted(
    database: Database, outside: psycopg.Connection
) -> None:
    """A row filter keeps changes from the stream: results of that table live by their age."""
    await follow(database, ITEM, 1)
    outside.execute("ALTER PUBLICATION headrace SET TABLE items WHERE (id > 50)")
    await until(lambda: stats(database).shards["pg"].invalidation != "change stream")
    await until(lambda: stats(database).shards["pg"].invalidation == "change stream")
    await database.fetch(ITEM, 1, cache=STREAMED)
    outside.execute("UPDATE items SET name = 'theirs' WHERE id = 1")

    await until_equal(database, "SELECT name FROM items WHERE id = 1", "theirs")
    await until_read(lambda: name(database), "theirs")


async def until_equal(database: Database, sql: str, value: object) -> None:
    """Ask until the answer is this one."""
    await until_read(lambda: database.fetch_value(sql, cache=STREAMED), value)
