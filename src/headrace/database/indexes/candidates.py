"""Which columns a statement compares, joins, sorts, groups and reads, and the indexes that follow. Pure.

An index can help where a bare column is compared: `lower(name) = $1` and `price * 2 > 10` are not seen, and no index
over an expression is proposed.
"""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Final

from sqlglot import exp, parse_one
from sqlglot.errors import SqlglotError
from sqlglot.optimizer.scope import Scope, traverse_scope

from headrace.database.indexes.index import Index, Schema, TableFacts
from headrace.database.planning.select_shape import folded
from headrace.database.planning.statement import DIALECT, with_parameters
from headrace.errors import CallerError

INCLUDE_COLUMNS_MAX: Final = 5
INCLUDE_BYTES_MAX: Final = 96
COLUMNS_MAX: Final = 4
"""Of a key: what stands behind is seldom worth its bytes."""

_EQUAL: Final = (exp.EQ, exp.In, exp.NullSafeEQ)
_RANGE: Final = (exp.GT, exp.GTE, exp.LT, exp.LTE, exp.Between)


@dataclass(slots=True)
class TableUse:
    """What one statement does with one table; columns as SQL writes them."""

    equal: set[str] = field(default_factory=set)
    """Held to a value, or to one of several."""
    ranges: set[str] = field(default_factory=set)
    """Held between values."""
    joined: set[str] = field(default_factory=set)
    """Held to a column of another table, or of a subquery."""
    sorted_by: tuple[str, ...] = ()
    grouped_by: tuple[str, ...] = ()
    read: set[str] = field(default_factory=set)
    """All columns that it needs."""
    whole: bool = False
    """It needs every column."""
    constant: dict[str, str] = field(default_factory=dict)
    """Conditions that hold in every call, by their columns."""

    @property
    def keys(self) -> set[str]:
        """Columns that can be of use in the key of an index."""
        return self.equal | self.ranges | self.joined | set(self.sorted_by) | set(self.grouped_by)


Uses = Mapping[str, TableUse]
"""By the names of the tables as SQL writes them."""


def read_statement(sql: str) -> exp.Expr:
    """The statement as a tree; raises CallerError if sqlglot cannot read it."""
    try:
        # A space behind every parameter: `$1,$` looks to sqlglot like the beginning of a dollar-quoted string.
        return parse_one(with_parameters(sql, lambda number: f"${number} "), dialect=DIALECT)
    except (SqlglotError, RecursionError) as error:
        reason = str(error).split("\n")[0]
        raise CallerError(f"The statement cannot be read: {reason}", fix="Leave it out of the workload.") from error


def uses_of(sql: str, schema: Schema, *, varies: bool = False) -> Uses:
    """What a statement does with each of its tables; `varies` says that its literals are others in other calls."""
    tree = read_statement(sql)
    found: dict[str, TableUse] = {}
    has_parameters = tree.find(exp.Parameter) is not None and not varies
    try:
        scopes = traverse_scope(_as_select(tree))
    except SqlglotError as error:
        raise CallerError(f"The names of the statement cannot be resolved: {error}") from error
    for scope in scopes:
        _Reader(schema, found, keeps_constants=has_parameters).read(scope)
    return found


def _as_select(tree: exp.Expr) -> exp.Expr:
    """An UPDATE or DELETE as the SELECT that finds its rows."""
    if not isinstance(tree, exp.Update | exp.Delete):
        query = tree.expression if isinstance(tree, exp.Insert) else tree
        return query if isinstance(query, exp.Query) else exp.select("1")
    select = exp.Select(expressions=[exp.Star()])
    select.set("from_" if "from_" in exp.Select.arg_types else "from", exp.From(this=tree.this.copy()))
    if where := tree.args.get("where"):
        select.set("where", where.copy())
    return select


