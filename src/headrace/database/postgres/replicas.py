"""Reads from replicas that are not too far behind, and never behind what their caller wrote.

Intuition: the primary's log is a clock. It is noted now and then how far it has got; a replica that has replayed the
log up to a note shows everything that was committed before that note was taken. So the age of what a replica shows is
known without comparing clocks and without writing heartbeats, and "has it seen my write" is the same question as "is
it fresh enough": was the note taken after the write was acknowledged?

What is not known is not used: a replica that did not answer lately, one on another timeline than the primary (log
positions mean something else there), one that was promoted. `choose` is pure; `Replicas` asks and carries out.
"""

import asyncio
from bisect import bisect_right
from collections import deque
from collections.abc import Mapping, Sequence
from typing import Final, NamedTuple

from headrace.clock import Clock
from headrace.database.config import ReplicaConfig
from headrace.database.postgres.leader import SIGHTING, Sighting
from headrace.database.postgres.nodes import Node
from headrace.database.postgres.pipeline import Params
from headrace.database.postgres.rows import Row
from headrace.database.postgres.sessions import seen_lsn, wrote_at
from headrace.errors import BackendError, CallerError, DatabaseUnavailable, StatementFailed

_NOTES_MAX: Final = 1000
_LOOKS_MISSED_MAX: Final = 4
"""A replica that has not answered for so many looks is not known any more."""
_PAUSE_S: Final = 0.02
LSN: Final = "SELECT (pg_current_wal_insert_lsn() - '0/0'::pg_lsn)::bigint"
"""How far a primary's log is, as a number."""
_WRITTEN: Final = f"SELECT *, (pg_current_wal_insert_lsn() - '0/0'::pg_lsn)::bigint FROM ({SIGHTING}) AS s"  # noqa: S608 - of constants
_REPLAYED: Final = (
    f"SELECT *, (coalesce(pg_last_wal_replay_lsn(), '0/0') - '0/0'::pg_lsn)::bigint FROM ({SIGHTING}) AS s"  # noqa: S608 - of constants
)
_RECOVERY_CONFLICT: Final = "40001"
"""SQLSTATE of a read that a standby cancelled to go on replaying."""


class Note(NamedTuple):
    """How far the primary's log was, at some moment after `at`."""

    at: float
    lsn: int


class Log:
    """What is known of the primary's log."""

    def __init__(self) -> None:
        self.origin: tuple[str, int] | None = None
        """System and timeline that the notes belong to."""
        self.notes: deque[Note] = deque(maxlen=_NOTES_MAX)

    def add(self, seen: Sighting, note: Note) -> None:
        """Take a note; those of another timeline are forgotten, because their positions are not of this log."""
        origin = (seen.system, seen.timeline)
        if seen.is_standby or (self.origin == origin and self.notes and note.lsn < self.notes[-1].lsn):
            return
        if self.origin != origin:
            self.origin = origin
            self.notes.clear()
        self.notes.append(note)

    def shown_until(self, lsn: int) -> float | None:
        """Everything that was committed before this moment is shown by who has replayed so far; None: not known."""
        number = bisect_right(self.notes, lsn, key=lambda note: note.lsn)
        return self.notes[number - 1].at if number else None


class Facts(NamedTuple):
    """What one replica said last."""

    name: str
    seen: Sighting
    lsn: int
    """It had replayed the log so far, at least."""
    heard_at: float
    load: float
    """Its busy connections by its weight."""


class Need(NamedTuple):
    """What a reader asks for."""

    wrote_at: float | None = None
    lsn: int | None = None
    name: str | None = None
    """None: any replica."""


class Choice(NamedTuple):
    """The replica that may answer, or why none may."""

    name: str | None
    reasons: tuple[str, ...] = ()


def choose(facts: Sequence[Facts], log: Log, need: Need, limits: ReplicaConfig, now: float) -> Choice:
    """The least busy replica that shows what the reader must see."""
    reasons, good = [], []
    for each in facts:
        if need.name is None or each.name == need.name:
            objection = _objection(each, log, need, limits, now)
            if objection is None:
                good.append(each)
            else:
                reasons.append(f"{each.name} {objection}")
    if not good:
        return Choice(None, tuple(reasons) or ("nothing was heard of any",))
    return Choice(min(good, key=lambda each: each.load).name)


