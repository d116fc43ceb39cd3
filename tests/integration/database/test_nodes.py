"""Pools on real servers: their share of the server, how well they are used, TLS, and shards that are only read."""

import asyncio
import os
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import AsyncExitStack
from dataclasses import replace
from pathlib import Path

import psycopg
import pytest

from headrace.database import Database, DatabaseConfig, ShardConfig
from headrace.embedded import EmbeddedPostgres, started
from headrace.errors import DatabaseUnavailable, OutcomeUnknown, StatementFailed, StatementRefused
from headrace.events import Event, PoolLimited
from headrace.testing import FakeClock

DEBIAN = Path("/usr/lib/postgresql/15/bin")
# Its own for each process: Postgres is on its usual port there.
ADDRESS = f"127.{64 + (os.getpid() >> 16)}.{os.getpid() >> 8 & 255}.{os.getpid() & 255}"
CONNECTIONS = "SELECT count(*) FROM pg_stat_activity WHERE application_name LIKE 'headrace %'"


class Notes:
    """Keeps every event."""

    def __init__(self) -> None:
        self.events: list[Event] = []

    def on(self, event: Event) -> None:
        self.events.append(event)


@pytest.fixture(scope="module")
def small(tmp_path_factory) -> Iterator[str]:
    """A server with room for 13 ordinary connections."""
    settings = {"max_connections": 16}
    with started(EmbeddedPostgres(tmp_path_factory.mktemp("small"), name="small", settings=settings)) as server:
        yield server.url


@pytest.fixture(scope="module")
def secured(tmp_path_factory) -> Iterator[Path]:
    """The certificate of a server on ADDRESS that takes nothing but TLS."""
    if not shutil.which("postgres", path=str(DEBIAN)):
        pytest.skip(f"there is no Postgres with TLS in {DEBIAN}")
    directory = tmp_path_factory.mktemp("secured")
    server = EmbeddedPostgres(directory / "pg", name="pg", binaries=DEBIAN)
    data = server.directory / "data"
    with started(server), psycopg.connect(server.url, autocommit=True) as connection:
        for setting in ("ssl = on", f"listen_addresses = '{ADDRESS}'"):
            connection.execute(f"ALTER SYSTEM SET {setting}")
    subject = ["-subj", f"/CN={ADDRESS}", "-addext", f"subjectAltName=IP:{ADDRESS}", "-days", "2"]
    files = ["-keyout", data / "server.key", "-out", data / "server.crt"]
    subprocess.run(
        ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", *files, *subject], check=True, capture_output=True
    )
    owner = data.stat()
    for name in ("server.key", "server.crt"):
        os.chown(data / name, owner.st_uid, owner.st_gid)
    (data / "server.key").chmod(0o600)
    (data / "pg_hba.conf").write_text("local all all trust\nhostssl all all 127.0.0.0/8 trust\n")
    certificate = directory / "root.crt"
    shutil.copy(data / "server.crt", certificate)
    with started(server):
        yield certificate


def config_of(dsn: str, **options) -> DatabaseConfig:
    options = {"acquire_timeout_s": 20.0, **options}
    return DatabaseConfig(shards=(ShardConfig(name="shard-0", dsn=dsn),), **options)


async def until_open_are(dsn: str, most: int) -> None:
    """Wait until no more of our connections are open: a server takes a moment to miss one that was closed."""
    with psycopg.connect(dsn, autocommit=True) as connection:
        async with asyncio.timeout(20):
            while connection.execute(CONNECTIONS).fetchone()[0] > most:
                await asyncio.sleep(0.01)


async def test_the_pools_of_all_processes_fit_into_the_server(small):
    """Three pools that want ten each get four, close what they have above that, and everybody is served."""
    notes = Notes()
    config = config_of(small, connections_max=10, acquire_timeout_s=60.0)
    # Its clock stands still, so that they look for their shares when they are told to, all three being there.
    clock = FakeClock()
    await until_open_are(small, 0)
    async with AsyncExitStack() as stack:
        databases = [await stack.enter_async_context(Database(config, observer=notes, clock=clock)) for _ in range(3)]
        await asyncio.gather(*(databases[0].execute("SELECT pg_sleep(0.1)") for _ in range(30)))
        await asyncio.gather(*(database.nodes["shard-0"].tend() for database in databases))
        sleeps = [database.execute("SELECT pg_sleep(0.02)") for database in databases for _ in range(50)]
        await asyncio.gather(*sleeps)
        assert [database.statistics().shards["shard-0"].connections_max for database in databases] == [4, 4, 4]
        await until_open_are(small, 12)
    told = [event for event in notes.events if isinstance(event, PoolLimited)]
    assert {(event.connections, event.wanted, event.pools) for event in told} == {(4, 10, 3)}


async def test_a_call_that_is_given_up_as_its_connection_comes_is_given_up(small):
    """At whichever turn of the loop: its task is cancelled and does not go on, and the connection serves the next."""
    async with Database(config_of(small, connections_max=1)) as database:
        node = database.nodes["shard-0"]
        for turns in range(20):
            async with node.reading():
                waiting = asyncio.create_task(node.execute("SELECT 1"))
                while not database.statistics().shards["shard-0"].waiting:
                    await asyncio.sleep(0)
            for _ in range(turns):
                await asyncio.sleep(0)
            is_given_up = waiting.cancel()
            await asyncio.wait({waiting})
            assert waiting.cancelled() == is_given_up, f"after {turns} turns"
        assert await node.execute("SELECT 1") == 1


