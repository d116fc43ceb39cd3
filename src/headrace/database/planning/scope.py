"""The names that a part of a statement can see, and what is known of what they stand for. Pure."""

from collections.abc import Mapping
from dataclasses import dataclass, field

from sqlglot import exp

from headrace.database.planning.beads import Bond
from headrace.database.planning.key_terms import Term
from headrace.database.planning.select_shape import folded


@dataclass(frozen=True, slots=True)
class TableFacts:
    """What the router knows of a declared table."""

    key: str | None
    """The column that shards it; None: a reference table, whole on every shard."""
    key_type: str = "text"
    """The column's type, as Postgres names it, with its modifiers."""
    columns: tuple[str, ...] | None = None
    """All of its columns in their order; None: not known."""
    computed: frozenset[str] = frozenset()
    """Those whose default is not the same at every call, or on every shard."""


Catalog = Mapping[str, TableFacts]
"""The declared tables by name."""


@dataclass(slots=True)
class Use:
    """One appearance of a base table in a statement."""

    name: str
    alias: str
    node: exp.Table
    facts: TableFacts | None
    """None: not declared."""
    written: bool = False
    terms: tuple[Term, ...] | None = None
    """The keys that its rows must have; None: any."""
    pushed: list[exp.Expr] = field(default_factory=list)
    """Conditions on this use alone that its rows must meet."""
    looked_up: set[str] = field(default_factory=set)
    """Columns by which a subquery finds its rows anew for every row outside."""


@dataclass(slots=True)
class Source:
    """What a name in a FROM clause stands for."""

    columns: frozenset[str] | None = None
    keys: dict[str, int] = field(default_factory=dict)
    """Which of its columns are the shard key of which use."""
    loose: set[str] = field(default_factory=set)
    """Those of its keys that an outer join may leave NULL, so that they say nothing of the shard."""
    use: int | None = None
    nullable: bool = False
    """An outer join may leave all of its columns NULL."""
    partitioned: bool = False
    """Its rows are spread over the shards, rather than the same everywhere."""
    closed: bool = False
    """It looks at rows of many keys at once, so it cannot be cut by key from outside."""


@dataclass(slots=True)
class Scope:
    """One SELECT, INSERT, UPDATE or DELETE, and the ones around it."""

    parent: "Scope | None"
    ctes: dict[str, "tuple[exp.Expr, Scope, bool]"]
    """Of each its query, what that sees, and whether its columns are given other names."""
    sources: dict[str, Source] = field(default_factory=dict)
    tied: bool = False
    """A subquery whose rows all have the key of the row outside that it is run for."""
    bond: Bond | None = None
    """Of a subquery, to the rows outside."""

    def find(self, column: exp.Column) -> "tuple[Scope, Source] | None":
        """What a column belongs to, here or further out; None: that cannot be said."""
        table, name = folded(column.args.get("table")), folded(column.this)
        scope: Scope | None = self
        while scope is not None:
            if table:
                if table in scope.sources:
                    return scope, scope.sources[table]
            elif found := scope._owner(name):
                return scope, found
            elif any(source.columns is None for source in scope.sources.values()):
                return None
            scope = scope.parent
        return None

    def _owner(self, name: str) -> Source | None:
        known = [source for source in self.sources.values() if source.columns is not None and name in source.columns]
        if known:
            return known[0]
        open_ones = [source for source in self.sources.values() if source.columns is None]
        return open_ones[0] if len(open_ones) == 1 and len(self.sources) == 1 else None
