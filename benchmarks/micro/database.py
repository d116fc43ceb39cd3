"""The door of the database next to asyncpg, psycopg and pgbench, on the same Postgres in the same run.

    python -m benchmarks.micro.database [reads] [writes] [route] [--tasks 100,500] [--rounds 5] [--uvloop]

- reads: one row by its primary key out of ROWS, in one process. asyncpg and psycopg with their pools, and with one
  connection for each of CONNECTIONS tasks that is never given back. `one by one` is `db.fetch_one` without
  concurrency. `batched` has `batch_by`; `with L1` reads through `Cache.get_or_load`, every key loaded before.
- writes: single-row INSERTs, each committed before it is acknowledged, synchronous_commit and fsync on.
- route: what finding the shard costs, of two, for a statement whose text was read before.

Each round runs every subject for SECONDS, in turn, so that a noisy neighbour hits all of them. Shown are the median
rate, half the distance between the quartiles, the best rate, the median of the ratio to the subject marked 1.00,
and the processor time of this process for one operation, which other work on the machine hardly changes: its inverse
is what one process could do at most. pgbench is a process of its own with a thread for each core, so its processor
time is not shown. The cyclic collector is set for all as `headrace up` sets it; by default its passes cost a batched
read one to two microseconds. The server is started here, on a Unix socket, and stopped.
"""

import argparse
import asyncio
import importlib.util
import json
import os
import platform
import random
import re
import statistics
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any

import psycopg
import psycopg_pool

from headrace.cache import Cache, MemoryConfig
from headrace.clock import SystemClock
from headrace.database import Database, DatabaseConfig, ShardConfig
from headrace.database.config import Sharded
from headrace.database.planning.route import OneShard, Router
from headrace.database.planning.scope import TableFacts
from headrace.database.shard_map import ShardMap
from headrace.embedded import EmbeddedPostgres, started
from headrace.embedded.binaries import find_postgres
from headrace.server.garbage import Garbage

ROWS = 100_000
CONNECTIONS = 10
SECONDS = 0.5
PARTS = ("reads", "writes", "route")
KEYS = random.Random(1).sample(range(ROWS), ROWS)
READ = "SELECT id, v, n FROM rows WHERE id = $1"
WRITE = "INSERT INTO written (a, v) VALUES ($1, $2)"

Once = Callable[[int], Awaitable[Any]]
Subject = Callable[[], Awaitable["Figure"]]


class Figure(tuple[float, float | None]):
    """Operations a second, and microseconds of this process for one."""

    __slots__ = ()


async def under_load(once: Once, tasks: int) -> Figure:
    """Tasks that each wait for their answer before they ask again."""
    ends = time.perf_counter() + SECONDS
    done = 0

    async def client(seed: int) -> None:
        nonlocal done
        place = seed * 97
        while time.perf_counter() < ends:
            await once(KEYS[place % ROWS])
            place += 1
            done += 1

    began, cpu = time.perf_counter(), time.process_time()
    async with asyncio.TaskGroup() as group:
        for seed in range(tasks):
            group.create_task(client(seed))
    return Figure((done / (time.perf_counter() - began), (time.process_time() - cpu) / done * 1e6))


async def held(connections: Sequence[Any], once: Callable[[Any, int], Awaitable[Any]]) -> Figure:
    """Connections that each belong to one task."""
    free = list(connections)

    async def turn(key: int) -> None:
        connection = free.pop()
        try:
            await once(connection, key)
        finally:
            free.append(connection)

    return await under_load(turn, len(connections))


# -- peers ------------------------------------------------------------------------------------------------------------


async def psycopg_execute(connection: Any, sql: str, *params: Any) -> Any:
    cursor = await connection.execute(sql, params)
    return await cursor.fetchone() if cursor.description else None


async def psycopg_peers(stack: AsyncExitStack, url: str, tasks: int, sql: str, values: Any) -> Mapping[str, Subject]:
    options: dict[str, Any] = {"autocommit": True, "cursor_factory": psycopg.AsyncRawCursor}
    pool = await stack.enter_async_context(
        psycopg_pool.AsyncConnectionPool(url, min_size=CONNECTIONS, max_size=CONNECTIONS, kwargs=options, open=False)
    )
    connections = [
        await stack.enter_async_context(await psycopg.AsyncConnection.connect(url, **options))
        for _ in range(CONNECTIONS)
    ]

    async def pooled(key: int) -> None:
        async with pool.connection() as connection:
            await psycopg_execute(connection, sql, *values(key))

    return {
        "psycopg, pool": lambda: under_load(pooled, tasks),
        "psycopg, held connections": lambda: held(connections, lambda c, key: psycopg_execute(c, sql, *values(key))),
    }


