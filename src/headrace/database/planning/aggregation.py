"""How aggregates over several shards become partial aggregates on each, and one aggregate over those. Pure.

Count is a sum of counts, avg a sum over a count, a variance comes from counts, sums and sums of squares. Both halves
are SQL that Postgres computes, so HAVING, ORDER BY, rounding and types are its own.

Exact: everything over integers, numerics, dates, intervals, text. Not in the last bits: sums, averages and variances
over real and double precision, which depend on the order of addition on a single Postgres already. A variance of
floats is combined by the update of means and squared deviations of Chan, Golub and LeVeque (1979), not by sums of
squares, which would lose all digits when the mean is large.
"""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final

from sqlglot import exp

from headrace.database.planning.column_names import column_name
from headrace.database.planning.select_shape import (
    USE,
    clauses,
    group_expressions,
    has_grouping_sets,
    is_aggregate,
    is_star,
    nested_queries,
    own_expressions,
)
from headrace.database.planning.statement import DIALECT, Rendered, render

PARTIALS: Final = "headrace_partials"
_ROOT_DIGITS: Final = 60
"""More than any root has that is rounded afterwards, so that rounding happens once."""


@dataclass(frozen=True, slots=True)
class Combination:
    """Every shard aggregates its rows; `combine` aggregates that."""

    partial: Rendered
    columns: int
    """How many columns the partial results have."""
    groups: tuple[int, ...]
    """Which of them the statement groups by."""
    final: Rendered
    """Over the partial results, with marks that `combined` replaces when their types are known."""

    def combined(self, types: Sequence[str], collations: Sequence[str | None]) -> str:
        """The statement over `$n::text[]`, one array a column after the statement's own parameters."""
        return _combined(self, types, collations)


@dataclass(frozen=True, slots=True)
class Undivided:
    """No shard can answer for itself."""

    reason: str


def canonical(node: exp.Expr) -> str:
    """The text of an expression with every column called by its table's use, so that `a.x` and `x` compare equal."""
    copy = node.copy().unnest()
    for part in [copy, *copy.find_all(exp.Column, exp.Identifier)]:
        if isinstance(part, exp.Column) and part.meta.get(USE) is not None:
            part.set("table", exp.to_identifier(f"use {part.meta[USE]}", quoted=True))
        elif isinstance(part, exp.Identifier) and not part.args.get("quoted"):
            part.set("this", str(part.this).lower())
    return str(copy.sql(dialect=DIALECT, comments=False))


class _Unsupported(Exception):
    """A way out of a recursion, never seen outside."""


def partial_column(place: int) -> exp.Column:
    """A column of the partial results. By its table's name, too: ORDER BY would take `c0` for an output called so."""
    return exp.column(f"c{place}", table=PARTIALS)


class Partials:
    """The columns of the partial results, each distinct expression once."""

    def __init__(self) -> None:
        self.items: list[exp.Expr] = []
        self.grouped: list[int] = []
        self._places: dict[str, int] = {}

    def place(self, node: exp.Expr, *, grouped: bool = False) -> int:
        """The number of the column that has this expression."""
        key = f"{'g' if grouped else 'a'} {canonical(node)}"
        if key not in self._places:
            self._places[key] = len(self.items)
            if grouped:
                self.grouped.append(len(self.items))
            self.items.append(node.copy())
        return self._places[key]

    def column(self, node: exp.Expr, *, grouped: bool = False) -> exp.Expr:
        """The same as an expression over the partial results."""
        return partial_column(self.place(node, grouped=grouped))


