"""How a SELECT over several shards becomes one question to each and one way to put the answers together. Pure.

Two ways. *Rows*: what one shard answers is a part of the whole answer; the parts are concatenated, or merged by the
ORDER BY. *Combination*: every shard aggregates its own rows, and one of the shards aggregates these partial results
(see `aggregation`). What is neither, such as windows over rows of several shards, says why.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from sqlglot import exp

from headrace.database.planning.aggregation import PARTIALS, Combination, Partials, Undivided, canonical, combination
from headrace.database.planning.column_names import column_name
from headrace.database.planning.conditions import term_of
from headrace.database.planning.key_terms import Constant, Parameter, Term
from headrace.database.planning.select_shape import (
    clauses,
    distinct_is_local,
    groups_are_local,
    has_aggregate,
    is_star,
    nested_queries,
    windows_are_local,
)
from headrace.database.planning.statement import Rendered, Statement, render


@dataclass(frozen=True, slots=True)
class OrderKey:
    """One key of an ORDER BY."""

    position: int
    """Of the column that it sorts by; negative ones count from the end."""
    descending: bool
    nulls_first: bool


@dataclass(frozen=True, slots=True)
class Rows:
    """Every shard answers a part of the rows."""

    query: Rendered
    """What each shard is asked."""
    order: tuple[OrderKey, ...] = ()
    hidden: int = 0
    """Columns at the end that only sort."""
    limit: Term | None = None
    offset: Term | None = None
    in_text: Rendered | None = None
    """The query with every key once more as text at its end, for keys that only Postgres can compare."""


Division = Rows | Combination | Undivided


def divide(statement: Statement) -> Division:
    """How a SELECT whose sharded tables are joined by their keys is divided among shards."""
    tree = statement.tree
    if statement.reason is not None:
        return Undivided(statement.reason)
    if statement.strings > 1:
        return Undivided("sharded tables are joined by something else than their shard keys")
    if not isinstance(tree, exp.Select):
        return Undivided("only a plain SELECT can be answered shard by shard")
    reason = _limit_reason(tree)
    if reason is not None:
        return Undivided(reason)
    aggregated = has_aggregate(tree) or tree.args.get("group") is not None or tree.args.get("having") is not None
    if aggregated and not groups_are_local(tree):
        return combination(tree)
    if not windows_are_local(tree):
        return Undivided("a window looks at rows of several shards")
    if tree.args.get("distinct") is not None and not distinct_is_local(tree):
        return _distinct(tree)
    return _rows(tree)


def _limit_reason(tree: exp.Select) -> str | None:
    limit, offset = tree.args.get("limit"), tree.args.get("offset")
    if isinstance(limit, exp.Fetch) and (limit.args.get("limit_options") is not None):
        return "FETCH ... WITH TIES depends on rows of other shards"
    if any(clause is not None and _count(clause) is None for clause in (limit, offset)):
        return "LIMIT or OFFSET is computed"
    return None


def _count(clause: exp.Expr | None) -> Term | None:
    """The value of a LIMIT, FETCH or OFFSET."""
    if clause is None:
        return None
    term = term_of(clause.args.get("count") if isinstance(clause, exp.Fetch) else clause.expression)
    if isinstance(term, Constant) and isinstance(term.value, str):
        return None
    return term if isinstance(term, Constant | Parameter) else None


# rows


def _rows(tree: exp.Select) -> Rows:
    limit, offset = _count(tree.args.get("limit")), _count(tree.args.get("offset"))
    order, added = _order(tree)
    query = tree.copy()
    keys = [_as(node.copy(), f"headrace_key_{n}") for n, node in enumerate(added)]
    query.set("expressions", query.expressions + keys)
    _push_limit(query)
    in_text = None
    if order:
        positions = [_key_node(tree, added, key) for key in order]
        in_text = None if any(node is None for node in positions) or tree.args.get("distinct") is not None else query
        if in_text is not None:
            texts = [
                _as(exp.cast(exp.Paren(this=node.copy()), "text"), text_name(n))  # type: ignore[union-attr]
                for n, node in enumerate(positions)
            ]
            in_text = query.copy()
            in_text.set("expressions", in_text.expressions + texts)
    rendered = render(query)
    return Rows(rendered, order, len(added), limit, offset, render(in_text) if in_text is not None else None)


def text_name(number: int) -> str:
    """What the text form of a sort key is called."""
    return f"headrace_text_{number}"


def _as(node: exp.Expr, name: str) -> exp.Expr:
    return exp.alias_(node, name)


def _key_node(tree: exp.Select, added: list[exp.Expr], key: OrderKey) -> exp.Expr | None:
    items = [*tree.expressions, *added]
    if key.position >= 0 and any(is_star(item) for item in items[: key.position + 1]):
        return None  # an ordinal at or behind a *: which column that is only the server knows
    item: exp.Expr = items[key.position].unalias()
    return item


def _order(tree: exp.Select) -> tuple[tuple[OrderKey, ...], list[exp.Expr]]:
    """Where every key of the ORDER BY stands in the rows, and the expressions to add because they stand nowhere."""
    clause = tree.args.get("order")
    if clause is None:
        return (), []
    found = [(_output_of(tree, ordered.this), ordered) for ordered in clause.expressions]
    added = [place for place, _ in found if not isinstance(place, int)]
    keys, counted = [], 0
    for place, ordered in found:
        if isinstance(place, int):
            position = place if place < 0 and not added else place - len(added) if place < 0 else place
        else:
            position = counted - len(added)
            counted += 1
        descending = bool(ordered.args.get("desc"))
        keys.append(OrderKey(position, descending, bool(ordered.args.get("nulls_first"))))
    return tuple(keys), added


def _output_of(tree: exp.Select, node: exp.Expr) -> int | exp.Expr:
    """The place of an ORDER BY expression among the outputs, or itself. Behind a `*` places count from the end."""
    items = tree.expressions
    stars = [index for index, item in enumerate(items) if is_star(item)]

    def place(index: int) -> int:
        return index - len(items) if stars and index > stars[0] else index

    if isinstance(node, exp.Literal) and not node.is_string and str(node.this).isdigit():
        index = int(node.this) - 1
        # With a * the server alone knows which column that is: it stands there, whatever it is called.
        return index if stars else place(index)
    if isinstance(node, exp.Column) and not node.args.get("table"):
        for index, item in enumerate(items):
            if not is_star(item) and column_name(item) == column_name(node):
                return place(index)
    wanted = canonical(node)
    for index, item in enumerate(items):
        if not is_star(item) and canonical(item.unalias()) == wanted:
            return place(index)
    return node


def _push_limit(query: exp.Select) -> None:
    """A shard needs to send no more than LIMIT + OFFSET rows."""
    limit, offset = query.args.get("limit"), query.args.get("offset")
    query.set("offset", None)
    if limit is None:
        return
    count = limit.args.get("count") if isinstance(limit, exp.Fetch) else limit.expression
    if count is None:
        return
    total: exp.Expr = count.copy()
    if offset is not None:
        # As numerics, whose sum cannot be too large; a NULL is no limit.
        skip = exp.Coalesce(this=_numeric(offset.expression), expressions=[exp.Literal.number(0)])
        total = exp.Add(this=_numeric(count), expression=skip)
        total = exp.cast(exp.Least(this=total, expressions=[exp.Literal.number(2**63 - 1)]), "bigint")
    query.set("limit", exp.Limit(expression=total))


def _numeric(node: exp.Expr) -> exp.Expr:
    return exp.cast(exp.cast(exp.Paren(this=node.copy()), "bigint"), "numeric")


# combination


def _distinct(tree: exp.Select) -> Division:
    """SELECT DISTINCT over rows of several shards: what each shard finds distinct, made distinct once more."""
    if any(is_star(item) for item in tree.expressions):
        return Undivided("SELECT DISTINCT * spans shards")
    if any(True for clause in clauses(tree) for _ in nested_queries(clause)):
        return Undivided("a subquery stands in a SELECT DISTINCT over several shards")
    partials = Partials()
    places = [partials.column(item.unalias(), grouped=True) for item in tree.expressions]
    named = {column_name(item): item.unalias() for item in tree.expressions}

    def column(node: exp.Expr) -> exp.Expr:
        """The partial column of an expression of DISTINCT ON or ORDER BY, which may name or number an output."""
        if isinstance(node, exp.Literal) and str(node.this).isdigit():
            node = tree.expressions[int(node.this) - 1].unalias()
        elif isinstance(node, exp.Column) and not node.args.get("table") and column_name(node) in named:
            node = named[column_name(node)]
        return partials.column(node, grouped=True)

    on = tree.args["distinct"].args.get("on")
    on_columns = exp.Tuple(expressions=[column(node) for node in on.expressions]) if on is not None else None
    order = tree.args["order"].expressions if tree.args.get("order") is not None else []
    keys = [column(node.this) for node in order]
    final = exp.Select(
        expressions=[
            exp.alias_(place, column_name(item), quoted=True)
            for place, item in zip(places, tree.expressions, strict=True)
        ],
        distinct=exp.Distinct(on=on_columns),
        from_=exp.From(this=exp.to_table(PARTIALS)),
    )
    partial = tree.copy()
    partial.set("expressions", [exp.alias_(node.copy(), f"c{n}") for n, node in enumerate(partials.items)])
    if keys:
        final.set("order", exp.Order(expressions=_sorted_by(order, keys)))
        numbers = [exp.Literal.number(int(key.name[1:]) + 1) for key in keys]
        partial.set("order", exp.Order(expressions=_sorted_by(order, numbers)))
    for name in ("limit", "offset"):
        if tree.args.get(name) is not None:
            final.set(name, tree.args[name].copy())
    _push_limit(partial)
    return Combination(render(partial), len(partials.items), (), render(final))


def _sorted_by(order: list[exp.Expr], keys: Sequence[exp.Expr]) -> list[exp.Expr]:
    """An ORDER BY with other keys in their places."""
    found = []
    for ordered, key in zip(order, keys, strict=True):
        copy = ordered.copy()
        copy.set("this", key)
        found.append(copy)
    return found
