"""Which tables changed, told by a shard itself: logical decoding, with a heartbeat that says how far it has told.

One task a shard holds two connections. On the first Postgres streams what it commits (plug-in pgoutput, temporary
slot): transaction ids and tables go into the `Ledger`, rows are not looked at. Over the second it writes a heartbeat
into the log, which comes back on the first behind everything that was committed before. `fresh_at` is when the last
one that came back was sent: the ledger knows every change that was visible by then. The same round looks at the
structure of the tables, because DDL is not streamed.

Whatever goes wrong ends in the same place: the ledger is told to forget, and the next stream begins with a new slot.
A temporary slot dies with its connection, so neither a killed process nor a stopped one keeps the log from being
recycled; `max_slot_wal_keep_size` bounds what a slow one can hold up.

A new slot waits on the server until every transaction that writes at that moment has ended. What is read while the
slot is made is not vouched for; `base` is taken afterwards.
"""

import asyncio
import os
import secrets
import socket
import struct
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Final, NamedTuple

import psycopg
from psycopg import AsyncConnection, AsyncRawCursor, generators, pq

from headrace.clock import Clock
from headrace.database.query_cache.catalog import STRUCTURE, Relation
from headrace.database.query_cache.ledger import Ledger
from headrace.database.query_cache.pgoutput import Changed, Decoder, Told
from headrace.events import ChangesFollowed, ChangesLost, Observer

PREFIX: Final = "headrace"
"""Of the heartbeats in the log."""
_RETRY_FIRST_S: Final = 0.05
_RETRY_MAX_S: Final = 5.0
_HOPELESS_S: Final = 60.0
"""Between attempts where an operator has to act first."""
_CONNECT_S: Final = 5
_BEATS_MAX: Final = 64
"""Heartbeats under way; older ones are given up."""
_AT_ONCE: Final = 500
"""Messages between two turns of the event loop."""
_LIFE_MIN_S: Final = 0.5
"""A stream is not restarted for more tables sooner: several often come together."""
_CLOSE_S: Final = 2.0

_SERVER: Final = """
SELECT current_setting('wal_level'), current_setting('max_slot_wal_keep_size'), pg_is_in_recovery(),
       current_setting('server_version_num')::int"""
_PUBLISHED: Final = """
WITH RECURSIVE down(oid) AS (
    SELECT r.prrelid FROM pg_catalog.pg_publication_rel AS r
    JOIN pg_catalog.pg_publication AS p ON p.oid = r.prpubid WHERE p.pubname = $1 AND r.prqual IS NULL
    UNION SELECT i.inhrelid FROM down JOIN pg_catalog.pg_inherits AS i ON i.inhparent = down.oid
    JOIN pg_catalog.pg_class AS c ON c.oid = i.inhrelid AND c.relispartition
)
SELECT (SELECT puballtables FROM pg_catalog.pg_publication WHERE pubname = $1),
       (SELECT coalesce(array_agg(oid::bigint), '{}') FROM down),
       (SELECT xmin::text FROM pg_catalog.pg_publication WHERE pubname = $1),
       (SELECT pubinsert AND pubupdate AND pubdelete AND pubtruncate FROM pg_catalog.pg_publication
        WHERE pubname = $1)"""
"""A table of which only some rows are published is not published."""
_BASE: Final = """
SELECT pg_snapshot_xmax(pg_current_snapshot())::text::bigint,
       (SELECT system_identifier FROM pg_control_system())::text || '/'
       || substr(pg_walfile_name(pg_current_wal_insert_lsn()), 1, 8), extract(epoch FROM now())::float8"""
_BEAT: Final = "SELECT pg_logical_emit_message({}), extract(epoch FROM clock_timestamp())::float8"
_DATA: Final = struct.Struct(">cqqq")
_KEEPALIVE: Final = struct.Struct(">cqqB")
_STATUS: Final = struct.Struct(">cqqqqB")


_Publication = tuple[bool | None, frozenset[int], str | None, bool | None]
"""Whether it has all tables (None: there is no such publication), those that it has, its version, and whether it has
every kind of change."""
_DIFFERENT: Final = ""
"""A digest that nothing has."""


class _Impossible(Exception):
    """The server cannot stream changes until an operator acts."""


class _Ended(Exception):
    """The stream stopped telling."""


class Followed(NamedTuple):
    """How far a stream has come."""

    is_live: bool
    reason: str | None
    """Why it tells nothing."""
    fresh_at: float
    """When the last heartbeat that came back was sent, on the monotonic clock."""
    warning: str | None


