"""Carries out what `route` planned for reading: asks shards, puts their answers together. A thin shell."""

import asyncio
from bisect import bisect_right
from collections import OrderedDict
from collections.abc import AsyncIterator, Callable, Hashable, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from datetime import datetime, time
from typing import Any, Final, NamedTuple

from headrace.database.config import DatabaseConfig
from headrace.database.fanout.merge import Block, Rank, concatenated, is_comparable, merged, ranked, sliced, sort_key
from headrace.database.fanout.parts import Bounds, How, Opening, Parts
from headrace.database.planning.aggregation import Combination
from headrace.database.planning.gather import Gathering, Pull
from headrace.database.planning.key_terms import Constant, Term
from headrace.database.planning.route import AnyShard, Gather, OneShard, Shards
from headrace.database.planning.scatter import OrderKey, Rows, text_name
from headrace.database.planning.statement import unended
from headrace.database.postgres.nodes import Node
from headrace.database.postgres.rows import Row, row_of
from headrace.database.postgres.transaction import Pieces, Transaction
from headrace.errors import CallerError, DatabaseUnavailable, Overloaded, StatementRefused

ReadPlan = OneShard | AnyShard | Shards | Gather

_BLANK_PADDED: Final = 1042
_INTEGER_BITS: Final = (16, 32, 64)
_TYPES = """
SELECT t.oid::bigint, format_type(t.oid, -1), t.typcollation <> 0, t.typtype = 'p'
FROM pg_type AS t WHERE t.oid = ANY($1::oid[])"""
_DEFAULT_COLLATION = """
SELECT datlocprovider = 'c' AND datcollate IN ('C', 'POSIX') FROM pg_database WHERE datname = current_database()"""


class _Column(NamedTuple):
    """A column of an answer, as a shard describes it."""

    name: str
    oid: int
    type_name: str
    collation: str | None
    """As SQL names it; None: the type has none."""


class _Shape(NamedTuple):
    """What is learnt of a statement at its first run."""

    names: tuple[str, ...]
    """The columns as a single Postgres calls them."""
    columns: tuple[_Column, ...]
    """Of what each shard is asked for."""
    sql: str
    """What runs: of a combination the statement over the partial results."""
    comparable: bool = True


class Answer(NamedTuple):
    """Blocks of rows, and the shards that are missing in them: complete only when the blocks have been read."""

    blocks: AsyncIterator[Block]
    missing: Mapping[str, str]