class _Reader:
    """Reads one SELECT."""

    def __init__(self, schema: Schema, found: dict[str, TableUse], *, keeps_constants: bool) -> None:
        self._schema = schema
        self._found = found
        self._keeps_constants = keeps_constants

    def read(self, scope: Scope) -> None:
        for source in scope.sources.values():
            facts = self._facts(source)
            if facts is not None:
                use = self._found.setdefault(facts.name, TableUse())
                use.whole |= any(isinstance(each, exp.Star) for each in scope.expression.expressions)
        for column in scope.columns:
            if (owned := self._owner(scope, column)) is not None:
                self._found.setdefault(owned[0], TableUse()).read.add(owned[1])
        for node in scope.find_all(*_EQUAL, *_RANGE, exp.Is, exp.Like):
            self._compare(scope, node)
        self._sort(scope)

    def _compare(self, scope: Scope, node: exp.Expr) -> None:
        sides = [node.this, *([node.expression] if isinstance(node, exp.Binary) else [])]
        owned = [self._owner(scope, side) if isinstance(side, exp.Column) else None for side in sides]
        for number, column in enumerate(owned):
            if column is None:
                continue
            use = self._found.setdefault(column[0], TableUse())
            other = owned[1 - number] if len(owned) == 2 else None
            if other is not None and other[0] == column[0] and not isinstance(node, exp.EQ):
                continue  # `shipped < received` of one row: no index finds it
            self._enter(use, column[1], node, is_joined=other is not None)

    def _enter(self, use: TableUse, column: str, node: exp.Expr, *, is_joined: bool) -> None:
        if is_joined or (isinstance(node, exp.In) and node.args.get("query") is not None):
            use.joined.add(column)
        elif isinstance(node, exp.Is | exp.EQ | exp.In | exp.NullSafeEQ):
            use.equal.add(column)
        elif isinstance(node, _RANGE) or _has_prefix(node):
            use.ranges.add(column)
        condition = _constant(column, node, with_literals=self._keeps_constants)
        if condition is not None:
            use.constant[column] = condition

    def _sort(self, scope: Scope) -> None:
        select = scope.expression
        order, group = select.args.get("order"), select.args.get("group")
        if order is not None:
            names: list[tuple[str, str]] = []
            directions = set()
            for each in order.expressions:
                owned = self._owner(scope, each.this) if isinstance(each.this, exp.Column) else None
                directions.add(bool(each.args.get("desc")))
                if owned is None or len(directions) > 1 or (names and names[0][0] != owned[0]):
                    break
                names.append(owned)
            if names:
                self._found[names[0][0]].sorted_by = tuple(name for _, name in names)[:COLUMNS_MAX]
        if group is not None:
            owners = [self._owner(scope, each) for each in group.expressions if isinstance(each, exp.Column)]
            columns = [each for each in owners if each is not None]
            if columns and len({table for table, _ in columns}) == 1 and len(columns) == len(group.expressions):
                self._found[columns[0][0]].grouped_by = tuple(name for _, name in columns)[:COLUMNS_MAX]

    def _facts(self, source: object) -> TableFacts | None:
        if not isinstance(source, exp.Table):
            return None
        return self._schema.table(folded(source.args.get("db")), folded(source.this))

    def _owner(self, scope: Scope, column: exp.Column) -> tuple[str, str] | None:
        """The table and column that are meant, as SQL writes them."""
        alias, name = folded(column.args.get("table")), folded(column.this)
        inner: Scope | None = scope
        while inner is not None:
            sources = {folded(exp.to_identifier(key)): source for key, source in inner.sources.items()}
            for key, source in sources.items():
                facts = self._facts(source)
                if alias in ("", key) and facts is not None and name in facts.columns:
                    return facts.name, facts.columns[name].sql
            if alias in sources:
                return None
            inner = inner.parent
        return None


def _has_prefix(node: exp.Expr) -> bool:
    pattern = node.expression if isinstance(node, exp.Like) else None
    return isinstance(pattern, exp.Literal) and pattern.name[:1] not in "%_"