def _objection(each: Facts, log: Log, need: Need, limits: ReplicaConfig, now: float) -> str | None:
    if now - each.heard_at > _LOOKS_MISSED_MAX * limits.look_s:
        return "has not answered lately"
    if not each.seen.is_standby:
        return "is no standby"
    if log.origin != (each.seen.system, each.seen.timeline):
        return "is on another timeline than the primary"
    shown_until = log.shown_until(each.lsn)
    if shown_until is None or now - shown_until > limits.lag_max_s:
        return f"is more than {limits.lag_max_s:g} s behind"
    if log.notes[-1].lsn - each.lsn > limits.lag_max_bytes:
        return f"is {log.notes[-1].lsn - each.lsn} bytes of log behind"
    if need.wrote_at is not None and shown_until < need.wrote_at:
        return "is behind what the caller wrote"
    if need.lsn is not None and each.lsn < need.lsn:
        return "is behind what the caller saw"
    return None


class Replicas:
    """The replicas of one shard."""

    def __init__(
        self, primary: Node, nodes: Mapping[str, tuple[Node, float]], limits: ReplicaConfig, *, clock: Clock
    ) -> None:
        self.nodes = {name: node for name, (node, _) in nodes.items()}
        self._primary = primary
        self._weights = {name: weight for name, (_, weight) in nodes.items()}
        self._limits = limits
        self._clock = clock
        self._log = Log()
        self._heard: dict[str, tuple[Sighting, int, float]] = {}
        self._asking: dict[str, asyncio.Task[None]] = {}

    async def fetch(self, sql: str, params: Params, *, replica: str) -> list[Row]:
        """The rows of a read: of the named replica, of `any`, or of the primary where the policy says so."""
        if replica != "any" and replica not in self.nodes:
            raise CallerError(
                f"Shard {self._primary.name} has no replica {replica!r}.",
                fix=f'Use replica="any"{"".join(f", or {name!r}" for name in self.nodes)}.',
            )
        choice = await self._choice(None if replica == "any" else replica)
        if choice.name is not None:
            try:
                return await self.nodes[choice.name].fetch(sql, params, read_only=True)
            except (BackendError, StatementFailed) as error:
                cancelled = isinstance(error, StatementFailed) and error.sqlstate == _RECOVERY_CONFLICT
                gone = isinstance(error, DatabaseUnavailable)
                if not (cancelled or gone) or self._limits.otherwise == "error":
                    raise
        elif self._limits.otherwise == "error":
            raise DatabaseUnavailable(
                f"No replica of shard {self._primary.name} can answer: {'; '.join(choice.reasons)}.",
                fix='Wait, or set database.replicas.otherwise = "primary".',
            )
        return await self._primary.fetch(sql, params, read_only=True)

    async def _choice(self, name: str | None) -> Choice:
        shard = self._primary.name
        need = Need(wrote_at(shard), seen_lsn(shard), name)
        ends = self._clock.monotonic() + self._limits.wait_s
        while True:
            now = self._clock.monotonic()
            choice = choose(self._facts(), self._log, need, self._limits, now)
            if choice.name is not None or now >= ends:
                return choice
            await self.look(timeout_s=ends - now)
            await self._clock.sleep(_PAUSE_S)

    def _facts(self) -> list[Facts]:
        return [
            Facts(name, *heard, self.nodes[name].busy / self._weights[name]) for name, heard in self._heard.items()
        ]

    async def watch(self) -> None:
        """Look again and again, until cancelled."""
        while True:
            await self.look(timeout_s=self._limits.look_s)
            await self._clock.sleep(self._limits.look_s)

    async def look(self, *, timeout_s: float) -> None:
        """Ask the primary and its replicas how far they are; those that do not answer in time are not waited for."""
        await self._ask({self._primary.name: self._primary}, timeout_s)  # first, so that replicas can have replayed it
        await self._ask(self.nodes, timeout_s)

    async def close(self) -> None:
        """End what is still being asked."""
        for task in self._asking.values():
            task.cancel()
        await asyncio.gather(*self._asking.values(), return_exceptions=True)

    async def _ask(self, nodes: Mapping[str, Node], timeout_s: float) -> None:
        loop = asyncio.get_running_loop()
        for name, node in nodes.items():
            task = self._asking.get(name)
            if task is None or task.done():
                self._asking[name] = loop.create_task(self._hear(node))
        # Not cancelled: the question to a frozen server ends when it thaws, and is the only one there.
        await asyncio.wait([self._asking[name] for name in nodes], timeout=timeout_s)

    async def _hear(self, node: Node) -> None:
        asked_at = self._clock.monotonic()
        is_primary = node is self._primary
        try:
            row = (await node.fetch(_WRITTEN if is_primary else _REPLAYED, read_only=True))[0]
        except (BackendError, StatementFailed):
            if not is_primary:
                self._heard.pop(node.name, None)
            return
        seen, lsn = Sighting.of(node.address, row[:3]), row[3]
        if is_primary:
            self._log.add(seen, Note(asked_at, lsn))
        else:
            self._heard[node.name] = (seen, lsn, asked_at)
