"""Reads from a real replica: within its limits, and never behind what their caller wrote."""

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import psycopg
import pytest

from headrace.clock import SystemClock
from headrace.database import Database, DatabaseConfig, ReplicaConfig, ShardConfig
from headrace.embedded import EmbeddedPostgres, started
from headrace.errors import CallerError, DatabaseUnavailable
from tests.failovers import ask, has_caught_up

LIMITS = ReplicaConfig(look_s=0.5, lag_max_s=600.0)
"""A replica that a busy machine lets answer within two seconds counts as one that has answered lately."""
COUNT = "SELECT count(*), pg_is_in_recovery() FROM notes"


@pytest.fixture(scope="module")
def servers(tmp_path_factory) -> Iterator[tuple[EmbeddedPostgres, EmbeddedPostgres]]:
    """A primary and a replica of it."""
    directory = tmp_path_factory.mktemp("postgres")
    with (
        started(EmbeddedPostgres(directory / "first", name="first")) as first,
        started(EmbeddedPostgres(directory / "second", name="second", replica_of=first)) as second,
    ):
        yield first, second


@pytest.fixture
def config(servers) -> DatabaseConfig:
    """A shard with one replica and an empty table, on both of them."""
    first, second = servers
    with psycopg.connect(first.url, autocommit=True) as connection:
        connection.execute("DROP TABLE IF EXISTS notes")
        connection.execute("CREATE TABLE notes (n int)")
    ends = SystemClock().monotonic() + 60
    while not has_caught_up(first, second):
        assert SystemClock().monotonic() < ends
    shards = (
        ShardConfig(name="shard-0", dsn=first.url),
        ShardConfig(name="near", dsn=second.url, replica_of="shard-0"),
    )
    return DatabaseConfig(shards=shards, connections_max=4, acquire_timeout_s=20.0, replicas=LIMITS)


@contextmanager
def late(replica: EmbeddedPostgres) -> Iterator[None]:
    """For the length of the block the replica shows nothing of what is committed."""
    ask(replica, "SELECT pg_wal_replay_pause()")
    try:
        ends = SystemClock().monotonic() + 60
        while ask(replica, "SELECT pg_get_wal_replay_pause_state()") != [("paused",)]:
            assert SystemClock().monotonic() < ends
        yield
    finally:
        ask(replica, "SELECT pg_wal_replay_resume()")


async def until(condition) -> None:
    async with asyncio.timeout(60):
        while not await condition():
            await asyncio.sleep(0.02)


async def read(database: Database, *, replica: str = "any"):
    return tuple((await database.fetch(COUNT, read_only=True, replica=replica))[0])


async def in_a_task(awaitable):
    """In a context of its own, as another request would run."""
    return await asyncio.get_running_loop().create_task(awaitable)


async def test_a_replica_answers_reads(config):
    """Who has written nothing is served by it as soon as it has the table; only who asks for it."""
    async with Database(config) as database:

        async def by_replica() -> bool:
            return await read(database) == (0, True)

        async def by_that_one() -> bool:
            return await read(database, replica="near") == (0, True)

        await until(by_replica)
        await until(by_that_one)
        assert tuple((await database.fetch(COUNT, read_only=True))[0]) == (0, False)
        assert set(database.statistics().shards) == {"shard-0", "near"}


@pytest.mark.slow
async def test_a_late_replica_is_never_read_by_one_who_wrote(config, servers):
    """It replays nothing: every reader that wrote sees all of its writes, at once; one who did not may see less."""
    async with Database(config) as database:

        async def by_replica() -> bool:
            return await in_a_task(read(database)) == (0, True)

        await until(by_replica)

        async def write_and_read(n: int) -> tuple[int, bool]:
            await database.execute("INSERT INTO notes VALUES ($1)", n)
            return await read(database)

        with late(servers[1]):
            for n in range(50):
                assert await in_a_task(write_and_read(n)) == (n + 1, False)
            await until(by_replica)


async def test_a_replica_that_caught_up_is_read_by_one_who_wrote(config):
    """By waiting for it, if that is wanted; what it shows holds the write."""
    limits = replace(LIMITS, wait_s=60.0, otherwise="error")
    async with Database(replace(config, replicas=limits)) as database:
        for n in range(10):
            await database.execute("INSERT INTO notes VALUES ($1)", n)
            assert await read(database) == (n + 1, True)


async def test_a_replica_that_lags_is_not_read(config, servers):
    """Beyond the limit the policy decides: the primary answers, or an error names replica and reason."""
    limits = replace(LIMITS, lag_max_s=0.5)
    async with Database(replace(config, replicas=limits)) as database:

        async def by_primary() -> bool:
            return await in_a_task(read(database)) == (1, False)

        with late(servers[1]):
            await in_a_task(database.execute("INSERT INTO notes VALUES (1)"))
            await until(by_primary)
    strict = replace(limits, otherwise="error")
    async with Database(replace(config, replicas=strict)) as database:
        reasons = []

        async def is_refused_for_lag() -> bool:
            try:
                await read(database)
            except DatabaseUnavailable as error:
                reasons.append(str(error))
            return any("near is more than 0.5 s behind" in each for each in reasons)

        with late(servers[1]):
            await in_a_task(database.execute("INSERT INTO notes VALUES (2)"))
            await until(is_refused_for_lag)


async def test_tasks_of_a_session_see_each_others_writes(config, servers):
    """Without one a task that wrote does not tell the others; a bookmark tells another process."""
    async with Database(config) as database:

        async def by_replica() -> bool:
            return await in_a_task(read(database)) == (0, True)

        await until(by_replica)
        with late(servers[1]):
            with database.session():
                await in_a_task(database.execute("INSERT INTO notes VALUES (1)"))
                assert await in_a_task(read(database)) == (1, False)
                mark = await database.bookmark()
            await until(by_replica)
            with database.session(mark):
                assert await read(database) == (1, False)


async def test_only_reads_go_to_replicas(config):
    """A statement that is not said to be one is refused, and so is a replica that the shard does not have."""
    async with Database(config) as database:
        with pytest.raises(CallerError, match="reads"):
            await database.fetch(COUNT, replica="any")
        with pytest.raises(CallerError, match="no replica 'far'"):
            await read(database, replica="far")
