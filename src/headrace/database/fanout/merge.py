"""Blocks of sorted rows from several shards become one sorted sequence, read no faster than it is asked for.

Rows whose keys Python orders as Postgres does (numbers, dates, bytes, uuids, text in "C" order) go through a k-way
merge with a heap. Keys that only Postgres can order, such as text in the order of a language, jsonb or an enum, are
*ranked* by a shard: it is shown the keys that are on the table and answers with their places. Whatever ranks no higher
than the last row of every unfinished block can be handed out, since all that is still to come is behind it; so a round
of ranking settles about a block of rows.
"""

import datetime
import heapq
import math
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from decimal import Decimal
from typing import Any, Final, Protocol

from headrace.database.planning.scatter import OrderKey
from headrace.database.postgres.rows import Row

Block = list[Row]
_NULL_FIRST, _PRESENT, _NULL_LAST = 0, 1, 2

# OIDs of pg_type.dat: fixed since there are types.
_TEXT_OIDS: Final = frozenset({25, 1043})
_PLAIN_OIDS: Final = frozenset({16, 17, 20, 21, 23, 26, 700, 701, 1700, 1082, 1083, 1114, 1184, 2950})
_BYTE_ORDERS: Final = frozenset({'"C"', '"POSIX"', '"ucs_basic"', 'pg_catalog."C"', 'pg_catalog."POSIX"'})


class Blocks(Protocol):
    """The answer of one shard."""

    async def next(self) -> Block | None:
        """The next rows; None after the last."""
        ...


def is_comparable(type_oid: int, collation: str | None) -> bool:
    """Whether Python orders values of this type as Postgres does."""
    return type_oid in _PLAIN_OIDS or (type_oid in _TEXT_OIDS and collation in _BYTE_ORDERS)


class _Descending:
    __slots__ = ("value",)

    def __init__(self, value: Any) -> None:
        self.value = value

    def __lt__(self, other: "_Descending") -> bool:
        return bool(other.value < self.value)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Descending) and bool(self.value == other.value)

    def __hash__(self) -> int:
        return hash(self.value)


def _ordered(value: Any) -> Any:
    """A value that `<` orders as Postgres does: NaN equals itself and lies above all numbers."""
    if isinstance(value, float):
        return (1, 0.0) if math.isnan(value) else (0, value)
    if isinstance(value, Decimal):
        return (1, 0) if value.is_nan() else (0, value)
    if isinstance(value, uuid.UUID):
        return value.bytes
    if isinstance(value, datetime.datetime) and value.tzinfo is not None:
        return value.astimezone(datetime.UTC)
    return value


def sort_key(order: Sequence[OrderKey]) -> Callable[[Row], tuple[Any, ...]]:
    """What rows are compared by."""
    plan = [(key.position, key.descending, _NULL_FIRST if key.nulls_first else _NULL_LAST) for key in order]

    def key_of(row: Row) -> tuple[Any, ...]:
        parts: list[Any] = []
        for position, descending, null_place in plan:
            value = row[position]
            if value is None:
                parts += (null_place, 0)
            else:
                parts += (_PRESENT, _Descending(_ordered(value)) if descending else _ordered(value))
        return tuple(parts)

    return key_of


async def concatenated(parts: Sequence[Blocks]) -> AsyncIterator[Block]:
    """All rows, shard after shard."""
    for part in parts:
        while (block := await part.next()) is not None:
            yield block


async def merged(
    parts: Sequence[Blocks], key_of: Callable[[Row], tuple[Any, ...]], *, block_rows: int
) -> AsyncIterator[Block]:
    """All rows in order; among equal ones those of an earlier shard come first."""
    heap: list[tuple[tuple[Any, ...], int, int, Block]] = []
    for number, part in enumerate(parts):
        block = await part.next()
        if block:
            heap.append((key_of(block[0]), number, 0, block))
    heapq.heapify(heap)
    ready: Block = []
    while heap:
        _, number, index, block = heap[0]
        ready.append(block[index])
        index += 1
        following: Block | None = block
        if index == len(block):
            following, index = await parts[number].next(), 0
        if following:
            heapq.heapreplace(heap, (key_of(following[index]), number, index, following))
        else:
            heapq.heappop(heap)
        if len(ready) >= block_rows:
            yield ready
            ready = []
    if ready:
        yield ready


Rank = Callable[[Sequence[Row]], Awaitable[list[int]]]
"""The dense rank of every row by its keys."""


async def ranked(parts: Sequence[Blocks], rank: Rank) -> AsyncIterator[Block]:
    """All rows in order, by keys that somebody else compares."""
    open_parts = dict(enumerate(parts))
    held: dict[int, Block] = {}
    while open_parts or any(held.values()):
        for number in list(open_parts):
            if not held.get(number):
                block = await open_parts[number].next()
                if block is None:
                    del open_parts[number]
                else:
                    held[number] = block
        rows = [(number, row) for number in sorted(held) for row in held[number]]
        if not rows:
            return
        ranks = await rank([row for _, row in rows])
        last: dict[int, int] = {}
        for (number, _), place in zip(rows, ranks, strict=True):
            last[number] = place
        # Equal keys may still come from a shard whose block ended with them: order among equals is free.
        settled = min((last[number] for number in open_parts if number in last), default=max(ranks))
        order = sorted(range(len(rows)), key=ranks.__getitem__)
        kept: dict[int, Block] = {}
        for (number, row), place in zip(rows, ranks, strict=True):
            if place > settled:
                kept.setdefault(number, []).append(row)
        held = kept
        yield [rows[index][1] for index in order if ranks[index] <= settled]


async def sliced(blocks: AsyncIterator[Block], *, limit: int | None, offset: int) -> AsyncIterator[Block]:
    """The rows behind `offset`, at most `limit`; reads no block that it does not need."""
    if limit is not None and limit <= 0:
        return
    async for block in blocks:
        if offset >= len(block):
            offset -= len(block)
            continue
        cut = block[offset:] if offset else block
        offset = 0
        if limit is None:
            yield cut
            continue
        yield cut[:limit]
        limit -= len(cut)
        if limit <= 0:
            return
