"""One Postgres and its connections. The only module that knows psycopg.

What broke decides what the caller is told: no connection, or an error that Postgres reported itself, means that
nothing was kept (`DatabaseUnavailable`, `StatementFailed`, `StatementTimeout`). A connection that died after a write
was sent means that nobody knows (`OutcomeUnknown`); such a write is never repeated here, but with `resolve_unknown`
the server is asked whether it is there. What was not sent yet waits for another connection: before each use it is
looked whether the server has hung up. A read is repeated once, on another connection.

Whoever borrows a connection finds a fresh session: one that a statement left something in is closed (see `texts`).

A shard of several servers is written to on the one that leads (see `leader`); so is a shard behind a single address
that leads to another server one day. No connection to a standby, or to a primary that was replaced, is ever lent.

Whether a node is available is found out by asking: every statement tells, and where there are none, `probe` does.
"""

import asyncio
import logging
import math
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import aclosing, asynccontextmanager
from functools import partial
from typing import Any, Final, TypeVar

import psycopg
import psycopg.sql

from headrace.clock import Clock
from headrace.database.config import DatabaseConfig, ShardConfig
from headrace.database.postgres.endpoints import address_of, application_name, hosts_of
from headrace.database.postgres.leader import SIGHTING, Leader, NoLeader, Sighting
from headrace.database.postgres.leadership import Leadership
from headrace.database.postgres.outcomes import CREATE, NOTE, Mark, find_out
from headrace.database.postgres.pipeline import (
    Answer,
    Params,
    PipelinedConnection,
    RowKind,
    ask_once,
    named_rows,
)
from headrace.database.postgres.pool import Pool, PoolClosed, PoolTimeout, TooManyRequests
from headrace.database.postgres.pool_usage import ROOM, NodeStatistics, Room, UsageMeter, fair_share
from headrace.database.postgres.rows import Row
from headrace.database.postgres.sessions import note_write
from headrace.database.postgres.texts import is_write, trace_of
from headrace.database.postgres.transaction import Pieces, Transaction
from headrace.database.postgres.trips import Trips
from headrace.errors import (
    BackendError,
    DatabaseUnavailable,
    HeadraceError,
    NotOpen,
    OutcomeUnknown,
    Overloaded,
    StatementFailed,
    StatementRefused,
    StatementTimeout,
)
from headrace.events import (
    LeaderChanged,
    LeaderRefused,
    Observer,
    OutcomeResolved,
    PoolLimited,
    ShardRecovered,
    ShardUnavailable,
)

_TIMEOUTS = (psycopg.errors.QueryCanceled, psycopg.errors.LockNotAvailable)
# Postgres says itself that it is going away, or not there yet: the statement surely left no trace.
_GOING_AWAY = (psycopg.errors.AdminShutdown, psycopg.errors.CannotConnectNow)
_CLOSE_S = 1.0
"""How long closing waits for connections that are just being made, and for statements that are under way."""
_SHARE_S: Final = 5.0
"""How often it is looked at how many share a server."""
_T = TypeVar("_T")
_POOL_LOG = logging.getLogger("psycopg.pool")
# format_type with -1 says `bpchar` where regtype would say `character`, of which an array holds single letters.
_DESCRIBED = """
SELECT format_type(p.type, -1) FROM pg_prepared_statements s, unnest(s.parameter_types) WITH ORDINALITY p(type, number)
WHERE s.name = 'headrace_described' ORDER BY p.number"""