def _constant(column: str, node: exp.Expr, *, with_literals: bool) -> str | None:
    """The condition, if it is the same in every call and every row must meet it.

    A literal counts as such where the statement also has parameters: whoever writes `state = 'open' AND owner = $1`
    means this state always.
    """
    outer = node.parent if isinstance(node, exp.Is) and isinstance(node.parent, exp.Not) else node
    above = outer.parent
    while isinstance(above, exp.And | exp.Paren):
        above = above.parent
    if not isinstance(above, exp.Where):
        return None
    if isinstance(node, exp.Is):
        return f"{column} IS {'NOT ' if outer is not node else ''}{node.expression.sql(dialect=DIALECT)}"
    if with_literals and isinstance(node, exp.EQ) and isinstance(node.expression, exp.Literal):
        return f"{column} = {node.expression.sql(dialect=DIALECT)}"
    return None


def seeds(uses: Iterable[Uses], schema: Schema) -> Iterator[Index]:
    """The indexes that the search begins with, each once: single columns, and what one statement would like best."""
    seen: set[Index] = set()
    for use_of in uses:
        for name, use in use_of.items():
            table = schema.tables[name]
            if not table.plain:
                continue
            for index in _wished(use, table):
                if index not in seen:
                    seen.add(index)
                    yield index


def _wished(use: TableUse, table: TableFacts) -> Iterator[Index]:
    facts = {each.sql: each for each in table.columns.values()}
    usable = {name for name in use.keys if facts[name].orders}
    for name in sorted(usable):
        yield Index(table.name, (name,))
    found = use.equal & usable
    # The column with the most values stands first: an index is of use to a search by its first column alone, too.
    first = sorted(found or use.joined & usable, key=lambda name: (-facts[name].distinct, name))
    tails: list[tuple[str, ...]] = [(name,) for name in sorted(use.ranges & usable - set(first))]
    tails += [tuple(name for name in use.sorted_by if name not in first), tuple(use.grouped_by), ()]
    for tail in dict.fromkeys(tails):
        columns = tuple(dict.fromkeys((*first, *tail)))[:COLUMNS_MAX]
        if not columns or not usable.issuperset(columns):
            continue
        index = Index(table.name, columns)
        yield index
        yield from covering(index, use, table)
        for column, condition in sorted(use.constant.items()):
            rest = tuple(name for name in columns if name != column)
            if rest:
                yield Index(table.name, rest, (), condition)


def covering(index: Index, use: TableUse, table: TableFacts) -> Iterator[Index]:
    """The index with the rest of what the statement reads in its leaves, if that is little."""
    rest = sorted(use.read - set(index.columns))
    facts = {each.sql: each for each in table.columns.values()}
    width = sum(facts[name].width_bytes for name in rest)
    if not use.whole and 0 < len(rest) <= INCLUDE_COLUMNS_MAX and width <= INCLUDE_BYTES_MAX and not index.include:
        yield Index(index.table, index.columns, tuple(rest), index.where)


def extensions(index: Index, uses: Iterable[Uses], table: TableFacts) -> Iterator[Index]:
    """The index with one more column in its key, or a covering one, as far as a statement uses both."""
    facts = {each.sql: each for each in table.columns.values()}
    for use_of in uses:
        use = use_of.get(index.table)
        if use is None or not use.keys.intersection(index.columns):
            continue
        if len(index.columns) < COLUMNS_MAX:
            for name in sorted(use.keys - set(index.columns)):
                if facts[name].orders:
                    include = tuple(each for each in index.include if each != name)
                    yield Index(index.table, (*index.columns, name), include, index.where)
        yield from covering(index, use, table)


def is_relevant(index: Index, use: TableUse | None) -> bool:
    """Whether an index can change the plan of a statement that uses its table so."""
    if use is None:
        return False
    if index.columns[0] in use.keys:
        return True
    return not use.whole and use.read <= {*index.columns, *index.include}


def where_share(index: Index, table: TableFacts) -> float:
    """The share of the rows that a partial index holds, by the statistics; 1 where they do not tell."""
    if index.where is None:
        return 1.0
    for facts in table.columns.values():
        if index.where == f"{facts.sql} IS NULL":
            return facts.null_share
        if index.where == f"{facts.sql} IS NOT NULL":
            return 1.0 - facts.null_share
        for value, share in facts.common:
            if index.where in (f"{facts.sql} = '{value}'", f"{facts.sql} = {value}"):
                return share
    return 1.0
