"""A statement, read once: what it is, which tables it uses, what it says of their shard keys. Pure.

sqlglot reads it as Postgres would. What sqlglot does not know stays an opaque `OTHER`, which only an explicit key, or
`everywhere=True`, can send anywhere. The text that runs on a single shard is always the caller's own, never one that
was written anew.
"""

import logging
import re
from collections.abc import Callable, Container, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any, Final

from sqlglot import exp, parse
from sqlglot.errors import SqlglotError

from headrace.database.planning.functions import functions
from headrace.database.planning.key_terms import Term
from headrace.database.planning.locality import Locality
from headrace.database.planning.scope import Catalog, Use
from headrace.errors import CallerError

DIALECT: Final = "postgres"


class Kind(StrEnum):
    """What a statement does."""

    SELECT = "select"
    INSERT = "insert"
    UPDATE = "update"
    DELETE = "delete"
    MERGE = "merge"
    SCHEMA = "schema"
    OTHER = "other"


OPAQUE: Final = frozenset({Kind.MERGE, Kind.SCHEMA, Kind.OTHER})
"""Nothing is known of the rows that these concern."""
_KINDS: Final[tuple[tuple[type[exp.Expr], Kind], ...]] = (
    (exp.Select, Kind.SELECT),
    (exp.SetOperation, Kind.SELECT),
    (exp.Values, Kind.SELECT),
    (exp.Subquery, Kind.SELECT),
    (exp.Insert, Kind.INSERT),
    (exp.Update, Kind.UPDATE),
    (exp.Delete, Kind.DELETE),
    (exp.Merge, Kind.MERGE),
    (exp.Create, Kind.SCHEMA),
    (exp.Drop, Kind.SCHEMA),
    (exp.Alter, Kind.SCHEMA),
    (exp.TruncateTable, Kind.SCHEMA),
)

_QUOTED_OR_PARAMETER = re.compile(
    r"""
    [eE]'(?:[^'\\]|''|\\.)*'            # E'...'
  | '(?:[^']|'')*'                      # '...'
  | "(?:[^"]|"")*"                      # "..."
  | \$([A-Za-z_\x80-\uffff][\w\x80-\uffff]*)?\$.*?\$(?(1)\1)\$   # $tag$...$tag$
  | --[^\n]*
  | /\*.*?\*/
  | (?P<parameter>\$\d+)
  | (?P<end>;)
  | (?P<unread>\|\|?/)
  | (?<![\w.$"])(?P<renamed>(?i:date_part|to_hex|log10))(?=\s*\()
    """,
    re.VERBOSE | re.DOTALL,
)


def with_parameters(sql: str, write: Callable[[int], str]) -> str:
    """The text with every `$n` as `write(n)` spells it; nothing else of it changes."""
    return _QUOTED_OR_PARAMETER.sub(
        lambda found: write(int(found["parameter"][1:])) if found["parameter"] else found[0], sql
    )


def _legible(sql: str) -> str:
    """The text as sqlglot reads it right: `$1,$` begins no dollar-quoted string if a space follows the number, and
    functions that it would write as others of another type keep their names if they are qualified.
    """

    def written(found: re.Match[str]) -> str:
        if found["parameter"]:
            return f"{found[0]} "
        return f"pg_catalog.{found[0]}" if found["renamed"] else found[0]

    return _QUOTED_OR_PARAMETER.sub(written, sql)


def unended(sql: str) -> str:
    """A single statement without the semicolon at its end, so that it can stand inside of another."""
    return _QUOTED_OR_PARAMETER.sub(lambda found: "" if found["end"] else found[0], sql)


@dataclass(frozen=True, slots=True)
class Statement:
    """The facts of one statement that routing needs."""

    sql: str
    kind: Kind
    tree: exp.Expr = field(repr=False)
    uses: tuple[Use, ...]
    """Every appearance of a base table."""
    sharded: tuple[Use, ...]
    """Those of sharded tables."""
    terms: tuple[tuple[Use, tuple[Term, ...]], ...] | None
    """The keys that every sharded table is held to; None: one of them is held to nothing."""
    undeclared: tuple[str, ...]
    """Tables that the configuration does not know."""
    writes: bool
    """It changes rows, also in a WITH query."""
    locks: bool
    """FOR UPDATE and its like."""
    volatile: tuple[str, ...]
    """Functions that answer differently at every call, or act."""
    clocks: tuple[str, ...]
    """Functions whose answer is the shard's own: now() and its like."""
    unknown_functions: tuple[str, ...]
    """Functions that are not known to be harmless."""
    parameters: int
    """The highest `$n`."""
    set_keys: tuple[tuple[Use, Term | None], ...]
    """The shard keys that it gives to rows of a table; None in it: not known."""
    defaults: tuple[str, ...]
    """Columns of a reference table that it leaves to defaults which each shard computes for itself."""
    insert_rows: tuple[Term | None, ...] | None
    """The shard key of every row of an INSERT ... VALUES into a sharded table; None in it: not known."""
    reason: str | None
    """Why shards cannot each answer for their own rows; None: they can."""
    strings: int
    """Groups of sharded tables that are joined by their keys; more than one cannot be answered shard by shard."""

    @property
    def read_only(self) -> bool:
        """Whether running it twice is the same as once: no writes, no locks, no function that might act."""
        return self.kind is Kind.SELECT and not (self.writes or self.locks or self.volatile or self.unknown_functions)


