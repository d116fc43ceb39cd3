"""Which rows of which shard a statement can touch: the tables of its scopes, and how their shard keys hang together.

Intuition: every use of a sharded table is a bead. An equality of two shard keys puts two beads on one string (their
matching rows are neighbours on every shard); a key that equals a value nails a bead to that value's shard, and along
the string others with it. All beads nailed: the statement runs where the nails are, whatever else it does. One string:
every shard can answer for its own rows. Anything else needs rows of several shards in one place.

The string may be followed only where the equality really filters: an outer join's condition restricts the rows of its
nullable side alone, a subquery's condition restricts the subquery's tables and not those outside, and nothing reaches
into a subquery whose LIMIT, window or aggregate looks at rows of other keys.

Columns that are a shard key get `meta[KEY]`, columns whose table is known get `meta[USE]`, and all whose source is
known `meta[FOUND]`. Wrong guesses here would be
wrong rows, so whatever is not understood counts as unknown: more shards are asked than needed, never fewer.
"""

from sqlglot import exp

from headrace.database.planning.beads import Beads, Reach
from headrace.database.planning.conditions import comparison, term_of
from headrace.database.planning.functions import functions
from headrace.database.planning.insert_columns import key_position, left_to_shards
from headrace.database.planning.key_terms import Term, hashes_alike
from headrace.database.planning.scope import Catalog, Scope, Source, Use
from headrace.database.planning.select_shape import (
    FOUND,
    KEY,
    NESTED,
    USE,
    conjuncts,
    distinct_is_local,
    folded,
    groups_are_local,
    has_aggregate,
    is_key,
    is_star,
    nested_queries,
    windows_are_local,
)

_End = tuple[str, Source, int]
"""One side of an equality of keys: the name of a source, the source, the use whose key it is."""


