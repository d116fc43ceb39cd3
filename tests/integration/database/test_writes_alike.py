"""Writes through the router over three shards leave the rows, and return those, that a single Postgres does."""

from contextlib import suppress

import psycopg
import pytest
from psycopg.rows import tuple_row

from headrace.database import Database, DatabaseConfig, Reference, ShardConfig, Sharded
from headrace.errors import StatementRefused
from tests.integration.database.conftest import Twins

SCHEMA = """
DROP TABLE IF EXISTS items, parts, kinds, headrace_shard_map;
CREATE TABLE items (tenant bigint, id bigint, n int, v text DEFAULT 'new', PRIMARY KEY (tenant, id));
CREATE TABLE parts (tenant bigint, id bigint, n int, PRIMARY KEY (tenant, id));
CREATE TABLE kinds (id int PRIMARY KEY, name text DEFAULT 'x', at timestamptz DEFAULT clock_timestamp())"""
FILL = """
TRUNCATE items, parts, kinds;
INSERT INTO kinds SELECT g, 'kind ' || g, '2026-01-01' FROM generate_series(1, 3) g"""
TABLES = {"items": Sharded(key="tenant"), "parts": Sharded(key="tenant"), "kinds": Reference()}
ROWS = [(tenant, id, tenant * 10 + id) for tenant in range(1, 9) for id in range(3)]
STATEMENTS = (
    "INSERT INTO items VALUES (1, 90, 1), (2, 90, 1), (3, 90, 2) RETURNING tenant, n",
    "INSERT INTO items VALUES (1, 0, 1), (2, 90, 1), (3, 0, 2) ON CONFLICT DO NOTHING RETURNING *",
    "INSERT INTO items VALUES (1, 0, 1), (2, 0, 1) ON CONFLICT (tenant, id) DO UPDATE SET n = excluded.n RETURNING *",
    "INSERT INTO items VALUES (1, 0, 1), (2, 0, 1) ON CONFLICT (tenant, id) DO UPDATE SET tenant = 5",
    "INSERT INTO items VALUES (1, 0, 1), (2, 0, 1) ON CONFLICT (tenant, id) DO UPDATE SET v = DEFAULT",
    "INSERT INTO items VALUES (1, 0, 1) ON CONFLICT (tenant, id) DO UPDATE SET n = (SELECT count(*) FROM items)",
    "INSERT INTO items VALUES (1, 0, 1), (2, 0, 1) ON CONFLICT (tenant, id) DO UPDATE SET"
    " n = (SELECT count(*) FROM kinds)",
    "INSERT INTO items VALUES (1, 80, 1) RETURNING (SELECT count(*) FROM items)",
    "INSERT INTO items VALUES (1, 80, 1), (2, 80, 1) RETURNING (SELECT count(*) FROM items)",
    "INSERT INTO items VALUES (1, 80, (SELECT count(*) FROM items)), (2, 80, 0)",
    "INSERT INTO items SELECT tenant, id + 50, n FROM parts RETURNING *",
    "INSERT INTO items SELECT tenant + 1, id + 50, n FROM parts",
    "INSERT INTO items SELECT tenant, id + 50, n FROM parts ORDER BY n LIMIT 2",
    "INSERT INTO items SELECT i.tenant, k.id + 50, 5 FROM kinds k, parts i",
    "INSERT INTO items SELECT id, id + 50, 5 FROM kinds",
    "INSERT INTO items SELECT tenant, 60, count(*) FROM parts GROUP BY tenant",
    "UPDATE items SET n = 0 RETURNING tenant, id",
    "UPDATE items SET n = (SELECT count(*) FROM items)",
    "UPDATE items SET n = p.n FROM parts p WHERE p.id = items.id",
    "UPDATE items SET n = p.n + 1 FROM parts p WHERE p.id = items.id AND p.tenant = items.tenant",
    "UPDATE items SET tenant = tenant + 1, id = id + 100 WHERE tenant = 1",
    "DELETE FROM items WHERE (tenant, id) IN (SELECT tenant, id FROM items ORDER BY n LIMIT 3)",
    "DELETE FROM items WHERE tenant IN (1, 2, 3) RETURNING *",
    "WITH x AS (DELETE FROM items RETURNING *) SELECT count(*) FROM x",
    "WITH x AS (DELETE FROM items WHERE tenant = 1 RETURNING *) INSERT INTO parts SELECT tenant, id + 50, n FROM x",
    "WITH x AS (DELETE FROM items WHERE tenant = 1 RETURNING *) INSERT INTO parts SELECT tenant + 1, id + 5, n FROM x",
    "WITH x AS (INSERT INTO items VALUES (1, 70, 1) RETURNING *) INSERT INTO items VALUES (2, 71, 1)",
    "WITH x AS (UPDATE kinds SET name = 'p' RETURNING *) SELECT * FROM items WHERE tenant = 1",
    "MERGE INTO items i USING (VALUES (1, 0), (2, 9)) s (t, i) ON i.tenant = s.t AND i.id = s.i"
    " WHEN MATCHED THEN UPDATE SET n = 0 WHEN NOT MATCHED THEN INSERT VALUES (s.t, s.i, 1, 'a')",
    "INSERT INTO kinds (id, at) VALUES (1, '2026-02-02') ON CONFLICT (id) DO UPDATE SET at = excluded.at RETURNING *",
    "INSERT INTO kinds (id, at) VALUES (1, '2026-02-02') ON CONFLICT (id) DO UPDATE SET at = DEFAULT",
    "UPDATE kinds SET at = DEFAULT",
    "UPDATE kinds SET name = DEFAULT RETURNING *",
    "UPDATE kinds SET (name, at) = ('a', DEFAULT) WHERE id = 1",
    "UPDATE kinds SET name = (SELECT count(*)::text FROM items)",
    "UPDATE kinds SET name = i.v FROM items i WHERE i.id = kinds.id AND i.tenant = 1",
    "DELETE FROM kinds WHERE id IN (SELECT id FROM kinds LIMIT 1)",
    "DELETE FROM kinds WHERE id IN (SELECT id FROM kinds ORDER BY id LIMIT 1) RETURNING *",
    "INSERT INTO kinds SELECT max(id) + 1, 'm', '2026-01-01'::timestamptz FROM kinds",
)
SHOW = ("SELECT * FROM items", "SELECT * FROM parts", "SELECT * FROM kinds")


