"""Reads of single rows by a key that come at the same time become one statement for each shard.

Intuition: the keys travel as an array, and the server itself runs the caller's statement once for each of them, as the
inner side of a nested loop (LATERAL). So nothing about equality, types, NULLs, collations or the order of rows has to
be rebuilt here: a row belongs to the caller whose number it comes with. The scan is the one that `= ANY($1)` would
make, and where that could carry only one column, this carries every parameter of the statement.
"""

import asyncio
import uuid
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Mapping, Sequence
from datetime import date
from decimal import Decimal
from functools import partial
from typing import Any, Final

from sqlglot import exp

from headrace.database.config import Reference, Sharded
from headrace.database.planning.scope import Catalog
from headrace.database.planning.statement import Kind, Statement, read_statement, unended, with_parameters
from headrace.database.postgres.batch import Batch
from headrace.database.postgres.nodes import Node
from headrace.database.postgres.pipeline import Params
from headrace.database.postgres.rows import Row, row_of
from headrace.errors import BackendError, CallerError, HeadraceError, StatementFailed

KEYS_MAX: Final = 500
"""Keys of one statement. Beyond it a batch only makes its first caller wait for its last."""
_GATHERS_MAX = 1000

# As psycopg would send them. Of others, above all str, the server infers the type from the statement, as ever.
_TYPES: Final[Mapping[type, str]] = {
    int: "bigint",
    float: "double precision",
    bool: "boolean",
    bytes: "bytea",
    uuid.UUID: "uuid",
    Decimal: "numeric",
    date: "date",
}
# Equal values of these are the same value to Postgres; 1.0 and 1.00 are not.
_EXACT: Final = frozenset({int, str, bool, bytes, uuid.UUID, type(None)})
# Not datetime: whether it has a time zone is the value's own affair, and decides how it is compared.
_SCALARS: Final = frozenset({*_TYPES, str, type(None)})

Signature = tuple[type, ...]


def is_point_read(statement: Statement, batch_by: Mapping[str, str]) -> bool:
    """Whether it is a SELECT that holds a table's `batch_by` column to one parameter, and may run for many at once."""
    if statement.kind is not Kind.SELECT or not statement.read_only or not isinstance(statement.tree, exp.Select):
        return False
    columns = {batch_by[use.name] for use in statement.uses if use.name in batch_by}
    where = statement.tree.args.get("where")
    if not columns or where is None or _counts_by_parameter(statement.tree):
        return False
    conjuncts = where.this.flatten() if isinstance(where.this, exp.And) else (where.this,)
    return any(_holds(conjunct.unnest(), columns) for conjunct in conjuncts)


def _counts_by_parameter(tree: exp.Select) -> bool:
    """LIMIT and OFFSET must be the same for all calls: Postgres counts once."""
    return any(part is not None and part.find(exp.Parameter) for part in map(tree.args.get, ("limit", "offset")))


def _holds(condition: Any, columns: set[str]) -> bool:
    if not isinstance(condition, exp.EQ):
        return False
    sides = (condition.left, condition.right)
    return any(isinstance(side, exp.Parameter) for side in sides) and any(
        isinstance(side, exp.Column) and side.name in columns for side in sides
    )


def gathered(sql: str, types: Sequence[str]) -> str:
    """The statement for arrays of its parameters, of these types: its rows, with the number of their caller before."""
    arrays = ", ".join(f"${number}::{name}[]" for number, name in enumerate(types, 1))
    names = ", ".join(f"headrace_{number}" for number in range(1, len(types) + 1))
    text = with_parameters(unended(sql), lambda number: f"headrace_keys.headrace_{number}")
    return (
        f"SELECT headrace_keys.headrace_call, headrace_rows.* FROM unnest({arrays}) WITH ORDINALITY"  # noqa: S608 - the caller's own
        f" AS headrace_keys({names}, headrace_call) CROSS JOIN LATERAL (\n{text}\n) AS headrace_rows"
    )


def _array(kind: type, values: Sequence[Any]) -> Any:
    """An array parameter. Of numbers in its text form: the driver's own takes as long as all the rest of the call."""
    return "{" + ",".join(map(str, values)) + "}" if kind is int else list(values)


def _numbered(columns: tuple[str, ...]) -> Callable[[Sequence[Any]], tuple[int, Row]]:
    make = row_of(columns[1:])
    return lambda values: (values[0], make(values[1:]))


