"""What statements really take: run, with EXPLAIN ANALYZE, in a transaction that may not write. And the verdict.

Only statements that surely do nothing but read are run: no locks, no function that headrace does not know. What an
index costs the writes is estimated, never measured: that would mean writing.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, NamedTuple

from headrace.database.indexes.costs import Prepared
from headrace.database.indexes.workload import Sample
from headrace.database.planning.statement import read_statement
from headrace.database.postgres.nodes import Node
from headrace.database.postgres.pipeline import DriverError, PipelinedConnection
from headrace.errors import CallerError

RUNS: Final = 3
"""Of each statement; the fastest counts, because everything else that runs on the machine only makes it slower."""
LONG_MS: Final = 2000.0
"""A statement that takes longer is run once."""
QUERIES_MAX: Final = 30
SLOWER_MAX: Final = 0.05
"""By so much a measurement may be worse before the index is to blame."""
NOISE_MS: Final = 0.5
"""What a measurement is off by, however short the statement."""


class Measured(NamedTuple):
    """One statement, on one shard."""

    ms: float
    """The mean over its samples of planning and running, each the fastest of its runs."""
    indexes: frozenset[str]
    """Those that its plans use."""


Measurement = Mapping[int, Measured]
"""By the number of the statement; those that could be run."""


@dataclass(frozen=True, slots=True)
class Judgement:
    """Whether an index stays."""

    keep: bool
    reason: str
    before_ms: float | None = None
    """Of the mean call of the statements that use it; None: there are none."""
    after_ms: float | None = None


def may_run(sample: Sample) -> bool:
    """Whether running a statement is surely nothing but reading."""
    try:
        return read_statement(sample.sql, {}).read_only
    except CallerError:
        return False


async def measure(node: Node, queries: Mapping[int, Prepared], *, timeout_s: float) -> Measurement:
    """Run each statement that may be run; what takes longer than `timeout_s` counts as that."""
    found: dict[int, Measured] = {}
    for number, query in queries.items():
        samples = [sample for sample in query.samples if may_run(sample)]
        if samples:
            async with node.reading() as connection:
                taken = [await _run(connection, sample, timeout_s) for sample in samples]
            known = [each for each in taken if each is not None]
            if known:
                indexes = frozenset(name for each in known for name in each.indexes)
                found[number] = Measured(sum(each.ms for each in known) / len(known), indexes)
    return found


async def _run(connection: PipelinedConnection, sample: Sample, timeout_s: float) -> Measured | None:
    best: Measured | None = None
    for _ in range(RUNS):
        taken = await _once(connection, sample, timeout_s)
        if taken is None:
            return None
        best = taken if best is None or taken.ms < best.ms else best
        if taken.ms > LONG_MS:
            break
    return best


async def _once(connection: PipelinedConnection, sample: Sample, timeout_s: float) -> Measured | None:
    await connection.execute("BEGIN READ ONLY", prepare=False)
    try:
        limit = f"SELECT set_config('statement_timeout', '{round(timeout_s * 1000)}', true)"
        await connection.execute(limit, prepare=False)
        explain = f"EXPLAIN (ANALYZE, TIMING OFF, FORMAT JSON) {sample.sql}"
        cursor = await connection.execute(explain, sample.params or None, prepare=False)
        plan = (await cursor.fetchall())[0][0][0]
    except DriverError as error:
        if connection.broken:
            raise
        if error.sqlstate == "57014":  # it ran into the limit
            return Measured(timeout_s * 1000, frozenset())
        return None  # Postgres does not take it with these parameters
    finally:
        if not connection.broken:
            await connection.execute("ROLLBACK", prepare=False)
    return Measured(plan["Planning Time"] + plan["Execution Time"], frozenset(_index_names(plan["Plan"])))


def _index_names(plan: Mapping[str, Any]) -> Iterator[str]:
    if "Index Name" in plan:
        yield plan["Index Name"]
    for child in plan.get("Plans", ()):
        yield from _index_names(child)


def total_ms(found: Measurement, numbers: Sequence[int], calls: Sequence[int]) -> float:
    """The mean time of a call over these statements, weighted by their calls."""
    return sum(found[n].ms * calls[n] for n in numbers) / max(1, sum(calls[n] for n in numbers))


def fastest(one: Measurement, other: Measurement) -> Measurement:
    """Of two measurements under the same indexes the better of each statement."""
    found = dict(one)
    for number, taken in other.items():
        mine = found.get(number)
        found[number] = taken if mine is None or taken.ms < mine.ms else mine
    return found


def judge(before: Measurement, after: Measurement, calls: Sequence[int], name: str, *, creates: bool) -> Judgement:
    """Whether the statements whose plans use the index `name` are no slower; of a new one also whether there are any.

    A statement that does not use it cannot be slower for it. So the others tell how much slower the machine itself has
    become meanwhile, and that is not held against the index.
    """
    numbers = sorted(before.keys() & after.keys())
    if not numbers:
        return Judgement(keep=True, reason="not measured: no statement of the workload that uses the table may be run")
    users = [n for n in numbers if name in (after if creates else before)[n].indexes]
    if not users:
        reason = "no measured statement uses it"
        return Judgement(keep=not creates, reason=reason, before_ms=None, after_ms=None)
    others = [n for n in numbers if n not in users]
    was, now = total_ms(before, users, calls), total_ms(after, users, calls)
    told = f"the statements that use it: {was:.2f} ms before, {now:.2f} ms after"
    drift = max(1.0, total_ms(after, others, calls) / total_ms(before, others, calls)) if others else 1.0
    if now > was * drift * (1 + SLOWER_MAX) + NOISE_MS:
        return Judgement(keep=False, reason=f"slower, {told}", before_ms=was, after_ms=now)
    return Judgement(keep=True, reason=f"measured, {told}", before_ms=was, after_ms=now)
