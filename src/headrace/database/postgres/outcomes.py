"""Finding out whether a commit happened whose answer was lost.

Every connection has one row in `headrace_outcomes`, with the number of its last transaction, and each transaction
raises that number as its last act. Whether a transaction is there is then read off the row, by anybody, on any server
of the lineage.

Why not `pg_xact_status` alone? A transaction id is only as durable as the log that mentions it. When a server crashes,
or a standby takes over, before that log was written or sent, the id is given to the next transaction that comes, and
its status is that of a stranger: a lost write would be called committed. So the status only tells that the transaction
is over (its session may outlive our connection by a moment, with a COMMIT that it has not read yet), and the row
whether it was kept. In this order: what is over does not change any more.
"""

import contextlib
import uuid
from collections.abc import Awaitable, Callable, Sequence
from typing import Any, Final, NamedTuple

from headrace.clock import Clock
from headrace.errors import BackendError, CallerError, StatementFailed

_LOCK: Final = 0x6F757463  # "outc": any number, as long as it is always the same
CREATE: Final = (
    f"SELECT pg_advisory_xact_lock({_LOCK})",
    """
CREATE TABLE IF NOT EXISTS headrace_outcomes (
    writer uuid PRIMARY KEY,
    number bigint NOT NULL,
    noted_at timestamptz NOT NULL
) WITH (fillfactor = 50)""",  # room for the next versions of a row beside it, which spares the index
    "DELETE FROM headrace_outcomes WHERE noted_at < now() - interval '1 day'",
)
"""Run in one transaction before the first mark; also forgets connections that ended long ago."""
NOTE: Final = """
INSERT INTO headrace_outcomes VALUES ($1, $2, now())
ON CONFLICT (writer) DO UPDATE SET number = excluded.number, noted_at = excluded.noted_at
RETURNING pg_current_xact_id()::text"""
_IS_RUNNING: Final = "SELECT pg_xact_status($1::text::xid8) = 'in progress'"
_IS_KEPT: Final = "SELECT number >= $2 FROM headrace_outcomes WHERE writer = $1"
_PAUSE_S: Final = 0.05
_XID_UNKNOWN: Final = "22023"
"""SQLSTATE of asking for the status of an id that was not given out yet: this server never ran the transaction."""


class Mark(NamedTuple):
    """What a transaction can be found by."""

    writer: uuid.UUID
    number: int
    xid: str


class Marker:
    """Numbers the transactions of one connection."""

    __slots__ = ("_number", "_writer")

    def __init__(self) -> None:
        self._writer = uuid.uuid4()
        self._number = 0

    def next(self) -> tuple[uuid.UUID, int]:
        """The parameters of NOTE for the next transaction."""
        self._number += 1
        return self._writer, self._number

    def mark(self, rows: Sequence[Any]) -> Mark:
        """What NOTE, with the last parameters, answered."""
        return Mark(self._writer, self._number, rows[0][0])


Ask = Callable[[str, Sequence[Any]], Awaitable[Sequence[Any]]]
"""Runs a query on the server that leads now."""


async def find_out(ask: Ask, mark: Mark, *, clock: Clock, wait_s: float) -> bool | None:
    """Whether the transaction was committed; None: no server could tell within the time."""
    ends = clock.monotonic() + wait_s
    while True:
        try:
            with contextlib.suppress(BackendError):  # a new leader may come until the time is over
                if not await _is_running(ask, mark):
                    rows = await ask(_IS_KEPT, (mark.writer, mark.number))
                    return bool(rows and rows[0][0])
        except CallerError:
            return None  # we are being closed, or may not look
        if clock.monotonic() >= ends:
            return None
        await clock.sleep(_PAUSE_S)


async def _is_running(ask: Ask, mark: Mark) -> bool:
    try:
        return bool((await ask(_IS_RUNNING, (mark.xid,)))[0][0])
    except StatementFailed as error:
        if error.sqlstate != _XID_UNKNOWN:
            raise
        return False