class PointReads:
    """The reads of one database that may travel together."""

    def __init__(self, tables: Mapping[str, Sharded | Reference], catalog: Catalog, *, waiting_max: int) -> None:
        self._batch_by = {name: table.batch_by for name, table in tables.items() if table.batch_by is not None}
        self._catalog = catalog
        self._waiting_max = waiting_max
        self._parameters: OrderedDict[str, int] = OrderedDict()
        """By text: how many parameters a point read has; 0: it is none."""
        self._gathers: dict[tuple[Any, ...], _Gather] = {}
        """By shard, text and types of the parameters."""

    def of(self, node: Node, sql: str, params: Params) -> Callable[[Params], Awaitable[list[Row]]] | None:
        """Who answers this read together with others; None: it goes alone."""
        gather = self._gathers.get((node.name, sql, *map(type, params)))
        if gather is None:
            gather = self._join(node, sql, params)
        return None if gather is None else gather.submit

    async def close(self) -> None:
        """Answer those who wait."""
        await asyncio.gather(*(gather.close() for gather in self._gathers.values()))

    def _learn(self, sql: str) -> int:
        try:
            statement = read_statement(sql, self._catalog)
        except CallerError:
            parameters = 0
        else:
            parameters = statement.parameters if is_point_read(statement, self._batch_by) else 0
        self._parameters[sql] = parameters
        if len(self._parameters) > _GATHERS_MAX:
            self._parameters.popitem(last=False)
        return parameters

    def _join(self, node: Node, sql: str, params: Params) -> "_Gather | None":
        parameters = self._parameters.get(sql)
        if parameters is None:
            parameters = self._learn(sql)
        signature = tuple(map(type, params))
        if parameters == 0 or parameters != len(params) or not _SCALARS.issuperset(signature):
            return None
        if len(self._gathers) >= _GATHERS_MAX and not self._make_room():
            return None
        forget = partial(self._forget, sql)
        gather = _Gather(node, sql, signature, forget=forget, waiting_max=self._waiting_max)
        self._gathers[node.name, sql, *signature] = gather
        return gather

    def _make_room(self) -> bool:
        idle = next((key for key, gather in self._gathers.items() if gather.is_idle), None)
        if idle is not None:
            del self._gathers[idle]
        return idle is not None

    def _forget(self, sql: str) -> None:
        """Send it alone from now on."""
        self._parameters[sql] = 0
        for key in [key for key in self._gathers if key[1] == sql]:
            del self._gathers[key]


class _Gather(Batch[Params, list[Row]]):
    """The calls of one statement on one shard with parameters of the same types."""

    def __init__(
        self, node: Node, sql: str, signature: Signature, *, forget: Callable[[], None], waiting_max: int
    ) -> None:
        super().__init__(
            self._answers,
            name=f"The point reads of shard {node.name}",
            items_max=KEYS_MAX,
            in_flight_max=2,
            waiting_max=waiting_max,
            may_abandon=True,
        )
        self._node = node
        self._sql = sql
        self._signature = signature
        self._forget = forget
        self._text: str | None = None

    async def _answers(self, calls: Sequence[Params]) -> Sequence[list[Row] | HeadraceError]:
        if len(calls) == 1:
            return await self._one_by_one(calls)
        # Callers who ask the same share an answer.
        asked = list(dict.fromkeys(calls)) if _EXACT.issuperset(self._signature) else calls
        try:
            rows = await self._ask(asked)
        except StatementFailed:
            # A value that the column's type cannot hold fails a whole array. Whose it was shows when each goes alone.
            self._text = None
            outcomes = await self._one_by_one(calls)
            if not any(isinstance(outcome, HeadraceError) for outcome in outcomes):
                self._forget()  # all are well alone: it is the statement that cannot be gathered
            return outcomes
        by_call: list[list[Row]] = [[] for _ in asked]
        for number, row in rows:
            by_call[number - 1].append(row)
        if len(asked) == len(calls):
            return by_call
        answers = dict(zip(asked, by_call, strict=True))
        return [answers[call].copy() for call in calls]

    async def _ask(self, asked: Sequence[Params]) -> list[tuple[int, Row]]:
        if self._text is None:
            declared = [_TYPES.get(kind, "unknown") for kind in self._signature]
            self._text = gathered(self._sql, await self._node.parameter_types(self._sql, declared))
        columns = [
            _array(kind, values) for kind, values in zip(self._signature, zip(*asked, strict=True), strict=True)
        ]
        return await self._node.fetch_as(_numbered, self._text, columns)

    async def _one_by_one(self, calls: Sequence[Params]) -> Sequence[list[Row] | HeadraceError]:
        if len(calls) == 1:
            return [await self._node.fetch(self._sql, calls[0], read_only=True)]
        return await asyncio.gather(*(self._alone(call) for call in calls))

    async def _alone(self, call: Params) -> list[Row] | HeadraceError:
        try:
            return await self._node.fetch(self._sql, call, read_only=True)
        except (CallerError, BackendError) as error:
            return error
