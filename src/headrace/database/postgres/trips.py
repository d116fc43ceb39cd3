"""What travels together to one node: reads in one round trip, single-row writes in one commit."""

import asyncio
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Sequence
from contextlib import AbstractAsyncContextManager
from typing import Any, Final, Protocol

from headrace.clock import Clock
from headrace.database.config import DatabaseConfig
from headrace.database.postgres.batch import Batch
from headrace.database.postgres.lock_patience import LockPatience
from headrace.database.postgres.outcomes import NOTE, Mark
from headrace.database.postgres.pipeline import (
    Answer,
    ConnectFailed,
    DriverError,
    Outcome,
    Params,
    PipelinedConnection,
    Question,
    RowKind,
)
from headrace.database.postgres.pool import PoolTimeout
from headrace.database.postgres.rows import Row, row_of
from headrace.database.postgres.texts import check_groupable
from headrace.errors import DatabaseUnavailable, HeadraceError, OutcomeUnknown

READS_MAX: Final = 32
"""Reads that share a round trip. More would save little and make the first wait longer for the last."""
WRITES_MAX: Final = 500
"""Writes that share a commit. They also share their locks until then."""
_BREAKS_MAX: Final = 2
"""Rows of a group that may lose their connection one by one. Each may be a crash of the whole server."""
_SLOW_S: Final = 0.5
_SLOW_MAX: Final = 1000


class Connect(Protocol):
    """How a connection is borrowed; the driver's errors in it become ours."""

    def __call__(self, *, read_only: bool) -> AbstractAsyncContextManager[PipelinedConnection]:
        """A connection that nobody else uses meanwhile."""


class Translate(Protocol):
    """What an error of the driver means."""

    def __call__(self, error: DriverError, *, broken: bool, read_only: bool) -> HeadraceError:
        """Our error; `broken` says that the connection is lost, `read_only` that surely nothing was kept."""


WasKept = Callable[[Mark, OutcomeUnknown], Awaitable[bool]]
"""Finds out whether a commit that was not answered happened; see `Node.was_kept`."""


