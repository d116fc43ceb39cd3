"""One Postgres and its connections. The only module that knows psycopg.

What broke decides what the caller is told: no connection, or an error that Postgres reported itself, means that
nothing was kept (`DatabaseUnavailable`, `StatementFailed`, `StatementTimeout`). A connection that died after a write
was sent means that nobody knows (`OutcomeUnknown`); such a write is never repeated here. A read is repeated once, on
another connection.

Whether a node is available is found out by asking: every statement tells, and where there are none, `probe` does.
"""

import asyncio
import logging
import os
import socket
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from typing import Any, NamedTuple

import psycopg
from psycopg_pool import AsyncConnectionPool, PoolClosed, PoolTimeout, TooManyRequests

from headrace.clock import Clock
from headrace.database.config import DatabaseConfig, ShardConfig
from headrace.database.rows import Row, row_of
from headrace.errors import (
    BackendError,
    ConfigError,
    DatabaseUnavailable,
    HeadraceError,
    NotOpen,
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


_CLOSE_S = 1.0
"""How long closing waits for connections that are just being made."""


_POOL_LOG = logging.getLogger("psycopg.pool")


class NodeStatistics(NamedTuple):
    """The connections of this process to one node."""

    connections: int
    idle: int
    waiting: int
    available: bool
    """It answered last time, and nothing is missing that must run before it serves."""


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
        self.available = False
        self.address = _address(shard)
        self._clock = clock
        self._observer = observer
        self._config = config
        self._down_since: float | None = None
        self._heard_at = -float("inf")
        self._unprepared: deque[Callable[[Node], Awaitable[None]]] = deque()
        self._lent: dict[psycopg.AsyncConnection[Any], asyncio.Task[Any] | None] = {}
        self._check: asyncio.Task[None] | None = None
        self._preparing: asyncio.Task[None] | None = None
        self._probing: asyncio.Task[None] | None = None
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
            name=f"headrace {shard.name}",
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
        _POOL_LOG.addFilter(self._is_news)
        await self._pool.open(wait=False)

    async def close(self) -> None:
        """Close every connection."""
        tasks = {task for task in (self._check, self._preparing, self._probing) if task is not None}
        talking = {task: connection for connection, task in self._lent.items() if task in tasks}
        for task in tasks - talking.keys():
            task.cancel()
        # The pool first, or it would replace what is severed; its workers may be stuck in connecting to a dead server.
        await self._pool.close(timeout=_CLOSE_S)
        for connection in talking.values():
            # Not cancelled: psycopg would first wait for the server to agree, and a frozen one never does.
            _sever(connection)
        await asyncio.gather(*tasks, return_exceptions=True)
        _POOL_LOG.removeFilter(self._is_news)

    def _is_news(self, record: logging.LogRecord) -> bool:
        """Whether the pool's words are worth a line: why the first attempts failed, not that later ones did too."""
        is_ours = isinstance(record.args, tuple) and record.args[:1] == (self._pool.name,)
        return not is_ours or self._down_since is None

    def prepare(self, preparation: Callable[["Node"], Awaitable[None]]) -> None:
        """Run this before any later statement, when the node is next reached; again and again until it succeeds."""
        self._unprepared.append(preparation)

    async def ready(self) -> None:
        """Return when all that must run first has run; raise what kept it from that."""
        if not self._unprepared or asyncio.current_task() is self._preparing:
            return
        if self._preparing is None or self._preparing.done():
            self._preparing = asyncio.get_running_loop().create_task(self._prepare())
        # One task for all who wait: it outlives the one that started it, and nobody tries in vain after another.
        preparing = self._preparing
        await asyncio.wait({preparing})
        if preparing.cancelled():
            raise DatabaseUnavailable(f"Shard {self.name} is being closed.")
        if error := preparing.exception():
            raise error

    async def _prepare(self) -> None:
        while self._unprepared:
            try:
                await self._unprepared[0](self)
            except OutcomeUnknown as error:
                # True of the preparation; of the statement that waits for it nothing was sent.
                raise DatabaseUnavailable(error.message) from error
            except HeadraceError as error:
                self._lost(error.message)
                raise
            self._unprepared.popleft()
        self._answered()

    def is_silent(self, seconds: float) -> bool:
        """Whether it has not answered anything for so long."""
        return not self.available or self._clock.monotonic() - self._heard_at >= seconds

    async def probe(self) -> None:
        """Find out whether the node answers, within twice `acquire_timeout_s`; `available` says what came of it."""
        if self._probing is None or self._probing.done():
            self._probing = asyncio.get_running_loop().create_task(self._ask())
        limit_s = 2 * self._config.acquire_timeout_s
        # Not cancelled when it takes longer: it ends by itself when the server thaws or dies, and until then it is
        # the only one.
        if not (await asyncio.wait({self._probing}, timeout=limit_s))[0]:
            self._lost(f"SELECT 1 was not answered within {limit_s:g} s")

    async def _ask(self) -> None:
        try:
            await self._fetch("SELECT 1", (), read_only=True)
        except HeadraceError:
            # What was found out stands in `available`; a pool whose connections are all busy tells nothing new.
            return

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
        await self.ready()
        try:
            connection = await self._pool.getconn()
        except PoolTimeout as error:
            raise self._without_connection() from error
        except PoolClosed as error:
            raise NotOpen(f"The connections to shard {self.name} are closed.") from error
        except TooManyRequests as error:
            raise Overloaded(f"Shard {self.name}: {self._config.waiting_max} calls wait for a connection.") from error
        self._lent[connection] = asyncio.current_task()
        try:
            yield connection
        except psycopg.Error as error:
            raise self._translated(
                error, broken=connection.broken or connection.closed, read_only=read_only
            ) from error
        else:
            self._answered()
        finally:
            del self._lent[connection]
            await self._pool.putconn(connection)

    def _without_connection(self) -> HeadraceError:
        waited = f"within {self._config.acquire_timeout_s:g} s"
        if self._lent and self.available:
            return Overloaded(
                f"Shard {self.name}: none of its {len(self._lent)} busy connections became free {waited}.",
                fix="Send fewer statements at once, or raise database.connections_max.",
            )
        return self._unavailable(f"no connection {waited}")

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
        self._lost(reason)
        if self._check is None or self._check.done():
            # One dead connection means that the idle ones are suspect: test them now, not by failing one caller each.
            self._check = asyncio.get_running_loop().create_task(self._pool.check())
        return DatabaseUnavailable(f"Shard {self.name} does not answer: {reason}.")

    def _lost(self, reason: str) -> None:
        self.available = False
        if self._down_since is None:
            self._down_since = self._clock.monotonic()
            self._observer.on(ShardUnavailable(self.name, reason))

    def _answered(self) -> None:
        self._heard_at = self._clock.monotonic()
        if self.available or self._unprepared:
            return
        self.available = True
        if self._down_since is not None:
            self._observer.on(ShardRecovered(self.name, self._heard_at - self._down_since))
            self._down_since = None


def _row_factory(cursor: psycopg.AsyncCursor[Any]) -> Callable[[Sequence[Any]], Row]:
    return row_of(tuple(column.name for column in cursor.description or ()))


def _sever(connection: psycopg.AsyncConnection[Any]) -> None:
    """End a conversation so that whoever waits for an answer reads the end of it."""
    if not connection.closed:
        with socket.socket(fileno=os.dup(connection.fileno())) as line:
            line.shutdown(socket.SHUT_RDWR)


def _address(shard: ShardConfig) -> str:
    """Where a connection string leads, as an operator may see it: nothing else of it, so no secret either."""
    try:
        parts = psycopg.conninfo.conninfo_to_dict(shard.dsn)
    except psycopg.ProgrammingError:
        # Neither libpq's words nor its error as a cause: both quote what it stumbled over, which may be the password.
        raise ConfigError(
            f"database.shards: the dsn of {shard.name!r} cannot be read.",
            fix="Write postgresql://user@host:port/database (%XX for special characters) or key=value pairs.",
        ) from None
    host = parts.get("host") or parts.get("hostaddr") or "local socket"
    return f"{host}:{parts.get('port', 5432)}/{parts.get('dbname', '')}"
