"""Merging sorted blocks: the same as sorting everything, whatever the blocks, keys and ties."""

import asyncio
from decimal import Decimal

from hypothesis import given
from hypothesis import strategies as st

from headrace.database.fanout.merge import concatenated, is_comparable, merged, ranked, sliced, sort_key
from headrace.database.planning.scatter import OrderKey
from headrace.database.postgres.rows import row_of

NUMBERS = st.none() | st.sampled_from([0.0, 0.5, -1.0, 2.25, float("nan"), float("inf")])
KINDS = st.sampled_from([float, Decimal])
TABLES = st.lists(st.lists(st.tuples(NUMBERS, st.integers(0, 2)), max_size=12), min_size=1, max_size=4)
ORDERS = st.tuples(st.booleans(), st.booleans(), st.booleans())
make = row_of(("value", "other"))


class Listed:
    """A shard's answer in blocks of a size; counts those that were read."""

    def __init__(self, rows, size):
        self.blocks = [rows[at : at + size] for at in range(0, len(rows), size)]
        self.read = 0

    async def next(self):
        self.read += 1
        return self.blocks.pop(0) if self.blocks else None


async def collected(blocks):
    return [row async for block in blocks for row in block]


def postgres_key(order):
    """The order that Postgres documents, said in another way: NaN above all numbers, NULLs where asked."""

    def key(row):
        value, other = row
        if value is None:
            place = (0 if order[1] else 2, 0, 0)
        else:
            is_nan = value != value
            sign = -1 if order[0] else 1
            place = (1, sign * int(is_nan), sign * (0 if is_nan else float(value)))
        return (*place, -other if order[2] else other)

    return key


@given(TABLES, KINDS, st.integers(1, 5), ORDERS)
def test_a_merge_is_a_sort(tables, kind, size, order):
    """By a key of numbers, NaN and NULL in every direction."""
    rows = [[make((None if value is None else kind(value), other)) for value, other in table] for table in tables]
    keys = (OrderKey(0, order[0], order[1]), OrderKey(1, order[2], False))
    reference = postgres_key(order)
    parts = [Listed(sorted(table, key=reference), size) for table in rows]
    found = asyncio.run(collected(merged(parts, sort_key(keys), block_rows=3)))
    assert [reference(row) for row in found] == sorted(reference(row) for table in rows for row in table)
    assert sorted(map(repr, found)) == sorted(repr(row) for table in rows for row in table)


@given(TABLES, st.integers(1, 5), ORDERS)
def test_ranking_gives_the_same_order_as_comparing(tables, size, order):
    """With a judge that sees only what is on the table."""
    rows = [[make(row) for row in table] for table in tables]
    reference = postgres_key(order)

    async def rank(shown):
        places = sorted({reference(row) for row in shown})
        return [places.index(reference(row)) + 1 for row in shown]

    parts = [Listed(sorted(table, key=reference), size) for table in rows]
    found = asyncio.run(collected(ranked(parts, rank)))
    assert [reference(row) for row in found] == sorted(reference(row) for table in rows for row in table)
    assert sorted(map(repr, found)) == sorted(repr(row) for table in rows for row in table)


@given(st.lists(st.integers(), max_size=20), st.integers(1, 5), st.none() | st.integers(0, 25), st.integers(0, 25))
def test_limit_and_offset_cut_as_a_slice_does(values, size, limit, offset):
    """Across the borders of blocks."""
    part = Listed([make((value, 0)) for value in values], size)
    found = asyncio.run(collected(sliced(concatenated([part]), limit=limit, offset=offset)))
    assert [row[0] for row in found] == values[offset:][:limit]


def test_a_limit_reads_no_block_that_it_does_not_need():
    """What is behind the last row stays on the shard."""
    part = Listed([make((value, 0)) for value in range(100)], 10)
    asyncio.run(collected(sliced(concatenated([part]), limit=15, offset=0)))
    assert part.read == 2


def test_only_types_that_python_orders_alike_are_compared_here():
    """Text only in code point order; jsonb, enums and intervals never."""
    text, jsonb, interval, timestamptz, own_type = 25, 3802, 1186, 1184, 99999
    assert is_comparable(text, '"C"')
    assert not is_comparable(text, '"en-x-icu"')
    assert not is_comparable(text, '"default"')
    assert is_comparable(timestamptz, None)
    assert not any(is_comparable(oid, None) for oid in (jsonb, interval, own_type))
