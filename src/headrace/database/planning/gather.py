"""A SELECT that no shard can answer alone: its rows are brought to one shard, and Postgres answers there. Pure.

Every sharded table of the statement becomes a temporary table on one shard, with the columns that the statement uses
and the rows that the conditions on that table alone leave over; then the statement runs over these. So windows, joins
by anything, set operations and correlated subqueries have exactly Postgres' meaning, at the price of moving rows: the
limits on them are in the configuration.
"""

import re
from dataclasses import dataclass
from typing import Final

from sqlglot import exp

from headrace.database.planning.scope import Use
from headrace.database.planning.select_shape import FOUND, USE
from headrace.database.planning.statement import DIALECT, Rendered, Statement, render

_PLACE: Final = "headrace_parameter_"
_PLACES = re.compile(rf'"?{_PLACE}(\d+)"?')


@dataclass(frozen=True, slots=True)
class Fragments:
    """SQL in pieces, with a parameter of the caller between each two: COPY takes no parameters, so they are written
    into it as literals.
    """

    pieces: tuple[str, ...]
    parameters: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Pull:
    """Rows of one table to bring together."""

    table: str
    """The temporary table that takes them."""
    define: str
    """Makes it, with the types and collations of the original."""
    select: Fragments
    """What every shard sends."""
    indexes: tuple[str, ...] = ()
    """Makes what a subquery needs that looks rows up one by one."""


@dataclass(frozen=True, slots=True)
class Gathering:
    """What to bring together, and the statement over it."""

    pulls: tuple[Pull, ...]
    final: Rendered
    reason: str
    """Why the shards could not answer each for itself."""


def gathering(statement: Statement, reason: str) -> Gathering:
    """How to answer a SELECT in one place."""
    final = statement.tree.copy()
    by_node: dict[int, list[Use]] = {}
    for use in statement.sharded:
        by_node.setdefault(id(use.node), []).append(use)
    # Tables that are needed whole are brought once, however often the statement names them.
    shared: dict[tuple[str, int], list[list[Use]]] = {}
    for node, uses in by_node.items():
        shared.setdefault((uses[0].name, node if _conditions(uses) else 0), []).append(uses)
    known = _columns(statement)
    pulls = []
    for number, together in enumerate(shared.values()):
        name = f"headrace_rows_{number}"
        nodes = [uses[0].node for uses in together]
        columns = None if known is None else set().union(*(known.get(id(node), set()) for node in nodes))
        pulls.append(_pull(name, together, columns))
        marks = {node.meta[USE] for node in nodes}
        for table in final.find_all(exp.Table):
            if table.meta.get(USE) in marks:
                _replace(table, name)
    for column in final.find_all(exp.Column):
        if column.args.get("db"):  # schema.table.column, whose table is no longer in that schema
            column.set("db", None)
    return Gathering(tuple(pulls), render(final), reason)


def _conditions(uses: list[Use]) -> list[exp.Expr]:
    """What the rows of a table are held to. Through a WITH query a table may be used twice: what both are held to."""
    return [node for node in uses[0].pushed if all(any(node is other for other in use.pushed) for use in uses)]


def _replace(table: exp.Table, name: str) -> None:
    if not table.args.get("alias"):
        table.set("alias", exp.TableAlias(this=table.this.copy()))
    table.set("this", exp.to_identifier(name))
    table.set("db", None)


def _columns(statement: Statement) -> dict[int, set[str]] | None:
    """The columns that the statement uses, by table node; None: all, because some cannot be told."""
    tree = statement.tree
    if any(True for star in tree.find_all(exp.Star) if not isinstance(star.parent, exp.Count)):
        return None
    if any(alias.args.get("columns") for alias in tree.find_all(exp.TableAlias)):
        return None
    used: dict[int, set[str]] = {}
    outputs = {item.alias for select in tree.find_all(exp.Select) for item in select.expressions}
    for join in tree.find_all(exp.Join):
        if join.args.get("using") or join.args.get("method"):
            return None
    for column in tree.find_all(exp.Column):
        index = column.meta.get(USE)
        if index is not None:
            identifier = column.this
            name = identifier.this if identifier.args.get("quoted") else str(identifier.this).lower()
            used.setdefault(id(statement.uses[index].node), set()).add(name)
        elif not column.meta.get(FOUND) and not (
            column.name in outputs and column.find_ancestor(exp.Order, exp.Group)
        ):
            return None
    return used


def _pull(name: str, together: list[list[Use]], columns: set[str] | None) -> Pull:
    use = together[0][0]
    table = use.node.copy()
    for clause in ("joins", "sample"):
        table.set(clause, None)
    if columns is None:
        items: list[exp.Expr] = [exp.Star()]
    else:
        items = [exp.column(exp.to_identifier(column, quoted=True)) for column in sorted(columns)]
    query = exp.Select(expressions=items or [exp.alias_(exp.Null(), "nothing")]).from_(table)
    define = f"CREATE TEMPORARY TABLE {name} ON COMMIT DROP AS {query.sql(dialect=DIALECT)} WITH NO DATA"
    conditions = [condition.copy() for condition in _conditions(together[0])]
    for condition in conditions:
        for column in [condition, *condition.find_all(exp.Column)]:
            if isinstance(column, exp.Column):
                column.set("table", exp.to_identifier(use.alias, quoted=True))
        query = query.where(condition, copy=False)
    for parameter in list(query.find_all(exp.Parameter)):
        parameter.replace(exp.Var(this=f"{_PLACE}{int(parameter.name) - 1}"))
    split = _PLACES.split(query.sql(dialect=DIALECT))
    columns_looked_up = sorted(set().union(*(each.looked_up for uses in together for each in uses)))
    indexes = tuple(f'CREATE INDEX ON {name} ("{column}")' for column in columns_looked_up)
    fragments = Fragments(tuple(split[::2]), tuple(int(index) for index in split[1::2]))
    return Pull(name, define, fragments, indexes)
