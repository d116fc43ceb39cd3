"""A connection on which many statements share one round trip.

Intuition: a letter with many questions instead of a letter for each. psycopg's own pipeline mode makes a cursor for
every statement and turns the event loop once for each; here libpq is handed all statements at once, and one wait
brings all answers.

Reads that travel together stand in one implicit transaction, so that one failure makes the server skip those behind
it. They are sent again, each with a Sync of its own, which makes them independent of each other.

Writes that travel together are one transaction. A row that is refused must not take the others with it: the first
attempt goes without savepoints, because most batches are good. After a refusal the rest is sent again with a savepoint
before each row, so every further refusal costs one round trip and nothing else. COMMIT is sent only when every row has
been answered: what breaks before it surely left no trace.
"""

import asyncio
import os
import select
import socket
from collections import OrderedDict
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Generator, Mapping, Sequence
from contextlib import aclosing, asynccontextmanager
from typing import Any, Final, cast

import psycopg
from psycopg import errors, pq
from psycopg import sql as composing
from psycopg.adapt import PyFormat, Transformer
from psycopg.conninfo import conninfo_to_dict, make_conninfo
from psycopg.waiting import Ready, Wait

from headrace.database.postgres.copying import copying
from headrace.database.postgres.lock_patience import LockPatience
from headrace.database.postgres.outcomes import Marker
from headrace.database.postgres.rows import Row, row_of
from headrace.database.postgres.texts import Trace, is_copy, is_query, may_commit, trace_of
from headrace.errors import StatementRefused

Params = Sequence[Any]
DriverError = psycopg.Error
ConnectFailed = psycopg.OperationalError
read_dsn = conninfo_to_dict
make_dsn = make_conninfo
RowKind = Callable[[tuple[str, ...]], Callable[[Sequence[Any]], Any]]
"""From the names of the columns to what makes a row of their values."""
Question = tuple[str, Params, RowKind]
Answer = list[Row] | int
"""The rows; of a statement that has none, the number of rows that it touched."""

_UNDO_ROW: Final[tuple[bytes, ...]] = (b"ROLLBACK TO headrace_row", b"RELEASE headrace_row")
_PREPARED_MAX = 200
_PARAMETERS_MAX: Final = 65535
"""Of one statement; the protocol counts them in 16 bits."""
_CANCEL_S: Final = 1.0
_AT_REST: Final = (pq.TransactionStatus.IDLE, pq.TransactionStatus.INTRANS)
_COPY_BLOCK_BYTES: Final = 256 * 1024
"""Rows that are copied from shard to shard travel in blocks of about this size."""
_SEEN_MAX = 1000
_COPY: Final = (pq.ExecStatus.COPY_IN, pq.ExecStatus.COPY_OUT, pq.ExecStatus.COPY_BOTH)
_ROWS, _DONE, _EMPTY = pq.ExecStatus.TUPLES_OK, pq.ExecStatus.COMMAND_OK, pq.ExecStatus.EMPTY_QUERY
_ABORTED, _SYNC, _ERROR = pq.ExecStatus.PIPELINE_ABORTED, pq.ExecStatus.PIPELINE_SYNC, pq.ExecStatus.FATAL_ERROR
_UNWRITABLE: Final = (ArithmeticError, RuntimeError, TypeError, ValueError)
"""What adapting a value raises beside the driver's own errors: half a surrogate pair, endless nesting, say."""
# What a row would not have suffered on its own: the others of its batch were in its way.
_MUTUAL = (errors.DeadlockDetected, errors.SerializationFailure)
_IN_VAIN = (errors.LockNotAvailable, errors.QueryCanceled)


class Skipped(psycopg.Error):
    """The server did not run it, because of a failure before it."""


def _is_stale(outcome: "Outcome") -> bool:
    """Whether a prepared statement is gone (DEALLOCATE, DISCARD), or a table that it uses was altered.

    The server says so before it runs anything of it. Inside of a function the same may come after some effect.
    """
    if not isinstance(outcome, errors.InvalidSqlStatementName | errors.FeatureNotSupported):
        return False
    is_gone = isinstance(outcome, errors.InvalidSqlStatementName)
    return (is_gone or outcome.diag.source_function == "RevalidateCachedQuery") and outcome.diag.context is None