async def test_a_loaded_pool_is_used_well(small):
    """More callers than connections: these are at work nearly all of the time that they are open."""
    clock, done = FakeClock(), []
    async with Database(config_of(small, connections_max=4, wait_p99_max_s=10.0), clock=clock) as database:
        async with AsyncExitStack() as stack:  # to make the four takes none of the time that counts
            for _ in range(4):
                await stack.enter_async_context(database.transaction())

        async def client() -> None:
            while len(done) < 400:
                await database.execute("SELECT pg_sleep(0.005)")
                done.append(clock.advance(0.01))

        await asyncio.gather(*(client() for _ in range(12)))
        used = database.statistics().shards["shard-0"]
    assert used.efficiency is not None
    assert used.efficiency > 0.8
    assert used.wait_p99_s is not None
    assert used.wait_p99_s < 10.0


async def test_tls_is_what_the_dsn_says(secured):
    """Verified against the certificate it works; unverified or without TLS nothing is sent."""
    dsn = f"host={ADDRESS} port=5432 dbname=headrace user=headrace"
    async with Database(config_of(f"{dsn} sslmode=verify-full sslrootcert={secured}")) as database:
        assert await database.fetch_value("SELECT ssl FROM pg_stat_ssl WHERE pid = pg_backend_pid()")
    for refused in ("sslmode=disable", "sslmode=verify-full sslrootcert=/etc/hostname"):
        async with Database(config_of(f"{dsn} {refused}", acquire_timeout_s=0.5)) as database:
            with pytest.raises(DatabaseUnavailable):
                await database.fetch_value("SELECT 1")


async def test_a_read_only_shard_is_read(small):
    """Its rows are, and a write is refused by the server, before any effect, in our words."""
    config = config_of(small)
    async with Database(config) as database:
        await database.execute("DROP TABLE IF EXISTS kept")
        await database.execute("CREATE TABLE kept AS SELECT 1 AS n")
    shards = (replace(config.shards[0], read_only=True),)
    async with Database(replace(config, shards=shards)) as database:
        assert await database.fetch_value("SELECT n FROM kept") == 1
        for grouped in (False, True):
            with pytest.raises(StatementRefused, match="shard-0 is read-only"):
                await database.execute("INSERT INTO kept VALUES (2)", grouped=grouped)


async def test_an_error_in_a_transaction_is_ours_and_leaves_nothing(small):
    """It can be caught inside the block, by its state, and outside."""
    async with Database(config_of(small)) as database:
        await database.execute("CREATE TABLE IF NOT EXISTS single (n int PRIMARY KEY)")
        with pytest.raises(StatementFailed, match="aborted"):
            await twice(database)
        assert await database.fetch("SELECT * FROM single") == []


async def twice(database: Database) -> None:
    async with database.transaction() as transaction:
        await transaction.execute("INSERT INTO single VALUES (1)")
        with pytest.raises(StatementFailed) as caught:
            await transaction.execute("INSERT INTO single VALUES (1)")
        assert caught.value.sqlstate == "23505"
        await transaction.execute("INSERT INTO single VALUES (2)")


@pytest.mark.parametrize(
    "sql",
    [
        "CALL kept_and_slow()",
        "DO $$BEGIN INSERT INTO kept VALUES (1); COMMIT; PERFORM pg_sleep(25); END$$",
        "BEGIN; INSERT INTO kept VALUES (1); COMMIT; SELECT pg_sleep(25)",
    ],
)
async def test_what_commits_by_itself_is_unknown_when_its_server_goes_away(small, sql):
    """Something of it may be kept although its end was not reached, so nobody is told that it may be repeated."""
    async with Database(config_of(small, connections_max=2)) as database:
        await database.execute("DROP TABLE IF EXISTS kept")
        await database.execute("CREATE TABLE kept (k int)")
        await database.execute(
            "CREATE OR REPLACE PROCEDURE kept_and_slow() LANGUAGE plpgsql AS"
            " 'BEGIN INSERT INTO kept VALUES (1); COMMIT; PERFORM pg_sleep(25); END'"
        )
        running = asyncio.ensure_future(database.execute(sql))
        async with asyncio.timeout(20):
            while not await database.fetch("SELECT 1 FROM kept"):
                await asyncio.sleep(0.01)
            sleeping = "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE wait_event = 'PgSleep'"
            while not await database.fetch(sleeping):
                await asyncio.sleep(0.01)
        with pytest.raises(OutcomeUnknown):
            await running
        assert await database.fetch("SELECT k FROM kept") == [(1,)]


async def test_text_of_any_client_encoding_is_told_right(small):
    """What a connection string says of the encoding does not matter: text is text on both sides."""
    for dsn in (small + "&client_encoding=LATIN1", small + "&options=-c%20client_encoding%3DLATIN1"):
        async with Database(config_of(dsn)) as database:
            assert await database.fetch_value("SELECT $1 || U&'\\6C34'", "車") == "車水"