def read_statement(sql: str, catalog: Catalog, *, aggregates: Container[str] = ()) -> Statement:
    """The facts of a statement; `aggregates` are those that users have made. Raises `CallerError` if it is no single
    statement.
    """
    tree = _parsed(sql)
    kind = next((kind for type_, kind in _KINDS if isinstance(tree, type_)), Kind.OTHER)
    locality = Locality(tree if kind not in OPAQUE else exp.Null(), catalog)
    volatile, clocks, unknown = functions(tree)
    sharded = tuple(locality.sharded)
    held = tuple((use, use.terms) for use in sharded if use.terms is not None)
    return Statement(
        sql=sql,
        kind=kind,
        tree=tree,
        uses=tuple(locality.uses),
        sharded=sharded,
        terms=held if held and len(held) == len(sharded) else None,
        undeclared=tuple(dict.fromkeys(use.name for use in locality.uses if use.facts is None)),
        writes=kind is not Kind.SELECT or any(tree.find_all(exp.Insert, exp.Update, exp.Delete, exp.Into)),
        locks=any(tree.find_all(exp.Lock)),
        volatile=volatile,
        clocks=clocks,
        unknown_functions=unknown,
        parameters=max((int(node.name) for node in tree.find_all(exp.Parameter) if node.name.isdigit()), default=0),
        set_keys=tuple(locality.set_keys),
        defaults=locality.defaults,
        insert_rows=None if locality.insert_rows is None else tuple(locality.insert_rows),
        reason=locality.reason or _reason_of_aggregate(unknown, aggregates),
        strings=locality.strings,
    )


def _reason_of_aggregate(functions: Sequence[str], aggregates: Container[str]) -> str | None:
    found = next((name for name in functions if name in aggregates), None)
    return None if found is None else f"the aggregate {found}() needs all rows in one place"


_SQLGLOT_LOG = logging.getLogger("sqlglot")


def _is_silent(record: logging.LogRecord) -> bool:
    return record.levelno >= logging.ERROR


def _parsed(sql: str) -> exp.Expr:
    # It warns of every statement that it keeps as a Command; for us that is one kind among others.
    _SQLGLOT_LOG.addFilter(_is_silent)
    try:
        found = parse(_legible(sql), dialect=DIALECT)
        trees = [tree for tree in found if tree is not None and not isinstance(tree, exp.Semicolon)]
    except (SqlglotError, RecursionError):
        return exp.Command(this=sql)
    finally:
        _SQLGLOT_LOG.removeFilter(_is_silent)
    if len(trees) != 1:
        raise CallerError(
            f"{len(trees)} statements in one text cannot be routed.",
            fix="Send one statement at a time, or pass key=...",
        )
    if any(found["unread"] for found in _QUOTED_OR_PARAMETER.finditer(sql)) or not _is_understood(trees[0]):
        return exp.Command(this=sql)
    return trees[0]


def _is_understood(tree: exp.Expr) -> bool:
    """`|/` would become sqrt(), which is of another type for numerics, and `@ x`, an absolute value, a parameter."""
    return all(node.name.isdigit() for node in tree.find_all(exp.Parameter))


@dataclass(frozen=True, slots=True)
class Rendered:
    """SQL text with `$1` ... and which of the caller's parameters these are, counted from 0."""

    sql: str
    parameters: tuple[int, ...]

    def pick(self, params: Sequence[Any]) -> tuple[Any, ...]:
        """Its own parameters out of the caller's."""
        return tuple(params[index] for index in self.parameters)


def render(tree: exp.Expr) -> Rendered:
    """The text of a tree, which it changes: parameters that the tree does not use are left out and the others counted
    anew, because Postgres refuses a parameter that nothing gives a type.
    """
    numbers: dict[int, int] = {}
    for node in tree.find_all(exp.Parameter):
        index = int(node.name) - 1
        number = numbers.setdefault(index, len(numbers) + 1)
        node.set("this", exp.Literal.number(number))
    return Rendered(tree.sql(dialect=DIALECT), tuple(numbers))