class Reader:
    """Reads over the nodes; what it learns of a statement's types it keeps, up to `statements_max` texts."""

    def __init__(self, nodes: Mapping[str, Node], config: DatabaseConfig) -> None:
        self._nodes = nodes
        self._config = config
        self._shapes: OrderedDict[tuple[str, Hashable], _Shape] = OrderedDict()
        self._byte_order: bool | None = None
        self._turns = asyncio.Semaphore(max(1, config.connections_max - 1))

    def forget(self) -> None:
        """The tables may have changed."""
        self._shapes.clear()

    @asynccontextmanager
    async def read(self, plan: ReadPlan, sql: str, params: Sequence[Any], how: How) -> AsyncIterator[Answer]:
        """The rows of a planned SELECT."""
        if isinstance(plan, Gather):
            reading = self._gathered(plan.gathering, plan.shards, params)
        elif isinstance(plan, Shards):
            if isinstance(plan.division, Combination):
                reading = self._combination(plan.division, plan.shards, sql, params, how)
            elif isinstance(plan.division, Rows):
                reading = self._rows(plan.division, plan.shards, sql, params, how)
            else:
                raise StatementRefused(f"It spans several shards: {plan.division.reason}.")
        else:
            shard = plan.shard if isinstance(plan, OneShard) else self._available(plan.shards).name
            reading = self.each((shard,), sql, params, how)
        async with reading as answer:
            yield answer

    @asynccontextmanager
    async def each(self, shards: Sequence[str], sql: str, params: Sequence[Any], how: How) -> AsyncIterator[Answer]:
        """The rows of a statement on each of the shards, one after the other, just as they answer."""
        async with Parts(self._openings(shards, sql, params), how) as parts:
            yield Answer(concatenated(parts.parts), parts.missing)

    def _available(self, shards: Sequence[str]) -> Node:
        return next((self._nodes[name] for name in shards if self._nodes[name].available), self._nodes[shards[0]])

    def _openings(self, shards: Sequence[str], sql: str, params: Sequence[Any]) -> dict[str, Opening]:
        def opening(node: Node) -> Opening:
            return lambda: node.stream(sql, params, block_rows=self._config.block_rows)

        return {name: opening(self._nodes[name]) for name in shards}

    # rows

    @asynccontextmanager
    async def _rows(
        self, rows: Rows, shards: Sequence[str], sql: str, params: Sequence[Any], how: How
    ) -> AsyncIterator[Answer]:
        limit, offset = _number(rows.limit, params), _number(rows.offset, params) or 0
        if not rows.order and rows.limit is None and rows.offset is None:
            async with Parts(self._openings(shards, sql, params), how, columns=()) as parts:
                yield Answer(concatenated(parts.parts), parts.missing)
            return
        coordinator = self._available(shards)
        shape = await self._shape_of_rows(rows, coordinator, sql, params)
        asked, hidden = rows.query, rows.hidden
        if not shape.comparable and rows.in_text is not None:
            asked, hidden = rows.in_text, rows.hidden + len(rows.order)
        own, columns = asked.pick(params), tuple(column.name for column in shape.columns)
        if not shape.comparable:
            columns += tuple(text_name(number) for number in range(len(rows.order)))
        async with AsyncExitStack() as stack:
            if not shape.comparable:
                await stack.enter_async_context(self._turn())
            openings = self._openings(shards, asked.sql, own)
            parts = await stack.enter_async_context(Parts(openings, how, columns=columns))
            if not rows.order:
                blocks = concatenated(parts.parts)
            elif shape.comparable:
                blocks = merged(parts.parts, sort_key(rows.order), block_rows=self._config.block_rows)
            else:
                blocks = ranked(parts.parts, self._rank(coordinator, rows, shape))
            blocks = sliced(blocks, limit=limit, offset=offset)
            yield Answer(_stripped(blocks, row_of(shape.names), hidden), parts.missing)

    @asynccontextmanager
    async def _turn(self) -> AsyncIterator[None]:
        """A stream holds a connection to each shard while it asks for ranks on one more: leave one for that."""
        try:
            async with asyncio.timeout(self._config.acquire_timeout_s):
                await self._turns.acquire()
        except TimeoutError as error:
            raise Overloaded(
                "Too many results are being sorted as only Postgres can.",
                fix='Read fewer at once, sort in COLLATE "C", or raise database.connections_max.',
            ) from error
        try:
            yield
        finally:
            self._turns.release()

    async def _shape_of_rows(self, rows: Rows, node: Node, sql: str, params: Sequence[Any]) -> _Shape:
        known = sql, signature(params)
        shape = self._shapes.get(known)
        if shape is None:
            names = tuple(name for name, _ in await node.describe(unended(sql), params))
            columns = await self._columns(node, rows.query.sql, rows.query.pick(params))
            keys = [columns[key.position] for key in rows.order]
            comparable = all(is_comparable(column.oid, column.collation) for column in keys)
            if not comparable and rows.in_text is None:
                raise StatementRefused(
                    "ORDER BY sorts by a column whose order only Postgres knows, behind a * or in a SELECT DISTINCT.",
                    fix="Name the columns, or put the DISTINCT into a subquery.",
                )
            shape = self._keep(known, _Shape(names, columns, rows.query.sql, comparable))
        return shape

    def _rank(self, node: Node, rows: Rows, shape: _Shape) -> Rank:
        """Lets a shard order keys: its `dense_rank` over their text form."""
        keys = [shape.columns[key.position] for key in rows.order]
        names = [f"k{number}" for number in range(len(keys))]
        typed = ", ".join(f"{_typed(f'raw.{name}', key)} AS {name}" for name, key in zip(names, keys, strict=True))
        order = ", ".join(_ordering(name, key) for name, key in zip(names, rows.order, strict=True))
        arrays = ", ".join(f"${number}::text[]" for number in range(1, len(keys) + 1))
        raw = f"unnest({arrays}) WITH ORDINALITY AS raw({', '.join(names)}, n)"
        keyed = f"SELECT raw.n, {typed} FROM {raw}"  # noqa: S608 - types and collations as Postgres calls them
        sql = f"SELECT dense_rank() OVER (ORDER BY {order}) FROM ({keyed}) AS typed ORDER BY n"  # noqa: S608 - as above

        async def rank(shown: Sequence[Row]) -> list[int]:
            texts = [[row[number - len(keys)] for row in shown] for number in range(len(keys))]
            return [row[0] for row in await node.fetch(sql, texts, read_only=True)]

        return rank

    # combinations

    @asynccontextmanager
    async def _combination(
        self, combination: Combination, shards: Sequence[str], sql: str, params: Sequence[Any], how: How
    ) -> AsyncIterator[Answer]:
        coordinator = self._available(shards)
        shape = await self._shape_of_combination(combination, coordinator, sql, params)
        bounds = Bounds(self._config.result_rows_max, self._config.result_bytes_max)
        partials: list[list[Any]] = [[] for _ in shape.columns]
        asked = _in_text(combination.partial.sql, shape.columns)
        async with Parts(self._openings(shards, asked, combination.partial.pick(params)), how) as parts:
            async for block in concatenated(parts.parts):
                bounds.count_block(block)
                for column, values in zip(partials, zip(*block, strict=True), strict=True):
                    column += values
            missing = parts.missing
        if how.tolerant and coordinator.name in missing:
            coordinator = self._available([name for name in shards if name not in missing] or shards)
        final = (*combination.final.pick(params), *partials)
        async with Parts(self._openings((coordinator.name,), shape.sql, final), how) as parts:
            yield Answer(_stripped(concatenated(parts.parts), row_of(shape.names), 0), missing)

    async def _shape_of_combination(
        self, combination: Combination, node: Node, sql: str, params: Sequence[Any]
    ) -> _Shape:
        known = sql, signature(params)
        shape = self._shapes.get(known)
        if shape is None:
            names = tuple(name for name, _ in await node.describe(unended(sql), params))
            columns = await self._columns(node, combination.partial.sql, combination.partial.pick(params))
            combined = combination.combined(
                [column.type_name for column in columns], [column.collation for column in columns]
            )
            shape = self._keep(known, _Shape(names, columns, combined))
        return shape

    # what a shard says of types

    def _keep(self, known: tuple[str, Hashable], shape: _Shape) -> _Shape:
        self._shapes[known] = shape
        if len(self._shapes) > self._config.statements_max:
            self._shapes.popitem(last=False)
        return shape

    async def _columns(self, node: Node, sql: str, params: Sequence[Any]) -> tuple[_Column, ...]:
        described = await node.describe(sql, params)
        found = await node.fetch(_TYPES, ([oid for _, oid in described],), read_only=True)
        types = {oid: (name, collatable, pseudo) for oid, name, collatable, pseudo in found}
        collatable = [number for number, (_, oid) in enumerate(described) if types[oid][1]]
        collations = await self._collations(node, sql, params, len(described), collatable)
        columns = []
        for number, (name, oid) in enumerate(described):
            type_name, _, pseudo = types[oid]
            if pseudo:
                raise StatementRefused(
                    f"The column {name!r} is of type {type_name}, which cannot travel between shards."
                )
            columns.append(_Column(name, oid, type_name, collations.get(number)))
        return tuple(columns)

    async def _collations(
        self, node: Node, sql: str, params: Sequence[Any], count: int, collatable: Sequence[int]
    ) -> dict[int, str | None]:
        if not collatable:
            return {}
        names = ", ".join(f"c{number}" for number in range(count))
        asked = ", ".join(f"pg_collation_for(q.c{number})" for number in collatable)
        # The outer join makes one row without running the statement: collations are known before any row is.
        nothing = f"SELECT * FROM ({sql}\n) AS s LIMIT 0"  # noqa: S608 - the statement is the caller's own
        one_row = f"(VALUES (1)) AS one LEFT JOIN ({nothing}) AS q({names}) ON true"
        rows = await node.fetch(f"SELECT {asked} FROM {one_row}", params, read_only=True)  # noqa: S608 - as above
        if self._byte_order is None:
            self._byte_order = bool((await node.fetch(_DEFAULT_COLLATION, read_only=True))[0][0])
        found = {}
        for number, collation in zip(collatable, rows[0], strict=True):
            is_default = collation in {None, '"default"'}
            found[number] = ('"C"' if self._byte_order else '"default"') if is_default else collation
        return found

    # gathering

    @asynccontextmanager
    async def _gathered(
        self, gathering: Gathering, shards: Sequence[str], params: Sequence[Any]
    ) -> AsyncIterator[Answer]:
        coordinator = self._available(shards)
        bounds = Bounds(self._config.gather_rows_max, self._config.gather_bytes_max)
        async with coordinator.transaction() as transaction:
            for pull in gathering.pulls:
                await self._pull(
                    transaction, pull, [self._nodes[name] for name in shards], params, coordinator, bounds
                )
            final = gathering.final
            async with transaction.stream(
                final.sql, *final.pick(params), block_rows=self._config.block_rows
            ) as blocks:
                yield Answer(blocks, {})

    async def _pull(
        self,
        transaction: Transaction,
        pull: Pull,
        nodes: Sequence[Node],
        params: Sequence[Any],
        coordinator: Node,
        bounds: Bounds,
    ) -> None:
        values = tuple(params[index] for index in pull.select.parameters)
        query = Pieces(pull.select.pieces, values)
        await transaction.execute(pull.define)
        own = (f"INSERT INTO {pull.table} {query.texts[0]}", *query.texts[1:])
        bounds.count(await transaction.run(Pieces(own, values)), 0)
        for node in nodes:
            if node is not coordinator:
                async with node.copy_out(query) as blocks:
                    await transaction.copy_in(pull.table, _counted(blocks, bounds))
        for sql in (*pull.indexes, f"ANALYZE {pull.table}"):
            await transaction.execute(sql)


