"""Reads through the query cache while others write: is any of them older than promised?

Every table has one row with a number that only grows. Writers note when each number was acknowledged, readers when
they asked and what they got. Afterwards each read is compared with the highest number that had been acknowledged
`staleness_max` before it was asked for. The machine's monotonic clock is one for all its processes.

Run as a program it is one of the writers that know nothing of headrace: `python -m tests.stale_reads DSN TABLES SEED`.
"""

import asyncio
import math
import os
import random
import signal
import subprocess
import sys
import time
from bisect import bisect_right
from collections import Counter, defaultdict
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field

import psycopg

from headrace.cache import Cache, RemoteConfig
from headrace.clock import SystemClock
from headrace.database import Database, DatabaseConfig, QueryPolicy, ShardConfig
from headrace.database.query_cache.cache import QueryCacheStatistics
from headrace.errors import HeadraceError
from headrace.testing import TcpProxy
from tests.redis_servers import RedisServer

TABLES = 16
PAUSE_S = 0.05
now = SystemClock.monotonic
ALONE = """
SELECT pg_terminate_backend(pid, 30000) FROM pg_stat_activity
WHERE datname = current_database() AND backend_type IN ('client backend', 'walsender') AND pid <> pg_backend_pid()"""
"""Ends all other sessions, with their slots: what a database that is closed has sent may still be under way there."""


def prepare(dsn: str, tables: int = TABLES) -> None:
    """Make the tables."""
    with psycopg.connect(dsn, autocommit=True) as connection:
        connection.execute(ALONE)
        connection.execute("DROP PUBLICATION IF EXISTS headrace")
        for table in range(tables):
            connection.execute(f"DROP TABLE IF EXISTS counter_{table}")
            connection.execute(f"CREATE TABLE counter_{table} (id int PRIMARY KEY, n bigint)")
            connection.execute(f"INSERT INTO counter_{table} VALUES (1, 0)")


def write_outside(dsn: str, tables: int, seed: int) -> None:
    """Raise numbers, and print which, and when they were acknowledged, until the end of standard input."""
    rng = random.Random(seed)
    with psycopg.connect(dsn, autocommit=True) as connection:
        while True:
            table = rng.randrange(tables)
            row = connection.execute(f"UPDATE counter_{table} SET n = n + 1 RETURNING n").fetchone()
            print(table, row[0] if row else 0, now(), flush=True)
            time.sleep(rng.random() * 2 * PAUSE_S)


@dataclass
class Report:
    """What came of a run."""

    reads: int = 0
    hits: int = 0
    loads: int = 0
    outdated: int = 0
    writes: int = 0
    stale: list[str] = field(default_factory=list)
    """Reads older than promised."""
    unseen: list[str] = field(default_factory=list)
    """Reads that lacked a write of their own process."""
    oldest_s: float = 0.0
    """How long before it was asked the oldest write had been acknowledged that a read lacked."""
    faults: int = 0
    errors: Counter[str] = field(default_factory=Counter)
    seconds: float = 0.0


@dataclass(frozen=True, kw_only=True)
class Least:
    """What a run comes to, however long its machine takes for that."""

    reads: int = 0
    hits: int = 0
    writes: int = 0
    faults: int = 0


