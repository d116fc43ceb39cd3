"""Where a statement goes, as data. Pure: (statement, parameters, shard map) -> Plan.

A plan never asks fewer shards than hold rows of the statement, and never writes on several shards unless told to:
what cannot be done right is `Refused`, with the reason and the way out.
"""

from collections import OrderedDict
from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, Protocol

import msgspec
from sqlglot import exp

from headrace.database.placement.postgres_hash import Key
from headrace.database.planning.aggregation import Undivided
from headrace.database.planning.copies import difference
from headrace.database.planning.gather import Gathering, gathering
from headrace.database.planning.key_terms import Coercion, Parameter, coercion, known_keys
from headrace.database.planning.scatter import Division, divide
from headrace.database.planning.scope import Catalog, Use
from headrace.database.planning.split import SplitText, split_text
from headrace.database.planning.statement import OPAQUE, Kind, Statement, read_statement

_WITH_KEY: Final = "Compare the shard key with a value (=, IN, ANY), or pass key=..."


_SEQUENCES: Final = frozenset({"nextval", "currval", "setval", "lastval"})


class _Placed(Protocol):
    @property
    def shard(self) -> str: ...


class Map(Protocol):
    """What routing needs of a shard map."""

    def locate(self, key: Key) -> _Placed:
        """The shard of a key."""
        ...


@dataclass(frozen=True, slots=True)
class OneShard:
    """The statement runs as it is on the shard that holds its keys."""

    shard: str


@dataclass(frozen=True, slots=True)
class AnyShard:
    """It reads only tables that stand whole on every shard."""

    shards: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Shards:
    """A SELECT that each of these shards answers for its own rows."""

    shards: tuple[str, ...]
    division: Division


@dataclass(frozen=True, slots=True)
class AllShards(Shards):
    """The same, of all shards: no key is known."""


@dataclass(frozen=True, slots=True)
class Gather:
    """A SELECT over rows of several shards that are first brought to one of them."""

    shards: tuple[str, ...]
    gathering: Gathering


@dataclass(frozen=True, slots=True)
class SplitInsert:
    """Rows to insert, by shard."""

    rows: Mapping[str, tuple[int, ...]]
    text: SplitText


@dataclass(frozen=True, slots=True)
class WriteEach:
    """A write that every one of these shards does to its own rows."""

    shards: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class ReferenceWrite:
    """A write to a table that stands whole on every shard: the same on all of them."""

    shards: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Refused:
    """It cannot be done right."""

    reason: str
    fix: str


Plan = OneShard | AnyShard | Shards | Gather | SplitInsert | WriteEach | ReferenceWrite | Refused


@dataclass(slots=True)
class _Entry:
    statement: Statement
    parameter: int
    """The index of the one parameter that is the key of the whole statement; -1: it is not so simple."""
    coerce: Coercion
    division: Division | None = None
    gathering: Gathering | None = None
    split: SplitText | None = None


class _Homes(dict[str, OneShard]):
    """One plan a shard, not one a statement."""

    def __missing__(self, shard: str) -> OneShard:
        plan = self[shard] = OneShard(shard)
        return plan


