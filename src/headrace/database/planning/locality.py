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

from headrace.database.planning.conditions import comparison, term_of
from headrace.database.planning.key_terms import Term
from headrace.database.planning.scope import Catalog, Scope, Source, TableFacts, Use
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


class Locality:
    """The uses of a statement and how they hang together; `reason` says why shards cannot answer each for itself."""

    def __init__(self, tree: exp.Expr, catalog: Catalog) -> None:
        self.uses: list[Use] = []
        self.reason: str | None = None
        self.set_key: Term | None = None
        self.sets_key = False
        self.insert_rows: list[Term | None] | None = None
        self._catalog = catalog
        self._strings: list[int] = []
        self._nails: dict[int, tuple[Term, ...]] = {}
        self._flows: set[tuple[int, int]] = set()
        self._open: set[int] = set()
        self._visit(tree, None)
        self._spread_nails()

    @property
    def sharded(self) -> list[Use]:
        """The uses of sharded tables."""
        return [use for use in self.uses if use.facts is not None and use.facts.key is not None]

    @property
    def strings(self) -> int:
        """How many strings the uses of sharded tables hang on."""
        spread = (index for index, use in enumerate(self.uses) if use.facts is not None and use.facts.key is not None)
        return len({self._string(index) for index in spread})

    def _refuse(self, reason: str) -> None:
        self.reason = self.reason or reason

    # beads, strings, nails

    def _string(self, index: int) -> int:
        while self._strings[index] != index:
            index = self._strings[index]
        return index

    def _tie(self, one: int, other: int) -> None:
        self._strings[self._string(one)] = self._string(other)

    def _nail(self, index: int, terms: tuple[Term, ...]) -> None:
        known = self._nails.get(index)
        if known is None or len(terms) < len(known):
            self._nails[index] = terms

    def _spread_nails(self) -> None:
        changed = True
        while changed:
            changed = False
            for source, target in self._flows:
                if source in self._nails and target not in self._nails:
                    self._nails[target] = self._nails[source]
                    changed = True
        for index, use in enumerate(self.uses):
            use.terms = self._nails.get(index)

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
                inner = Scope(scope, {**scope.ctes, name: (exp.Values(), scope)})
                if self._visit(cte.this, inner).partitioned:
                    self._refuse("a recursive query spans shards")
                scope.ctes[name] = (exp.Values(), scope)
            elif isinstance(cte.this, exp.Insert | exp.Update | exp.Delete):
                self._visit(cte.this, scope)
                scope.ctes[name] = (exp.Values(), scope)
                self._refuse("a WITH query that writes spans shards")
            else:
                scope.ctes[name] = (cte.this, Scope(scope.parent, dict(scope.ctes)))

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
            if name in {"with_", "from_", "joins", "laterals"}:
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
        inner = Scope(scope, dict(scope.ctes))
        source = self._nested_source(query, inner)
        if source.partitioned and not inner.tied:
            self._refuse("a subquery is not tied to its outer query by the shard key")

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
        nullable = {"LEFT": added, "RIGHT": before, "FULL": set[str]()}.get(side)
        if method == "NATURAL" and (right or partitioned):
            self._refuse("a NATURAL JOIN does not say its columns")
        for identifier in join.args.get("using") or ():
            self._using(folded(identifier), scope, before, added, nullable)
        for condition in conjuncts(join.args.get("on")):
            self._condition(condition, scope, nullable)
        if join.args.get("on") is not None:
            self._mark(join.args["on"], scope)
            for query in nested_queries(join.args["on"]):
                self._nested(query, scope)
        for alias in {"LEFT": added, "RIGHT": before, "FULL": before | added}.get(side, ()):
            scope.sources[alias].nullable = True
        return partitioned or right

    def _using(self, name: str, scope: Scope, before: set[str], added: set[str], nullable: set[str] | None) -> None:
        left = [index for alias in before if (index := scope.sources[alias].keys.get(name)) is not None]
        right = [index for alias in added if (index := scope.sources[alias].keys.get(name)) is not None]
        if left and right:
            ends = {
                index: scope.sources[alias] for alias in before | added for index in scope.sources[alias].keys.values()
            }
            from_right = {index for alias in added for index in scope.sources[alias].keys.values()}
            self._equal(
                left[0], right[0], (ends[left[0]], ends[right[0]]), nullable_of(nullable, before, added, from_right)
            )

    def _source(self, node: exp.Expr, scope: Scope) -> bool:
        alias = folded(node.args["alias"].this) if node.args.get("alias") else ""
        if isinstance(node, exp.Table) and isinstance(node.this, exp.Identifier):
            source = self._table(node, scope)
            alias = alias or folded(node.this)
        elif isinstance(node, exp.Lateral) and isinstance(node.this, exp.Subquery):
            inner = Scope(scope, dict(scope.ctes))
            source = self._nested_source(node.this.this, inner)
            source.closed = source.closed and not inner.tied
        elif isinstance(node, exp.Subquery) and isinstance(node.this, exp.Table):
            return self._grouped_joins(node, scope)
        elif isinstance(node, exp.Subquery):
            source = self._visit(node, Scope(scope.parent, dict(scope.ctes)))
        else:
            source = Source()
        if node.args.get("alias") and node.args["alias"].args.get("columns"):
            source = Source(partitioned=source.partitioned, closed=True, use=None)
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
            query, env = scope.ctes[name]
            return Source() if isinstance(query, exp.Values) else self._visit(query, env)
        return self._use(node, name, schema)

    def _use(self, node: exp.Table, name: str, schema: str, *, written: bool = False) -> Source:
        full = f"{schema}.{name}" if schema else name
        facts = self._catalog.get(full)
        if facts is None and schema in {"", "public"}:
            facts = self._catalog.get(name) or self._catalog.get(f"public.{name}")
        alias = folded(node.args["alias"].this) if node.args.get("alias") else name
        index = len(self.uses)
        self.uses.append(Use(full, alias, node, facts, written))
        self._strings.append(index)
        node.meta[USE] = index
        if facts is None:
            return Source(use=index)
        keys = {facts.key: index} if facts.key is not None else {}
        columns = frozenset(facts.columns) if facts.columns is not None else None
        return Source(columns, keys, use=index, partitioned=facts.key is not None)

    # conditions

    def _condition(self, condition: exp.Expr, scope: Scope, nullable: set[str] | None) -> None:
        """What one condition says of keys. `nullable` names the sources of which it filters rows; None: all."""
        if isinstance(condition, exp.EQ):
            self._look_up(condition, scope)
            ends = [self._key_of(side, scope) for side in (condition.this, condition.expression)]
            if ends[0] is not None and ends[1] is not None:
                self._equal_columns(condition, scope, nullable)
        if isinstance(condition, exp.In) and condition.args.get("query") is not None:
            self._member(condition, scope, nullable)
        for index, terms in self._nails_of(condition, scope, nullable).items():
            self._nail(index, terms)
        self._push(condition, scope, nullable)

    def _look_up(self, condition: exp.EQ, scope: Scope) -> None:
        """Note a column of this scope that is compared with one further out."""
        sides = [side.unnest() for side in (condition.this, condition.expression)]
        found = [scope.find(side) if isinstance(side, exp.Column) else None for side in sides]
        if found[0] is None or found[1] is None or found[0][0] is found[1][0]:
            return
        for side, (owner, source) in zip(sides, (found[0], found[1]), strict=True):
            if owner is scope and source.use is not None:
                self.uses[source.use].looked_up.add(folded(side.this))

    def _push(self, condition: exp.Expr, scope: Scope, nullable: set[str] | None) -> None:
        """Note a condition on one use alone: gathering its rows may apply it at the shards."""
        if any(nested_queries(condition)):
            return
        owners = set()
        for column in condition.find_all(exp.Column):
            found = scope.find(column)
            if found is None or found[0] is not scope or found[1].use is None:
                return
            if found[1].nullable and nullable is None:
                return  # WHERE sees the rows that the outer join made up
            owners.add(next(alias for alias, source in scope.sources.items() if source is found[1]))
        if len(owners) == 1 and (nullable is None or owners <= nullable):
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

    def _equal_columns(self, condition: exp.EQ, scope: Scope, nullable: set[str] | None) -> None:
        ends = []
        for side in (condition.this, condition.expression):
            column = side.unnest()
            found = scope.find(column)
            if found is None:
                return
            owner, source = found
            alias = next(alias for alias, one in owner.sources.items() if one is source)
            ends.append((owner is scope, alias, source, source.keys[folded(column.this)]))
        (own_a, alias_a, source_a, a), (own_b, alias_b, source_b, b) = ends
        if not own_a and not own_b:
            return
        if source_a.closed or source_b.closed:
            return
        self._tie(a, b)
        if own_a and own_b:
            if nullable is None or alias_b in nullable:
                self._flows.add((a, b))
            if nullable is None or alias_a in nullable:
                self._flows.add((b, a))
            return
        scope.tied = True
        if nullable is None or (alias_a if own_a else alias_b) in nullable:
            self._flows.add((b, a) if own_a else (a, b))

    def _equal(self, a: int, b: int, sources: tuple[Source, Source], filtered: tuple[bool, bool]) -> None:
        if sources[0].closed or sources[1].closed:
            return
        self._tie(a, b)
        if filtered[1]:
            self._flows.add((a, b))
        if filtered[0]:
            self._flows.add((b, a))

    def _member(self, condition: exp.In, scope: Scope, nullable: set[str] | None) -> None:
        """`key IN (SELECT key ...)`: a join that keeps each row once."""
        query = condition.args["query"]
        select = query.this if isinstance(query, exp.Subquery) else query
        outer = self._key_of(condition.this, scope)
        if outer is None or not isinstance(select, exp.Select) or select.meta.get("visited"):
            return
        select.meta["visited"] = True
        inner = Scope(scope, dict(scope.ctes))
        source = self._nested_source(select, inner)
        key = self._single_output(select, inner)
        if key is not None and not source.closed:
            self._tie(outer, key)
            self._flows.add((outer, key))
            if nullable is None:
                self._flows.add((key, outer))
        elif source.partitioned and not inner.tied:
            self._refuse("a subquery is not tied to its outer query by the shard key")

    def _single_output(self, select: exp.Select, scope: Scope) -> int | None:
        if len(select.expressions) != 1:
            return None
        return self._key_of(select.expressions[0].unalias(), scope)

    def _nails_of(self, condition: exp.Expr, scope: Scope, nullable: set[str] | None) -> dict[int, tuple[Term, ...]]:
        while isinstance(condition, exp.Paren):
            condition = condition.this
        if isinstance(condition, exp.And):
            return {
                **self._nails_of(condition.this, scope, nullable),
                **self._nails_of(condition.expression, scope, nullable),
            }
        if isinstance(condition, exp.Or):
            one = self._nails_of(condition.this, scope, nullable)
            other = self._nails_of(condition.expression, scope, nullable)
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
        return {index: terms} if nullable is None or alias in nullable else {}

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
            self._assignments(node.expressions, target.facts)
        self._expressions(node, scope)
        return Source(partitioned=partitioned, closed=True)

    def _assignments(self, items: list[exp.Expr], facts: TableFacts) -> None:
        for item in items:
            left = item.this.unnest() if isinstance(item, exp.EQ) else item
            names = left.expressions if isinstance(left, exp.Tuple) else [left]
            if facts.key is None or not any(folded(name.this) == facts.key for name in names):
                continue
            value = item.expression
            if isinstance(value, exp.Column) and folded(value.this) == facts.key:
                continue  # SET key = key, or = excluded.key, which are the same row's
            self.sets_key = True
            self.set_key = term_of(value) if not isinstance(left, exp.Tuple) else None

    def _insert(self, node: exp.Insert, scope: Scope) -> Source:
        target = self._target(node, scope)
        index = len(self.uses) - 1
        facts, values = target.facts, node.expression
        position = self._key_position(node, facts)
        conflict = node.args.get("conflict")
        if facts is not None and conflict is not None:
            self._assignments(conflict.expressions, facts)
        if isinstance(values, exp.Values) and facts is not None and facts.key is not None:
            self._insert_values(values, index, position, scope)
        elif isinstance(values, exp.Select):
            self._insert_select(values, index, position, scope)
        elif values is not None and self._visit(values, scope).partitioned:
            self._refuse("the inserted rows are drawn from several shards at once")
        if facts is not None and facts.key is not None and not self._is_placed(index):
            self._refuse("the shard key of the inserted rows cannot be known")
        return Source(partitioned=facts is not None and facts.key is not None, closed=True)

    def _is_placed(self, index: int) -> bool:
        return index in self._nails or any(target == index for _, target in self._flows)

    def _insert_values(self, values: exp.Values, index: int, position: int | None, scope: Scope) -> None:
        self.insert_rows = [
            term_of(row.expressions[position]) if position is not None and position < len(row.expressions) else None
            for row in values.expressions
        ]
        self._nested_in_values(values, scope)
        terms = tuple(term for term in self.insert_rows if term is not None)
        if len(terms) == len(self.insert_rows):
            self._nail(index, terms)

    def _insert_select(self, select: exp.Select, index: int, position: int | None, scope: Scope) -> None:
        inner = Scope(None, dict(scope.ctes))
        self._with(select, inner)
        source = self._select(select, inner)
        facts = self.uses[index].facts
        if position is not None and position < len(select.expressions):
            item = select.expressions[position].unalias()
            key, term = self._key_of(item, inner), term_of(item)
            if key is not None:
                self._tie(index, key)
                self._flows.add((key, index))
            elif term is not None:
                self._nail(index, (term,))
        if source.partitioned and (facts is None or facts.key is None):
            self._refuse("a table that stands whole on every shard would be filled with what one shard knows")
        if source.partitioned and source.closed:
            self._refuse("the inserted rows are drawn from several shards at once")

    def _nested_in_values(self, values: exp.Expr, scope: Scope) -> None:
        for row in values.expressions:
            for query in nested_queries(row):
                self._nested(query, scope)

    @staticmethod
    def _key_position(node: exp.Insert, facts: TableFacts | None) -> int | None:
        if facts is None or facts.key is None:
            return None
        names = list(facts.columns or ())
        if isinstance(node.this, exp.Schema):
            names = [
                folded(column if isinstance(column, exp.Identifier) else column.this)
                for column in node.this.expressions
            ]
        return names.index(facts.key) if facts.key in names else None


def nullable_of(
    nullable: set[str] | None, before: set[str], added: set[str], from_right: set[int]
) -> tuple[bool, bool]:
    """Of a USING column, whether the left and the right table are filtered by it."""
    if nullable is None:
        return True, True
    return bool(nullable & before), bool(nullable & added and from_right)


def _default_name(node: exp.Expr) -> str:
    return folded(node.this) if isinstance(node, exp.Column) else str(node.name).lower()