class Node:
    """A pool of connections to one Postgres, or to the one that leads of several."""

    def __init__(self, shard: ShardConfig, config: DatabaseConfig, *, clock: Clock, observer: Observer) -> None:
        self.name = shard.name
        self.available = False
        self.address = address_of(shard)
        self._clock = clock
        self._observer = observer
        self._config = config
        self._down_since: float | None = None
        self._heard_at = -float("inf")
        self._may_stand_by = shard.read_only or shard.replica_of is not None
        self._leaves_marks = config.resolve_unknown and not self._may_stand_by
        """Each transaction notes what it can be found by (see `outcomes`)."""
        self._unprepared: deque[Callable[[Node], Awaitable[None]]] = deque()
        self._lent: dict[PipelinedConnection, asyncio.Task[Any] | None] = {}
        self._check: asyncio.Task[None] | None = None
        self._preparing: asyncio.Task[None] | None = None
        self._probing: asyncio.Task[None] | None = None
        self._tending: asyncio.Task[None] | None = None
        self._trips = Trips(
            shard.name,
            config,
            connect=self._connection,
            translate=self._translated,
            was_kept=self.was_kept if self._leaves_marks else None,
            clock=clock,
        )
        self._hosts = hosts_of(shard)
        self._is_read_only = shard.read_only
        half = config.acquire_timeout_s / 2  # the rest is for connecting to who was found
        self._leadership = Leadership(self._hosts, ask=ask_once, follow=self._follow, timeout_s=half, clock=clock)
        self._shared_at = -float("inf")
        self._meter = UsageMeter(wait_p99_max_s=config.wait_p99_max_s, now=clock.monotonic())
        self.unknown = self.resolved = 0
        if self._leaves_marks:
            self.prepare(_make_outcomes)
        self._pool = Pool(
            self._target,
            connection_class=PipelinedConnection,
            kwargs={
                "autocommit": True,
                "row_factory": named_rows,
                "cursor_factory": psycopg.AsyncRawCursor,
                "application_name": application_name(shard),
            },
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

    async def _configure(self, connection: PipelinedConnection) -> None:
        """Set the limits of the session and find out whose it is; raises if that may not be lent."""
        limits = {"statement_timeout": self._config.statement_timeout_s, "lock_timeout": self._config.lock_timeout_s}
        settings = {name: f"{math.ceil(limit_s * 1000)}" for name, limit_s in limits.items()}  # 0 would be none
        if self._is_read_only:
            settings["default_transaction_read_only"] = "on"
        self._pool.greeting(connection)
        row = await connection.introduce(SIGHTING, settings)
        seen = Sighting.of(f"{connection.info.host}:{connection.info.port}", row[:3])
        objection = self._leadership.met(seen)
        if objection is not None and not self._may_stand_by:
            await connection.close()
            raise psycopg.OperationalError(objection)
        connection.timeline = seen.timeline

    async def open(self) -> None:
        """Start connecting; does not wait, so that one dead shard does not keep the others from serving."""
        _POOL_LOG.addFilter(self._is_news)
        await self._pool.open(wait=False)

    async def close(self) -> None:
        """Close every connection."""
        tasks = {task for task in (self._check, self._preparing, self._probing, self._tending) if task is not None}
        talking = {task: connection for connection, task in self._lent.items() if task in tasks}
        for task in tasks - talking.keys():
            task.cancel()
        self._pool.give_up()
        # The pool first, or it would replace what is severed; its workers may be stuck in connecting to a dead server.
        await self._pool.close(timeout=_CLOSE_S)
        for connection in talking.values():
            # Not cancelled: psycopg would first wait for the server to agree, and a frozen one never does.
            connection.sever()
        running = await self._trips.close(timeout_s=_CLOSE_S)
        callers = {task for task in self._lent.values() if task is not None} - running - {asyncio.current_task()}
        if callers:
            await asyncio.wait(callers, timeout=_CLOSE_S)
        self._sever_all()
        if running:
            await asyncio.wait(running)
        await asyncio.gather(*tasks, self._leadership.close(), return_exceptions=True)
        _POOL_LOG.removeFilter(self._is_news)

    def _is_news(self, record: logging.LogRecord) -> bool:
        """Whether the pool's words are worth a line: why the first attempts failed, not that later ones did too."""
        is_ours = isinstance(record.args, tuple) and record.args[:1] == (self._pool.name,)
        return not is_ours or self._down_since is None

    async def _target(self) -> str:
        """Where the pool connects to."""
        if len(self._hosts) == 1:
            return next(iter(self._hosts.values()))
        found = await self._leadership.look()
        if isinstance(found, NoLeader):
            raise psycopg.OperationalError(found.reason)
        return self._hosts[found.address]

    async def _follow(self, found: Leader | NoLeader) -> None:
        """Leave the server that was written to until now."""
        if isinstance(found, NoLeader):
            self._observer.on(LeaderRefused(self.name, found.reason))
            self._lost(found.reason)
        else:
            self._observer.on(LeaderChanged(self.name, found.address, found.timeline))
        # What is under way there would be lost with it, or be on both.
        self._sever_all()
        self._pool.give_up()
        await self._pool.drain()

    def _sever_all(self) -> None:
        for connection in list(self._lent):
            connection.sever()

    async def tend(self) -> None:
        """Once a second: see who leads, where there is a choice, and take no more than a share of the server."""
        if self._tending is None or self._tending.done():
            self._tending = asyncio.get_running_loop().create_task(self._tend())
        # As with a probe: who stops waiting for a frozen server does not cancel the question.
        await asyncio.wait({self._tending}, timeout=self._config.acquire_timeout_s)

    async def _tend(self) -> None:
        if len(self._hosts) > 1:
            await self._leadership.look()
        if self._unprepared or self._clock.monotonic() - self._shared_at < _SHARE_S:
            return
        self._shared_at = self._clock.monotonic()
        try:
            row = (await self._fetch(ROOM, (), read_only=True))[0]
        except HeadraceError:
            return  # who is not reached, or busy, is asked again
        room = Room(*row)
        share = fair_share(room, self._config.connections_max)
        if share != self._pool.max_size:
            await self._pool.resize(1, share)
            if share < self._config.connections_max:
                wanted = self._config.connections_max
                free = room.limit - room.others
                self._observer.on(PoolLimited(self.name, share, wanted, room.pools, free))
        await self._pool.shrink()

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

    @property
    def busy(self) -> int:
        """Connections that are at work."""
        return len(self._lent)

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
        # Nothing that it would let run for so long is still awaited from a server that answers nobody else either.
        is_mute = self._clock.monotonic() - self._heard_at >= self._config.statement_timeout_s
        if is_mute and self._lent and not await self._leadership.answers():
            self._sever_all()

    async def _ask(self) -> None:
        try:
            await self._fetch("SELECT 1", (), read_only=True)
        except HeadraceError:
            # What was found out stands in `available`; a pool whose connections are all busy tells nothing new.
            return

    async def fetch(self, sql: str, params: Params = (), *, read_only: bool = False) -> list[Row]:
        """The rows of one statement in a transaction of its own.

        A `read_only` one is repeated once if its connection died, and shares round trips with others that come while
        it waits.
        """
        if not read_only:
            answer = await self._write(lambda: self._fetch(sql, params, read_only=False), sql, params)
            return answer if isinstance(answer, list) else []
        if self._unprepared or trace_of(sql):
            # What prepares the node waits for nobody: those who share wait for it. And a setting is nobody else's.
            return await self._fetch(sql, params, read_only=True)
        return await self._trips.read(sql, params)

    async def fetch_as(self, row_kind: RowKind, sql: str, params: Params) -> list[Any]:
        """What a read-only statement answers, in rows of another kind; a text always comes with the same."""
        return await self._trips.read(sql, params, row_kind)

    async def _fetch(self, sql: str, params: Params, *, read_only: bool) -> list[Row]:
        async with self._connection(read_only=read_only) as connection:
            cursor = await connection.execute(sql, params or None)
            return await cursor.fetchall() if cursor.description else []

    @asynccontextmanager
    async def stream(
        self, sql: str, params: Params = (), *, block_rows: int
    ) -> AsyncIterator[AsyncIterator[list[Row]]]:
        """The rows of a statement that changes nothing, in blocks; leaving early cancels it on the server."""
        async with self.reading() as connection, aclosing(connection.blocks(sql, params, block_rows)) as blocks:
            yield blocks

    @asynccontextmanager
    async def copy_out(self, query: Pieces) -> AsyncIterator[AsyncIterator[bytes]]:
        """The rows of a SELECT in the text form of COPY, in blocks of whole rows."""
        async with self.reading() as connection, aclosing(connection.copy_out(*query)) as blocks:
            yield blocks

    @asynccontextmanager
    async def reading(self) -> AsyncIterator[PipelinedConnection]:
        """A connection of one's own for a read that takes several statements."""
        async with self._connection(read_only=True) as connection:
            yield connection

    async def describe(self, sql: str, params: Params = ()) -> list[tuple[str, int]]:
        """Name and type (its OID on this server) of every column of a SELECT, without running it."""
        async with self._connection(read_only=True) as connection:
            described = f"SELECT * FROM ({sql}\n) AS described LIMIT 0"  # noqa: S608 - the statement is the caller's own
            cursor = await connection.execute(described, params or None)
            return [(column.name, column.type_code) for column in cursor.description or ()]

    async def execute(self, sql: str, params: Params = (), *, grouped: bool = False) -> int:
        """Run one statement in a transaction of its own; the number of rows that it touched.

        With `grouped` an INSERT, UPDATE or DELETE shares a commit with others; it is committed when this returns.
        """
        if grouped and not self._unprepared:
            return await self._noted(lambda: self._trips.write(sql, params))

        async def once() -> int:
            async with self._connection(read_only=False) as connection:
                cursor = await connection.execute(sql, params or None)
                return cursor.rowcount

        answer = await self._write(once, sql, params)
        return answer if isinstance(answer, int) else len(answer)

    async def parameter_types(self, sql: str, declared: Sequence[str]) -> list[str]:
        """The types that the server gives to the parameters of a statement; `unknown` ones it infers."""
        async with self.reading() as connection:
            await connection.execute(f"PREPARE headrace_described ({', '.join(declared)}) AS {sql}")
            return [row[0] for row in await (await connection.execute(_DESCRIBED)).fetchall()]

    async def execute_many(self, sql: str, rows: Sequence[Params]) -> None:
        """Run one statement for each row, pipelined, in one transaction."""

        async def once() -> None:
            async with self.transaction() as transaction:
                await transaction.execute_many(sql, rows)

        await self._noted(once)

    @asynccontextmanager
    async def transaction(self) -> AsyncIterator[Transaction]:
        """A transaction that commits when the block ends and rolls back when it raises."""
        mark: Mark | None = None
        try:
            # Until COMMIT is sent a connection that breaks has undone everything.
            async with (
                self._connection(read_only=True) as connection,
                connection.transaction(),
                self._transaction(connection) as transaction,
            ):
                yield transaction
                await transaction.end()
                if self._leaves_marks and transaction.texts:
                    noted = await connection.execute(NOTE, connection.marker.next())
                    mark = connection.marker.mark(await noted.fetchall())
                connection.is_committing = True
        except OutcomeUnknown as error:
            if mark is None or not await self.was_kept(mark, error):
                raise
        finally:
            self.note_write()

    @asynccontextmanager
    async def unfinished(self) -> AsyncIterator[Transaction]:
        """A transaction that is rolled back when the block ends, unless it was prepared for a two-phase commit."""
        try:
            async with self._connection(read_only=True) as connection:
                await connection.execute("BEGIN")
                try:
                    async with self._transaction(connection) as transaction:
                        yield transaction
                finally:
                    if not connection.broken and not connection.closed:
                        await connection.rollback()
        finally:
            self.note_write()

    @asynccontextmanager
    async def _transaction(self, connection: PipelinedConnection) -> AsyncIterator[Transaction]:
        def translate(error: psycopg.Error) -> HeadraceError:
            return self._translated(error, broken=connection.broken or connection.closed, read_only=True)

        transaction = Transaction(connection, translate)
        try:
            yield transaction
        finally:
            transaction.is_over = True

    async def was_kept(self, mark: Mark, unknown: OutcomeUnknown) -> bool:
        """Whether a transaction whose commit was not answered was committed.

        Raises `DatabaseUnavailable` if it was not, and never will be, and `unknown` if that cannot be found out within
        `resolve_wait_s`.
        """
        wait_s, ask = self._config.resolve_wait_s, partial(self._fetch, read_only=True)
        try:
            async with asyncio.timeout(2 * wait_s):  # a frozen server holds up a question without end
                is_kept = await find_out(ask, mark, clock=self._clock, wait_s=wait_s)
        except TimeoutError:
            is_kept = None
        if is_kept is None:
            raise unknown
        self.resolved += 1
        self.unknown -= 1
        self._observer.on(OutcomeResolved(self.name, is_kept))
        if not is_kept:
            raise DatabaseUnavailable(f"{self.name}: the connection broke at a commit, which did not happen.")
        return True

    async def _write(self, once: Callable[[], Awaitable[Answer]], sql: str, params: Params) -> Answer:
        """A write outside of a transaction; with `resolve_unknown`, and where that is possible, in one of its own."""
        if self._leaves_marks and not self._unprepared and is_write(sql):
            return await self._noted(lambda: self._trips.write_alone(sql, params))
        return await self._noted(once)

    async def _noted(self, write: Callable[[], Awaitable[_T]]) -> _T:
        """Run a write, once more if it met a standby, and remember for the caller that it wrote."""
        try:
            try:
                return await write()
            except DatabaseUnavailable as error:
                if not isinstance(error.__cause__, psycopg.errors.ReadOnlySqlTransaction):
                    raise
            return await write()
        finally:
            self.note_write()

    def note_write(self) -> None:
        """The caller's context wrote here, or may have: it reads that back, from replicas too."""
        note_write(self.name, self._clock.monotonic())

    def statistics(self) -> NodeStatistics:
        """The pool, now."""
        stats = self._pool.get_stats()
        return NodeStatistics(
            stats.get("pool_size", 0),
            stats.get("pool_available", 0),
            stats.get("requests_waiting", 0),
            self.available,
            self._pool.max_size,
            *self._meter.usage(self._clock.monotonic()),
            self.unknown,
            self.resolved,
        )

    @asynccontextmanager
    async def _connection(self, *, read_only: bool) -> AsyncIterator[PipelinedConnection]:
        """A connection, and every psycopg error turned into ours."""
        await self.ready()
        asked = self._clock.monotonic()
        try:
            connection = await self._borrowed()
        except PoolTimeout as error:
            raise self._without_connection() from error
        except PoolClosed as error:
            raise NotOpen(f"The connections to shard {self.name} are closed.") from error
        except TooManyRequests as error:
            raise Overloaded(f"Shard {self.name}: {self._config.waiting_max} calls wait for a connection.") from error
        self._lent[connection] = asyncio.current_task()
        now = self._count()
        self._meter.waited(now, now - asked)
        connection.is_committing = False
        try:
            yield connection
        except psycopg.Error as error:
            if not self._may_stand_by and connection.was_demoted(error):
                await connection.close()
                raise self._unavailable("it is a standby now, and refused this before any effect") from error
            broken = connection.broken or connection.closed
            if connection.is_committing and (broken or isinstance(error, _GOING_AWAY)):
                # Not even a server that says itself that it is going away says whether it has committed before.
                raise self._translated(psycopg.OperationalError(str(error)), broken=True, read_only=False) from error
            raise self._translated(error, broken=broken, read_only=read_only) from error
        else:
            self._answered()
            connection.check_done()
        finally:
            del self._lent[connection]
            await self._pool.take_back(connection)
            self._count()

    async def _borrowed(self) -> PipelinedConnection:
        """A connection that was not hung up while it lay idle, to a server that was not replaced meanwhile."""
        while True:
            connection = await self._pool.getconn()
            replaced = connection.timeline < self._leadership.lineage.timeline and not self._may_stand_by
            if not replaced and not connection.is_hung_up():
                return connection
            await connection.close()
            await self._pool.putconn(connection)

    def _count(self) -> float:
        """Tell the meter how many connections are busy now; the time."""
        now = self._clock.monotonic()
        self._meter.change(now, busy=self._pool.occupied, opened=self._pool.size)
        return now

    def _without_connection(self) -> HeadraceError:
        waited = f"within {self._config.acquire_timeout_s:g} s"
        if len(self._lent) >= self._pool.max_size and self.available:
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
        if isinstance(error, psycopg.errors.ReadOnlySqlTransaction) and self._is_read_only:
            return StatementRefused(
                f"Shard {self.name} is read-only.", fix="Write to another shard, or set read_only = false."
            )
        if broken:
            self._unavailable(reason)
            self.unknown += 1
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
        if self._down_since is None and not self._pool.closed:  # else it was us who hung up
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


async def _make_outcomes(node: Node) -> None:
    async with node.transaction() as transaction:
        for statement in CREATE:
            await transaction.execute(statement)
        transaction.texts.clear()  # nothing to mark it with yet
