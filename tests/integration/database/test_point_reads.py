"""Reads that travel together, on two real Postgres servers."""

import asyncio
from collections import Counter
from dataclasses import replace
from decimal import Decimal

import pytest

from headrace.database import Database
from headrace.database.config import Reference, Sharded
from headrace.errors import StatementFailed

ROWS = 40
READ = "SELECT id, v, price FROM orders WHERE id = $1"


@pytest.fixture
async def trips(monkeypatch):
    """How many calls each gathered statement answered, by shard."""
    from headrace.database.postgres.nodes import Node

    seen = []
    fetch_as = Node.fetch_as

    async def counted(node, row_kind, sql, params):
        seen.append(node.name)
        return await fetch_as(node, row_kind, sql, params)

    monkeypatch.setattr(Node, "fetch_as", counted)
    return seen


@pytest.fixture
async def orders(database, database_config):
    """Two shards with the table `orders`, the reads of which are gathered by `id`; and `codes`, whole on both."""
    for node in database.nodes.values():
        await node.execute("CREATE TABLE orders (id bigint PRIMARY KEY, v text, price numeric(10, 2), c char(5))")
        await node.execute("CREATE TABLE codes (code text PRIMARY KEY, name text)")
        await node.execute("INSERT INTO codes VALUES ('de', 'Germany'), ('fr', 'France')")
    tables = {"orders": Sharded(key="id", batch_by="id"), "codes": Reference(batch_by="code")}
    async with Database(replace(database_config, tables=tables)) as orders:
        for number in range(ROWS):
            values = (number, f"v{number}", Decimal(number), f"c{number}")
            await orders.execute("INSERT INTO orders VALUES ($1, $2, $3, $4)", *values)
        yield orders


async def together(database, sql, keys):
    """The rows, or the error, of each key, all asked for in one turn of the loop."""
    return await asyncio.gather(*(database.fetch(sql, key) for key in keys), return_exceptions=True)


async def test_reads_of_one_turn_are_one_statement_a_shard(orders, trips):
    """Each caller gets its own row, with names and types as ever."""
    answers = await together(orders, READ, range(ROWS))

    assert [(rows[0].id, rows[0].v, rows[0].price) for rows in answers] == [
        (number, f"v{number}", Decimal(number)) for number in range(ROWS)
    ]
    assert answers[0][0].columns == ("id", "v", "price")
    assert Counter(trips) == {"shard-0": 1, "shard-1": 1}


async def test_null_missing_and_equal_keys_are_answered_as_alone(orders):
    """NULL equals nothing, a row that is not there is no row, and callers with one key share nothing that they see."""
    keys = [3, None, 3, ROWS + 1, -(2**63)]

    answers = await together(orders, READ, keys)
    alone = [await orders.fetch(READ, key) for key in keys]

    assert answers == alone
    assert [len(rows) for rows in answers] == [1, 0, 1, 0, 0]
    answers[0].clear()
    assert len(answers[2]) == 1