class ChangeStream:
    """Follows the changes of one shard into a ledger, from `open` to `close`."""

    def __init__(
        self,
        shard: str,
        dsn: str,
        ledger: Ledger,
        *,
        publication: str,
        may_publish: bool,
        heartbeat_s: float,
        on_probe: Callable[[float, float], None],
        on_structure: Callable[[set[str]], None],
        clock: Clock,
        observer: Observer,
    ) -> None:
        self._shard = shard
        self._dsn = dsn
        self._ledger = ledger
        self._publication = publication
        self._may_publish = may_publish
        self.heartbeat_s = heartbeat_s
        self._on_probe = on_probe
        self._on_structure = on_structure
        self._clock = clock
        self._observer = observer
        self.fresh_at = float("-inf")
        self.digests: dict[str, str] = {}
        """The structure that analysed queries count on, by name."""
        self.unpublished: dict[int, str] = {}
        """Why tables are not told of, by OID."""
        self._wanted: dict[int, Relation] = {}
        self._task: asyncio.Task[None] | None = None
        self._connections: list[AsyncConnection[Any]] = []
        self._more = asyncio.Event()
        self._is_closing = False
        self._reason: str | None = "it has not begun yet"
        self._told_reason: str | None = None
        self._warning: str | None = None
        self._beats: dict[int, list[float]] = {}
        self._position = 0
        self._slot = ""

    # -- life ---------------------------------------------------------------------------------------------------------

    def follow(self, relations: Iterable[Relation], digests: Mapping[str, str]) -> None:
        """Tell of these tables too, whose structure was as in `digests` when a query was analysed."""
        for name, digest in digests.items():
            # Of two analyses one is outdated, and nobody knows which: the next look finds a change, and forgets both.
            self.digests[name] = digest if self.digests.get(name, digest) == digest else _DIFFERENT
        new = {relation.oid: relation for relation in relations if relation.oid not in self._wanted}
        self._wanted.update(new)
        if self._task is None or self._task.done():
            self._task = asyncio.get_running_loop().create_task(self._run())
            self._task.add_done_callback(self._died)
        elif not self._ledger.tells_of(new):
            self._more.set()

    async def close(self) -> None:
        """Stop; the server drops the slot when it notices the end of the connection."""
        self._is_closing = True
        self._sever()
        if self._task is not None:
            await asyncio.wait({self._task}, timeout=_CLOSE_S)
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)
        self._ledger.end()

    def state(self) -> Followed:
        """How far it has come."""
        is_live = self._reason is None and self.fresh_at > float("-inf")
        reason = None if is_live else self._reason or "it begins anew, for more tables"
        return Followed(is_live, reason, self.fresh_at, self._warning)

    async def _run(self) -> None:
        wait_s = _RETRY_FIRST_S
        while not self._is_closing:
            began = self._clock.monotonic()
            try:
                await self._follow()
                wait_s = 0.0  # it was asked for more tables
            except _Impossible as error:
                self._lost(str(error))
                wait_s = _HOPELESS_S
            except psycopg.errors.InsufficientPrivilege as error:
                self._lost(_first_line(error))
                wait_s = _HOPELESS_S
            except (psycopg.Error, OSError, _Ended) as error:
                self._lost(_first_line(error))
                lived = self._clock.monotonic() - began > _RETRY_MAX_S
                wait_s = _RETRY_FIRST_S if lived else min(_RETRY_MAX_S, 2 * wait_s or _RETRY_FIRST_S)
            finally:
                self._ledger.end()
                self.fresh_at = float("-inf")
                await self._disconnect()
            if not self._is_closing:
                await self._clock.sleep(wait_s)

    def _died(self, task: asyncio.Task[None]) -> None:
        if not task.cancelled() and (error := task.exception()) is not None:
            self._lost(f"{type(error).__name__}: {error}")
            message = "the change stream ended for a reason that it does not know"
            task.get_loop().call_exception_handler({"message": message, "exception": error})

    def _lost(self, reason: str) -> None:
        self._reason = reason
        if reason != self._told_reason and not self._is_closing:
            self._told_reason = reason
            self._observer.on(ChangesLost(self._shard, reason))

    async def _connect(self, **options: Any) -> AsyncConnection[Any]:
        connection = await AsyncConnection.connect(
            self._dsn,
            autocommit=True,
            cursor_factory=AsyncRawCursor,
            connect_timeout=_CONNECT_S,
            target_session_attrs="read-write",
            **options,
        )
        self._connections.append(connection)
        if self._is_closing:
            raise _Ended("it is being closed")
        return connection

    def _sever(self) -> None:
        """End both conversations so that whoever waits for an answer, of a frozen server too, reads the end of it."""
        for connection in self._connections:
            if not connection.closed:
                with socket.socket(fileno=os.dup(connection.fileno())) as line:
                    try:
                        line.shutdown(socket.SHUT_RDWR)
                    except OSError:
                        continue  # the other side was faster

    async def _disconnect(self) -> None:
        for connection in self._connections:
            await connection.close()
        self._connections.clear()

    # -- following ----------------------------------------------------------------------------------------------------

    async def _follow(self) -> None:
        self._more.clear()
        self._beats.clear()
        beating = await self._connect()
        emitted = await self._prepare(beating)
        published = await self._publication_facts(beating)
        streaming = await self._connect(replication="database")
        self._slot = slot = f"headrace_{os.getpid()}_{secrets.token_hex(6)}"
        await _command(streaming, f"CREATE_REPLICATION_SLOT {slot} TEMPORARY LOGICAL pgoutput NOEXPORT_SNAPSHOT")
        # Of what is committed from here on, the slot tells. What ended before lies below the base.
        base, lineage, since = await _row(beating, _BASE)
        await _command(
            streaming,
            f"START_REPLICATION SLOT {slot} LOGICAL 0/0 (proto_version '1', "
            f"publication_names '{_quoted(self._publication)}', messages 'true')",
        )
        tables = None if published[0] else published[1]
        self._ledger.begin(lineage=lineage, base=base, since=since, published=tables)
        await self._together(self._receive(streaming.pgconn), self._beat(beating, emitted, published))

    async def _together(self, *works: Any) -> None:
        """Both until one ends, or more tables are wanted and it has lived long enough."""
        loop = asyncio.get_running_loop()
        tasks = {loop.create_task(work) for work in works}
        waiting = loop.create_task(self._until_more())
        tasks.add(waiting)
        try:
            done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
            for task in done:
                task.result()
        finally:
            self._sever()
            waiting.cancel()
            # Not cancelled at once: psycopg would ask the server first, and a frozen one does not answer.
            await asyncio.wait(tasks, timeout=_CLOSE_S)
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def _until_more(self) -> None:
        await self._clock.sleep(_LIFE_MIN_S)
        await self._more.wait()

    async def _prepare(self, connection: AsyncConnection[Any]) -> str:
        """Look whether the server can stream, publish what is wanted, and say what a heartbeat emits."""
        wal_level, keep, in_recovery, version = await _row(connection, _SERVER)
        if wal_level != "logical":
            raise _Impossible(f"wal_level is {wal_level}; it must be logical")
        if in_recovery:
            raise _Ended("it is a standby")
        self._warning = None if keep != "-1" else "max_slot_wal_keep_size is not set: a stuck slot could fill the disk"
        await connection.execute("SET synchronous_commit TO local")
        await self._publish(connection)
        # Non-transactional ones cost no transaction id, but only 17 and newer flush them at once.
        return f"false, '{PREFIX}', $1, true" if version >= 170000 else f"true, '{PREFIX}', $1"

    async def _publish(self, connection: AsyncConnection[Any]) -> None:
        name = _identifier(self._publication)
        all_tables, oids, _, is_whole = await self._publication_facts(connection)
        if is_whole is False:
            raise _Impossible(f"the publication {name} leaves out inserts, updates, deletes or truncates")
        if all_tables is None and not self._may_publish:
            raise _Impossible(f"there is no publication {name}, and publish is off")
        if all_tables is None:
            await _tolerant(connection, f"CREATE PUBLICATION {name} WITH (publish_via_partition_root = true)")
        if all_tables or not self._may_publish:
            return
        for relation in list(self._wanted.values()):
            if relation.oid in oids:
                continue
            try:
                await _tolerant(connection, f"ALTER PUBLICATION {name} ADD TABLE {relation.path} {relation.identity}")
            except psycopg.ProgrammingError as error:
                # Not ours to publish, or gone: what is read of it lives by its age alone.
                self.unpublished[relation.oid] = _first_line(error)

    async def _publication_facts(self, connection: AsyncConnection[Any]) -> _Publication:
        all_tables, oids, version, is_whole = await _row(connection, _PUBLISHED, (self._publication,))
        return all_tables, frozenset(oids), version, is_whole

    # -- the heartbeat ------------------------------------------------------------------------------------------------

    async def _beat(self, connection: AsyncConnection[Any], emitted: str, published: _Publication) -> None:
        sql, number = _BEAT.format(emitted), 0
        while True:
            number += 1
            sent = self._clock.monotonic()
            self._beats[number] = [sent, 0]
            while len(self._beats) > _BEATS_MAX:
                del self._beats[next(iter(self._beats))]
            _, told_at = await _row(connection, sql, (f"{self._slot}:{number}",))
            self._on_probe(told_at, sent)
            await self._look_at_structure(connection)
            facts = await self._publication_facts(connection)
            if facts[0] != published[0] or facts[2] != published[2] or not facts[1] >= published[1]:
                raise _Ended("the publication was altered")
            self._half(number)
            await self._clock.sleep(self.heartbeat_s)

    async def _look_at_structure(self, connection: AsyncConnection[Any]) -> None:
        if not self.digests:
            return
        expected = dict(self.digests)
        rows = await (await connection.execute(STRUCTURE, (list(expected),))).fetchall()
        found = {name: digest for name, digest in rows}
        changed = {name for name, digest in expected.items() if found.get(name) != digest}
        if changed:
            self._ledger.restructure((await _row(connection, _BASE))[2])
            for name in changed:
                self.digests.pop(name, None)
            self._on_structure(changed)

    def _half(self, number: int) -> None:
        """A heartbeat was answered, or came back; when both, everything that was visible at its sending is known."""
        beat = self._beats.get(number)
        if beat is None:
            return
        beat[1] += 1
        if beat[1] == 2:
            del self._beats[number]
            self.fresh_at = max(self.fresh_at, beat[0])
            if self._reason is not None:
                self._reason = self._told_reason = None
                tables = self._ledger.tables
                self._observer.on(ChangesFollowed(self._shard, -1 if tables is None else tables, self._warning))

    # -- the stream ---------------------------------------------------------------------------------------------------

    async def _receive(self, pgconn: Any) -> None:
        loop, readable, decoder = asyncio.get_running_loop(), asyncio.Event(), Decoder()
        pgconn.nonblocking = 1
        loop.add_reader(pgconn.socket, readable.set)
        fileno = pgconn.socket
        try:
            while True:
                silence_s = max(2.0, 10 * self.heartbeat_s)
                try:
                    async with asyncio.timeout(silence_s):
                        await readable.wait()
                except TimeoutError:
                    raise _Ended(f"nothing was heard for {silence_s:g} s") from None
                readable.clear()
                pgconn.consume_input()
                has_more = True
                while has_more:
                    has_more = self._take(pgconn, decoder)
                    await asyncio.sleep(0)
                pgconn.flush()
        finally:
            loop.remove_reader(fileno)

    def _take(self, pgconn: Any, decoder: Decoder) -> bool:
        """Read what has come; whether there may be more."""
        for _ in range(_AT_ONCE):
            length, data = pgconn.get_copy_data(1)
            if length == 0:
                return False
            if length < 0:
                raise _Ended("the server ended the stream")
            self._hear(pgconn, bytes(data), decoder)
        return True

    def _hear(self, pgconn: Any, data: bytes, decoder: Decoder) -> None:
        if data[:1] == b"k":
            _, self._position, _, wants_reply = _KEEPALIVE.unpack_from(data)
            if wants_reply:
                self._acknowledge(pgconn)
            return
        _, start, _, _ = _DATA.unpack_from(data)
        self._position = max(self._position, start)
        fact = decoder.read(data[_DATA.size :])
        if isinstance(fact, Changed):
            self._ledger.note(fact.xid, fact.tables)
        elif isinstance(fact, Told) and fact.prefix == PREFIX:
            slot, _, number = fact.content.decode().partition(":")
            if slot == self._slot and number.isdigit():
                self._half(int(number))
                self._acknowledge(pgconn)

    def _acknowledge(self, pgconn: Any) -> None:
        pgconn.put_copy_data(_STATUS.pack(b"r", self._position, self._position, self._position, 0, 0))


async def _row(connection: AsyncConnection[Any], sql: str, params: Sequence[Any] = ()) -> Sequence[Any]:
    cursor = await connection.execute(sql, params or None)
    row: Sequence[Any] = await cursor.fetchone() or ()
    return row


async def _command(connection: AsyncConnection[Any], sql: str) -> None:
    """Run a command of the replication protocol, which knows simple queries only."""
    connection.pgconn.send_query(sql.encode())
    for result in await connection.wait(generators.execute(connection.pgconn)):
        if result.status == pq.ExecStatus.FATAL_ERROR:
            raise psycopg.errors.error_from_result(result)


async def _tolerant(connection: AsyncConnection[Any], sql: str) -> None:
    """Run it, unless another process was faster."""
    try:
        await connection.execute(sql)
    except (psycopg.errors.DuplicateObject, psycopg.errors.UniqueViolation):
        return


def _identifier(name: str) -> str:
    return '"' + name.replace('"', '""') + '"'


def _quoted(name: str) -> str:
    return _identifier(name).replace("'", "''")


def _first_line(error: BaseException) -> str:
    return str(error).strip().split("\n")[0] or type(error).__name__
