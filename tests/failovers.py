"""A shard with a standby that can take over, another shard beside it, and writes to both."""

import asyncio
import os
import signal
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import ExitStack, asynccontextmanager, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import unquote

import psutil
import psycopg

from headrace.database import Database, ShardConfig
from headrace.embedded import EmbeddedPostgres, started
from headrace.errors import DatabaseUnavailable, OutcomeUnknown, Overloaded

WRITES_A_SECOND = 200


def ask(server: EmbeddedPostgres, sql: str):
    with psycopg.connect(server.url, autocommit=True) as connection:
        cursor = connection.execute(sql.encode())
        return cursor.fetchall() if cursor.description else []


def postmaster_of(server: EmbeddedPostgres) -> psutil.Process:
    """The parent of all of its processes."""
    return psutil.Process(int((server.directory / "data" / "postmaster.pid").read_text().split()[0]))


def stop_family(server: EmbeddedPostgres) -> list[psutil.Process]:
    """All of its processes, stopped: the postmaster first, which then starts no other."""
    postmaster = postmaster_of(server)
    stop(postmaster)
    family = [postmaster, *postmaster.children(recursive=True)]
    for process in family[1:]:
        with suppress(psutil.NoSuchProcess):
            stop(process)
    return family


def stop(process: psutil.Process) -> None:
    """From the return on it does nothing more."""
    process.suspend()
    while process.status() not in {psutil.STATUS_STOPPED, psutil.STATUS_TRACING_STOP, psutil.STATUS_ZOMBIE}:
        time.sleep(0.001)


def _signal(process: psutil.Process, number: signal.Signals) -> None:
    """Send it, unless the process has ended by itself."""
    with suppress(psutil.NoSuchProcess):
        process.send_signal(number)


@contextmanager
def frozen(server: EmbeddedPostgres) -> Iterator[None]:
    """All of its processes stopped, so that it neither answers nor hangs up."""
    family = stop_family(server)
    try:
        yield
    finally:
        for process in family:
            _signal(process, signal.SIGCONT)


def kill(server: EmbeddedPostgres) -> None:
    """SIGKILL for all of its processes at once."""
    family = stop_family(server)
    for process in family:
        _signal(process, signal.SIGKILL)
    psutil.wait_procs(family, timeout=30)


def hold_commits_for(server: EmbeddedPostgres | str, standbys: str) -> None:
    """From the return on every commit waits for these standbys, or, with none, for nobody.

    A new backend inherits the setting from a postmaster that has told all others of it; the checkpointer, which lets
    the commits wait, has read it by the end of a checkpoint that was asked for afterwards.
    """
    url = server if isinstance(server, str) else server.url
    with psycopg.connect(url, autocommit=True) as connection:
        connection.execute(f"ALTER SYSTEM SET synchronous_standby_names = '{standbys}'".encode())
        connection.execute("SELECT pg_reload_conf()")
    is_told = False
    while not is_told:
        with psycopg.connect(url, autocommit=True) as connection:
            is_told = connection.execute("SHOW synchronous_standby_names").fetchone() == (standbys,)
            if is_told:
                connection.execute("CHECKPOINT")


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


def has_caught_up(primary: EmbeddedPostgres, standby: EmbeddedPostgres) -> bool:
    """Whether the standby streams, and has replayed all that the primary has written."""
    [(at,)] = ask(primary, "SELECT pg_current_wal_flush_lsn()")
    caught_up = f"SELECT count(*) FROM pg_stat_wal_receiver WHERE pg_last_wal_replay_lsn() >= '{at}'"
    return ask(standby, caught_up) == [(1,)]


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
        # One that took over sooner would not have the table. (Bounded by the test's timeout.)
        while not has_caught_up(first, second):
            os.sched_yield()
        if synchronous:
            hold_commits_for(first, "*")
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
    except (DatabaseUnavailable, Overloaded):
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
