"""What this process knows of one shard for judging results: its clock, its lineage, own writes, the change stream.

Ages are told by the clock of the shard's server, which every process can read: a result says when its transaction
began by that clock, and each answer of the server bounds what it shows now. So results of other machines have an age
that no other clock can falsify. A server whose clock is set back ends all results from before that.
"""

from collections.abc import Iterable
from typing import Final

from msgspec import UnsetType

from headrace.database.query_cache.changes import ChangeStream
from headrace.database.query_cache.ledger import Ledger, Verdict
from headrace.database.query_cache.stored import State, Stored
from headrace.database.query_policy import QueryPolicy

CLOCK_MAX_S: Final = 60.0
"""How long an answer of the server tells its time: longer, and two clocks may have drifted apart by milliseconds."""
CLOCK_BACK_S: Final = 1.0
"""By so much the answers of two connections may overtake each other; a clock that goes further back was set."""
WRITTEN_MAX: Final = 10_000
"""Tables whose last own write is remembered; beyond it all of them count as written now."""


class ShardView:
    """One shard, as the query cache of this process sees it."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.ledger = Ledger()
        self.stream: ChangeStream | None = None
        self.lineage: str | None = None
        self._clock: tuple[float, float] | None = None
        self._written: dict[str, float] = {}
        self._written_all = float("-inf")
        self._written_last = float("-inf")
        self._unsettled: set[str] | None = set()
        """Own writes whose moment is not known, because the server's clock was not; None: any table."""
        self._wrote_at = float("-inf")
        """The last own write, on the monotonic clock."""

    # -- time ---------------------------------------------------------------------------------------------------------

    def probe(self, told_at: float, sent: float) -> None:
        """The server's clock showed `told_at` at some moment after `sent`, of the monotonic clock."""
        if self._clock is None or sent >= self._clock[1]:
            if self._clock is not None and told_at < self._clock[0] - CLOCK_BACK_S:
                self._note(None, self._clock[0])  # it was set back: what was read before would look younger than it is
            self._clock = (told_at, sent)
            if self._unsettled is None or self._unsettled:
                # The write may have come after the question: the clock showed no more than this when it was committed.
                self._settle(told_at + max(0.0, self._wrote_at - sent))

    def latest(self, now: float) -> float | None:
        """What the server's clock shows at most; None: not known."""
        if self._clock is None or now - self._clock[1] > CLOCK_MAX_S:
            return None
        return self._clock[0] + now - self._clock[1]

    def learn(self, state: State, sent: float) -> None:
        """A read that was sent then told who the server is and what time it has."""
        if state.lineage:
            self._hear(state.lineage, state.read_at, sent)

    def beat(self, told_at: float, sent: float) -> None:
        """So did a heartbeat of the stream."""
        if self.ledger.lineage is not None:
            self._hear(self.ledger.lineage, told_at, sent)

    def _hear(self, lineage: str, told_at: float, sent: float) -> None:
        if lineage != self.lineage:
            if self._clock is not None and sent < self._clock[1]:
                return  # from before a failover that others have seen since
            if self.lineage is not None:
                # After a failover the clock and the transaction ids are others, and what was written is not dated.
                self._clock = None
                self._unsettled = None
            self.lineage = lineage
        self.probe(told_at, sent)

    def flush(self, now: float) -> None:
        """No result that was begun before now answers any more."""
        self.wrote(None, now)

    # -- own writes ---------------------------------------------------------------------------------------------------

    def wrote(self, tables: Iterable[str] | None, now: float) -> None:
        """This process committed a write to these tables, named without schema; None: to any."""
        moment = self.latest(now)
        self._wrote_at = max(self._wrote_at, now)
        if moment is None:
            if tables is None or self._unsettled is None:
                self._unsettled = None
            else:
                self._unsettled.update(tables)
            return
        self._note(tables, moment)

    def _note(self, tables: Iterable[str] | None, moment: float) -> None:
        self._written_last = max(self._written_last, moment)
        if tables is not None:
            self._written.update(dict.fromkeys(tables, moment))
        if tables is None or len(self._written) > WRITTEN_MAX:
            self._written_all = self._written_last
            self._written.clear()

    def _settle(self, moment: float) -> None:
        # They were committed before it: a result that was begun later has seen them.
        self._note(self._unsettled, moment)
        self._unsettled = set()

    def _saw_own_writes(self, stored: Stored) -> bool:
        began = stored.read_at
        if began > self._written_last:
            return True
        written = self._written
        return began > self._written_all and all(began > written.get(name, -1.0) for name in stored.names)

    # -- judging ------------------------------------------------------------------------------------------------------

    def is_usable(self, stored: Stored, policy: QueryPolicy, now: float) -> bool:
        """Whether the result may answer a call with this policy now."""
        latest = self.latest(now)
        if latest is None or stored.lineage != self.lineage or not stored.kept:
            return False
        age = latest - stored.read_at
        if age < 0:
            return False  # the server's clock was set back
        ttl = policy.ttl
        if age > (stored.life_s if isinstance(ttl, UnsetType) else ttl) or not self._saw_own_writes(stored):
            return False
        verdict = self._verdict(stored)
        if verdict is Verdict.STALE:
            return False
        if age <= policy.staleness_max:
            return True
        stream = self.stream
        return verdict is Verdict.GOOD and stream is not None and now - stream.fresh_at <= policy.staleness_max

    def _verdict(self, stored: Stored) -> Verdict:
        notes = stored.__dict__
        version = self.ledger.version
        if notes.get("judged_at") == version:
            kept: Verdict = notes["verdict"]
            return kept
        verdict = self.ledger.judge(stored.lineage, stored.seen, stored.tables, read_at=stored.read_at)
        notes["judged_at"], notes["verdict"] = version, verdict
        return verdict
