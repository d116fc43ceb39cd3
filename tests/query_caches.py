"""Queries, tables and helpers of the tests of the query cache."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import psycopg
import pytest

from headrace.cache import Cache
from headrace.database import (
    Database,
    DatabaseConfig,
    QueryCacheConfig,
    QueryPolicy,
    ShardConfig,
)
from headrace.embedded import EmbeddedPostgres
from headrace.events import Event
from tests.stale_reads import ALONE

LONG = QueryPolicy(staleness_max=60.0, ttl=600.0)
"""Young enough for every test: only an invalidation makes such a result outdated."""
STREAMED = QueryPolicy(staleness_max=0.75, ttl=600.0)
"""A bound that heartbeats keep on a busy machine, too."""
ITEM = "SELECT id, name, price FROM items WHERE id = $1"
SCHEMA = """
DROP PUBLICATION IF EXISTS headrace; DROP SCHEMA public CASCADE; CREATE SCHEMA public;
GRANT ALL ON SCHEMA public TO public;
CREATE TABLE items (id int PRIMARY KEY, name text, price numeric(8, 2));
INSERT INTO items SELECT n, 'item ' || n, n / 3.0 FROM generate_series(1, 100) AS n;
CREATE TABLE notes (note text);
CREATE TABLE notes_2 AS SELECT 1 AS id; ALTER TABLE notes_2 ADD PRIMARY KEY (id);
CREATE UNLOGGED TABLE scratch (id int PRIMARY KEY);
CREATE VIEW dear AS SELECT * FROM items WHERE price > 10;
CREATE VIEW today AS SELECT * FROM items WHERE name < CURRENT_DATE::text;
CREATE MATERIALIZED VIEW kept AS SELECT * FROM items;
CREATE TABLE parts (id int, day date, PRIMARY KEY (id, day)) PARTITION BY RANGE (day);
CREATE TABLE parts_2026 PARTITION OF parts FOR VALUES FROM ('2026-01-01') TO ('2027-01-01');
CREATE TABLE secrets (id int PRIMARY KEY, tenant text);
ALTER TABLE secrets ENABLE ROW LEVEL SECURITY;
CREATE FUNCTION reads_items() RETURNS bigint LANGUAGE plpgsql STABLE
    AS 'BEGIN RETURN (SELECT count(*) FROM items); END';
CREATE FUNCTION twice(int) RETURNS int LANGUAGE sql IMMUTABLE AS 'SELECT 2 * $1';
CREATE FUNCTION drawn(items) RETURNS float LANGUAGE sql VOLATILE AS 'SELECT random()';
"""


class Notes:
    """Keeps every event."""

    def __init__(self) -> None:
        self.events: list[Event] = []

    def on(self, event: Event) -> None:
        self.events.append(event)

    def of(self, kind: type[Event]) -> list[Event]:
        return [event for event in self.events if isinstance(event, kind)]


def renew(url: str) -> None:
    """The tables above, new, and nobody who is still at work on those from before."""
    with psycopg.connect(url, autocommit=True) as connection:
        connection.execute(ALONE)
        connection.execute(SCHEMA.encode())


async def until(condition: Callable[[], object], seconds: float = 30.0) -> None:
    """Wait until it holds."""
    async with asyncio.timeout(seconds):
        while not condition():
            await asyncio.sleep(0.005)


async def until_read(read: Callable[[], Awaitable[object]], value: object) -> None:
    """Ask until the answer is this one."""
    async with asyncio.timeout(30):
        while await read() != value:
            await asyncio.sleep(0.002)


async def read_in_time(read: Callable[[], Awaitable[object]], value: object, *, bound_s: float) -> None:
    """From now on the answer is this one for whoever asks later than after the bound, however long he waits for it."""
    loop = asyncio.get_running_loop()
    since = asked = loop.time()
    async with asyncio.timeout(30):
        while await read() != value:
            assert asked - since <= bound_s
            await asyncio.sleep(0.001)
            asked = loop.time()


DEBIAN = Path("/usr/lib/postgresql/15/bin")
MAJORS = [15, 16, 18]


def postgres(directory: Path, major: int) -> EmbeddedPostgres:
    """A server of this version: 15 is Debian's, if it is there."""
    if major != 15:
        return EmbeddedPostgres(directory, name="pg", major=major)
    if not (DEBIAN / "postgres").exists():
        pytest.skip(f"there is no Postgres in {DEBIAN}")
    return EmbeddedPostgres(directory, name="pg", binaries=DEBIAN)


@asynccontextmanager
async def cached(
    url: str, notes: Notes | None = None, *, cache: Cache | None = None, **config: object
) -> AsyncIterator[Database]:
    """A database of one shard with a cache."""
    query_cache = QueryCacheConfig(heartbeat_s=0.05, **config)  # type: ignore[arg-type]
    shards = (ShardConfig(name="pg", dsn=url),)
    whole = DatabaseConfig(shards=shards, query_cache=query_cache, acquire_timeout_s=20.0, lock_timeout_s=20.0)
    if cache is not None:
        async with Database(whole, cache=cache, observer=notes) as database:
            yield database
        return
    async with Cache() as own, Database(whole, cache=own, observer=notes) as database:
        yield database


def stats(database: Database):
    found = database.statistics().queries
    assert found is not None
    return found


async def follow(database: Database, sql: str = ITEM, *params: object) -> None:
    """Ask until the stream vouches for the result."""
    await database.fetch(sql, *params, cache=STREAMED)
    await until(lambda: stats(database).shards["pg"].invalidation == "change stream")
    # What was read before the stream began is used while it is young, and then read again.
    await old_hit(database, STREAMED, sql, *params)


async def old_hit(database: Database, policy: QueryPolicy, sql: str, *params: object) -> None:
    """Ask until a result that is older than the bound has answered: only the stream can vouch for it."""
    now = asyncio.get_running_loop().time
    async with asyncio.timeout(60):
        loads, since, asked = -1, now(), now()
        while stats(database).loads != loads or asked - since <= policy.staleness_max:
            if stats(database).loads != loads:
                loads, since = stats(database).loads, now()
            await asyncio.sleep(0.005)
            asked = now()
            await database.fetch(sql, *params, cache=policy)