class Router:
    """Plans statements over a fixed set of shards; what it reads of a text it keeps, up to `statements_max` texts."""

    def __init__(
        self, shards: Sequence[str], catalog: Catalog, *, statements_max: int, aggregates: Container[str] = ()
    ) -> None:
        self.shards = tuple(shards)
        self.catalog = catalog
        self._aggregates = aggregates
        self._max = statements_max
        self._entries: OrderedDict[str, _Entry] = OrderedDict()
        self._one = _Homes()

    def knows(self, sql: str) -> bool:
        """Whether the text was read already."""
        return sql in self._entries

    def forget(self, sql: str) -> None:
        """Read the text again when it comes next."""
        self._entries.pop(sql, None)

    def statement(self, sql: str) -> Statement:
        """What a text says."""
        return self._entry(sql).statement

    def plan(self, sql: str, params: Sequence[Any], shard_map: Map, *, everywhere: bool = False) -> Plan:
        """Where the statement goes. `everywhere` allows it to write on several shards."""
        entry = self._entries.get(sql)
        if entry is None:
            entry = self._entry(sql)
        if entry.parameter >= 0 and entry.parameter < len(params):
            key = entry.coerce(params[entry.parameter])
            if key is not msgspec.UNSET and key is not None:
                return self._one[shard_map.locate(key).shard]
        return self._decide(entry, params, shard_map, everywhere=everywhere)

    def _entry(self, sql: str) -> _Entry:
        entry = self._entries.get(sql)
        if entry is None:
            statement = read_statement(sql, self.catalog, aggregates=self._aggregates)
            parameter, coerce = _single_parameter(statement)
            entry = self._entries[sql] = _Entry(statement, parameter, coerce)
            if len(self._entries) > self._max:
                self._entries.popitem(last=False)
        return entry

    def _decide(self, entry: _Entry, params: Sequence[Any], shard_map: Map, *, everywhere: bool) -> Plan:
        statement = entry.statement
        if statement.kind in OPAQUE:
            return self._outright(statement, everywhere=everywhere)
        if strange := self._strange(statement):
            return strange
        if not statement.sharded:
            return self._reference(statement)
        homes = self._homes(statement, params, shard_map)
        sequence = next((name for name in statement.volatile if name in _SEQUENCES), None)
        if sequence is not None and (homes is None or len(homes) > 1):
            return Refused(
                f"{sequence}() counts on each shard by itself, and would give the same numbers on several.",
                f"{_WITH_KEY} Or make the numbers in the client, with headrace.database.Ids.",
            )
        if statement.kind is Kind.INSERT and statement.insert_rows is not None:
            rows = self._rows(statement, params, shard_map)
            if isinstance(rows, Refused):
                return rows
            if homes is not None and len(rows) > 1:
                return self._insert(entry, rows, everywhere=everywhere)
        if homes is not None and len(homes) == 1:
            return self._single(statement, homes[0], params, shard_map)
        if statement.kind is Kind.SELECT:
            return self._read(entry, homes)
        return self._write(statement, homes, everywhere=everywhere)

    def _strange(self, statement: Statement) -> Refused | None:
        if statement.undeclared:
            return Refused(
                f"The table {statement.undeclared[0]!r} is not declared, so nobody knows on which shard its rows are.",
                "Declare it in database.tables (Sharded or Reference), or pass key=...",
            )
        if not statement.uses:
            return Refused(
                f"The statement names no key and no table, and there are {len(self.shards)} shards.",
                "Pass key=..., or use fetch_everywhere for a query over all shards.",
            )
        return None

    def _outright(self, statement: Statement, *, everywhere: bool) -> Plan:
        if statement.kind is Kind.MERGE:
            return Refused(
                "A MERGE is not read for its keys, and on every shard it would insert the rows that are on others.",
                "Pass key=..., or use INSERT ... ON CONFLICT.",
            )
        if isinstance(statement.tree, exp.Command) and statement.tree.this.upper() == "PREPARE":
            return Refused(
                "What PREPARE makes outlives the call, and a prepared transaction its connection; nobody ends it.",
                "Statements are prepared by themselves; transaction() commits on several shards at once if asked to.",
            )
        if everywhere:
            return WriteEach(self.shards)
        return Refused(
            "The statement names no key: it is neither SELECT, INSERT, UPDATE nor DELETE.",
            "Pass everywhere=True to run it on every shard, or key=...",
        )

    def _reference(self, statement: Statement) -> Plan:
        if not statement.writes and not statement.locks:
            return AnyShard(self.shards)
        differing = statement.volatile + statement.clocks + statement.unknown_functions
        if differing:
            return Refused(
                f"{differing[0]}() may answer differently on every shard, and a reference table must be the same on "
                "all.",
                "Compute the value first and pass it as a parameter.",
            )
        if statement.defaults:
            return Refused(
                f"Every shard would compute the default of {statement.defaults[0]!r} for itself, and a reference table"
                " must be the same on all.",
                "Give the column a value in the statement.",
            )
        computed = frozenset[str]().union(*(use.facts.computed for use in statement.uses if use.facts is not None))
        if reason := difference(statement.tree, computed):
            return Refused(
                f"{reason}, and a reference table must be the same on all.",
                "Compute the value first and pass it as a parameter, or say the order.",
            )
        if statement.locks:
            return Refused("A lock on a reference table would hold on one shard only.", "Pass key=... to choose one.")
        return ReferenceWrite(self.shards)

    def _homes(self, statement: Statement, params: Sequence[Any], shard_map: Map) -> tuple[str, ...] | None:
        """The shards that hold all keys of the statement; None: not every table is held to keys."""
        if statement.terms is None:
            return None
        homes: dict[str, None] = {}
        for use, terms in statement.terms:
            keys = known_keys(terms, _coercion(use), params)
            if keys is None:
                return None
            homes.update((shard_map.locate(key).shard, None) for key in keys)
        return tuple(name for name in self.shards if name in homes) or self.shards[:1]

    def _single(self, statement: Statement, home: str, params: Sequence[Any], shard_map: Map) -> Plan:
        copied = [
            use.name for use in statement.uses if use.written and use.facts is not None and use.facts.key is None
        ]
        if copied:
            return Refused(
                f"The reference table {copied[0]!r} would change on one shard only.",
                "Read the rows first, then write them in a statement of its own.",
            )
        for use, term in statement.set_keys:
            keys = None if term is None else known_keys((term,), _coercion(use), params)
            if not keys or any(shard_map.locate(key).shard != home for key in keys):
                return Refused(
                    f"It changes the shard key of {use.name!r} rows, which may belong to another shard then.",
                    "Insert the rows under the new key and delete the old ones.",
                )
        return self._one[home]

    def _read(self, entry: _Entry, homes: tuple[str, ...] | None) -> Plan:
        statement = entry.statement
        if statement.writes:
            return Refused("A SELECT that writes in its WITH queries spans several shards.", _WITH_KEY)
        if statement.locks:
            return Refused("Row locks would be held on several shards.", _WITH_KEY)
        if entry.division is None:
            entry.division = divide(statement)
        if isinstance(entry.division, Undivided):
            if entry.gathering is None:
                entry.gathering = gathering(statement, entry.division.reason)
            return Gather(self.shards, entry.gathering)
        if homes is not None:
            return Shards(homes, entry.division)
        return AllShards(self.shards, entry.division)

    def _write(self, statement: Statement, homes: tuple[str, ...] | None, *, everywhere: bool) -> Plan:
        if statement.set_keys:
            return Refused(
                "It changes shard keys on several shards.",
                "Insert the rows under the new key and delete the old ones.",
            )
        target = next((use for use in statement.sharded if use.written), None)
        if statement.kind is Kind.INSERT and homes is None and target is not None and target.terms is not None:
            return _unplaced("A row", target)  # and not one on every shard
        reason = statement.reason
        if reason is None and statement.strings > 1:
            reason = "its tables are joined by something else than their shard keys"
        if reason is not None:
            return Refused(f"{statement.kind.upper()} cannot be done shard by shard: {reason}.", _WITH_KEY)
        if not everywhere:
            return Refused(
                f"The {statement.kind.upper()} names no key, so it would write on several shards.",
                f"{_WITH_KEY} Or pass everywhere=True.",
            )
        return WriteEach(self.shards if homes is None else homes)

    def _rows(
        self, statement: Statement, params: Sequence[Any], shard_map: Map
    ) -> dict[str, tuple[int, ...]] | Refused:
        """The rows of an INSERT by their shards."""
        use = next(use for use in statement.sharded if use.written)
        rows: dict[str, tuple[int, ...]] = {}
        for number, term in enumerate(statement.insert_rows or ()):
            keys = known_keys((term,), _coercion(use), params) if term is not None else None
            if not keys:
                return _unplaced(f"Row {number + 1}", use)
            shard = shard_map.locate(keys[0]).shard
            rows[shard] = (*rows.get(shard, ()), number)
        return rows

    def _insert(self, entry: _Entry, rows: Mapping[str, tuple[int, ...]], *, everywhere: bool) -> Plan:
        statement = entry.statement
        if statement.set_keys:
            return Refused("Its ON CONFLICT changes shard keys on several shards.", "Leave the key as it is.")
        if not everywhere:
            return Refused(
                f"The rows belong to {len(rows)} shards, and their INSERT would not be one transaction.",
                "Pass everywhere=True to accept that, or insert the rows of one shard at a time.",
            )
        if statement.reason is not None or len(statement.sharded) > 1:
            return Refused("The rows are computed from tables of several shards.", _WITH_KEY)
        if entry.split is None:
            entry.split = split_text(statement)
        return SplitInsert({name: rows[name] for name in self.shards if name in rows}, entry.split)


def _unplaced(row: str, use: Use) -> Refused:
    key = use.facts.key if use.facts is not None else None
    return Refused(
        f"{row} has no shard key ({use.name}.{key}) that is known and that its column would keep as it is.",
        "Give every row a value of the column's own type, and in its precision, for it.",
    )


def _coercion(use: Use) -> Coercion:
    return coercion(use.facts.key_type if use.facts is not None else "")


def _single_parameter(statement: Statement) -> tuple[int, Coercion]:
    """The parameter that alone decides the shard, so that a repeated statement is routed without further thought."""
    terms = {term for _, terms in statement.terms or () for term in terms}
    writes_copies = any(use.written and use.facts is not None and use.facts.key is None for use in statement.uses)
    if len(terms) != 1 or statement.set_keys or statement.undeclared or writes_copies:
        return -1, coercion("")
    (term,) = terms
    kinds = {use.facts.key_type for use in statement.sharded if use.facts is not None}
    if not isinstance(term, Parameter) or len(kinds) != 1:
        return -1, coercion("")
    return term.index, coercion(kinds.pop())
