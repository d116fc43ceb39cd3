"""A shard with a standby that can take over, another shard beside it, and writes to both."""

import asyncio
import signal
from collections.abc import AsyncIterator, Iterator
from contextlib import ExitStack, asynccontextmanager, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import unquote

import psutil
import psycopg

from headrace.database import Database, ShardConfig
from headrace.embedded import EmbeddedPostgres, started
from headrace.errors import DatabaseUnavailable, OutcomeUnknown

WRITES_A_SECOND = 200


def ask(server: EmbeddedPostgres, sql: str):
    with psycopg.connect(server.url, autocommit=True) as connection:
        cursor = connection.execute(sql.encode())
        return cursor.fetchall() if cursor.description else []


def family_of(server: EmbeddedPostgres) -> list[psutil.Process]:
    """All of its processes."""
    postmaster = psutil.Process(int((server.directory / "data" / "postmaster.pid").read_text().split()[0]))
    return [postmaster, *postmaster.children(recursive=True)]


@contextmanager
def frozen(server: EmbeddedPostgres) -> Iterator[None]:
    """All of its processes stopped, so that it neither answers nor hangs up."""
    family = family_of(server)
    for process in family:
        process.suspend()
    try:
        yield
    finally:
        for process in family:
            process.resume()


def kill(server: EmbeddedPostgres) -> None:
    """SIGKILL for all of its processes at once."""
    family = family_of(server)
    for process in family:
        process.suspend()
    for process in family:
        process.send_signal(signal.SIGKILL)
    psutil.wait_procs(family, timeout=5)


def together(*servers: EmbeddedPostgres) -> str:
    """One connection string for several servers."""
    hosts = ",".join(unquote(server.url.split("host=")[1].split("&")[0]) for server in servers)
    return f"host={hosts} port=5432 dbname=headrace user=headrace"


@dataclass
class Pair:
    """A primary and the standby that can take its place; and another shard."""

    first: EmbeddedPostgres
    second: EmbeddedPostgres
    other: EmbeddedPostgres

    @property
    def shards(self) -> tuple[ShardConfig, ShardConfig]:
        return (
            ShardConfig(name="moving", dsn=together(self.first, self.second)),
            ShardConfig(name="still", dsn=self.other.url),
        )


@contextmanager
def pair(directory: Path, *, synchronous: bool) -> Iterator[Pair]:
    with ExitStack() as servers:
        first = servers.enter_context(started(EmbeddedPostgres(directory / "first", name="first")))
        second = servers.enter_context(
            started(EmbeddedPostgres(directory / "second", name="second", replica_of=first))
        )
        other = servers.enter_context(started(EmbeddedPostgres(directory / "other", name="other")))
        for server in (first, other):
            ask(server, "CREATE TABLE notes (n int)")
        if synchronous:
            ask(first, "ALTER SYSTEM SET synchronous_standby_names = '*'")
            ask(first, "SELECT pg_reload_conf()")
        yield Pair(first, second, other)


@dataclass
class Load:
    """What became of every write."""

    acknowledged: set[int] = field(default_factory=set)
    refused: set[int] = field(default_factory=set)
    unknown: set[int] = field(default_factory=set)
    took_s: list[float] = field(default_factory=list)
    """Of those that were acknowledged."""


async def write(database: Database, key: str, n: int, load: Load, *, grouped: bool) -> None:
    loop = asyncio.get_running_loop()
    began = loop.time()
    try:
        await database.execute("INSERT INTO notes VALUES ($1)", n, key=key, grouped=grouped)
        load.acknowledged.add(n)
        load.took_s.append(loop.time() - began)
    except OutcomeUnknown:
        load.unknown.add(n)
    except DatabaseUnavailable:
        load.refused.add(n)


@asynccontextmanager
async def writing(database: Database, key: str, load: Load, *, grouped: bool) -> AsyncIterator[None]:
    """WRITES_A_SECOND single-row writes for the length of the block, each its own task; all are over when it ends."""
    ended = asyncio.Event()

    async def feed() -> None:
        async with asyncio.TaskGroup() as writes:
            n = 0
            while not ended.is_set():
                writes.create_task(write(database, key, n, load, grouped=grouped))
                n += 1
                await asyncio.sleep(1 / WRITES_A_SECOND)

    async with asyncio.TaskGroup() as group:
        group.create_task(feed())
        yield
        ended.set()