async def _counted(blocks: AsyncIterator[bytes], bounds: Bounds) -> AsyncIterator[bytes]:
    async for block in blocks:
        bounds.count(block.count(b"\n"), len(block))
        yield block


async def _stripped(
    blocks: AsyncIterator[Block], make: Callable[[Sequence[Any]], Row], hidden: int
) -> AsyncIterator[Block]:
    """The rows without the columns that only sorted, under the names of the statement."""
    async for block in blocks:
        yield [make(row[: len(row) - hidden]) for row in block]


def _in_text(sql: str, columns: Sequence[_Column]) -> str:
    """The partial results as text, which loses nothing: it is the type's own output, and is read by its own input."""
    texts = ", ".join(
        # A cast of char(n) to text would cut the blanks at its end.
        f"textin(bpcharout(c{number}))" if column.oid == _BLANK_PADDED else f"c{number}::text"
        for number, column in enumerate(columns)
    )
    names = ", ".join(f"c{number}" for number in range(len(columns)))
    return f"SELECT {texts} FROM ({sql}\n) AS partial({names})"  # noqa: S608 - the statement is the caller's own


def _typed(name: str, column: _Column) -> str:
    collation = f" COLLATE {column.collation}" if column.collation is not None else ""
    return f"{name}::{column.type_name}{collation}"