async def shown(connection, sql):
    cursor = await connection.execute(sql)
    return sorted(map(repr, await cursor.fetchall())) if cursor.description else []


def fill(url, keeps):
    with psycopg.connect(url, autocommit=True) as connection:
        connection.execute(FILL)
        own = [row for row in ROWS if keeps(row[0])]
        connection.cursor().executemany("INSERT INTO items VALUES (%s, %s, %s, 'old')", own)
        connection.cursor().executemany("INSERT INTO parts VALUES (%s, %s, %s)", own[::3])


@pytest.fixture
async def database(twins: Twins):
    """The shards with the rows where they belong, and all of them on the single Postgres."""
    for url in (twins.single, *twins.shards.values()):
        with psycopg.connect(url, autocommit=True) as connection:
            connection.execute(SCHEMA)
    shards = tuple(ShardConfig(name=name, dsn=url) for name, url in twins.shards.items())
    config = DatabaseConfig(shards=shards, tables=TABLES, connections_max=2, acquire_timeout_s=20.0)
    async with Database(config) as database:
        yield database


@pytest.mark.parametrize("everywhere", [False, True])
async def test_a_write_does_what_a_single_postgres_does_or_is_refused(database, twins, everywhere):
    """Not one of them leaves a row where it is not looked for, or copies that differ."""
    found, done = [], 0
    for sql in STATEMENTS:
        fill(twins.single, lambda tenant: True)
        for name, url in twins.shards.items():
            fill(url, lambda tenant, name=name: database.locate(tenant).shard == name)
        async with await psycopg.AsyncConnection.connect(twins.single, autocommit=True, row_factory=tuple_row) as one:
            with suppress(StatementRefused):  # then nothing of it may be left
                rows = sorted(map(repr, map(tuple, await database.fetch(sql, everywhere=everywhere))))
                done += 1
                if rows != await shown(one, sql):
                    found.append(f"{sql}\n    returned {rows}")
            single = [await shown(one, each) for each in SHOW]
        kept = []
        for url in twins.shards.values():
            async with await psycopg.AsyncConnection.connect(url, autocommit=True, row_factory=tuple_row) as shard:
                kept.append([await shown(shard, each) for each in SHOW])
        merged = [sorted(row for each in kept for row in each[table]) for table in (0, 1)]
        if [*merged, kept[0][2]] != single or any(each[2] != kept[0][2] for each in kept):
            found.append(f"{sql}\n    left other rows")
    assert not found, "\n".join(found)
    assert done >= (15 if everywhere else 4)
