"""One Postgres and its connections. The only module that knows psycopg.

What broke decides what the caller is told: no connection, or an error that Postgres reported itself, means that
nothing was kept (`DatabaseUnavailable`, `StatementFailed`, `StatementTimeout`). A connection that died after a write
was sent means that nobody knows (`OutcomeUnknown`); such a write is never repeated here. A read is repeated once, on
another connection.
"""

import asyncio
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from typing import Any, NamedTuple

import psycopg
from psycopg_pool import AsyncConnectionPool, PoolTimeout, TooManyRequests

from headrace.clock import Clock
from headrace.database.config import DatabaseConfig, ShardConfig, without_password
from headrace.database.rows import Row, row_of
from headrace.errors import (
    BackendError,
    CallerError,
    DatabaseUnavailable,
    HeadraceError,
    OutcomeUnknown,
    Overloaded,
    StatementFailed,
    StatementTimeout,
)
from headrace.events import Observer, ShardRecovered, ShardUnavailable

Params = Sequence[Any]

_TIMEOUTS = (psycopg.errors.QueryCanceled, psycopg.errors.LockNotAvailable)
# Postgres says itself that it is going away, or not there yet: the statement surely left no trace.
_GOING_AWAY = (psycopg.errors.AdminShutdown, psycopg.errors.CannotConnectNow)


class NodeStatistics(NamedTuple):
    """The connections of this process to one node."""

    connections: int
    idle: int
    waiting: int
    available: bool


class Transaction:
    """One open transaction: its statements commit or vanish together."""

    __slots__ = ("_connection",)

    def __init__(self, connection: psycopg.AsyncConnection[Any]) -> None:
        self._connection = connection

    async def fetch(self, sql: str, *params: Any) -> list[Row]:
        """The rows of a statement."""
        cursor = await self._connection.execute(sql, params or None)
        return await cursor.fetchall() if cursor.description else []

    async def execute(self, sql: str, *params: Any) -> int:
        """Run a statement; the number of rows that it touched."""
        cursor = await self._connection.execute(sql, params or None)
        return cursor.rowcount


