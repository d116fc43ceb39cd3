"""Every statement through the router over three shards gives what it gives on a single Postgres."""

import math
from collections import Counter
from collections.abc import AsyncIterator
from decimal import Decimal

import psycopg
import pytest
from psycopg.rows import tuple_row

from headrace.database import Database, DatabaseConfig, ShardConfig
from headrace.database.config import KeyRange, ListedKey, Reference, Sharded
from headrace.database.planning.route import Refused
from headrace.errors import HeadraceError
from tests.integration.database import differential, grammar, pitfalls
from tests.integration.database.conftest import Twins
from tests.integration.database.differential import Case

TABLES = {"accounts": Sharded(key="tenant"), "orders": Sharded(key="tenant"), "countries": Reference()}
STRATEGIES = {
    "hash": {"strategy": "hash"},
    # shard-1 holds the keys from 100 to 199, of which there are none
    "range": {
        "strategy": "range",
        "ranges": (
            KeyRange(shard="shard-0", until=7),
            KeyRange(shard="shard-2", until=100),
            KeyRange(shard="shard-1"),
        ),
    },
    "directory": {
        "strategy": "directory",
        "directory": (ListedKey(key=1, shard="shard-0"), ListedKey(key=2, shard="shard-2")),
    },
}


@pytest.fixture(params=list(STRATEGIES))
async def database(request: pytest.FixtureRequest, twins: Twins) -> AsyncIterator[Database]:
    """The shards under one strategy, with the rows where it wants them and all of them on the single Postgres."""
    fill(twins.single, differential.rows())
    empty_maps(twins)
    config = DatabaseConfig(
        shards=tuple(ShardConfig(name=name, dsn=url) for name, url in twins.shards.items()),
        tables=TABLES,
        connections_max=3,
        acquire_timeout_s=20.0,
        block_rows=25,
        **STRATEGIES[request.param],
    )
    async with Database(config) as database:
        fill_shards(database, twins, differential.rows())
        yield database


def empty_maps(twins: Twins) -> None:
    """Let the shards forget where keys live."""
    for url in twins.shards.values():
        with psycopg.connect(url, autocommit=True) as connection:
            connection.execute("DROP TABLE IF EXISTS headrace_shard_map")


def fill_shards(database: Database, twins: Twins, tables: dict[str, list[tuple]]) -> None:
    for name, url in twins.shards.items():
        own = {
            table: [row for row in rows if table == "countries" or database.locate(row[0]).shard == name]
            for table, rows in tables.items()
        }
        fill(url, own)


def fill(url: str, tables: dict[str, list[tuple]]) -> None:
    with psycopg.connect(url, autocommit=True) as connection, connection.cursor() as cursor:
        for table, rows in tables.items():
            cursor.execute(f"TRUNCATE {table}")
            if rows:
                marks = ", ".join(["%s"] * len(rows[0]))
                cursor.executemany(f"INSERT INTO {table} VALUES ({marks})", rows)


def exact(value: object) -> tuple:
    """A value that equals another only if both have the same type and digits."""
    if isinstance(value, Decimal):
        return ("Decimal", str(value))
    if isinstance(value, list | dict):
        return (type(value).__name__, repr(value))
    return (type(value).__name__, "nan" if isinstance(value, float) and math.isnan(value) else value)


def differs(case: Case, expected: list[tuple], found: list[tuple]) -> str | None:
    if case.close:
        expected, found = sorted(expected, key=repr), sorted(found, key=repr)
        for want, have in zip(expected, found, strict=True):
            for one, other in zip(want, have, strict=True):
                same = type(one) is type(other) and (one == other or math.isclose(one, other, rel_tol=1e-6))
                if not same:
                    return f"{want} != {have}"
        return None
    wanted, had = [tuple(map(exact, row)) for row in expected], [tuple(map(exact, row)) for row in found]
    if case.sorted_by is not None and case.sorted_by >= 0:
        keys = case.sorted_by
        if [row[:keys] for row in wanted] != [row[:keys] for row in had]:
            return "the order differs"
    if case.sorted_by == -1 and wanted != had:
        first = next((pair for pair in zip(wanted, had, strict=False) if pair[0] != pair[1]), None)
        return f"{len(wanted)} and {len(had)} rows, first difference {first}"
    lacking, surplus = Counter(wanted) - Counter(had), Counter(had) - Counter(wanted)
    if lacking or surplus:
        return f"missing {list(lacking)[:3]}, too many {list(surplus)[:3]}"
    return None


async def differences(database: Database, single: str, cases: list[Case]) -> list[str]:
    """What is not the same through the router; each statement runs twice, as what is remembered may differ."""
    found = []
    async with await psycopg.AsyncConnection.connect(
        single, autocommit=True, cursor_factory=psycopg.AsyncRawCursor, row_factory=tuple_row
    ) as connection:
        for case in cases:
            cursor = await connection.execute(case.sql, case.params or None)
            expected = await cursor.fetchall()
            names = tuple(column.name for column in cursor.description or ())
            for _ in range(2):
                try:
                    rows = await database.fetch(case.sql, *case.params)
                except HeadraceError as error:
                    found.append(f"{case.sql} {case.params}\n    {error}")
                    break
                problem = differs(case, expected, [tuple(row) for row in rows])
                if problem is None and rows and rows[0].columns != names:
                    problem = f"columns {rows[0].columns}, not {names}"
                if problem is not None:
                    plan = await database.explain(case.sql, *case.params)
                    found.append(f"{case.sql} {case.params}\n    {problem}\n    {plan}")
                    break
    return found


GROUPS = {
    "filters": differential.FILTERS,
    "aggregates": differential.AGGREGATES,
    "joins": differential.JOINS,
    "generated": differential.GENERATED,
    "pitfalls": pitfalls.CASES,
}


@pytest.mark.parametrize("group", GROUPS)
async def test_the_router_answers_as_a_single_postgres_does(database: Database, twins: Twins, group: str) -> None:
    """Same rows, types, digits and column names, and the same order where ORDER BY decides it."""
    found = await differences(database, twins.single, GROUPS[group])
    assert not found, f"{len(found)} of {len(GROUPS[group])}:\n" + "\n".join(found)


def test_the_suite_is_as_large_as_it_says() -> None:
    """At least 300 different statements."""
    assert len({(case.sql, repr(case.params)) for cases in GROUPS.values() for case in cases}) >= 300


STATEMENTS = 100
SEED = 20261124


async def test_statements_at_random_are_answered_as_a_single_postgres_does(twins: Twins) -> None:
    """Or refused with a reason; what a single Postgres refuses, such as a subquery of two rows, is passed over."""
    rows = differential.rows(count=45)
    shards = tuple(ShardConfig(name=name, dsn=url) for name, url in twins.shards.items())
    empty_maps(twins)
    fill(twins.single, rows)
    async with (
        Database(
            DatabaseConfig(shards=shards, tables=TABLES, connections_max=3, acquire_timeout_s=20.0, block_rows=7)
        ) as database,
        await psycopg.AsyncConnection.connect(twins.single, autocommit=True) as connection,
    ):
        fill_shards(database, twins, rows)
        cases = []
        for case in grammar.statements(STATEMENTS, SEED):
            try:
                cursor = psycopg.AsyncRawCursor(connection)
                await cursor.execute(case.sql, case.params or None)
            except psycopg.Error:
                continue
            if not isinstance(await database.explain(case.sql, *case.params), Refused):
                cases.append(case)
        found = await differences(database, twins.single, cases)
    assert len(cases) > 0.9 * STATEMENTS
    assert not found, f"{len(found)} of {len(cases)}:\n" + "\n".join(found)