async def asyncpg_peers(stack: AsyncExitStack, url: str, tasks: int, sql: str, values: Any) -> Mapping[str, Subject]:
    if importlib.util.find_spec("asyncpg") is None:
        print("asyncpg is not installed: see benchmarks/peers/requirements-database.txt")
        return {}
    import asyncpg

    pool = await stack.enter_async_context(asyncpg.create_pool(url, min_size=CONNECTIONS, max_size=CONNECTIONS))
    connections = [await asyncpg.connect(url) for _ in range(CONNECTIONS)]
    for connection in connections:
        stack.push_async_callback(connection.close)
    return {
        "asyncpg, pool": lambda: under_load(lambda key: pool.fetchrow(sql, *values(key)), tasks),
        "asyncpg, held connections": lambda: held(connections, lambda c, key: c.fetchrow(sql, *values(key))),
    }


def pgbench_peer(directory: Path, url: str, clients: int, script: str) -> Subject:
    program = find_postgres(None, major=16).path.parent / "pgbench"
    file = directory / f"{abs(hash(script))}.sql"
    file.write_text(script)
    threads = min(clients, os.cpu_count() or 1)

    async def run() -> Figure:
        process = await asyncio.create_subprocess_exec(
            *(program, "-n", "-M", "prepared", "-f", file, "-T", str(max(1, round(SECONDS)))),
            *("-c", str(clients), "-j", str(threads), url),
            stdout=asyncio.subprocess.PIPE,
        )
        output, _ = await process.communicate()
        found = re.search(rb"tps = ([\d.]+)", output)
        if found is None:
            raise SystemExit(f"pgbench said: {output.decode()}")
        return Figure((float(found[1]), None))

    return run


# -- headrace ---------------------------------------------------------------------------------------------------------


@asynccontextmanager
async def database(url: str, *, batch_by: str | None = None) -> AsyncIterator[Database]:
    tables = {"rows": Sharded(key="id", batch_by=batch_by)}
    shards = (ShardConfig(name="shard-0", dsn=url),)
    async with Database(DatabaseConfig(shards=shards, tables=tables, connections_max=CONNECTIONS)) as open_database:
        yield open_database


async def read_subjects(stack: AsyncExitStack, url: str, tasks: int) -> Mapping[str, Subject]:
    plain = await stack.enter_async_context(database(url))
    batched = await stack.enter_async_context(database(url, batch_by="id"))
    cache = await stack.enter_async_context(Cache(memory=MemoryConfig(entries_max=2 * ROWS)))

    async def load(key: int) -> Any:
        return tuple(await batched.fetch_one(READ, key) or ())

    async def cached(key: int) -> Any:
        return await cache.get_or_load(f"row:{key}", lambda: load(key), ttl=3600.0)

    for start in range(0, ROWS, 1000):
        await asyncio.gather(*(cached(key) for key in range(start, start + 1000)))
    return {
        "headrace, one by one": lambda: under_load(lambda key: plain.fetch_one(READ, key, read_only=True), 1),
        "headrace": lambda: under_load(lambda key: plain.fetch_one(READ, key, read_only=True), tasks),
        "headrace, batched": lambda: under_load(lambda key: batched.fetch_one(READ, key), tasks),
        "headrace, with L1": lambda: under_load(cached, tasks),
    }


async def write_subjects(stack: AsyncExitStack, url: str, tasks: int) -> Mapping[str, Subject]:
    plain = await stack.enter_async_context(database(url))
    return {
        "headrace": lambda: under_load(lambda key: plain.execute(WRITE, key, "a value"), tasks),
        "headrace, grouped": lambda: under_load(lambda key: plain.execute(WRITE, key, "a value", grouped=True), tasks),
    }


def route_figures(rounds: int) -> list[float]:
    """Nanoseconds of planning a statement whose text was read before."""
    config = DatabaseConfig(
        shards=tuple(ShardConfig(name=name, dsn="dbname=none") for name in ("shard-0", "shard-1")),
        tables={"rows": Sharded(key="id")},
    )
    shard_map = ShardMap.of(config)
    catalog = {"rows": TableFacts("id", "bigint", ("id", "v", "n"))}
    router = Router(("shard-0", "shard-1"), catalog, statements_max=100)
    plan = router.plan(READ, (1,), shard_map)
    if not isinstance(plan, OneShard):
        raise SystemExit(f"the statement is not routed to one shard: {plan}")
    figures = []
    for _ in range(rounds):
        began = time.perf_counter_ns()
        for key in range(20_000):
            router.plan(READ, (key,), shard_map)
        figures.append((time.perf_counter_ns() - began) / 20_000)
    return figures


# -- the run ----------------------------------------------------------------------------------------------------------


async def measure(subjects: Mapping[str, Subject], rounds: int) -> dict[str, list[Figure]]:
    figures: dict[str, list[Figure]] = {name: [] for name in subjects}
    for subject in subjects.values():
        await subject()
    garbage = Garbage(SystemClock())
    garbage.settle()
    for _ in range(rounds):
        for name, subject in subjects.items():
            figures[name].append(await subject())
    garbage.leave()
    return figures