Outcome = Answer | psycopg.Error
_Shape = tuple[str, tuple[int, ...]]
"""A statement's text, which always comes with the same kind of rows, and the types of its parameters."""


class _Kept:
    """A statement as the server keeps it, and how to read its rows."""

    __slots__ = ("make_row", "name", "transformer")

    def __init__(self, name: bytes) -> None:
        self.name = name
        self.transformer: Any = None
        self.make_row: Any = None


class _Call:
    """A question in the form that goes over the wire, and what came of it."""

    __slots__ = ("formats", "is_fresh", "kept", "outcome", "position", "row_kind", "shape", "values")

    def __init__(self, shape: _Shape, row_kind: RowKind, values: Sequence[Any], formats: Any) -> None:
        self.shape = shape
        self.row_kind = row_kind
        self.values = values
        self.formats = formats
        self.kept: _Kept | None = None
        self.is_fresh = False
        """The round that is under way prepares it."""
        self.position = 0
        """Where its result stands among the results of the round."""
        self.outcome: Outcome = 0


class PipelinedConnection(psycopg.AsyncConnection[Row]):
    """A psycopg connection that can also take many statements at once. Whoever calls it has it alone."""

    def __init__(self, pgconn: Any, row_factory: Any = psycopg.rows.tuple_row) -> None:
        super().__init__(pgconn, row_factory)
        self._dumping = Transformer(self)
        self._kept: OrderedDict[_Shape, _Kept] = OrderedDict()
        self._seen: OrderedDict[_Shape, None] = OrderedDict()
        self._names = 0
        self._unwanted: list[bytes] = []
        """Prepared statements that the server still has and nobody uses any more."""
        self.is_marked = False
        """Its session is not what it was (see `texts`), so nobody else may have it."""
        self.timeline = 0
        """Of the server, when it was connected."""
        self.is_committing = False
        """COMMIT was sent, or is about to be, by us or inside of a statement: if it breaks now nobody knows."""
        self.marker = Marker()

    async def execute(
        self, query: Any, params: Any = None, *, prepare: bool | None = None, binary: bool = False
    ) -> psycopg.AsyncCursor[Row]:
        """Run one statement; once more, unprepared, if it was prepared for a table that has changed since."""
        if isinstance(query, str):
            self.is_marked |= trace_of(query) is Trace.SESSION
            self.is_committing |= not self.is_in_transaction and may_commit(query)
        try:
            return await super().execute(query, params, prepare=prepare, binary=binary)
        except psycopg.Error as error:
            if not _is_stale(error):
                raise
            self.is_marked = True  # the driver does not forget what it prepared
            if self.is_in_transaction:
                raise
            return await super().execute(query, params, prepare=False, binary=binary)
        except _UNWRITABLE as error:
            raise psycopg.DataError(str(error)) from error

    @property
    def is_in_transaction(self) -> bool:
        """Whether a transaction is open, be it one that an error has ended."""
        return self.is_aborted or self.pgconn.transaction_status == pq.TransactionStatus.INTRANS

    @property
    def is_aborted(self) -> bool:
        """Whether an error was met in the open transaction, so that the server turns its COMMIT into a ROLLBACK."""
        return self.pgconn.transaction_status == pq.TransactionStatus.INERROR

    def check_done(self) -> None:
        """Raise if a statement outside of a transaction has begun one: it ends with the loan."""
        if self.is_in_transaction:
            raise StatementRefused(
                "The statement leaves a transaction open, which was rolled back.",
                fix="Use `async with db.transaction()` in place of BEGIN.",
            )

    async def prepare_transaction(self, gid: str) -> bool:
        """Prepare the open transaction for a two-phase commit. False: it could not be, and was rolled back."""
        cursor = await self.execute(_with_literals(("PREPARE TRANSACTION ", ""), (gid,)))
        return cursor.statusmessage == "PREPARE TRANSACTION"

    async def cancel_safe(self, *, timeout: float = 30.0) -> None:
        """Ask the server to end what runs; psycopg does when a task is cancelled, which a frozen one must not hold."""
        await super().cancel_safe(timeout=min(timeout, _CANCEL_S))

    async def introduce(self, query: str, settings: Mapping[str, str]) -> Row:
        """The only row of a query, with settings of the session made on the way."""
        setting = ", ".join(f"set_config('{name}', '{value}', false)" for name, value in settings.items())
        cursor = await super().execute(f"SELECT *, {setting} FROM ({query}) AS introduced")  # noqa: S608 - of our own
        row = await cursor.fetchone()
        assert row is not None
        return row

    def is_hung_up(self) -> bool:
        """Whether the server has ended the conversation: a write sent now would have an unknown outcome."""
        if self.closed:
            return True
        line = select.poll()
        line.register(self.fileno(), select.POLLIN)
        if not line.poll(0):
            return False
        try:
            self.pgconn.consume_input()  # a notice, or its last words
            self.pgconn.consume_input()
        except psycopg.OperationalError:
            return True
        return self.pgconn.status == pq.ConnStatus.BAD

    def was_demoted(self, error: DriverError) -> bool:
        """Whether the server refused a write because it is a standby by now."""
        if self.closed or not isinstance(error, errors.ReadOnlySqlTransaction):
            return False
        return self.pgconn.parameter_status(b"in_hot_standby") == b"on"

    def sever(self) -> None:
        """End the conversation so that whoever waits for an answer reads the end of it."""
        if not self.closed:
            with socket.socket(fileno=os.dup(self.fileno())) as line:
                line.shutdown(socket.SHUT_RDWR)

    async def run_literally(self, texts: Sequence[str], values: Sequence[Any]) -> int:
        """Run a statement with these values between its texts; the number of rows that it touched."""
        return (await self.execute(_with_literals(texts, values))).rowcount

    async def copy_in(self, table: str, blocks: AsyncIterator[bytes]) -> None:
        """Append rows, in the text form of COPY, to a table."""
        command = composing.SQL("COPY {} FROM STDIN").format(composing.Identifier(table))
        async with copying(self, command, sever=self.sever) as copy:
            async for block in blocks:
                await copy.write(block)

    async def copy_out(self, texts: Sequence[str], values: Sequence[Any]) -> AsyncGenerator[bytes, None]:
        """The rows of a SELECT in the text form of COPY, in blocks of whole rows."""
        command = composing.SQL("COPY ({}) TO STDOUT").format(_with_literals(texts, values))
        block = bytearray()
        async with copying(self, command, sever=self.sever) as copy:
            async for row in copy:
                block += row
                if len(block) >= _COPY_BLOCK_BYTES:
                    yield bytes(block)
                    block.clear()
            if block:
                yield bytes(block)

    @asynccontextmanager
    async def _changing_nothing(self, text: str) -> AsyncIterator[None]:
        """Outside of a transaction refuse what writes, before any effect; where words do not tell the server does."""
        if is_query(text) or self.is_in_transaction:
            yield
            return
        try:
            async with self.transaction():
                await self.execute("SET TRANSACTION READ ONLY")
                yield
        except errors.ReadOnlySqlTransaction as error:
            reason = str(error).strip().split("\n")[0]
            raise StatementRefused(f"Only reads are streamed: {reason}.", fix="Use fetch for what writes.") from error

    async def blocks(self, text: str, params: Params, block_rows: int) -> AsyncGenerator[list[Row], None]:
        """Rows as the server sends them. An older libpq hands them out one by one; then the blocks form here."""
        size = block_rows if psycopg.capabilities.has_stream_chunked() else 1
        block: list[Row] = []
        self.is_marked |= trace_of(text) is Trace.SESSION
        async with self._changing_nothing(text), self.cursor() as cursor:
            try:
                stream = cast("AsyncGenerator[Row, None]", cursor.stream(text, params or None, size=size))
                async with aclosing(stream):
                    async for row in stream:
                        block.append(row)
                        if len(block) >= block_rows:
                            yield block
                            block = []
            finally:
                # libpq leaves the mode in which rows come in chunks only when a query starts outside of a pipeline;
                # the first one in a pipeline would be answered in chunks, too.
                if self.pgconn.transaction_status in _AT_REST:
                    await self.execute("")
        if block:
            yield block

    async def run_each(self, questions: Sequence[Question]) -> list[Outcome]:
        """The answer to each, or the error that it alone met. Raises `psycopg.Error` if the connection broke.

        Several must be reads: they share a transaction, and those that a failure held up are sent again.
        """
        outcomes, calls = self._calls(questions)
        await self._round(calls)
        for _ in range(2):
            left = [call for call in calls if isinstance(call.outcome, Skipped) or _is_stale(call.outcome)]
            if not left:
                break
            self._forget_stale(calls)
            await self._round(left, is_each_alone=True)
        return _filled(outcomes, calls)

    async def run_together(
        self, questions: Sequence[Question], patience: LockPatience
    ) -> list[Outcome] | psycopg.Error:
        """Run them in one transaction and leave it open; `commit_together` ends it.

        A row that is refused has its error as its outcome and does not keep the others from being committed. An error
        instead: they were in each other's way, nothing is left open, and they have to be sent one at a time. Raises
        `psycopg.Error` if the connection broke; nothing was kept then.
        """
        outcomes, calls = self._calls(questions)
        before: tuple[bytes, ...] = (b"BEGIN", *patience.commands)
        left, has_savepoints = calls, False
        while left:
            await self._round(left, before=before, has_savepoints=has_savepoints)
            refused = _first_refused(left)
            if refused is None:
                return _filled(outcomes, calls)
            error = left[refused].outcome
            if isinstance(error, _MUTUAL):
                await self._command(b"ROLLBACK")
                return error
            if isinstance(error, _IN_VAIN):
                patience.shorten()
            if has_savepoints:
                left, before = left[refused + 1 :], (*_UNDO_ROW, *patience.commands)
                continue
            await self._command(b"ROLLBACK")
            self._forget_stale(left)
            if not (isinstance(error, Skipped) or _is_stale(error)):
                left = [*left[:refused], *left[refused + 1 :]]
            before, has_savepoints = (b"BEGIN", *patience.commands), True
        if self.is_aborted:
            # The last row was refused; what the transaction holds is that of the others.
            await self._command(_UNDO_ROW[0])
        return _filled(outcomes, calls)

    async def commit_together(self) -> psycopg.Error | None:
        """Commit what `run_together` left open; why it was rolled back, if only the commit found a reason."""
        if self.pgconn.transaction_status == pq.TransactionStatus.IDLE:
            return None  # every row was refused
        result = await self._command(b"COMMIT")
        return None if result.command_status == b"COMMIT" else errors.error_from_result(result, self.info.encoding)

    async def _command(self, sql: bytes) -> Any:
        """The server's answer."""
        self.pgconn.enter_pipeline_mode()
        try:
            self.pgconn.send_query_params(sql, None)
            self.pgconn.pipeline_sync()
            results = await self.wait(_results(self.pgconn, 1))
        finally:
            await self._leave()
        return results[0][0]

    def _calls(self, questions: Sequence[Question]) -> tuple[list[Outcome | None], list[_Call]]:
        """The questions as they are sent; those that cannot be written have their outcome already."""
        outcomes: list[Outcome | None] = [None] * len(questions)
        calls: list[_Call] = []
        dumping = self._dumping
        for index, (sql, params, row_kind) in enumerate(questions):
            try:
                self._check(sql, params)
                if not params:
                    calls.append(_Call((sql, ()), row_kind, (), None))
                    continue
                values = dumping.dump_sequence(params, [PyFormat.AUTO] * len(params))
            except psycopg.Error as error:
                outcomes[index] = error
            except _UNWRITABLE as error:
                outcomes[index] = psycopg.DataError(str(error))
            else:
                calls.append(_Call((sql, dumping.types or ()), row_kind, values, dumping.formats))
        return outcomes, calls

    def _check(self, sql: str, params: Params) -> None:
        """Refuse what libpq would refuse in the middle of a trip, at the cost of everybody in it."""
        if is_copy(sql):
            raise psycopg.NotSupportedError("COPY is not a statement that has rows")
        if len(params) > _PARAMETERS_MAX:
            raise psycopg.ProgrammingError(
                f"there are {len(params)} parameters, and at most {_PARAMETERS_MAX} can be sent"
            )
        if not sql.isascii():
            sql.encode(self.info.encoding)
        if trace_of(sql) is Trace.SESSION:
            self.is_marked = True

    async def _round(
        self,
        calls: Sequence[_Call],
        *,
        before: Sequence[bytes] = (),
        is_each_alone: bool = False,
        has_savepoints: bool = False,
    ) -> None:
        """Send all, wait once, and note in each call what came of it."""
        pgconn = self.pgconn
        trips = [[call] for call in calls] if is_each_alone else [calls]
        sizes = []
        pgconn.enter_pipeline_mode()
        try:
            for trip in trips:
                sent = 0
                for command in before:
                    pgconn.send_query_params(command, None)
                    sent += 1
                for call in trip:
                    if has_savepoints:
                        pgconn.send_query_params(b"SAVEPOINT headrace_row", None)
                        sent += 1
                    sent += self._send(call, may_prepare=not (is_each_alone or has_savepoints))
                    call.position = sent - 1
                    if has_savepoints:
                        pgconn.send_query_params(b"RELEASE headrace_row", None)
                        sent += 1
                pgconn.pipeline_sync()
                sizes.append(sent)
            answers = await self.wait(_results(pgconn, len(trips)))
        finally:
            await self._leave()
        for trip, size, results in zip(trips, sizes, answers, strict=True):
            for call in trip:
                call.outcome = self._outcome(call, results)
            if len(results) > size:
                self._note_late(trip, results[-1])

    def _note_late(self, trip: Sequence[_Call], result: Any) -> None:
        """What only the end of the implicit transaction found: it undoes all statements, whosever fault it is."""
        error = errors.error_from_result(result, self.info.encoding)
        for call in trip:
            if not isinstance(call.outcome, psycopg.Error):
                call.outcome = error if len(trip) == 1 else Skipped()

    def _send(self, call: _Call, *, may_prepare: bool) -> int:
        """Hand a call to libpq; how many results it will have."""
        pgconn, shape = self.pgconn, call.shape
        # What is sent a second time goes unprepared: what was prepared may be why.
        kept = call.kept = self._kept.get(shape) if may_prepare else None
        call.is_fresh = False
        if kept is not None:
            self._kept.move_to_end(shape)
        elif not may_prepare or self.prepare_threshold is None or not self._is_seen(shape):
            pgconn.send_query_params(shape[0].encode(self.info.encoding), call.values, shape[1], call.formats)
            return 1
        else:
            sent = self._make_room()
            self._names += 1
            call.is_fresh = True
            kept = call.kept = self._kept[shape] = _Kept(b"headrace_%d" % self._names)
            pgconn.send_prepare(kept.name, shape[0].encode(self.info.encoding), shape[1])
            pgconn.send_query_prepared(kept.name, call.values, call.formats)
            return sent + 2
        pgconn.send_query_prepared(kept.name, call.values, call.formats)
        return 1

    def _is_seen(self, shape: _Shape) -> bool:
        """Whether it is worth preparing: it comes for the second time."""
        if shape in self._seen:
            del self._seen[shape]
            return True
        self._seen[shape] = None
        if len(self._seen) > _SEEN_MAX:
            self._seen.popitem(last=False)
        return False

    def _make_room(self) -> int:
        if len(self._kept) >= _PREPARED_MAX:
            self._unwanted.append(self._kept.popitem(last=False)[1].name)
        for name in self._unwanted:
            self.pgconn.send_query_params(b"DEALLOCATE " + name, None)
        sent = len(self._unwanted)
        self._unwanted.clear()
        return sent

    def _forget_stale(self, calls: Sequence[_Call]) -> None:
        """What the server has no more, or not as it was, is prepared anew."""
        first = _first_refused(calls)
        for call in calls:
            is_changed = isinstance(call.outcome, errors.FeatureNotSupported) and _is_stale(call.outcome)
            if is_changed and (kept := self._kept.pop(call.shape, None)) is not None:
                self._unwanted.append(kept.name)
        # Where the first that failed was only skipped, what failed was to make room for it: somebody threw all away.
        if any(isinstance(call.outcome, errors.InvalidSqlStatementName) for call in calls) or (
            first is not None and isinstance(calls[first].outcome, Skipped)
        ):
            self._kept.clear()
            self._unwanted.clear()

    def _outcome(self, call: _Call, results: Sequence[Any]) -> Outcome:
        result = results[call.position]
        status = result.status
        if call.is_fresh and results[call.position - 1].status != _DONE:
            self._kept.pop(call.shape, None)
            result = results[call.position - 1]
            status = result.status
        if status == _ROWS:
            try:
                return self._rows(call, result)
            except psycopg.Error as error:
                return error
        if status in (_DONE, _EMPTY):
            return result.command_tuples or 0
        if status == _ABORTED:
            return Skipped()
        return errors.error_from_result(result, self.info.encoding)

    def _rows(self, call: _Call, result: Any) -> list[Row]:
        kept = call.kept or _Kept(b"")
        transformer = kept.transformer
        if transformer is None:
            transformer = kept.transformer = Transformer(self)
            transformer.set_pgresult(result)
            encoding = self.info.encoding
            names = tuple(result.fname(index).decode(encoding) for index in range(result.nfields))
            kept.make_row = call.row_kind(names)
        else:
            # Their types cannot have changed: the server refuses a prepared statement whose result has.
            transformer.set_pgresult(result, set_loaders=False)
        rows: list[Row] = transformer.load_rows(0, result.ntuples, kept.make_row)
        transformer.set_pgresult(None, set_loaders=False)
        return rows

    async def _leave(self) -> None:
        try:
            self.pgconn.exit_pipeline_mode()
        except psycopg.Error:
            # Answers are still on their way (the wait was cut short): nobody could tell whose they are.
            await self.close()


