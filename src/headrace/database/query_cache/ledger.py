"""Which results are still good: what the change stream of a shard has told so far, against what a result saw. Pure.

The argument, in the order of the write-ahead log.

A result carries the snapshot that was taken in its own transaction just before the query: every transaction that this
snapshot sees, the query saw too. The stream tells of every committed transaction its id and the tables that it
changed, in the order of the commit records. A result is good as long as its snapshot sees every transaction that the
stream has told of and that changed one of its tables.

Why not note "the version of the table before the query" and compare it afterwards? Because a transaction is in the
log before it is visible: the committer writes its record, waits for the disk and perhaps for a standby, and only then
lets others see it. The stream may tell of it in that gap. A query that begins after the telling still does not see it,
and a version that was read before the query would call its result new, for ever. The snapshot cannot be deceived so:
the transaction stands in its list of running ones.

Hence a race between a load and an invalidation has no loser. It does not matter when the result is stored, or by which
process: every reader compares it with what its own stream has told, at every hit. A result that was read before an
invalidation is refused by everybody who heard of the change, even if it was stored long after it.

That the stream has told everything up to a moment is known from heartbeats: a message that this process writes into
the log at a time t comes back after every transaction that was visible before t. So with a heartbeat of age a, what is
good by the ledger is at most a old.

What the stream cannot tell is covered by `base` and `since`. All transactions below `base` ended before the stream
began; a result whose snapshot does not see all of them is refused. So is one that was read before `since`, when the
stream began or a structure was last found altered. Ids alone would not do: a server that crashes forgets the last ones
that it gave out and gives them out again, and an alteration may be followed by reads before any other id is given.
Ids are 64 bits wide here; the stream has 32 of them, and the others are those of the nearest id known.
"""

from collections import deque
from collections.abc import Iterable
from enum import IntEnum
from itertools import count
from typing import Final, NamedTuple

REMEMBERED: Final = 128
"""Transactions a table whose ids are remembered one by one. Of older ones only the highest id is."""
_versions: Final = count(1)


class Snapshot(NamedTuple):
    """What `pg_current_snapshot()` says: which transactions were over."""

    xmin: int
    xmax: int
    running: frozenset[int]

    @classmethod
    def read(cls, text: str) -> "Snapshot":
        """Read `xmin:xmax:running,...`."""
        xmin, xmax, running = text.split(":")
        return cls(int(xmin), int(xmax), frozenset(map(int, running.split(","))) if running else frozenset())

    def sees(self, xid: int) -> bool:
        """Whether the transaction was over."""
        return xid < self.xmin or (xid < self.xmax and xid not in self.running)


class Verdict(IntEnum):
    """What the stream can say of a result."""

    STALE = 0
    """A change of its tables was told that it did not see."""
    UNKNOWN = 1
    """It may lack a change from before the stream began, or of a table that the stream does not tell of."""
    GOOD = 2
    """It lacks nothing that was told."""


class _Changes:
    __slots__ = ("floor", "recent")

    def __init__(self) -> None:
        self.floor = 0
        self.recent: deque[int] = deque()

    def add(self, xid: int) -> None:
        self.recent.append(xid)
        if len(self.recent) > REMEMBERED:
            self.floor = max(self.floor, self.recent.popleft())


class Ledger:
    """What one shard's stream has told this process."""

    def __init__(self) -> None:
        self.lineage: str | None = None
        """The system identifier and timeline that it holds for; None: there is no stream."""
        self.version = next(_versions)
        """Changes whenever something may have become invalid; no two ledgers ever have the same."""
        self._base = 0
        self._since = 0.0
        self._near = 0
        self._tables: dict[int, _Changes] = {}
        self._published: frozenset[int] | None = frozenset()

    def begin(self, *, lineage: str, base: int, since: float, published: frozenset[int] | None) -> None:
        """A stream begins to tell of these tables (None: of all); `base` is above all ids that ended before that.

        `since` is the time by then, on the server's clock.
        """
        self.end()
        self.lineage, self._base, self._near, self._since = lineage, base, base, since
        self._published = published

    def end(self) -> None:
        """The stream is lost: nothing is good by it any more."""
        self.version = next(_versions)
        self.lineage = None
        self._tables.clear()
        self._published = frozenset()

    def restructure(self, since: float) -> None:
        """A table or view was altered before this time, on the server's clock."""
        self.version = next(_versions)
        self._since = max(self._since, since)

    def note(self, xid: int, tables: Iterable[int]) -> None:
        """The transaction with this id, of which the lower 32 bits count, has changed these tables."""
        full = self._near + ((xid - self._near + 2**31) % 2**32 - 2**31)
        self._near = full
        self.version = next(_versions)
        for table in tables:
            self._tables.setdefault(table, _Changes()).add(full)

    @property
    def tables(self) -> int | None:
        """How many tables the stream tells of; None: of all."""
        return None if self._published is None else len(self._published)

    def tells_of(self, tables: Iterable[int]) -> bool:
        """Whether the stream tells of every one of these tables."""
        return self.lineage is not None and (self._published is None or self._published.issuperset(tables))

    def judge(self, lineage: str, snapshot: Snapshot, tables: Iterable[int], *, read_at: float) -> Verdict:
        """What the stream says of a result that saw `snapshot` and was read from these tables, from `read_at` on."""
        if lineage != self.lineage:
            return Verdict.UNKNOWN
        told = [changes for table in tables if (changes := self._tables.get(table)) is not None]
        if not all(snapshot.sees(xid) for changes in told for xid in changes.recent):
            return Verdict.STALE
        floor = max((changes.floor for changes in told), default=0)
        if read_at <= self._since or snapshot.xmin < self._base or snapshot.xmin <= floor:
            return Verdict.UNKNOWN
        return Verdict.GOOD if self.tells_of(tables) else Verdict.UNKNOWN