def show(title: str, figures: Mapping[str, Sequence[Figure]], unit: str, first: str) -> None:
    print(f"\n{title}\n| | a second | ± | best | ratio | us of processor a {unit} |\n|---|---|---|---|---|---|")
    for name, found in figures.items():
        rates = [rate for rate, _ in found]
        quartiles = statistics.quantiles(rates, n=4) if len(rates) > 1 else (rates[0],) * 3
        ratio = statistics.median(rate / base for (rate, _), (base, _) in zip(found, figures[first], strict=True))
        cpu = statistics.median(cost for _, cost in found if cost is not None) if found[0][1] is not None else None
        print(
            f"| {name} | {statistics.median(rates):,.0f} | {(quartiles[2] - quartiles[0]) / 2:,.0f} "
            f"| {max(rates):,.0f} | {ratio:.2f} "
            f"| {'' if cpu is None else f'{cpu:.1f}'} |"
        )


async def measure_part(part: str, directory: Path, url: str, tasks: int, rounds: int) -> dict[str, list[Figure]]:
    sql, values = (READ, lambda key: (key,)) if part == "reads" else (WRITE, lambda key: (key, "a value"))
    script = f"\\set id random(0, {ROWS - 1})\nSELECT id, v, n FROM rows WHERE id = :id;\n"
    if part == "writes":
        script = f"\\set a random(0, {ROWS - 1})\nINSERT INTO written (a, v) VALUES (:a, 'a value');\n"
    async with AsyncExitStack() as stack:
        ours = await (read_subjects if part == "reads" else write_subjects)(stack, url, tasks)
        subjects = {
            "pgbench": pgbench_peer(directory, url, min(tasks, 50), script),
            **await asyncpg_peers(stack, url, tasks, sql, values),
            **await psycopg_peers(stack, url, tasks, sql, values),
            **ours,
        }
        figures = await measure(subjects, rounds)
    show(f"{part}, {tasks} tasks", figures, part[:-1], "psycopg, pool")
    return figures


async def main(parts: Sequence[str], tasks: Sequence[int], rounds: int, directory: Path, url: str) -> dict[str, Any]:
    results: dict[str, Any] = {}
    async with await psycopg.AsyncConnection.connect(url, autocommit=True) as connection:
        await connection.execute("CREATE TABLE rows (id bigint PRIMARY KEY, v text, n bigint)")
        await connection.execute(
            "INSERT INTO rows SELECT g, 'value ' || g, g FROM generate_series(0, %s) g" % (ROWS - 1)
        )
        await connection.execute(
            "CREATE TABLE written (id bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY, a bigint, v text)"
        )
        await connection.execute("VACUUM ANALYZE rows")
        settings = [
            (await (await connection.execute(f"SHOW {name}")).fetchone() or ("",))[0]
            for name in ("server_version", "fsync", "synchronous_commit", "shared_buffers")
        ]
    print("Postgres {}, fsync {}, synchronous_commit {}, shared_buffers {}".format(*settings))
    for part in parts:
        if part == "route":
            figures = results["route"] = route_figures(rounds * 5)
            print(f"\nroute: {statistics.median(figures):,.0f} ns a statement, at best {min(figures):,.0f}")
            continue
        for number in tasks:
            results[f"{part}, {number} tasks"] = await measure_part(part, directory, url, number, rounds)
    return results


def run() -> None:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("parts", nargs="*", default=PARTS, metavar="PART", help=", ".join(PARTS))
    arguments.add_argument("--tasks", default="100,500")
    arguments.add_argument("--rounds", type=int, default=5)
    arguments.add_argument("--uvloop", action="store_true")
    arguments.add_argument("--json", type=Path)
    options = arguments.parse_args()
    if unknown := set(options.parts) - set(PARTS):
        arguments.error(f"no such part: {', '.join(sorted(unknown))}; there are {', '.join(PARTS)}")
    tasks = [int(number) for number in options.tasks.split(",")]
    factory = None
    if options.uvloop:
        import uvloop

        factory = uvloop.new_event_loop
    print(
        f"{'uvloop' if options.uvloop else 'asyncio'}, Python {platform.python_version()}, "
        f"psycopg {version('psycopg')}, {os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}"
    )
    with tempfile.TemporaryDirectory(prefix="headrace-") as name:
        directory = Path(name)
        directory.chmod(0o755)
        with (
            started(EmbeddedPostgres(directory / "pg", name="bench", settings={"max_connections": 150})) as server,
            asyncio.Runner(loop_factory=factory) as runner,
        ):
            results = runner.run(main(options.parts, tasks, options.rounds, directory, server.url))
    print(f"load {os.getloadavg()[0]:.1f}", file=sys.stderr)
    if options.json:
        options.json.write_text(json.dumps(results))


if __name__ == "__main__":
    run()