def _ordering(name: str, key: OrderKey) -> str:
    direction = "DESC" if key.descending else "ASC"
    return f"{name} {direction} NULLS {'FIRST' if key.nulls_first else 'LAST'}"


def _number(term: Term | None, params: Sequence[Any]) -> int | None:
    """The value of LIMIT or OFFSET; NULL means none."""
    if term is None:
        return None
    value = term.value if isinstance(term, Constant) else params[term.index]
    if value is None:
        return None
    if type(value) is not int or value < 0:
        raise CallerError(f"LIMIT or OFFSET is {value!r}.", fix="Give a whole number that is not negative.")
    return value


def signature(values: Sequence[Any]) -> Hashable:
    """What the server's types of parameters depend on, and with them those of the columns."""
    return tuple(map(_kind, values))


def _kind(value: Any) -> Hashable:
    if type(value) is int:  # smallint, integer, bigint or numeric, by its size
        return bisect_right(_INTEGER_BITS, (value if value >= 0 else ~value).bit_length())
    if isinstance(value, list | tuple):
        return list, frozenset(map(_kind, value))
    return type(value), isinstance(value, datetime | time) and value.tzinfo is not None


def unavailable(missing: Mapping[str, str]) -> DatabaseUnavailable:
    """The error of an answer that lacks shards."""
    return DatabaseUnavailable(" ".join(missing.values()))