def named_rows(cursor: psycopg.AsyncCursor[Any]) -> Callable[[Sequence[Any]], Row]:
    """Rows whose values have the names of the columns."""
    return row_of(tuple(column.name for column in cursor.description or ()))


async def ask_once(dsn: str, query: str, timeout_s: float) -> Sequence[Any] | None:
    """The only row of a query, over a connection of its own; None: there was no answer within the time."""
    try:
        async with asyncio.timeout(timeout_s / 2):
            connection = await PipelinedConnection.connect(dsn, autocommit=True)
    except (psycopg.Error, TimeoutError):
        return None
    # Not cancelled: psycopg would first wait for the server to agree, and a frozen one never does.
    end = asyncio.get_running_loop().call_later(timeout_s / 2, connection.sever)
    try:
        return await (await connection.execute(query.encode())).fetchone()
    except psycopg.Error:
        return None
    finally:
        end.cancel()
        await connection.close()


def _with_literals(texts: Sequence[str], values: Sequence[Any]) -> composing.Composed:
    parts: list[composing.Composable] = [composing.SQL(texts[0])]
    for value, text in zip(values, texts[1:], strict=True):
        parts += [composing.Literal(value), composing.SQL(text)]
    return composing.Composed(parts)


def _results(pgconn: Any, syncs: int) -> Generator[Wait, Ready | int, list[list[Any]]]:
    """Flush what was handed to libpq and collect the results up to each Sync, in order."""
    trips: list[list[Any]] = [[]]
    try:
        while pgconn.flush():
            if (yield Wait.RW) & Ready.R:
                pgconn.consume_input()
        yield from _collect(pgconn, syncs, trips)
    except psycopg.OperationalError as error:
        if trips[-1] and trips[-1][-1].status == _ERROR:
            # The server's last words say why it went away.
            raise errors.error_from_result(trips[-1][-1]) from error
        raise
    return trips


def _collect(pgconn: Any, syncs: int, trips: list[list[Any]]) -> Generator[Wait, Ready | int, None]:
    while True:
        while pgconn.is_busy():
            yield Wait.R
            pgconn.consume_input()
        result = pgconn.get_result()
        if result is None:
            if pgconn.status == pq.ConnStatus.BAD:
                raise psycopg.OperationalError(pgconn.get_error_message())
        elif (status := result.status) == _SYNC:
            if len(trips) == syncs:
                return
            trips.append([])
        elif status in _COPY:
            raise psycopg.NotSupportedError("COPY cannot share a round trip with other statements")
        else:
            trips[-1].append(result)


def _first_refused(calls: Sequence[_Call]) -> int | None:
    """The row that the server refused; those behind it were skipped."""
    for index, call in enumerate(calls):
        if isinstance(call.outcome, psycopg.Error):
            return index
    return None


def _filled(outcomes: list[Outcome | None], calls: Sequence[_Call]) -> list[Outcome]:
    answers = iter(calls)
    return [next(answers).outcome if outcome is None else outcome for outcome in outcomes]