class Locality:
    """The uses of a statement and how they hang together; `reason` says why shards cannot answer each for itself."""

    def __init__(self, tree: exp.Expr, catalog: Catalog) -> None:
        self.uses: list[Use] = []
        self.reason: str | None = None
        self.set_keys: list[tuple[Use, Term | None]] = []
        self.defaults: tuple[str, ...] = ()
        self.insert_rows: list[Term | None] | None = None
        self._catalog = catalog
        self._beads = Beads()
        self._visit(tree, None)
        self._beads.settle()
        for index, use in enumerate(self.uses):
            use.terms = self._beads.nails.get(index)

    @property
    def sharded(self) -> list[Use]:
        """The uses of sharded tables."""
        return [use for use in self.uses if use.facts is not None and use.facts.key is not None]

    @property
    def strings(self) -> int:
        """How many strings the uses of sharded tables hang on."""
        spread = (index for index, use in enumerate(self.uses) if use.facts is not None and use.facts.key is not None)
        return len({self._beads.string(index) for index in spread})

    def _refuse(self, reason: str) -> None:
        self.reason = self.reason or reason

    def _alike(self, a: int, b: int) -> bool:
        """Whether equal keys of two uses have one home: 5 as bigint and 5 as numeric have different hashes."""
        kinds = [facts.key_type for index in (a, b) if (facts := self.uses[index].facts) is not None]
        return len(kinds) == 2 and hashes_alike(*kinds)

    # statements

    def _visit(self, node: exp.Expr, parent: Scope | None) -> Source:
        scope = Scope(parent, dict(parent.ctes) if parent is not None else {})
        self._with(node, scope)
        match node:
            case exp.Select():
                return self._select(node, scope)
            case exp.SetOperation():
                return self._set_operation(node, scope)
            case exp.Subquery():
                source = self._visit(node.this, scope)
                source.closed = source.closed or any(node.args.get(name) for name in ("limit", "offset"))
                return source
            case exp.Insert():
                return self._insert(node, scope)
            case exp.Update() | exp.Delete():
                return self._change(node, scope)
        for child in node.iter_expressions():
            for query in nested_queries(child):
                self._nested(query, scope)
        return Source()

    def _with(self, node: exp.Expr, scope: Scope) -> None:
        with_ = node.args.get("with_")
        if with_ is None:
            return
        for cte in with_.expressions:
            name = folded(cte.args["alias"].this)
            if with_.args.get("recursive"):
                # Its own name inside stands for rows that nothing is known of.
                inner = Scope(scope, {**scope.ctes, name: (exp.Values(), scope, False)})
                if self._visit(cte.this, inner).partitioned:
                    self._refuse("a recursive query spans shards")
                scope.ctes[name] = (exp.Values(), scope, False)
            elif isinstance(cte.this, exp.Insert | exp.Update | exp.Delete):
                self._visit(cte.this, scope)
                scope.ctes[name] = (exp.Values(), scope, False)
                self._refuse("a WITH query that writes spans shards")
            else:
                renamed = bool(cte.args["alias"].args.get("columns"))
                scope.ctes[name] = (cte.this, Scope(scope.parent, dict(scope.ctes)), renamed)

    def _set_operation(self, node: exp.SetOperation, scope: Scope) -> Source:
        sides = [self._visit(side, scope) for side in (node.this, node.expression)]
        partitioned = any(side.partitioned for side in sides)
        if partitioned:
            self._refuse(f"a {type(node).__name__.upper()} spans shards")
        return Source(sides[0].columns, partitioned=partitioned, closed=True)

    def _select(self, node: exp.Select, scope: Scope) -> Source:
        partitioned = self._from(node, scope)
        where = node.args.get("where")
        for condition in conjuncts(where):
            self._condition(condition, scope, None)
        self._expressions(node, scope)
        closed = self._looks_at_many_keys(node, scope)
        columns, keys, loose = self._outputs(node, scope)
        return Source(columns, keys, loose, partitioned=partitioned, closed=closed)

    def _expressions(self, node: exp.Expr, scope: Scope) -> None:
        """Mark the columns of a scope, and visit the queries inside its expressions."""
        for name, value in node.args.items():
            if name in {"with_", "from_", "joins", "laterals", "expression"}:
                continue
            for child in value if isinstance(value, list) else [value]:
                if isinstance(child, exp.Expr):
                    self._mark(child, scope)
                    for query in nested_queries(child):
                        self._nested(query, scope)

    def _mark(self, node: exp.Expr, scope: Scope) -> None:
        if isinstance(node, NESTED):
            return
        if isinstance(node, exp.Column):
            self._key_of(node, scope)
            return
        for child in node.iter_expressions():
            self._mark(child, scope)

    def _nested(self, query: exp.Expr, scope: Scope) -> None:
        """A query inside an expression: every shard may answer it for itself only if it is tied to the outer rows."""
        if query.meta.get("visited"):
            return
        query.meta["visited"] = True
        inner = self._inside(scope)
        source = self._nested_source(query, inner)
        if source.partitioned and not inner.tied:
            self._refuse("a subquery is not tied to its outer query by the shard key")

    def _inside(self, scope: Scope) -> Scope:
        return Scope(scope, dict(scope.ctes), bond=self._beads.bond())

    def _nested_source(self, query: exp.Expr, inner: Scope) -> Source:
        if not isinstance(query, exp.Select):
            return self._visit(query, inner)
        self._with(query, inner)
        return self._select(query, inner)

    # FROM

    def _from(self, node: exp.Expr, scope: Scope) -> bool:
        """Enter the sources of a FROM clause; whether its rows are spread over the shards."""
        from_ = node.args.get("from_")
        if from_ is None:
            return False
        partitioned = self._source(from_.this, scope)
        for join in node.args.get("joins") or ():
            partitioned = self._join(join, scope, partitioned=partitioned)
        for lateral in node.args.get("laterals") or ():
            partitioned = self._source(lateral, scope) or partitioned
        return partitioned

    def _join(self, join: exp.Join, scope: Scope, *, partitioned: bool) -> bool:
        before = set(scope.sources)
        right = self._source(join.this, scope)
        side = (join.args.get("side") or "").upper()
        method = (join.args.get("method") or "").upper()
        added = set(scope.sources) - before
        if (
            (side == "LEFT" and right and not partitioned)
            or (side == "RIGHT" and partitioned and not right)
            or (side == "FULL" and partitioned != right)
        ):
            self._refuse("an outer join keeps the rows of a table that stands whole on every shard")
        filtered = {"LEFT": added, "RIGHT": before, "FULL": set[str]()}.get(side)
        reach = Reach(filtered, added, self._beads.bond(both_kept=side == "FULL")) if filtered is not None else None
        if method == "NATURAL" and (right or partitioned):
            self._refuse("a NATURAL JOIN does not say its columns")
        for identifier in join.args.get("using") or ():
            self._using(folded(identifier), scope, before, reach)
        for condition in conjuncts(join.args.get("on")):
            self._condition(condition, scope, reach)
        if join.args.get("on") is not None:
            self._mark(join.args["on"], scope)
            for query in nested_queries(join.args["on"]):
                self._nested(query, scope)
        for alias in {"LEFT": added, "RIGHT": before, "FULL": before | added}.get(side, ()):
            scope.sources[alias].nullable = True
        return partitioned or right

    def _using(self, name: str, scope: Scope, before: set[str], reach: Reach | None) -> None:
        sides: list[list[tuple[str, Source]]] = [[], []]
        for alias, source in scope.sources.items():
            if name in source.keys:
                sides[alias not in before].append((alias, source))
        if sides[0] and sides[1]:
            (one, left), (other, right) = sides[0][0], sides[1][0]
            self._equal((one, left, left.keys[name]), (other, right, right.keys[name]), reach)

    def _source(self, node: exp.Expr, scope: Scope) -> bool:
        alias = folded(node.args["alias"].this) if node.args.get("alias") else ""
        if isinstance(node, exp.Table) and isinstance(node.this, exp.Identifier):
            source = self._table(node, scope)
            alias = alias or folded(node.this)
        elif isinstance(node, exp.Lateral) and isinstance(node.this, exp.Subquery):
            inner = self._inside(scope)
            source = self._nested_source(node.this.this, inner)
            source.closed = source.closed and not inner.tied
        elif isinstance(node, exp.Subquery) and isinstance(node.this, exp.Table):
            return self._grouped_joins(node, scope)
        elif isinstance(node, exp.Subquery):
            source = self._visit(node, Scope(scope.parent, dict(scope.ctes)))
        else:
            source = Source()
        if node.args.get("alias") and node.args["alias"].args.get("columns"):
            source = _renamed(source)
        if source.closed and source.partitioned:
            self._refuse("a subquery in FROM looks at rows of several shards at once")
        scope.sources[alias or f" {len(scope.sources)}"] = source
        joins = node.args.get("joins") or () if isinstance(node, exp.Table) else ()
        partitioned = source.partitioned
        for join in joins:
            partitioned = self._join(join, scope, partitioned=partitioned)
        return partitioned

    def _grouped_joins(self, node: exp.Subquery, scope: Scope) -> bool:
        """`FROM (a JOIN b ON ...)`."""
        partitioned = self._source(node.this, scope)
        for join in node.args.get("joins") or ():
            partitioned = self._join(join, scope, partitioned=partitioned)
        return partitioned

    def _table(self, node: exp.Table, scope: Scope) -> Source:
        name, schema = folded(node.this), folded(node.args.get("db"))
        if not schema and name in scope.ctes:
            query, env, renamed = scope.ctes[name]
            source = Source() if isinstance(query, exp.Values) else self._visit(query, env)
            return _renamed(source) if renamed else source
        return self._use(node, name, schema)

    def _use(self, node: exp.Table, name: str, schema: str, *, written: bool = False) -> Source:
        full = f"{schema}.{name}" if schema else name
        facts = self._catalog.get(full)
        if facts is None and schema in {"", "public"}:
            facts = self._catalog.get(name) or self._catalog.get(f"public.{name}")
        alias = folded(node.args["alias"].this) if node.args.get("alias") else name
        index = self._beads.add()
        self.uses.append(Use(full, alias, node, facts, written))
        node.meta[USE] = index
        if facts is None:
            return Source(use=index)
        keys = {facts.key: index} if facts.key is not None else {}
        columns = frozenset(facts.columns) if facts.columns is not None else None
        return Source(columns, keys, use=index, partitioned=facts.key is not None)

    # conditions

    def _condition(self, condition: exp.Expr, scope: Scope, reach: Reach | None) -> None:
        """What one condition says of keys. `reach` names the sources of which it filters rows; None: all."""
        if isinstance(condition, exp.EQ):
            self._look_up(condition, scope)
            ends = [self._key_of(side, scope) for side in (condition.this, condition.expression)]
            if ends[0] is not None and ends[1] is not None:
                self._equal_columns(condition, scope, reach)
        if isinstance(condition, exp.In) and condition.args.get("query") is not None:
            self._member(condition, scope, reach)
        for index, terms in self._nails_of(condition, scope, reach).items():
            self._beads.nail(index, terms)
        self._push(condition, scope, reach)

    def _look_up(self, condition: exp.EQ, scope: Scope) -> None:
        """Note a column of this scope that is compared with one further out."""
        sides = [side.unnest() for side in (condition.this, condition.expression)]
        found = [scope.find(side) if isinstance(side, exp.Column) else None for side in sides]
        if found[0] is None or found[1] is None or found[0][0] is found[1][0]:
            return
        for side, (owner, source) in zip(sides, (found[0], found[1]), strict=True):
            if owner is scope and source.use is not None:
                self.uses[source.use].looked_up.add(folded(side.this))

    def _push(self, condition: exp.Expr, scope: Scope, reach: Reach | None) -> None:
        """Note a condition on one use alone: gathering its rows may apply it at the shards."""
        found = functions(condition)
        if any(nested_queries(condition)) or found.volatile or found.unknown:
            return  # at the shards and again over what they sent, it would answer twice
        owners = set()
        for column in condition.find_all(exp.Column):
            owner = scope.find(column)
            if owner is None or owner[0] is not scope or owner[1].use is None:
                return
            if owner[1].nullable and reach is None:
                return  # WHERE sees the rows that the outer join made up
            owners.add(next(alias for alias, source in scope.sources.items() if source is owner[1]))
        if len(owners) == 1 and (reach is None or owners <= reach.filtered):
            use = scope.sources[owners.pop()].use
            if use is not None:
                self.uses[use].pushed.append(condition)

    def _key_of(self, node: exp.Expr, scope: Scope) -> int | None:
        while isinstance(node, exp.Paren):
            node = node.this
        if not isinstance(node, exp.Column) or isinstance(node.this, exp.Star):
            return None
        found = scope.find(node)
        if found is None:
            return None
        node.meta[FOUND] = True
        if found[1].use is not None:
            node.meta[USE] = found[1].use
        name = folded(node.this)
        index = found[1].keys.get(name)
        if index is not None and not found[1].nullable and name not in found[1].loose:
            node.meta[KEY] = True
        return index

    def _equal_columns(self, condition: exp.EQ, scope: Scope, reach: Reach | None) -> None:
        own: list[_End] = []
        outer: list[_End] = []
        for side in (condition.this, condition.expression):
            column = side.unnest()
            found = scope.find(column)
            if found is None:
                return
            owner, source = found
            alias = next(alias for alias, one in owner.sources.items() if one is source)
            (own if owner is scope else outer).append((alias, source, source.keys[folded(column.this)]))
        if len(own) == 2:
            self._equal(own[0], own[1], reach)
        if len(own) != 1:
            return
        (alias, inside, index), (_, outside, home) = own[0], outer[0]
        if inside.closed or outside.closed or not self._alike(index, home):
            return
        if reach is None:
            scope.tied = True
        if reach is None or alias in reach.filtered:
            self._beads.flow(home, index)
            bond = scope.bond if reach is None else reach.bond
            if bond is not None:
                bond.add(home, index)

    def _equal(self, one: _End, other: _End, reach: Reach | None) -> None:
        """The keys of two sources of one scope are equal, at least in the rows that the condition filters."""
        (alias_a, source_a, a), (alias_b, source_b, b) = one, other
        if source_a.closed or source_b.closed or not self._alike(a, b):
            return
        filters_a = reach is None or alias_a in reach.filtered
        filters_b = reach is None or alias_b in reach.filtered
        if filters_b:
            self._beads.flow(a, b)
        if filters_a:
            self._beads.flow(b, a)
        if filters_a and filters_b:
            self._beads.tie(a, b)
        elif reach is None:
            return
        elif filters_a or filters_b:
            reach.bond.add(*((a, b) if filters_b else (b, a)))
        elif reach.bond.both_kept and (alias_a in reach.right) != (alias_b in reach.right):
            reach.bond.add(*((b, a) if alias_a in reach.right else (a, b)))

    def _member(self, condition: exp.In, scope: Scope, reach: Reach | None) -> None:
        """`key IN (SELECT key ...)`: a join that keeps each row once."""
        query = condition.args["query"]
        select = query.this if isinstance(query, exp.Subquery) else query
        outer = self._key_of(condition.this, scope)
        if outer is None or not isinstance(select, exp.Select) or select.meta.get("visited"):
            return
        select.meta["visited"] = True
        found = scope.find(condition.this.unnest())
        is_own = found is not None and found[0] is scope
        inner = self._inside(scope)
        source = self._nested_source(select, inner)
        key = self._single_output(select, inner)
        if key is not None and not source.closed and self._alike(outer, key):
            self._beads.flow(outer, key)
            if reach is None and is_own:
                self._beads.tie(outer, key)
                self._beads.flow(key, outer)
            elif inner.bond is not None:
                inner.bond.add(outer, key)
        elif source.partitioned and not inner.tied:
            self._refuse("a subquery is not tied to its outer query by the shard key")

    def _single_output(self, select: exp.Select, scope: Scope) -> int | None:
        if len(select.expressions) != 1:
            return None
        return self._key_of(select.expressions[0].unalias(), scope)

    def _nails_of(self, condition: exp.Expr, scope: Scope, reach: Reach | None) -> dict[int, tuple[Term, ...]]:
        while isinstance(condition, exp.Paren):
            condition = condition.this
        if isinstance(condition, exp.And):
            return {
                **self._nails_of(condition.this, scope, reach),
                **self._nails_of(condition.expression, scope, reach),
            }
        if isinstance(condition, exp.Or):
            one = self._nails_of(condition.this, scope, reach)
            other = self._nails_of(condition.expression, scope, reach)
            return {index: one[index] + other[index] for index in one.keys() & other.keys()}
        found = comparison(condition)
        if found is None:
            return {}
        column, terms = found
        index = self._key_of(column, scope)
        owner = scope.find(column) if index is not None else None
        if index is None or owner is None or owner[0] is not scope or owner[1].closed:
            return {}
        alias = next(alias for alias, source in scope.sources.items() if source is owner[1])
        return {index: terms} if reach is None or alias in reach.filtered else {}

    # what a select shows

    def _outputs(self, node: exp.Select, scope: Scope) -> tuple[frozenset[str] | None, dict[str, int], set[str]]:
        names: set[str] | None = set()
        keys: dict[str, int] = {}
        loose: set[str] = set()
        for item in node.expressions:
            if is_star(item):
                for alias, source in scope.sources.items():
                    if isinstance(item, exp.Column) and alias != folded(item.args.get("table")):
                        continue
                    names = names | source.columns if names is not None and source.columns is not None else None
                    keys = {**source.keys, **keys}
                    loose |= set(source.keys) if source.nullable else source.loose
                continue
            inner = item.unalias()
            name = folded(item.args.get("alias")) if isinstance(item, exp.Alias) else _default_name(inner)
            if names is not None:
                names.add(name)
            index = self._key_of(inner, scope)
            if index is not None:
                keys[name] = index
                if not is_key(inner):
                    loose.add(name)
        return frozenset(names) if names is not None else None, keys, loose

    def _looks_at_many_keys(self, node: exp.Select, scope: Scope) -> bool:
        if any(node.args.get(name) for name in ("limit", "offset")):
            return True
        if not windows_are_local(node):
            return True
        distinct = node.args.get("distinct")
        if distinct is not None and not distinct_is_local(node):
            return True
        if node.args.get("group") is not None or has_aggregate(node):
            return not groups_are_local(node)
        return False

    # writes

    def _target(self, node: exp.Expr, scope: Scope) -> Use:
        table = node.this.this if isinstance(node.this, exp.Schema) else node.this
        source = self._use(table, folded(table.this), folded(table.args.get("db")), written=True)
        use = self.uses[-1]
        scope.sources[use.alias] = source
        return use

    def _change(self, node: exp.Expr, scope: Scope) -> Source:
        target = self._target(node, scope)
        partitioned = target.facts is not None and target.facts.key is not None
        others = self._from(node, scope)
        for table in node.args.get("using") or ():
            others = self._source(table, scope) or others
        if others and not partitioned:
            self._refuse("a table that stands whole on every shard would be changed by what one shard knows")
        for condition in conjuncts(node.args.get("where")):
            self._condition(condition, scope, None)
        if isinstance(node, exp.Update) and target.facts is not None:
            self._assignments(node.expressions, target, scope)
        self._expressions(node, scope)
        return Source(partitioned=partitioned, closed=True)

    def _assignments(self, items: list[exp.Expr], target: Use, scope: Scope) -> None:
        for item in items:
            left = item.this.unnest() if isinstance(item, exp.EQ) else item
            names = left.expressions if isinstance(left, exp.Tuple) else [left]
            if target.facts is None or target.facts.key is None:
                return
            if not any(folded(name.this) == target.facts.key for name in names):
                continue
            if isinstance(item.expression, exp.Column) and self._is_own_key(item.expression, target, scope):
                continue
            self.set_keys.append((target, term_of(item.expression) if not isinstance(left, exp.Tuple) else None))

    def _is_own_key(self, value: exp.Column, target: Use, scope: Scope) -> bool:
        """`SET key = key`, or `= excluded.key`: the same row's."""
        if target.facts is None or folded(value.this) != target.facts.key:
            return False
        found = scope.find(value)
        is_excluded = folded(value.args.get("table")) == "excluded"
        return is_excluded or (found is not None and found[1].use == self.uses.index(target))

    def _insert(self, node: exp.Insert, scope: Scope) -> Source:
        target = self._target(node, scope)
        index = len(self.uses) - 1
        facts, values = target.facts, node.expression
        position = key_position(node, facts)
        self.defaults += left_to_shards(node, facts)
        conflict = node.args.get("conflict")
        if facts is not None and conflict is not None:
            self._assignments(conflict.expressions, target, scope)
        if isinstance(values, exp.Values) and facts is not None and facts.key is not None:
            self._insert_values(values, index, position, scope)
        elif isinstance(values, exp.Select):
            self._insert_select(values, index, position, scope)
        elif values is not None and self._visit(values, scope).partitioned:
            self._refuse("the inserted rows are drawn from several shards at once")
        if facts is not None and facts.key is not None and not self._beads.is_placed(index):
            self._refuse("the shard key of the inserted rows cannot be known")
        self._expressions(node, scope)
        return Source(partitioned=facts is not None and facts.key is not None, closed=True)

    def _insert_values(self, values: exp.Values, index: int, position: int | None, scope: Scope) -> None:
        self.insert_rows = [
            term_of(row.expressions[position]) if position is not None and position < len(row.expressions) else None
            for row in values.expressions
        ]
        self._nested_in_values(values, scope)
        terms = tuple(term for term in self.insert_rows if term is not None)
        if len(terms) == len(self.insert_rows):
            self._beads.nail(index, terms)

    def _insert_select(self, select: exp.Select, index: int, position: int | None, scope: Scope) -> None:
        inner = Scope(None, dict(scope.ctes))
        self._with(select, inner)
        source = self._select(select, inner)
        facts = self.uses[index].facts
        if position is not None and position < len(select.expressions):
            item = select.expressions[position].unalias()
            key, term = self._key_of(item, inner), term_of(item)
            if key is not None and self._alike(index, key):
                self._beads.tie(index, key)
                self._beads.flow(key, index)
            elif term is not None:
                self._beads.nail(index, (term,))
        if source.partitioned and (facts is None or facts.key is None):
            self._refuse("a table that stands whole on every shard would be filled with what one shard knows")
        if source.partitioned and source.closed:
            self._refuse("the inserted rows are drawn from several shards at once")

    def _nested_in_values(self, values: exp.Expr, scope: Scope) -> None:
        for row in values.expressions:
            for query in nested_queries(row):
                self._nested(query, scope)


def _renamed(source: Source) -> Source:
    """A source whose columns got other names, `AS t(x, y)`: nothing is known of them."""
    return Source(partitioned=source.partitioned, closed=True)


def _default_name(node: exp.Expr) -> str:
    return folded(node.this) if isinstance(node, exp.Column) else str(node.name).lower()
