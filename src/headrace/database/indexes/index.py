"""What an index is, what tables and their columns are like, and what an index would weigh. Pure."""

import math
import re
import zlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Final

_PAGE_BYTES: Final = 8192
_FILLED: Final = 0.9
"""How full Postgres leaves a leaf page of a B-tree."""
_ENTRY_BYTES: Final = 12
"""The header of an index entry, and the pointer to it."""
_ROW_POINTER_BYTES: Final = 6
_POSTING_ROWS: Final = 220
"""Rows of one posting list, at most: it holds a sixth of a page."""
_NAME_BYTES_MAX: Final = 63
_SCHEMA: Final = re.compile(r'(?:"(?:[^"]|"")*"|[^".]+)\.')


@dataclass(frozen=True, slots=True)
class ColumnFacts:
    """What Postgres' statistics say of a column."""

    sql: str
    """Its name as SQL writes it."""
    type_name: str
    width_bytes: float = 8.0
    distinct: float = 1.0
    """Values; of n rows at most n."""
    null_share: float = 0.0
    orders: bool = True
    """A B-tree can hold it."""
    packs: bool = True
    """Equal values share their entry."""
    common: tuple[tuple[str, float], ...] = ()
    """Its most common values with their shares, the most common first."""
    bounds: tuple[str, ...] = ()
    """Values between which equally many rows lie, rising."""


@dataclass(frozen=True, slots=True)
class TableFacts:
    """What Postgres' statistics say of a table, of one shard or of all."""

    name: str
    """As SQL writes it, with its schema where it needs one."""
    rows: float
    size_bytes: int
    columns: Mapping[str, ColumnFacts]
    inserts: float = 0.0
    """Rows since the statistics began; so the two below."""
    updates: float = 0.0
    deletes: float = 0.0
    scans: int = 0
    """Times that it was read from one end to the other."""
    plain: bool = True
    """An ordinary table: an index can be built on it while it is written to."""


@dataclass(frozen=True, slots=True, order=True)
class Index:
    """A B-tree: over columns, with more columns in its leaves, of some rows."""

    table: str
    """As SQL writes it."""
    columns: tuple[str, ...]
    """The key, as SQL writes its columns."""
    include: tuple[str, ...] = ()
    """Columns that its leaves hold too, so that the table need not be read."""
    where: str | None = None
    """The condition of the rows that it holds; None: all."""

    @property
    def name(self) -> str:
        """The name that it gets: the same for the same index, wherever it is built."""
        spelled = "_".join(re.sub(r"[^A-Za-z0-9]+", "_", part).strip("_") for part in (self.table, *self.columns))
        mark = f"_{zlib.crc32(self._body().encode()):08x}"
        return f"headrace_{spelled}"[: _NAME_BYTES_MAX - len(mark)].rstrip("_").lower() + mark

    @property
    def path(self) -> str:
        """Its name with the schema of its table, where that needs one."""
        found = _SCHEMA.match(self.table)
        return (found[0] if found else "") + self.name

    def sql(self) -> str:
        """The statement that makes it while the table is in use."""
        return f"CREATE INDEX CONCURRENTLY {self.name} ON {self._body()}"

    def hypothetical(self) -> str:
        """The statement without a name, as HypoPG reads it."""
        return f"CREATE INDEX ON {self._body()}"

    def _body(self) -> str:
        include = f" INCLUDE ({', '.join(self.include)})" if self.include else ""
        where = f" WHERE {self.where}" if self.where else ""
        return f"{self.table} ({', '.join(self.columns)}){include}{where}"

    def serves(self, other: "Index") -> bool:
        """Whether whatever `other` can do, this one can do as well."""
        return (
            self.table == other.table
            and self.where in (None, other.where)
            and self.columns[: len(other.columns)] == other.columns
            and set(other.include) <= {*self.columns, *self.include}
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class StandingIndex:
    """An index that is there, on one shard."""

    name: str
    """As SQL writes it, with its schema where it needs one."""
    table: str
    definition: str
    """The statement that makes it."""
    method: str = "btree"
    key: tuple[str, ...]
    """Its columns and expressions in order, each with operator class, collation and direction where they are not the
    default, so that equal texts order alike."""
    include: tuple[str, ...] = ()
    where: str | None = None
    unique: bool = False
    constraint: str | None = None
    """The primary key, unique or exclusion constraint that it carries out, or foreign key that refers to it."""
    identity: bool = False
    """Rows are known by it in logical replication, it orders the table (CLUSTER), or it is a partition's part of an
    index of the whole."""
    refers: str | None = None
    """The foreign key whose columns it begins with: who deletes what rows refer to looks for them by it."""
    valid: bool = True
    scans: int = 0
    """Since the statistics began."""
    size_bytes: int = 0
    age_s: float | None = None
    """Since the statistics of its shard began; None: not known."""

    def as_index(self) -> Index | None:
        """The same in our words; None: it is no plain, valid B-tree."""
        if self.method != "btree" or not self.valid:
            return None
        return Index(self.table, self.key, self.include, self.where)


def bare_name(path: str) -> str:
    """The name at the end of what SQL writes, as plans show it: without schema and quotes."""
    found = _SCHEMA.match(path)
    name = path[found.end() :] if found else path
    return name[1:-1].replace('""', '"') if name.startswith('"') else name


@dataclass(frozen=True, slots=True)
class Schema:
    """The tables and indexes of one shard."""

    tables: Mapping[str, TableFacts]
    """By their names as SQL writes them."""
    names: Mapping[tuple[str, str], str] = field(default_factory=dict)
    """From schema ('' for those that need none) and name, without quotes, to the name as SQL writes it."""
    indexes: tuple[StandingIndex, ...] = ()
    age_s: float | None = None
    """Since its statistics began; None: not known."""

    def table(self, schema: str, name: str) -> TableFacts | None:
        """The table that a statement means."""
        found = self.names.get((schema, name))
        return None if found is None else self.tables[found]


def index_bytes(index: Index, table: TableFacts, *, share: float = 1.0) -> int:
    """What an index would weigh: entries, shared by rows with equal keys where Postgres can do that.

    A freshly built one; years of updates may double it. After nbtree's README, "Notes about deduplication".
    """
    facts = {each.sql: each for each in table.columns.values()}
    key = [facts[name] for name in index.columns if name in facts]
    rows = max(1.0, table.rows * share)
    width = sum(max(1.0, each.width_bytes) for each in (*key, *(facts[n] for n in index.include if n in facts)))
    entry = _ENTRY_BYTES + math.ceil(width / 8) * 8
    distinct = min(rows, math.prod(max(1.0, each.distinct) for each in key))
    leaves = rows * entry
    if not index.include and all(each.packs for each in key) and distinct * 2 < rows:
        lists = max(distinct, rows / _POSTING_ROWS)
        leaves = min(leaves, rows * _ROW_POINTER_BYTES + lists * entry)
    pages = 2 + math.ceil(leaves / (_PAGE_BYTES * _FILLED))
    return (pages + pages // 200) * _PAGE_BYTES
