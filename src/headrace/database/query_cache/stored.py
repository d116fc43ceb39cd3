"""A result as the cache holds it: the cells as Postgres sent them, and what says how old they are.

Kept as cells, a result survives the shared tier whole: what comes out of Redis is read by the same code of psycopg as
what comes out of Postgres. In memory the rows are made of them once.
"""

import datetime
import decimal
import ipaddress
import uuid
from collections.abc import Sequence
from copy import deepcopy
from functools import cached_property
from typing import Any, Final, NamedTuple

import msgspec
from psycopg.adapt import Transformer
from psycopg.pq import Format
from psycopg.types.range import Range

from headrace.database.postgres.pipeline import PipelinedConnection
from headrace.database.postgres.rows import Row, row_of
from headrace.database.query_cache.key import SETTINGS, Context
from headrace.database.query_cache.ledger import Snapshot

Params = Sequence[Any]

_SETTINGS: Final = ", ".join(f"current_setting('{name}', true)" for name in SETTINGS)
STATE: Final = f"""
SELECT set_config('transaction_read_only', 'on', true), pg_current_snapshot()::text,
       extract(epoch FROM now())::float8,
       CASE WHEN pg_is_in_recovery() THEN '' ELSE
           (SELECT system_identifier FROM pg_control_system())::text || '/'
           || substr(pg_walfile_name(pg_current_wal_insert_lsn()), 1, 8) END,
       pg_my_temp_schema() <> 0, current_database()::text, current_user::text, array[{_SETTINGS}]::text[]"""  # noqa: S608 - of constants
"""Asked in the transaction of every read, before it: the session may not be what it was when the key was made."""

_ZONED: Final = frozenset({1184, 1185, 1266, 1270, 3910, 3911, 4534, 6153})
"""Types whose values psycopg shows in the session's time zone."""
_UTC: Final = frozenset({"UTC", "Etc/UTC", "GMT", "Etc/GMT"})
_FORMS: Final = (("DateStyle", "ISO"), ("IntervalStyle", "postgres"), ("client_encoding", "UTF8"))
"""How values have to be written for psycopg to read them without asking their connection: how each setting begins."""
_FIXED: Final = frozenset(
    {int, float, str, bytes, bool, type(None), decimal.Decimal, uuid.UUID, Range}
    | {datetime.date, datetime.datetime, datetime.time, datetime.timedelta}
    | {ipaddress.IPv4Address, ipaddress.IPv6Address, ipaddress.IPv4Network, ipaddress.IPv6Network}
    | {ipaddress.IPv4Interface, ipaddress.IPv6Interface}
)
"""Values that nobody can change, so that all callers may have the same."""


class State(NamedTuple):
    """Who read, when, and what was over by then."""

    snapshot: str
    read_at: float
    """When the transaction began, by the server's clock: seconds since 1970."""
    lineage: str
    """System identifier and timeline of the server; empty: it is a standby."""
    has_temporary: bool
    """The session has temporary tables, which may hide others."""
    context: Context

    @classmethod
    def of(cls, row: Sequence[Any]) -> "State":
        """Read the row that STATE gives."""
        _, snapshot, read_at, lineage, has_temporary, database, role, settings = row
        values = tuple("" if value is None else value for value in settings)
        return cls(snapshot, read_at, lineage, has_temporary, Context(database, role, values))


class Stored(msgspec.Struct, dict=True):
    """A cached result."""

    shard: str
    lineage: str
    snapshot: str
    read_at: float
    """By the server's clock; the query began later."""
    cost_s: float
    life_s: float
    """Longest life that its cost makes worthwhile, from `read_at`."""
    tables: tuple[int, ...]
    """OIDs of the tables that it depends on, partitions and parents included."""
    names: tuple[str, ...]
    """Their names and those of views, without schemas."""
    columns: tuple[str, ...]
    types: tuple[int, ...]
    cells: list[list[bytes | None]] | None
    """Row by row, in text form; None: other processes cannot read it as this one does."""
    size: int
    """Bytes of the cells."""
    kept: bool = True
    """False: it answers those who wait for it and nobody else."""

    @cached_property
    def rows(self) -> list[Row] | None:
        """The rows; None where they cannot be made of what is there."""
        if self.cells is None:
            return None
        reader = Transformer()
        reader.set_loader_types(self.types, Format.TEXT)
        make = row_of(self.columns)
        return [make(reader.load_sequence(cells)) for cells in self.cells]

    @cached_property
    def seen(self) -> Snapshot:
        """Which transactions the query saw, at least."""
        return Snapshot.read(self.snapshot)

    def answer(self) -> list[Row] | None:
        """The rows, for one caller to do with as he likes; None where they cannot be made of what is there."""
        rows = self.rows
        if rows is None or self._is_fixed:
            return rows and rows.copy()
        return deepcopy(rows)

    @cached_property
    def _is_fixed(self) -> bool:
        return all(value.__class__ in _FIXED for row in self.rows or () for value in row)


class Reading(NamedTuple):
    """What came of a read."""

    state: State
    columns: tuple[str, ...]
    types: tuple[int, ...]
    cells: list[list[bytes | None]]
    rows: list[Row]

    @property
    def is_portable(self) -> bool:
        """Whether the cells alone say what the rows are."""
        settings = dict(zip(SETTINGS, self.state.context.settings, strict=True))
        is_plain = all(settings[name].startswith(form) for name, form in _FORMS)
        return is_plain and (settings["TimeZone"] in _UTC or _ZONED.isdisjoint(self.types))

    @property
    def size(self) -> int:
        """Bytes of the cells."""
        return sum(len(cell) for cells in self.cells for cell in cells if cell is not None)


async def read(connection: PipelinedConnection, sql: str, params: Params) -> Reading:
    """Run a query, and STATE before it, in one transaction and one round trip.

    In between no snapshot is kept: each statement takes its own, and that of the query is the later one. So the query
    saw everything that the noted snapshot sees, and perhaps more.
    """
    async with connection.pipeline():
        state = await connection.execute(STATE)
        query = await connection.execute(sql, params or None)
    found = State.of(await state.fetchone() or ())
    rows = await query.fetchall()
    result = query.pgresult
    assert result is not None
    width = range(result.nfields)
    return Reading(
        found,
        tuple(column.name for column in query.description or ()),
        tuple(result.ftype(column) for column in width),
        [[result.get_value(row, column) for column in width] for row in range(result.ntuples)],
        rows,
    )