def combination(tree: exp.Select) -> Combination | Undivided:
    """How a SELECT with aggregates is divided."""
    group = tree.args.get("group")
    if group is not None and has_grouping_sets(group):
        return Undivided("GROUPING SETS, ROLLUP, CUBE and () group rows of several shards")
    if any(True for clause in clauses(tree) for _ in nested_queries(clause)):
        return Undivided("a subquery stands beside aggregates over several shards")
    if any(
        isinstance(node, exp.UDTF | exp.Explode | exp.ExplodingGenerateSeries)
        for item in tree.expressions
        for node in (item, *own_expressions(item))
    ):
        return Undivided("a function that returns rows stands beside aggregates over several shards")
    partials = Partials()
    groups = group_expressions(tree)
    places = {canonical(node): partials.place(node, grouped=True) for node in groups}
    own_groups = tuple(places.values())
    rewriter = _Rewriter(partials, places)
    try:
        final = _final(tree, rewriter)
    except _Unsupported as unsupported:
        return Undivided(str(unsupported))
    if not partials.items:
        return Undivided("it groups rows of several shards and looks at none of their columns")
    partial = tree.copy()
    for name in ("having", "order", "limit", "offset", "distinct", "group", "windows"):
        partial.set(name, None)
    partial.set("expressions", [exp.alias_(node, f"c{n}") for n, node in enumerate(partials.items)])
    # By position: an expression with a parameter in it would not be recognised as the one that is selected.
    grouping = [exp.Literal.number(place + 1) for place in partials.grouped]
    partial.set("group", exp.Group(expressions=grouping) if grouping else None)
    groups_of_final = (*own_groups, *rewriter.dependent)
    if groups_of_final:
        final.set("group", exp.Group(expressions=[partial_column(place) for place in dict.fromkeys(groups_of_final)]))
    return Combination(render(partial), len(partials.items), tuple(dict.fromkeys(groups_of_final)), render(final))


def _final(tree: exp.Select, rewriter: "_Rewriter") -> exp.Select:
    outputs = {column_name(item) for item in tree.expressions}
    final = exp.Select()
    items = []
    for item in tree.expressions:
        if is_star(item):
            raise _Unsupported("SELECT * stands beside aggregates over several shards")
        name = column_name(item)
        rewritten = rewriter.rewrite(item.unalias())
        items.append(rewritten if name == "?column?" else exp.alias_(rewritten, name, quoted=True))
    final.set("expressions", items)
    if isinstance(having := tree.args.get("having"), exp.Having):
        final.set("having", exp.Having(this=rewriter.rewrite(having.this)))
    if isinstance(distinct := tree.args.get("distinct"), exp.Distinct):
        on = distinct.args.get("on")
        final.set(
            "distinct",
            exp.Distinct(
                on=exp.Tuple(expressions=[rewriter.rewrite(node) for node in on.expressions])
                if on is not None
                else None
            ),
        )
    if (order := tree.args.get("order")) is not None:
        final.set("order", exp.Order(expressions=[_reordered(node, outputs, rewriter) for node in order.expressions]))
    if tree.args.get("windows"):
        final.set("windows", [rewriter.rewrite(window) for window in tree.args["windows"]])
    for name in ("limit", "offset"):
        if tree.args.get(name) is not None:
            final.set(name, tree.args[name].copy())
    final.set("from_", exp.From(this=exp.to_table(PARTIALS)))
    return final


def _reordered(ordered: exp.Ordered, outputs: set[str], rewriter: "_Rewriter") -> exp.Expr:
    copy = ordered.copy()
    node = ordered.this
    is_output = isinstance(node, exp.Column) and not node.args.get("table") and column_name(node) in outputs
    if not is_output and not isinstance(node, exp.Literal):
        copy.set("this", rewriter.rewrite(node))
    return copy


def _mark(kind: str, *places: int) -> str:
    """Stands for SQL that depends on the types of partial columns."""
    return f"\x01{kind} {' '.join(map(str, places))}\x02"


_MARK = re.compile("\x01(\\w+) ([\\d ]+)\x02")


