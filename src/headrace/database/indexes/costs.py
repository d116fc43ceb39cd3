"""What statements would cost under indexes that do not exist: a HypoPG session on one shard.

HypoPG tells the planner of one connection about indexes that nobody built; EXPLAIN then says what it would do with
them. Nothing is written. Without HypoPG there is no estimate: a copy of a table that has its statistics but not its
rows does not help, because Postgres' planner takes the size of a table from its file, not from its statistics.
"""

from collections import defaultdict
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any, Final

from headrace.database.indexes.candidates import Uses, uses_of
from headrace.database.indexes.extend import Answers, Question
from headrace.database.indexes.index import Index, Schema
from headrace.database.indexes.samples import parameters, repaired, sampled
from headrace.database.indexes.workload import Query, Sample
from headrace.database.postgres.nodes import Node
from headrace.database.postgres.pipeline import DriverError, PipelinedConnection
from headrace.errors import CallerError

_HYPOPG: Final = """
SELECT (SELECT quote_ident(n.nspname) FROM pg_extension e JOIN pg_namespace n ON n.oid = e.extnamespace
        WHERE e.extname = 'hypopg'),
    EXISTS (SELECT FROM pg_available_extensions WHERE name = 'hypopg'), current_setting('server_version_num')::int"""
_GENERIC_PLANS: Final = 160000
"""The version of Postgres from which EXPLAIN can plan without values for the parameters."""


@dataclass(frozen=True, slots=True)
class Capability:
    """Whether costs can be estimated on a shard."""

    schema: str | None
    """Where HypoPG is installed; None: it is not."""
    available: bool
    """The server has its files, so that CREATE EXTENSION would do."""
    generic: bool

    @property
    def reason(self) -> str:
        """Why not."""
        how = "run CREATE EXTENSION hypopg" if self.available else "install the package postgresql-NN-hypopg first"
        return f"estimate unavailable: the shard has no HypoPG ({how})"


async def capability(node: Node) -> Capability:
    """What a shard can do."""
    schema, available, version = (await node.fetch(_HYPOPG, read_only=True))[0]
    return Capability(schema, available, version >= _GENERIC_PLANS)


@dataclass(frozen=True, slots=True)
class Prepared:
    """A statement of the workload that can be read and run."""

    query: Query
    uses: Uses
    samples: tuple[Sample, ...]
    guessed: bool
    """Its parameters come from statistics."""


async def prepared(node: Node, query: Query, schema: Schema) -> Prepared | str:
    """The statement with its tables and parameters; or why it can not be weighed."""
    try:
        if query.samples:
            texts = {each.sql for each in query.samples}
            uses = uses_of(query.samples[0].sql, schema, varies=len(texts) > 1)
            return Prepared(query, uses, query.samples, guessed=False)
        text = repaired(query.text)
        uses = uses_of(text, schema)
        count = parameters(text)
        types = await node.parameter_types(text, ("unknown",) * count) if uses and count else ()
        return Prepared(query, uses, sampled(text, schema, types), guessed=bool(types))
    except CallerError as error:  # Postgres or sqlglot cannot read it
        return error.message


class WhatIf:
    """Answers questions for the statements that it was given."""

    def __init__(self, connection: PipelinedConnection, found: Capability, queries: Sequence[Prepared]) -> None:
        self._connection = connection
        self._schema = found.schema
        self._generic = found.generic
        self._samples: list[tuple[Sample, ...]] = [each.samples for each in queries]
        self._queries = queries
        self.unplanned: dict[int, str] = {}
        """Statements that Postgres cannot plan, and what it says."""

    async def answer(self, questions: Sequence[Question]) -> Answers:
        """The cost of one call each, the mean over its samples; infinite for one that cannot be planned."""
        found: dict[Question, float] = {}
        by_indexes: dict[frozenset[Index], list[Question]] = defaultdict(list)
        for question in questions:
            by_indexes[question.indexes].append(question)
        for indexes, asked in by_indexes.items():
            await self._pretend(indexes)
            for question in asked:
                found[question] = await self._cost(question.query)
        return found

    async def _pretend(self, indexes: frozenset[Index]) -> None:
        await self._connection.execute(f"SELECT {self._schema}.hypopg_reset()", prepare=False)
        create = f"SELECT indexrelid FROM {self._schema}.hypopg_create_index($1)"  # noqa: S608 - a quoted schema
        for index in sorted(indexes, key=Index.sql):
            await self._connection.execute(create, (index.hypothetical(),), prepare=False)

    async def _cost(self, number: int) -> float:
        if number in self.unplanned:
            return float("inf")
        costs = []
        for sample in self._samples[number]:
            try:
                costs.append(await self._explained(f"EXPLAIN (FORMAT JSON) {sample.sql}", sample.params))
            except DriverError as error:
                if self._connection.broken:
                    raise
                self.unplanned[number] = str(error).split("\n")[0]
        if costs:
            self.unplanned.pop(number, None)
            return sum(costs) / len(costs)
        return await self._generic_cost(number)

    async def _generic_cost(self, number: int) -> float:
        """With no values that the statement accepts, what it costs on the average."""
        sample = self._samples[number][0]
        if self._generic and self._queries[number].guessed:
            try:
                cost = await self._explained(f"EXPLAIN (FORMAT JSON, GENERIC_PLAN) {sample.sql}", ())
            except DriverError as error:
                if self._connection.broken:
                    raise
                self.unplanned[number] = str(error).split("\n")[0]
            else:
                del self.unplanned[number]
                return cost
        return float("inf")

    async def _explained(self, sql: str, params: Sequence[Any]) -> float:
        cursor = await self._connection.execute(sql, params or None, prepare=False)
        rows = await cursor.fetchall()
        return float(rows[0][0][0]["Plan"]["Total Cost"])


@asynccontextmanager
async def what_if(node: Node, found: Capability, queries: Sequence[Prepared]) -> AsyncIterator[WhatIf]:
    """A connection on which indexes can be pretended; none of them is left when it goes back."""
    if found.schema is None:
        raise CallerError(found.reason)
    async with node.reading() as connection:
        try:
            yield WhatIf(connection, found, queries)
        finally:
            if not connection.broken:
                await connection.execute(f"SELECT {found.schema}.hypopg_reset()", prepare=False)
