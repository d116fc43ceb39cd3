"""What index advice says, and what came of following it."""

from dataclasses import dataclass, field
from enum import StrEnum

from headrace.database.indexes.index import Index


class Verdict(StrEnum):
    """What is advised."""

    CREATE = "create"
    DROP = "drop"
    REJECT = "reject"
    """Looked at, and not advised."""


@dataclass(frozen=True, slots=True)
class QueryGain:
    """What an index does to one statement, by the planner's estimate for one call."""

    text: str
    calls: int
    cost_before: float
    cost_after: float


@dataclass(frozen=True, slots=True, kw_only=True)
class IndexAdvice:
    """An index to make or to drop, or one that was considered and rejected, with the evidence."""

    verdict: Verdict
    name: str
    """Of the index, as SQL writes it."""
    table: str
    sql: str
    """What `apply` runs on each shard."""
    undo: str = ""
    """What takes it back."""
    reason: str
    """In one sentence."""
    index: Index | None = None
    """Of one to make."""
    size_bytes: int | None = None
    """Over all shards; of one to make an estimate."""
    gain: float | None = None
    """Share that it saves of what the workload would cost without it and with the others advised, writes counted, by
    the planner's estimate; None: estimate unavailable."""
    queries: tuple[QueryGain, ...] = ()
    """The statements that it changes most."""
    evidence: tuple[str, ...] = ()
    """What the judgement rests on, and what it leaves out."""

    @classmethod
    def creating(cls, index: Index, *, reason: str = "asked for") -> "IndexAdvice":
        """Advice to make an index of one's own choice: `apply` measures it like any other."""
        return cls(
            verdict=Verdict.CREATE,
            name=index.path,
            table=index.table,
            sql=index.sql(),
            undo=f"DROP INDEX CONCURRENTLY {index.path}",
            reason=reason,
            index=index,
        )


class State(StrEnum):
    """How far a change of an index has come on a shard."""

    BUILDING = "building"
    BUILT = "built"
    KEPT = "kept"
    DROPPED = "dropped"
    """Made and dropped again, because of what was measured; or dropped, as advised."""
    DROPPING = "dropping"
    RESTORED = "restored"
    """Dropped and made again, because of what was measured."""
    FAILED = "failed"


@dataclass(frozen=True, slots=True, kw_only=True)
class IndexChange:
    """One line of the history: what was done to one index on one shard."""

    shard: str
    id: int
    """Rises in the history of its shard; 0: there was nothing to do, so the history does not have it."""
    name: str
    table: str
    sql: str
    state: State
    reason: str = ""
    size_bytes: int | None = None
    estimated_gain: float | None = None
    before_ms: float | None = None
    """Measured: the mean call of the statements of the workload whose plans use the index; None: not measured."""
    after_ms: float | None = None
    seconds: float | None = None
    """That the building took."""
    begun_at: float = 0.0
    """Seconds since 1970."""
    queries: tuple[tuple[str, float, float], ...] = field(default=())
    """Of each statement its text and milliseconds before and after; only in what `apply` returns."""