class _Rewriter:
    """Turns expressions over rows into expressions over partial results."""

    def __init__(self, partials: Partials, groups: dict[str, int]) -> None:
        self._partials = partials
        self._groups = groups
        self.dependent: list[int] = []
        """Columns that are neither grouped by nor aggregated: a primary key among the groups determines them."""

    def rewrite(self, node: exp.Expr) -> exp.Expr:
        place = self._groups.get(canonical(node))
        if place is not None:
            return partial_column(place)
        if isinstance(node, exp.Filter) or is_aggregate(node):
            return self._aggregate(node)
        if isinstance(node, exp.Column):
            place = self._partials.place(node, grouped=True)
            self.dependent.append(place)
            return partial_column(place)
        copy = node.copy()
        inner = copy.this if isinstance(copy, exp.Window) else None
        for name, value in node.args.items():
            if inner is not None and name == "this":
                copy.set("this", self._window_function(node.this))
            elif isinstance(value, list):
                copy.set(name, [self.rewrite(part) if isinstance(part, exp.Expr) else part for part in value])
            elif isinstance(value, exp.Expr) and not isinstance(value, exp.Identifier | exp.DataType):
                copy.set(name, self.rewrite(value))
        return copy

    def _window_function(self, function: exp.Expr) -> exp.Expr:
        if isinstance(function, exp.Filter | exp.IgnoreNulls | exp.RespectNulls | exp.WithinGroup):
            raise _Unsupported("a window function with a filter stands over aggregates of several shards")
        copy = function.copy()
        for name, value in function.args.items():
            if isinstance(value, list):
                copy.set(name, [self.rewrite(part) if isinstance(part, exp.Expr) else part for part in value])
            elif isinstance(value, exp.Expr) and not isinstance(value, exp.Star):
                copy.set(name, self.rewrite(value))
        return copy

    def _aggregate(self, node: exp.Expr) -> exp.Expr:
        where = node.expression if isinstance(node, exp.Filter) else None
        function = node.this if isinstance(node, exp.Filter) else node
        argument = function.this if isinstance(function.this, exp.Expr) else None
        if isinstance(function, exp.Anonymous):
            argument = function.expressions[0] if len(function.expressions) == 1 else None
        if isinstance(argument, exp.Distinct):
            return self._distinct(function, argument, where)
        rule = _RULES.get(type(function))
        if isinstance(function, exp.Anonymous):
            rule = _ANONYMOUS_RULES.get(function.name.lower())
        if rule is None or argument is None or isinstance(argument, exp.Order):
            raise _Unsupported(f"{column_name(function)}() needs all rows in one place")

        def partial(sql: str) -> int:
            """A partial aggregate; `{x}` is the argument."""
            called: exp.Expr = exp.maybe_parse(sql.replace("{x}", "headrace_x"), dialect=DIALECT)
            for column in list(called.find_all(exp.Column)):
                column.replace(
                    exp.Paren(this=argument.copy()) if not isinstance(argument, exp.Star) else argument.copy()
                )
            if where is not None:
                called = exp.Filter(this=called, expression=where.copy())
            return self._partials.place(called)

        return exp.Paren(this=exp.Var(this=rule(partial)))

    def _distinct(self, function: exp.Expr, distinct: exp.Distinct, where: exp.Expr | None) -> exp.Expr:
        """Shards send their distinct values as further groups; the duplicates go when all are together."""
        if not isinstance(function, exp.Count | exp.Sum | exp.Avg | exp.Min | exp.Max):
            raise _Unsupported(f"{column_name(function)}(DISTINCT) needs all rows in one place")
        if len(distinct.expressions) != 1:
            raise _Unsupported("DISTINCT over several arguments needs all rows in one place")
        value = distinct.expressions[0]
        if isinstance(value, exp.Tuple):
            columns: exp.Expr = exp.Tuple(
                expressions=[self._partials.column(part, grouped=True) for part in value.expressions]
            )
        else:
            columns = self._partials.column(value, grouped=True)
        copy = function.copy()
        copy.set("this", exp.Distinct(expressions=[columns]))
        if where is None:
            return copy
        condition = self._partials.column(where.this, grouped=True)
        return exp.Filter(this=copy, expression=exp.Where(this=condition))


_Partial = Callable[[str], int]
_Rule = Callable[[_Partial], str]


def _same(name: str) -> _Rule:
    return lambda partial: f"{name}(c{partial(f'{name}({{x}})')})"


def _variance(kind: str) -> _Rule:
    def rule(partial: _Partial) -> str:
        return _mark(
            kind,
            partial("COUNT({x})"),
            partial("SUM(({x})::numeric)"),
            partial("SUM(({x})::numeric * ({x})::numeric)"),
            partial("AVG({x})"),
            partial("VAR_POP({x})"),
        )

    return rule


