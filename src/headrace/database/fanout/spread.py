"""Statements that name no single shard: learns the tables, plans, and has the plans carried out."""

from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager, contextmanager
from typing import Any

from headrace.database.catalog import check_collations, declared, read_aggregates, read_catalog
from headrace.database.config import DatabaseConfig
from headrace.database.fanout.merge import Block
from headrace.database.fanout.parts import COLUMNS_CHANGED, Bounds, How
from headrace.database.fanout.reading import Answer, Reader
from headrace.database.fanout.writing import Task, Written, write_all
from headrace.database.planning.route import (
    AnyShard,
    Gather,
    Map,
    OneShard,
    Plan,
    ReferenceWrite,
    Refused,
    Router,
    Shards,
    SplitInsert,
    WriteEach,
)
from headrace.database.planning.statement import Kind
from headrace.database.postgres.nodes import Node
from headrace.database.postgres.rows import Partial, Row
from headrace.errors import DatabaseUnavailable, StatementFailed, StatementRefused

_CHANGED = frozenset({"42P01", "42703", "42804", "42883", "42P08", "22P02", "22003", COLUMNS_CHANGED})
"""SQLSTATEs after which the tables are looked at again: a table, a column or a type is not what it was."""


class Spread:
    """The shards that hold slots, for statements over more than one of them."""

    def __init__(self, nodes: Mapping[str, Node], config: DatabaseConfig, shards: Sequence[str]) -> None:
        self.only = nodes[shards[0]] if len(shards) == 1 else None
        """The one shard, where every statement goes."""
        self._nodes = nodes
        self._config = config
        self._shards = tuple(shards)
        self._reader = Reader(nodes, config)
        self._router = Router(self._shards, declared(config.tables), statements_max=config.statements_max)

    # planning

    async def plan(self, sql: str, params: Sequence[Any], shard_map: Map, *, everywhere: bool = False) -> Plan:
        """Where a statement goes."""
        if not self._router.knows(sql):
            await self._learn(sql)
        return self._router.plan(sql, params, shard_map, everywhere=everywhere)

    async def _learn(self, sql: str) -> None:
        """Read a text, with the columns of its tables at hand."""
        if not self._is_strange(sql):
            return
        node = next((self._nodes[name] for name in self._shards if self._nodes[name].available), None)
        if node is None:
            raise DatabaseUnavailable(f"None of the shards {', '.join(self._shards)} can be reached.")
        await check_collations([self._nodes[name] for name in self._shards if self._nodes[name].available])
        catalog = await read_catalog(node, self._config.tables)
        self._router = Router(
            self._shards,
            catalog,
            statements_max=self._config.statements_max,
            aggregates=await read_aggregates(node),
        )
        if self._is_strange(sql):
            self._router.forget(sql)

    def _is_strange(self, sql: str) -> bool:
        """Whether it uses a declared table whose columns are not known."""
        uses = self._router.statement(sql).uses
        return any(use.facts is not None and use.facts.columns is None for use in uses)

    async def check(self, shard: str, shard_map: Map, sql: str, params: Sequence[Any]) -> None:
        """Refuse what does not belong into a transaction on this shard, as far as its words tell."""
        plan = await self.plan(sql, params, shard_map)
        if isinstance(plan, AnyShard) or plan == OneShard(shard):
            return
        statement = self._router.statement(sql)
        if statement.undeclared or not statement.uses:
            return
        if isinstance(plan, OneShard):
            raise StatementRefused(
                f"The transaction is on {shard}, and the statement's rows are on {plan.shard}.",
                fix="Begin the transaction with the key of these rows; rows of several shards need two_phase=True.",
            )
        raise StatementRefused(
            f"The transaction is on {shard}, and the statement concerns rows of other shards too.",
            fix="Compare the shard key with the value that the transaction is for.",
        )

    @contextmanager
    def _watched(self) -> Iterator[None]:
        """Learn the tables anew after an error that says that somebody else changed them."""
        try:
            yield
        except StatementFailed as error:
            if error.sqlstate in _CHANGED:
                self._forget()
            raise

    def _forget(self) -> None:
        """Tables may have changed."""
        self._router = Router(self._shards, declared(self._config.tables), statements_max=self._config.statements_max)
        self._reader.forget()

    # reading

    async def fetch(self, plan: Plan, sql: str, params: Sequence[Any]) -> list[Row]:
        """All rows of a statement."""
        if isinstance(plan, OneShard | AnyShard | Shards | Gather):
            return (await self._collected(plan, sql, params, tolerant=False)).rows
        written = await self._write(plan, sql, params)
        if isinstance(plan, ReferenceWrite):
            return written[0].rows
        return [row for each in written for row in each.rows]

    async def fetch_everywhere(
        self, sql: str, params: Sequence[Any], shard_map: Map, *, partial: bool
    ) -> list[Row] | Partial:
        """See `Database.fetch_everywhere`."""
        plan: Plan | None = None
        statement = self._router.statement(sql)
        if statement.writes and statement.kind is not Kind.OTHER:
            raise StatementRefused(
                "fetch_everywhere reads, and the statement writes.", fix="Use fetch(..., everywhere=True)."
            )
        if self.only is None:
            await self._learn_quietly(sql)
            statement = self._router.statement(sql)
            if statement.kind is Kind.SELECT and statement.uses and not statement.undeclared:
                plan = await self.plan(sql, params, shard_map)
        if plan is not None:
            answer = await self._collected(readable(plan), sql, params, tolerant=partial)
        else:
            async with self._reader.each(self._shards, sql, params, self._how(sql, tolerant=partial)) as found:
                answer = await self._bounded(found)
        return answer if partial else answer.rows

    def _how(self, sql: str, *, tolerant: bool = False) -> How:
        return How(tolerant, self._router.statement(sql).read_only)

    async def _learn_quietly(self, sql: str) -> None:
        if not self._router.knows(sql):
            await self._learn(sql)

    @asynccontextmanager
    async def stream(self, plan: Plan, sql: str, params: Sequence[Any]) -> AsyncIterator[AsyncIterator[Row]]:
        """The rows of a SELECT as they are read."""
        with self._watched():
            async with self._reader.read(readable(plan), sql, params, self._how(sql)) as answer:
                yield each_row(answer.blocks)

    async def _collected(
        self, plan: OneShard | AnyShard | Shards | Gather, sql: str, params: Sequence[Any], *, tolerant: bool
    ) -> Partial:
        with self._watched():
            async with self._reader.read(plan, sql, params, self._how(sql, tolerant=tolerant)) as answer:
                return await self._bounded(answer)

    async def _bounded(self, answer: Answer) -> Partial:
        bounds = Bounds(self._config.result_rows_max, self._config.result_bytes_max)
        rows: list[Row] = []
        async for block in answer.blocks:
            bounds.count_block(block)
            rows += block
        return Partial(rows, dict(answer.missing))

    # writing

    async def execute(self, plan: Plan, sql: str, params: Sequence[Any]) -> int:
        """Run a statement; how many rows it touched."""
        if isinstance(plan, OneShard | AnyShard | Shards | Gather):
            return len((await self._collected(plan, sql, params, tolerant=False)).rows)
        written = await self._write(plan, sql, params)
        if isinstance(plan, ReferenceWrite):
            return written[0].touched
        return sum(max(each.touched, 0) for each in written)

    async def _write(self, plan: Plan, sql: str, params: Sequence[Any]) -> list[Written]:
        tasks: dict[str, Task] = {}
        match plan:
            case Refused():
                raise refusal(plan)
            case SplitInsert():
                tasks = {shard: plan.text.insert(rows, params) for shard, rows in plan.rows.items()}
            case ReferenceWrite() | WriteEach():
                tasks = {shard: (sql, params) for shard in plan.shards}
        with self._watched():
            written = await write_all(self._nodes, tasks, same=isinstance(plan, ReferenceWrite))
        if self._router.statement(sql).kind in {Kind.SCHEMA, Kind.OTHER}:
            self._forget()
        return written


def refusal(plan: Refused) -> StatementRefused:
    """The error of a plan that is none."""
    return StatementRefused(plan.reason, fix=plan.fix)


def readable(plan: Plan) -> OneShard | AnyShard | Shards | Gather:
    """A plan that reads; raises of every other."""
    if isinstance(plan, Refused):
        raise refusal(plan)
    if not isinstance(plan, OneShard | AnyShard | Shards | Gather):
        raise StatementRefused("It writes on several shards.", fix="Use execute(..., everywhere=True).")
    return plan


def one_shard(plan: Plan) -> str:
    """The shard of a plan that has one; raises of every other."""
    if isinstance(plan, Refused):
        raise refusal(plan)
    if not isinstance(plan, OneShard):
        raise StatementRefused("It concerns more than one shard.", fix="Use execute(..., everywhere=True).")
    return plan.shard


async def each_row(blocks: AsyncIterator[Block]) -> AsyncIterator[Row]:
    """Rows one by one."""
    async for block in blocks:
        for row in block:
            yield row
