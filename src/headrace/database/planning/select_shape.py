"""What a SELECT is made of: aggregates, groups, windows, and whether these stay on one shard. Pure."""

import re
from collections.abc import Iterator
from typing import Final

from sqlglot import exp

KEY: Final = "headrace key"
USE: Final = "headrace use"
FOUND: Final = "headrace found"
"""Marks on columns: it is a shard key; the table that it belongs to; its source is known."""
NESTED: Final = (exp.Select, exp.SetOperation, exp.Values, exp.Insert, exp.Update, exp.Delete)


def folded(identifier: object) -> str:
    """A name as Postgres folds it."""
    if not isinstance(identifier, exp.Identifier):
        return ""
    return str(identifier.this) if identifier.args.get("quoted") else str(identifier.this).lower()


def conjuncts(condition: exp.Expr | None) -> Iterator[exp.Expr]:
    """The parts of a condition that must all hold."""
    while isinstance(condition, exp.Paren | exp.Where):
        condition = condition.this
    if isinstance(condition, exp.And):
        yield from conjuncts(condition.this)
        yield from conjuncts(condition.expression)
    elif condition is not None:
        yield condition


def nested_queries(node: exp.Expr) -> Iterator[exp.Expr]:
    """The queries in an expression, itself included, not those inside of these."""
    if isinstance(node, NESTED):
        yield node
        return
    for child in node.iter_expressions():
        yield from nested_queries(child)


def is_star(item: exp.Expr) -> bool:
    """Whether a select item is `*` or `table.*`."""
    return isinstance(item, exp.Star) or (isinstance(item, exp.Column) and isinstance(item.this, exp.Star))


def is_key(node: exp.Expr) -> bool:
    """Whether the expression is a shard key."""
    return isinstance(node.unnest(), exp.Column) and bool(node.unnest().meta.get(KEY))


def own_expressions(node: exp.Expr) -> Iterator[exp.Expr]:
    """All nodes below, without those of queries inside."""
    for child in node.iter_expressions():
        if not isinstance(child, NESTED):
            yield child
            yield from own_expressions(child)


def clauses(select: exp.Select) -> Iterator[exp.Expr]:
    """What a select computes: its items, HAVING and ORDER BY, without FROM and WHERE."""
    yield from select.expressions
    for name in ("having", "order", "distinct", "qualify"):
        if isinstance(clause := select.args.get(name), exp.Expr):
            yield clause


def has_aggregate(select: exp.Select) -> bool:
    """Whether the select aggregates, other than in windows."""
    return any(True for _ in aggregates(select))


_AGGREGATE_NAMES = frozenset(
    re.findall(
        r"\S+",
        "every bool_and bool_or bit_and bit_or bit_xor json_agg jsonb_agg json_object_agg jsonb_object_agg xmlagg "
        "range_agg range_intersect_agg any_value mode percentile_cont percentile_disc rank_agg regr_avgx regr_avgy "
        "regr_count regr_intercept regr_r2 regr_slope regr_sxx regr_sxy regr_syy json_arrayagg json_objectagg",
    )
)


def is_aggregate(node: exp.Expr) -> bool:
    """Whether the node calls an aggregate function."""
    if isinstance(node, exp.Anonymous):
        return node.name.lower() in _AGGREGATE_NAMES
    return isinstance(node, exp.AggFunc | exp.WithinGroup | exp.JSONArrayAgg | exp.JSONObjectAgg)


def aggregates(select: exp.Select) -> Iterator[exp.Expr]:
    """The aggregates of a select, outermost first, with their FILTER; those in windows are none."""
    for clause in clauses(select):
        yield from _aggregates_in(clause)


def _aggregates_in(node: exp.Expr) -> Iterator[exp.Expr]:
    if isinstance(node, NESTED):
        return
    if isinstance(node, exp.Window):
        for child in node.this.iter_expressions():
            yield from _aggregates_in(child)
        for name, value in node.args.items():
            for part in value if isinstance(value, list) else [value]:
                if name != "this" and isinstance(part, exp.Expr):
                    yield from _aggregates_in(part)
        return
    if is_aggregate(node) or (isinstance(node, exp.Filter) and is_aggregate(node.this)):
        yield node
        return
    for child in node.iter_expressions():
        yield from _aggregates_in(child)


def group_expressions(select: exp.Select) -> list[exp.Expr]:
    """What a select groups by: ordinals and output names resolved."""
    group = select.args.get("group")
    if group is None:
        return []
    aliases = {item.alias: item.this for item in select.expressions if isinstance(item, exp.Alias)}
    found = []
    for item in group.expressions:
        if isinstance(item, exp.Literal) and not item.is_string and str(item.this).isdigit():
            position = int(item.this) - 1
            found.append(select.expressions[position].unalias() if position < len(select.expressions) else item)
        elif (
            isinstance(item, exp.Column)
            and not item.args.get("table")
            and not item.meta.get(USE) is not None
            and item.name in aliases
        ):
            found.append(aliases[item.name])
        else:
            found.append(item)
    return found


def has_grouping_sets(group: exp.Group) -> bool:
    """Whether rows are grouped in several ways at once."""
    sets = exp.Cube | exp.Rollup | exp.GroupingSets
    nothing = any(isinstance(node, exp.Tuple) and not node.expressions for node in group.expressions)
    return nothing or any(isinstance(node, sets) for node in own_expressions(group))


def groups_are_local(select: exp.Select) -> bool:
    """Whether every group lies on one shard, because the shard key is part of what is grouped by."""
    group = select.args.get("group")
    if group is None or has_grouping_sets(group):
        return False
    return any(is_key(item) for item in group_expressions(select))


def distinct_is_local(select: exp.Select) -> bool:
    """Whether rows that DISTINCT compares lie on one shard."""
    on = select.args["distinct"].args.get("on")
    if on is None:
        return any(is_key(item.unalias()) for item in select.expressions)
    return any(is_key(item) for item in on.expressions)


def windows_are_local(select: exp.Select) -> bool:
    """Whether every window looks at rows of one shard only."""
    named = {folded(window.this): window for window in select.args.get("windows") or ()}
    for clause in clauses(select):
        for node in (clause, *own_expressions(clause)):
            if isinstance(node, exp.Window) and isinstance(node.parent, exp.Expr):
                definition = named.get(folded(node.args.get("alias")), node)
                if not any(is_key(part) for part in definition.args.get("partition_by") or ()):
                    return False
    return True