class Trips:
    """The shared round trips of one node.

    A read that runs long would hold up the others of its trip. The texts of a trip that took longer than half a second
    go alone, until they are quick again.
    """

    def __init__(
        self,
        name: str,
        config: DatabaseConfig,
        *,
        connect: Connect,
        translate: Translate,
        was_kept: WasKept | None,
        clock: Clock,
    ) -> None:
        self._name = name
        self._connect = connect
        self._translate = translate
        self._was_kept = was_kept
        self._clock = clock
        self._lock_wait_s = min(config.lock_timeout_s, config.statement_timeout_s)
        self._slow: OrderedDict[str, None] = OrderedDict()
        self._reads: Batch[Question, list[Any]] = Batch(
            self._read,
            name=f"The reads of shard {name}",
            items_max=READS_MAX,
            in_flight_max=config.connections_max,
            waiting_max=config.waiting_max,
            may_abandon=True,
        )
        self._writes: Batch[Question, Answer] = Batch(
            self._write,
            name=f"The grouped writes of shard {name}",
            items_max=WRITES_MAX,
            in_flight_max=1,  # so that what one caller sends first is done first
            waiting_max=config.waiting_max,
        )

    async def read(self, sql: str, params: Params, row_kind: RowKind = row_of) -> list[Any]:
        """The rows of a read, which is repeated once if its connection died."""
        question = (sql, params, row_kind)
        if sql not in self._slow:
            return await self._reads.submit(question)
        answer = (await self._read([question]))[0]
        if isinstance(answer, HeadraceError):
            raise answer
        return answer

    async def write(self, sql: str, params: Params) -> int:
        """Run a write of a single row; when this returns it is committed. The number of rows that it touched."""
        check_groupable(sql)
        answer = await self._writes.submit((sql, params, row_of))
        return answer if isinstance(answer, int) else len(answer)

    async def write_alone(self, sql: str, params: Params) -> Answer:
        """Run a write in a transaction of its own, so that it can be found out what became of it."""
        answer = (await self._write([(sql, params, row_of)]))[0]
        if isinstance(answer, HeadraceError):
            raise answer
        return answer

    async def close(self, *, timeout_s: float) -> set[asyncio.Task[None]]:
        """Let what is under way arrive and refuse more; the tasks that still run after the time."""
        running = await asyncio.gather(*(batch.close(timeout_s=timeout_s) for batch in (self._reads, self._writes)))
        return running[0] | running[1]

    # -- reads --------------------------------------------------------------------------------------------------------

    async def _read(self, questions: Sequence[Question]) -> list[list[Row] | HeadraceError]:
        began = self._clock.monotonic()
        try:
            answers = await self._read_once(questions)
        except DatabaseUnavailable:
            answers = await self._read_once(questions)
        self._judge(questions, self._clock.monotonic() - began)
        return answers

    async def _read_once(self, questions: Sequence[Question]) -> list[list[Row] | HeadraceError]:
        async with self._connect(read_only=True) as connection:
            outcomes = await connection.run_each(questions)
        return [_rows(self._told(outcome)) for outcome in outcomes]

    def _judge(self, questions: Sequence[Question], seconds: float) -> None:
        if seconds > _SLOW_S:
            for sql, _, _ in questions:
                self._slow[sql] = None
            while len(self._slow) > _SLOW_MAX:
                self._slow.popitem(last=False)
        elif self._slow:
            for sql, _, _ in questions:
                self._slow.pop(sql, None)

    # -- writes -------------------------------------------------------------------------------------------------------

    async def _write(self, questions: Sequence[Question]) -> list[Answer | HeadraceError]:
        """One transaction for all that the server does not refuse; the errors of those that it does.

        Where they cannot be committed together, or the connection died over them before the commit, each is tried by
        itself, so that it is told of no fault but its own.
        """
        patience = LockPatience(self._lock_wait_s)
        try:
            answers = await self._transaction(questions, patience)
        except DatabaseUnavailable as error:
            if len(questions) == 1 or not _died_under_way(error):
                raise
        else:
            if not isinstance(answers, DriverError):
                return answers
        return await self._write_one_by_one(questions, patience)

    async def _write_one_by_one(
        self, questions: Sequence[Question], patience: LockPatience
    ) -> list[Answer | HeadraceError]:
        answers: list[Answer | HeadraceError] = []
        broken = 0
        for question in questions:
            try:
                written = await self._transaction([question], patience)
            except HeadraceError as error:
                answers.append(error)
                broken += 1
                if broken == _BREAKS_MAX:
                    break
            else:
                answers.append(self._told(written) if isinstance(written, DriverError) else written[0])
        gone = f"Shard {self._name} went away before the write was sent."
        return [*answers, *(DatabaseUnavailable(gone) for _ in questions[len(answers) :])]

    async def _transaction(
        self, questions: Sequence[Question], patience: LockPatience
    ) -> list[Answer | HeadraceError] | DriverError:
        """What became of each row of one transaction; or why nothing of it was kept, and not whose fault that is."""
        answers: list[Answer | HeadraceError] = []
        mark: Mark | None = None
        try:
            # Until COMMIT is sent nothing is kept: as with a read, nobody has to wonder.
            async with self._connect(read_only=True) as connection:
                note = [(NOTE, connection.marker.next(), row_of)] if self._was_kept is not None else []
                outcomes = await connection.run_together([*questions, *note], patience)
                if isinstance(outcomes, DriverError):
                    return outcomes
                if note and isinstance(noted := outcomes.pop(), list):
                    mark = connection.marker.mark(noted)
                answers = [self._told(outcome) for outcome in outcomes]
                connection.is_committing = True
                refusal = await connection.commit_together()
                return answers if refusal is None else refusal
        except OutcomeUnknown as unknown:
            if mark is None or self._was_kept is None or not await self._was_kept(mark, unknown):
                raise
            return answers

    def _told(self, outcome: Outcome) -> Answer | HeadraceError:
        if isinstance(outcome, DriverError):
            error = self._translate(outcome, broken=False, read_only=True)
            error.__cause__ = outcome
            return error
        return outcome


def _rows(answer: Answer | HeadraceError) -> list[Row] | HeadraceError:
    """What has no rows, and was asked for them, has none."""
    return [] if isinstance(answer, int) else answer


def _died_under_way(error: DatabaseUnavailable) -> bool:
    """Whether there was a connection, which the statements did not survive, and surely nothing was kept."""
    if isinstance(error, OutcomeUnknown) or isinstance(error.__cause__, PoolTimeout):
        return False
    return isinstance(error.__cause__, ConnectFailed)