class Run:
    """Two caches over one Redis as two processes have them, two writers in them and two outside."""

    def __init__(
        self, dsn: str, direct: str, redis: RedisServer, policy: QueryPolicy, *, tables: int = TABLES
    ) -> None:
        self.dsn = dsn
        self.direct = direct
        self.redis = redis
        self.policy = policy
        self.tables = tables
        self.databases: list[Database] = []
        self._acknowledged: dict[int, list[tuple[float, int]]] = defaultdict(list)
        self._own: dict[tuple[int, int], list[tuple[float, int]]] = defaultdict(list)
        self._reads: list[tuple[float, int, int, int]] = []
        self._report = Report()
        self._is_over = False
        self._least = Least()
        self._late_at = math.inf

    @asynccontextmanager
    async def _open(self) -> AsyncIterator[None]:
        shard = ShardConfig(name="pg", dsn=self.dsn)
        config = DatabaseConfig(shards=(shard,), connections_max=4, acquire_timeout_s=1.0)
        async with AsyncExitStack() as stack:
            for _ in range(2):
                cache = await stack.enter_async_context(Cache(remote=RemoteConfig(url=self.redis.url)))
                self.databases.append(await stack.enter_async_context(Database(config, cache=cache)))
            yield

    async def run(
        self,
        reads: int,
        *,
        fault: Callable[[], Awaitable[object]] | None = None,
        every_s: float = 1.0,
        every_reads: int = 0,
        least: Least = Least(),
        within_s: float = math.inf,
    ) -> Report:
        """Read so often, with a fault now and then: after so long, and so many reads, since the last one.

        A machine that is too slow for all of it `within_s` ends with what it has by then; none before the `least`.
        """
        began = now()
        self._least = least
        await asyncio.to_thread(prepare, self.direct, self.tables)
        command = [sys.executable, "-m", "tests.stale_reads", self.direct, str(self.tables)]
        async with self._open():
            outside = [
                await asyncio.create_subprocess_exec(*command, str(seed), stdout=subprocess.PIPE) for seed in range(2)
            ]
            tasks: list[asyncio.Task[None]] = []
            try:
                for process in outside:
                    assert process.stdout is not None
                    self._hear(await process.stdout.readline())  # it has begun
                tasks += [asyncio.ensure_future(self._listen(process)) for process in outside]
                tasks += [asyncio.ensure_future(self._write(index)) for index in range(2)]
                if fault is not None:
                    tasks.append(asyncio.ensure_future(self._disturb(fault, every_s, every_reads)))
                self._late_at = now() + within_s
                await asyncio.gather(*(self._read(reader % 2, reader, reads // 4) for reader in range(4)))
            finally:
                self._is_over = True
                for process in outside:
                    process.send_signal(signal.SIGTERM)
                    await process.wait()
                if tasks:
                    await asyncio.wait(tasks, timeout=20)
                for task in tasks:
                    task.cancel()
                await asyncio.gather(*tasks, return_exceptions=True)
            for found in self._statistics():
                self._report.hits += found.hits
                self._report.loads += found.loads
                self._report.outdated += found.outdated
        self._report.seconds = now() - began
        self._compare()
        return self._report

    def _statistics(self) -> list[QueryCacheStatistics]:
        return [found for database in self.databases if (found := database.statistics().queries) is not None]

    def _has_least(self) -> bool:
        hits, least, report = sum(found.hits for found in self._statistics()), self._least, self._report
        is_worked = report.writes >= least.writes and report.faults >= least.faults
        return is_worked and len(self._reads) >= least.reads and hits >= least.hits

    async def _listen(self, process: asyncio.subprocess.Process) -> None:
        assert process.stdout is not None
        async for line in process.stdout:
            self._hear(line)

    def _hear(self, line: bytes) -> None:
        table, number, moment = line.split()
        self._acknowledged[int(table)].append((float(moment), int(number)))
        self._report.writes += 1

    async def _write(self, index: int) -> None:
        rng = random.Random(100 + index)
        database = self.databases[index]
        while not self._is_over:
            table = rng.randrange(self.tables)
            try:
                number = await database.fetch_value(f"UPDATE counter_{table} SET n = n + 1 RETURNING n")
            except HeadraceError as error:
                self._report.errors[f"write {type(error).__name__}"] += 1
            else:
                entry = (now(), number)
                self._acknowledged[table].append(entry)
                self._own[index, table].append(entry)
                self._report.writes += 1
            await asyncio.sleep(rng.random() * 2 * PAUSE_S)

    async def _read(self, index: int, seed: int, count: int) -> None:
        rng, database, policy = random.Random(seed), self.databases[index], self.policy
        done = table = 0
        while (done < count and now() < self._late_at) or not self._has_least():
            asked = now()
            # Where reads are slow, what one has loaded is too old for another unless it comes right after it.
            if done % 2 == 0 or asked < self._late_at:
                table = rng.randrange(self.tables)
            try:
                number = await database.fetch_value(f"SELECT n FROM counter_{table} WHERE id = $1", 1, cache=policy)
            except HeadraceError as error:
                self._report.errors[f"read {type(error).__name__}"] += 1
                await asyncio.sleep(0.01)
                continue
            self._reads.append((asked, index, table, number))
            done += 1
            if done % 8 == 0:
                # Reads shall meet many states of the tables, not one of them often.
                await asyncio.sleep(0.002)

    async def _disturb(self, fault: Callable[[], Awaitable[object]], every_s: float, every_reads: int) -> None:
        while not self._is_over:
            due = len(self._reads) + every_reads
            await asyncio.sleep(every_s)
            while len(self._reads) < due and not self._is_over:
                await asyncio.sleep(0.005)
            if self._is_over:
                return
            self._report.faults += 1
            await fault()

    def _compare(self) -> None:
        report = self._report
        report.reads = len(self._reads)
        acknowledged = {table: _rising(entries) for table, entries in self._acknowledged.items()}
        own = {key: _rising(entries) for key, entries in self._own.items()}
        for asked, index, table, number in self._reads:
            moments, numbers = acknowledged.get(table, ([], []))
            first_missed = bisect_right(numbers, number)
            if first_missed < len(moments):
                age = asked - moments[first_missed]
                report.oldest_s = max(report.oldest_s, age)
                if age > self.policy.staleness_max:
                    report.stale.append(f"counter_{table} was {number}, missed since {age:.3f} s")
            moments, numbers = own.get((index, table), ([], []))
            missed = bisect_right(numbers, number)
            if missed < len(moments) and moments[missed] < asked:
                report.unseen.append(f"counter_{table} was {number}, own {numbers[missed]} was acknowledged before")


def _rising(entries: Sequence[tuple[float, int]]) -> tuple[list[float], list[int]]:
    """By number: the moment from which on at least this number had been acknowledged, and the numbers."""
    by_number = sorted(entries, key=lambda entry: entry[1])
    moments = [moment for moment, _ in by_number]
    for index in range(len(moments) - 2, -1, -1):
        moments[index] = min(moments[index], moments[index + 1])
    return moments, [number for _, number in by_number]


# -- what may happen ------------------------------------------------------------------------------------------------


def kill_decoding(direct: str) -> Callable[[], Awaitable[object]]:
    """The server ends every replication connection."""
    return lambda: _statement(direct, "SELECT pg_terminate_backend(pid) FROM pg_stat_replication")


def freeze_decoding(direct: str, seconds: float = 0.7) -> Callable[[], Awaitable[object]]:
    """The streaming processes of the server stop for a while, and nobody is told."""

    async def freeze() -> None:
        pids = [row[0] for row in await _statement(direct, "SELECT pid FROM pg_stat_replication")]
        for sign in (signal.SIGSTOP, signal.SIGCONT):
            for pid in pids:
                try:
                    os.kill(pid, sign)
                except ProcessLookupError:
                    continue
            if sign is signal.SIGSTOP:
                await asyncio.sleep(seconds)

    return freeze


def cut_all(proxy: TcpProxy) -> Callable[[], Awaitable[object]]:
    """Every connection to the server is reset, the streaming ones too."""

    async def cut() -> None:
        proxy.cut()

    return cut


def mute_all(proxy: TcpProxy, seconds: float = 0.7) -> Callable[[], Awaitable[object]]:
    """Nothing passes for a while, in either direction, and nobody is told."""

    async def mute() -> None:
        proxy.deaf()
        await asyncio.sleep(seconds)
        proxy.heal()

    return mute


def flush(redis: RedisServer) -> Callable[[], Awaitable[object]]:
    """Redis loses everything."""
    return lambda: asyncio.to_thread(redis.call, "FLUSHALL")


async def _statement(dsn: str, sql: str) -> list[tuple[int]]:
    def run() -> list[tuple[int]]:
        with psycopg.connect(dsn, autocommit=True) as connection:
            return connection.execute(sql).fetchall()

    return await asyncio.to_thread(run)


if __name__ == "__main__":
    write_outside(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))
