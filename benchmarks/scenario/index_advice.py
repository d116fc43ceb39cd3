"""Index advice on TPC-H: what is advised at a budget, what the planner promised, what it brought; and that an index
which makes the workload slower is dropped again.

    python -m venv tpch && tpch/bin/pip install tpchgen-cli==4.0.0
    python -m benchmarks.scenario.index_advice --generator tpch/bin/tpchgen-cli --binaries /usr/lib/postgresql/15/bin
        [--scale 0.1] [--budget-mib 60] [--timeout 60]

From the root of a checkout, with a Postgres that has HypoPG (Debian: postgresql-15-hypopg). The tables have their
primary keys and nothing else. Prints Markdown; exits with 1 if the bad index stays.
"""

import argparse
import asyncio
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psycopg

from benchmarks.scenario.tpch_queries import QUERIES, SCHEMA, TABLES
from headrace.database import Database, DatabaseConfig, IndexAdvice, IndexConfig, Query, ShardConfig, Workload
from headrace.database.indexes.advice import State, Verdict
from headrace.database.indexes.index import Index
from headrace.database.indexes.workload import Sample
from headrace.embedded import EmbeddedPostgres, started

SETTINGS = {
    "fsync": False,
    "shared_buffers": "512MB",
    "work_mem": "64MB",
    "max_parallel_workers_per_gather": 0,
    "random_page_cost": 1.1,
    "jit": False,
}
# The rows of `kind` 'rare' are the last ones; the planner takes them for evenly spread, and walks an index on `made`
# from the wrong end, row by row, each on another page.
TRAP = """
CREATE TABLE trap (id int, made int, kind text, filler text);
INSERT INTO trap SELECT n, n, CASE WHEN n > 398000 THEN 'rare' ELSE 'often' END, repeat('x', 60)
    FROM generate_series(1, 400000) AS n ORDER BY hashint4(n);
"""
TRAPPED = "SELECT id FROM trap WHERE kind = 'rare' ORDER BY made LIMIT 10"


def load(url: str, directory: Path) -> None:
    with psycopg.connect(url, autocommit=True) as connection:
        connection.execute("CREATE EXTENSION hypopg")
        connection.execute(SCHEMA.encode())
        for table in TABLES:
            with (
                connection.cursor() as cursor,
                (directory / f"{table}.csv").open("rb") as file,
                cursor.copy(f"COPY {table} FROM STDIN (FORMAT csv, HEADER)".encode()) as copy,
            ):
                while block := file.read(1 << 20):
                    copy.write(block)
        connection.execute(TRAP.encode())
        connection.execute(b"VACUUM ANALYZE")


def size(url: str, kind: str) -> int:
    with psycopg.connect(url) as connection:
        whose = "relkind = %s AND relnamespace = 'public'::regnamespace"
        row = connection.execute(f"SELECT sum(pg_relation_size(oid)) FROM pg_class WHERE {whose}", (kind,)).fetchone()
        return int(row[0])


def measured(url: str, timeout_s: float) -> dict[int, tuple[float, float | None]]:
    """Of each query the planner's cost and the fastest of three runs in ms; None: it ran into the limit."""
    found: dict[int, tuple[float, float | None]] = {}
    with psycopg.connect(url, autocommit=True) as connection:
        connection.execute(f"SET statement_timeout = {round(timeout_s * 1000)}".encode())
        for number, sql in QUERIES.items():
            cost = connection.execute(f"EXPLAIN (FORMAT JSON) {sql}".encode()).fetchone()[0][0]["Plan"]["Total Cost"]
            runs: list[float] = []
            try:
                for _ in range(3):
                    began = time.perf_counter()
                    connection.execute(sql.encode()).fetchall()
                    runs.append((time.perf_counter() - began) * 1000)
                    if runs[0] > 5000:
                        break
            except psycopg.errors.QueryCanceled:
                found[number] = cost, None
            else:
                found[number] = cost, min(runs)
    return found


def mean(value: float | None) -> str:
    return "-" if value is None else f"{value:,.1f} ms"


def ms(value: float | None, timeout_s: float) -> str:
    return f"> {timeout_s:g} s" if value is None else f"{value:,.1f} ms"


