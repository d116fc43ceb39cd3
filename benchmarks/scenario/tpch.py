"""TPC-H over two shards, beside a single Postgres: which queries the shards answer each for its own rows, which need
rows in one place, which are refused; whether the rows are the same, and how long it takes.

    python -m venv tpch && tpch/bin/pip install tpchgen-cli==4.0.0
    python -m benchmarks.scenario.tpch --generator tpch/bin/tpchgen-cli [--scale 0.1] [--only 1 6 ...] [--runs 3]

From the root of a checkout. lineitem and orders are sharded by the order's key, everything else stands on both shards.
Prints a table; exits with 1 if a query gives other rows than the single Postgres.
"""

import argparse
import asyncio
import csv
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from contextlib import ExitStack
from pathlib import Path

import psycopg

from benchmarks.scenario.tpch_queries import COMPLEX, INDEXES, QUERIES, SCHEMA, SIMPLE, TABLES
from headrace.database import Database, DatabaseConfig, ShardConfig
from headrace.database.config import Reference, Sharded
from headrace.database.planning.aggregation import Combination
from headrace.database.planning.route import AnyShard, Gather, OneShard, Plan, Refused, Shards
from headrace.embedded import EmbeddedPostgres, started
from headrace.errors import HeadraceError

SHARDED = {"orders": "o_orderkey", "lineitem": "l_orderkey"}
SETTINGS = {"fsync": False, "shared_buffers": "512MB", "work_mem": "64MB", "max_parallel_workers_per_gather": 0}


def load(url: str, directory: Path, keep: "dict[str, Keep]") -> None:
    with psycopg.connect(url, autocommit=True) as connection:
        connection.execute(SCHEMA.encode())
        for table in TABLES:
            with (
                connection.cursor() as cursor,
                (directory / f"{table}.csv").open(newline="") as file,
                cursor.copy(f"COPY {table} FROM STDIN (FORMAT csv)".encode()) as copy,
            ):
                next(file)
                wanted = keep.get(table)
                for line in file:
                    if wanted is None or wanted(int(line[: line.index(",")])):
                        copy.write(line)
        connection.execute(INDEXES.encode())
        connection.execute(b"ANALYZE")


class Keep:
    """Whether a row of a shard's table belongs there."""

    def __init__(self, shard: str, database: Database) -> None:
        self._homes: dict[int, bool] = {}
        self._shard, self._database = shard, database

    def __call__(self, key: int) -> bool:
        found = self._homes.get(key)
        if found is None:
            found = self._homes[key] = self._database.locate(key).shard == self._shard
        return found


def how(plan: Plan) -> str:
    match plan:
        case OneShard():
            return "one shard"
        case AnyShard():
            return "one shard (reference tables only)"
        case Shards():
            return "each shard, combined" if isinstance(plan.division, Combination) else "each shard, merged"
        case Gather():
            return f"gathered: {plan.gathering.reason}"
        case Refused():
            return f"refused: {plan.reason}"
    return type(plan).__name__


async def measure(
    database: Database, single: psycopg.AsyncConnection, sql: str, params: tuple, runs: int
) -> list[str]:
    cursor = await single.execute(sql, params or None)
    expected = await cursor.fetchall()
    alone, through = [], []
    for _ in range(runs):
        start = time.perf_counter()
        cursor = await single.execute(sql, params or None)
        await cursor.fetchall()
        alone.append(time.perf_counter() - start)
    plan = await database.explain(sql, *params)
    try:
        rows = await database.fetch(sql, *params)
    except HeadraceError as error:
        return [how(plan), f"{1000 * statistics.median(alone):.1f}", "-", f"refused: {error.message}"]
    for _ in range(runs):
        start = time.perf_counter()
        await database.fetch(sql, *params)
        through.append(time.perf_counter() - start)
    same = Counter(map(str, map(tuple, rows))) == Counter(map(str, expected))
    return [
        how(plan),
        f"{1000 * statistics.median(alone):.1f}",
        f"{1000 * statistics.median(through):.1f}",
        f"{len(rows)} same" if same else "DIFFERENT ROWS",
    ]


async def compare(urls: list[str], directory: Path, arguments: argparse.Namespace) -> bool:
    *shard_urls, single_url = urls
    shards = tuple(ShardConfig(name=f"shard-{number}", dsn=url) for number, url in enumerate(shard_urls))
    tables = {table: Sharded(key=SHARDED[table]) if table in SHARDED else Reference() for table in TABLES}
    config = DatabaseConfig(
        shards=shards, tables=tables, connections_max=4, statement_timeout_s=arguments.timeout, gather_rows_max=10**7
    )
    async with Database(config) as database:
        loads = [
            (url, {table: Keep(shard.name, database) for table in SHARDED})
            for url, shard in zip(shard_urls, shards, strict=True)
        ]
        for url, keep in [*loads, (single_url, {})]:
            await asyncio.to_thread(load, url, directory, keep)
        single = await psycopg.AsyncConnection.connect(
            single_url, autocommit=True, cursor_factory=psycopg.AsyncRawCursor,
            options=f"-c statement_timeout={int(1000 * arguments.timeout)}",
        )  # fmt: skip
        wanted = [
            (f"Q{number}", sql, ())
            for number, sql in QUERIES.items()
            if not arguments.only or number in arguments.only
        ]
        if not arguments.only:
            wanted += [(name, *case) for group in (SIMPLE, COMPLEX) for name, case in group.items()]
        writer = csv.writer(sys.stdout, delimiter="|")
        writer.writerow(["query", "how", "single ms", "sharded ms", "rows"])
        right = True
        async with single:
            for name, sql, params in wanted:
                row = await measure(database, single, sql, params, arguments.runs)
                right = right and "DIFFERENT" not in row[-1]
                writer.writerow([name, *row])
                sys.stdout.flush()
    return right


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--generator", type=Path, required=True, help="the program tpchgen-cli")
    parser.add_argument("--scale", type=float, default=0.1)
    parser.add_argument("--only", type=int, nargs="*", default=[])
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--timeout", type=float, default=120.0, help="seconds for one statement")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        directory = Path(folder)
        subprocess.run(
            [arguments.generator, "csv", "-s", str(arguments.scale), f"--output-dir={directory / 'rows'}"], check=True
        )
        urls = [
            stack.enter_context(started(EmbeddedPostgres(directory / name, name=name, settings=SETTINGS))).url
            for name in ("shard-0", "shard-1", "single")
        ]
        return 0 if asyncio.run(compare(urls, directory / "rows", arguments)) else 1


if __name__ == "__main__":
    sys.exit(main())