class Node:
    """A pool of connections to one Postgres."""

    def __init__(self, shard: ShardConfig, config: DatabaseConfig, *, clock: Clock, observer: Observer) -> None:
        self.name = shard.name
        self.available = True
        self._clock = clock
        self._observer = observer
        self._down_since = 0.0
        self._check: asyncio.Task[None] | None = None
        self._config = config
        self._shown_dsn = without_password(shard.dsn)
        self._pool: AsyncConnectionPool[psycopg.AsyncConnection[Any]] = AsyncConnectionPool(
            shard.dsn,
            kwargs={"autocommit": True, "row_factory": _row_factory, "cursor_factory": psycopg.AsyncRawCursor},
            min_size=1,
            max_size=config.connections_max,
            open=False,
            configure=self._configure,
            timeout=config.acquire_timeout_s,
            max_waiting=config.waiting_max,
            # The pool doubles its delay after each failure without a bound; giving up early makes the next caller's
            # wait start a fresh attempt, so that a Postgres that is back is found within that wait.
            reconnect_timeout=min(1.0, config.acquire_timeout_s),
            name=shard.name,
        )

    async def _configure(self, connection: psycopg.AsyncConnection[Any]) -> None:
        settings: Mapping[str, float] = {
            "statement_timeout": self._config.statement_timeout_s,
            "lock_timeout": self._config.lock_timeout_s,
        }
        for name, seconds in settings.items():
            await connection.execute("SELECT set_config($1, $2, false)", (name, str(round(seconds * 1000))))

    async def open(self) -> None:
        """Start connecting; does not wait, so that one dead shard does not keep the others from serving."""
        await self._pool.open(wait=False)

    async def close(self) -> None:
        """Close every connection."""
        if self._check is not None:
            self._check.cancel()
            await asyncio.gather(self._check, return_exceptions=True)
        await self._pool.close()

    async def fetch(self, sql: str, params: Params = (), *, read_only: bool = False) -> list[Row]:
        """The rows of one statement in a transaction of its own.

        A `read_only` one is repeated once if its connection died.
        """
        try:
            return await self._fetch(sql, params, read_only=read_only)
        except DatabaseUnavailable:
            if not read_only:
                raise
        return await self._fetch(sql, params, read_only=True)

    async def _fetch(self, sql: str, params: Params, *, read_only: bool) -> list[Row]:
        async with self._connection(read_only=read_only) as connection:
            cursor = await connection.execute(sql, params or None)
            return await cursor.fetchall() if cursor.description else []

    async def execute(self, sql: str, params: Params = ()) -> int:
        """Run one statement in a transaction of its own; the number of rows that it touched."""
        async with self._connection(read_only=False) as connection:
            cursor = await connection.execute(sql, params or None)
            return cursor.rowcount

    async def execute_many(self, sql: str, rows: Sequence[Params]) -> None:
        """Run one statement for each row, pipelined, in one transaction."""
        async with (
            self._connection(read_only=False) as connection,
            connection.transaction(),
            connection.cursor() as cursor,
        ):
            await cursor.executemany(sql, rows)

    @asynccontextmanager
    async def transaction(self) -> AsyncIterator[Transaction]:
        """A transaction that commits when the block ends and rolls back when it raises."""
        async with self._connection(read_only=False) as connection, connection.transaction():
            yield Transaction(connection)

    def statistics(self) -> NodeStatistics:
        """The pool, now."""
        stats = self._pool.get_stats()
        return NodeStatistics(
            stats.get("pool_size", 0), stats.get("pool_available", 0), stats.get("requests_waiting", 0), self.available
        )

    @asynccontextmanager
    async def _connection(self, *, read_only: bool) -> AsyncIterator[psycopg.AsyncConnection[Any]]:
        """A connection, and every psycopg error turned into ours."""
        try:
            connection = await self._pool.getconn()
        except PoolTimeout as error:
            raise self._unavailable(f"no connection within {self._config.acquire_timeout_s:g} s") from error
        except TooManyRequests as error:
            raise Overloaded(f"Shard {self.name}: {self._config.waiting_max} calls wait for a connection.") from error
        try:
            yield connection
        except psycopg.Error as error:
            raise self._translated(
                error, broken=connection.broken or connection.closed, read_only=read_only
            ) from error
        else:
            self._answered()
        finally:
            await self._pool.putconn(connection)

    def _translated(self, error: psycopg.Error, *, broken: bool, read_only: bool) -> HeadraceError:
        reason = str(error).strip().split("\n")[0] or type(error).__name__
        if isinstance(error, _TIMEOUTS):
            return StatementTimeout(f"{self.name}: {reason}.")
        if isinstance(error, _GOING_AWAY) or (broken and read_only):
            return self._unavailable(reason)
        if broken:
            self._unavailable(reason)
            return OutcomeUnknown(f"{self.name}: the connection broke after a write was sent ({reason}).")
        if isinstance(error, psycopg.errors.OperationalError):
            return BackendError(f"{self.name}: {reason}.")
        return StatementFailed(
            f"{self.name}: {reason}.", sqlstate=error.sqlstate or "", constraint=error.diag.constraint_name
        )

    def _unavailable(self, reason: str) -> DatabaseUnavailable:
        if self.available:
            self.available = False
            self._down_since = self._clock.monotonic()
            self._observer.on(ShardUnavailable(self.name, reason))
        if self._check is None or self._check.done():
            # One dead connection means that the idle ones are suspect: test them now, not by failing one caller each.
            self._check = asyncio.get_running_loop().create_task(self._pool.check())
        return DatabaseUnavailable(f"Shard {self.name} ({self._shown_dsn}) does not answer: {reason}.")

    def _answered(self) -> None:
        if not self.available:
            self.available = True
            self._observer.on(ShardRecovered(self.name, self._clock.monotonic() - self._down_since))


def _row_factory(cursor: psycopg.AsyncCursor[Any]) -> Callable[[Sequence[Any]], Row]:
    return row_of(tuple(column.name for column in cursor.description or ()))


def checked_dsn(shard: ShardConfig) -> None:
    """Refuse a connection string that libpq cannot read."""
    try:
        psycopg.conninfo.conninfo_to_dict(shard.dsn)
    except psycopg.ProgrammingError as error:
        raise CallerError(
            f"database.shards: the dsn of {shard.name!r} cannot be read: {str(error).strip()}.",
            fix="Write postgresql://user@host:port/database or key=value pairs.",
        ) from error