async def advised(url: str, arguments: argparse.Namespace) -> bool:
    config = DatabaseConfig(
        shards=(ShardConfig(name="tpch", dsn=url),),
        statement_timeout_s=600,
        indexes=IndexConfig(measure_timeout_s=arguments.timeout),
    )
    workload = Workload(
        tuple(Query(f"Q{number}", samples=(Sample(sql),)) for number, sql in QUERIES.items()), "the 22 queries, once"
    )
    tables_mib, before_mib = size(url, "r") / 2**20, size(url, "i") / 2**20
    before = measured(url, arguments.timeout)
    async with Database(config) as database:
        began = time.perf_counter()
        advice = await database.indexes.advise(workload, budget_bytes=arguments.budget_mib * 2**20)
        seconds = time.perf_counter() - began
        creating = [each for each in advice if each.verdict is Verdict.CREATE]
        print(
            f"Tables {tables_mib:.0f} MiB, indexes {before_mib:.0f} MiB, budget {arguments.budget_mib} MiB;", end=" "
        )
        print(f"advice took {seconds:.1f} s: {creating[0].evidence[1] if creating else 'nothing'}\n")
        changes = [change for each in creating for change in await database.indexes.apply(each, workload)]
        after = measured(url, arguments.timeout)
        print_indexes(creating, changes)
        print_queries(before, after, arguments.timeout)
        print_rejected(advice)
        bad = IndexAdvice.creating(Index("trap", ("made",)), reason="deliberately bad")
        only = [each for each in await database.indexes.advise([TRAPPED]) if each.index == bad.index]
        [change] = await database.indexes.apply(bad, [TRAPPED])
    print(f"\nThe bad index, `{bad.sql}`, for `{TRAPPED}`: ", end="")
    print(
        f"the advice says: {only[0].verdict}, {only[0].reason}." if only else "the advice has no word on it.", end=" "
    )
    print(f"Applied: {change.state}, {change.reason}.")
    return change.state is State.DROPPED


def print_indexes(creating: list[IndexAdvice], changes: list) -> None:
    print(
        "| index | size, estimate | size | estimated gain | mean call of those that use it, before | after | state |"
    )
    print("|---|---|---|---|---|---|---|")
    for each, change in zip(creating, changes, strict=True):
        body = each.sql.partition(" ON ")[2]
        print(
            f"| `{body}` | {each.size_bytes / 2**20:.1f} MiB | {(change.size_bytes or 0) / 2**20:.1f} MiB "
            f"| {each.gain:.1%} | {mean(change.before_ms)} | {mean(change.after_ms)} | {change.state} |"
        )


def print_queries(before: dict, after: dict, timeout_s: float) -> None:
    print("\n| query | estimated cost before | after | real time before | after |")
    print("|---|---|---|---|---|")
    for number, (cost, real) in before.items():
        cost_after, real_after = after[number]
        print(f"| Q{number} | {cost:,.0f} | {cost_after:,.0f} | {ms(real, timeout_s)} | {ms(real_after, timeout_s)} |")
    both = [number for number in before if before[number][1] is not None and after[number][1] is not None]
    costs = [sum(found[number][0] for number in before) for found in (before, after)]
    reals = [sum(found[number][1] or 0 for number in both) for found in (before, after)]
    print(f"| all | {costs[0]:,.0f} | {costs[1]:,.0f} | {reals[0]:,.1f} ms | {reals[1]:,.1f} ms |")
    cut = [f"Q{number}" for number in before if number not in both]
    if cut:
        print(f"\nThe sum of real times is without {', '.join(cut)}, cut off after {timeout_s:g} s.")


def print_rejected(advice: list[IndexAdvice]) -> None:
    print("\nRejected, the first five:\n")
    for each in [each for each in advice if each.verdict is Verdict.REJECT][:5]:
        print(f"- `{each.sql.partition(' ON ')[2] or each.name}`: {each.reason}")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--generator", type=Path, required=True, help="the program tpchgen-cli")
    parser.add_argument("--binaries", type=Path, required=True, help="of a Postgres that has HypoPG")
    parser.add_argument("--scale", type=float, default=0.1)
    parser.add_argument("--budget-mib", type=int, default=60)
    parser.add_argument("--timeout", type=float, default=60.0, help="seconds for one statement")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        directory = Path(folder)
        subprocess.run(
            [arguments.generator, "csv", "-s", str(arguments.scale), f"--output-dir={directory / 'rows'}"], check=True
        )
        postgres = EmbeddedPostgres(directory / "tpch", name="tpch", binaries=arguments.binaries, settings=SETTINGS)
        with started(postgres) as running:
            load(running.url, directory / "rows")
            return 0 if asyncio.run(advised(running.url, arguments)) else 1


if __name__ == "__main__":
    sys.exit(main())