_RULES: Final[dict[type[exp.Expr], _Rule]] = {
    exp.Count: lambda partial: f"COALESCE(SUM(c{partial('COUNT({x})')}), 0)::bigint",
    exp.Sum: lambda partial: _mark("sum", partial("SUM({x})")),
    exp.Min: _same("MIN"),
    exp.Max: _same("MAX"),
    exp.Avg: lambda partial: _mark("avg", partial("SUM({x})"), partial("COUNT({x})"), partial("AVG({x})")),
    exp.Stddev: _variance("stddev_samp"),
    exp.StddevSamp: _variance("stddev_samp"),
    exp.StddevPop: _variance("stddev_pop"),
    exp.Variance: _variance("var_samp"),
    exp.VariancePop: _variance("var_pop"),
    exp.LogicalAnd: _same("BOOL_AND"),
    exp.LogicalOr: _same("BOOL_OR"),
    exp.BitwiseAndAgg: _same("BIT_AND"),
    exp.BitwiseOrAgg: _same("BIT_OR"),
    exp.BitwiseXorAgg: _same("BIT_XOR"),
}
_ANONYMOUS_RULES: Final[dict[str, _Rule]] = {
    name: _same(name.upper()) for name in ("every", "bool_and", "bool_or", "bit_and", "bit_or", "bit_xor")
}


# when the types are known


def _combined(combination: Combination, types: Sequence[str], collations: Sequence[str | None]) -> str:
    first = len(combination.final.parameters) + 1
    columns = [
        f"raw.c{n}::{kind}" + (f" COLLATE {collation}" if collation is not None else "") + f" AS c{n}"
        for n, (kind, collation) in enumerate(zip(types, collations, strict=True))
    ]
    arrays = ", ".join(f"${first + n}::text[]" for n in range(combination.columns))
    names = ", ".join(f"c{n}" for n in range(combination.columns))
    means: dict[int, str] = {}
    body = _MARK.sub(lambda mark: _expanded(mark, types, means, combination.groups), combination.final.sql)
    # Nothing of a caller's is in this text but what Postgres itself calls its types and collations.
    source = f"SELECT {', '.join(columns)} FROM unnest({arrays}) AS raw({names})"  # noqa: S608 - see above
    if means:
        source = f"SELECT part.*, {', '.join(means.values())} FROM ({source}) AS part"  # noqa: S608 - see above
    return f"WITH {PARTIALS} AS ({source}) {body}"


def _expanded(mark: re.Match[str], types: Sequence[str], means: dict[int, str], groups: Sequence[int]) -> str:
    kind, places = mark[1], [int(place) for place in mark[2].split()]
    if kind == "sum":
        return f"SUM(c{places[0]})::{types[places[0]]}"
    if kind == "avg":
        total, count, average = places
        if types[average] == "numeric":
            return f"SUM(c{total})::numeric / NULLIF(SUM(c{count}), 0)"
        if types[total] == "real":  # its sum has lost more digits than an average in double precision may
            return f"SUM(c{average} * c{count}) / NULLIF(SUM(c{count}), 0)::double precision"
        return f"SUM(c{total}) / NULLIF(SUM(c{count}), 0)::double precision"
    count, total, squares, average, variance = places
    rooted, population = kind.startswith("stddev"), kind.endswith("pop")
    enough = f"SUM(c{count}) > {0 if population else 1}"
    if types[variance] == "numeric":
        above = f"(SUM(c{count}) * SUM(c{squares}) - SUM(c{total}) * SUM(c{total}))"
        below = f"(SUM(c{count}) * {f'SUM(c{count})' if population else f'(SUM(c{count}) - 1)'})"
        value = f"({above} / {below})"
        found = _root(value) if rooted else value
        return f"CASE WHEN {enough} THEN CASE WHEN {above} <= 0 THEN 0 ELSE {found} END END"
    window = f"OVER (PARTITION BY {', '.join(f'c{group}' for group in groups)})" if groups else "OVER ()"
    means[count] = (
        f"SUM(c{average} * c{count}) {window} / NULLIF(SUM(c{count}) {window}, 0)::double precision AS m{count}"
    )
    deviations = f"SUM(c{variance} * c{count} + c{count} * (c{average} - m{count}) ^ 2)"
    value = f"{deviations} / {f'SUM(c{count})' if population else f'(SUM(c{count}) - 1)'}::double precision"
    return f"CASE WHEN {enough} THEN {f'SQRT({value})' if rooted else value} END"


def _root(value: str) -> str:
    """The root with as many digits as the quotient, as `numeric_stddev_internal` of numeric.c has it.

    SQRT alone would round to digits of its own, and rounding that again goes wrong where they end in 5.
    """
    return f"ROUND(SQRT({value} + 0.{'0' * _ROOT_DIGITS}), COALESCE(SCALE({value}), 0))"