@pytest.mark.parametrize(
    ("sql", "calls"),
    [
        ("SELECT v FROM orders WHERE id = $1 AND c = $2", [(1, "c1"), (1, "c1   "), (1, "c"), (2, "c2"), (3, None)]),
        ("SELECT v, $2::text AS mine FROM orders WHERE id = $1", [(1, "a"), (1, "b"), (2, "a")]),
        ("SELECT price * $2 AS p FROM orders WHERE id = $1", [(1, Decimal("2.0")), (1, Decimal("2.00")), (2, 2)]),
        ("SELECT count(*), max(v) FROM orders WHERE id = $1", [(1,), (ROWS + 1,), (1,)]),
        ("SELECT v FROM orders WHERE id = $1 LIMIT 1", [(1,), (2,)]),
        ("SELECT id AS a, id AS a, 7 FROM orders WHERE id = $1", [(1,), (2,)]),
        ("SELECT v FROM orders WHERE id = $1", [("5",), (5,), (5.0,), (Decimal(5),), (True,)]),
        ("SELECT v FROM orders WHERE id = $1", [(1,), (2**70,), (1,)]),
        ("SELECT v FROM orders WHERE id = $1; -- the end", [(1,), (2,), (3,)]),
    ],
)
async def test_what_travels_together_is_answered_as_what_travels_alone(orders, database_config, sql, calls):
    """Whatever the statement selects, and whatever the types of its parameters, errors included."""
    async with Database(replace(database_config, tables={"orders": Sharded(key="id")})) as plain:
        key = orders.locate(1)
        calls = [
            call for call in calls if call[0] in {1, "5", 2**70} or orders.locate(int(call[0])).shard == key.shard
        ]
        for _ in range(3):
            answers = await asyncio.gather(
                *(orders.fetch(sql, *call, key=1) for call in calls), return_exceptions=True
            )
        alone = [
            (await asyncio.gather(plain.fetch(sql, *call, key=1, read_only=True), return_exceptions=True))[0]
            for call in calls
        ]
    assert [str(answer) for answer in answers] == [str(answer) for answer in alone]


async def test_a_value_that_the_type_cannot_hold_fails_its_caller_alone(orders):
    """The others of the batch get their rows."""
    answers = await asyncio.gather(
        *(orders.fetch(READ, key, key=1) for key in ("1", "no number", "1")), return_exceptions=True
    )

    assert [len(answers[0]), len(answers[2])] == [1, 1]
    assert isinstance(answers[1], StatementFailed)
    assert answers[1].sqlstate == "22P02"


async def test_an_error_of_the_statement_reaches_every_caller(orders):
    """All of them asked for the same impossible thing."""
    answers = await together(orders, "SELECT no_such_column FROM orders WHERE id = $1", range(6))

    assert [getattr(answer, "sqlstate", answer) for answer in answers] == ["42703"] * 6


async def test_a_cancelled_caller_does_not_cancel_the_others(orders):
    """It leaves alone."""
    tasks = [asyncio.ensure_future(orders.fetch(READ, number)) for number in range(10)]
    await asyncio.sleep(0)
    await asyncio.sleep(0)

    tasks[4].cancel()
    answers = await asyncio.gather(*tasks, return_exceptions=True)

    assert isinstance(answers.pop(4), asyncio.CancelledError)
    assert all(len(rows) == 1 for rows in answers)


async def test_a_transaction_reads_for_itself(orders):
    """What it wrote and nobody else may see is what it reads."""
    async with orders.transaction(key=1) as transaction:
        await transaction.execute("UPDATE orders SET v = 'mine' WHERE id = $1", 1)
        inside = await transaction.fetch(READ, 1)
        outside = await together(orders, READ, [1, 1])

    assert inside[0].v == "mine"
    assert [rows[0].v for rows in outside] == ["v1", "v1"]


async def test_a_changed_table_is_read_as_it_is_now(orders):
    """The statement is described anew when the column's type has changed under it."""
    await together(orders, "SELECT * FROM orders WHERE id = $1", [1, 1, 2, 3])
    for node in orders.nodes.values():
        await node.execute("ALTER TABLE orders ALTER id TYPE text USING id::text, ADD w int DEFAULT 9")

    for _ in range(3):
        answers = await asyncio.gather(
            *(orders.fetch("SELECT * FROM orders WHERE id = $1", "1", key=1) for _ in range(3))
        )

    assert [rows[0].w for rows in answers] == [9, 9, 9]
    assert answers[0][0].id == "1"


async def test_reference_tables_are_gathered_too(orders):
    """By the column that they name."""
    answers = await together(orders, "SELECT name FROM codes WHERE code = $1", ["de", "fr", "xx", "de"])

    assert [[row.name for row in rows] for rows in answers] == [["Germany"], ["France"], [], ["Germany"]]
