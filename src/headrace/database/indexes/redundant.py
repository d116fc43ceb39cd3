"""Which of the indexes that are there could go: copies, beginnings of others, and those that nobody reads. Pure.

Never one that enforces something: unique indexes, those of constraints, and those by which rows are known in logical
replication stay, whatever the statistics say. Nor one that a foreign key needs, seldom as it may be, for being unused.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Final, NamedTuple

from headrace.database.indexes.index import StandingIndex

UNUSED_AFTER_S: Final = 7 * 86_400.0
"""An index for the month's end is not read for weeks: this is a lower bound, not proof."""


Copies = Sequence[tuple[str, StandingIndex]]
"""One index on each of its shards."""


class Superfluous(NamedTuple):
    """An index that could go, or why one that looks like it should not."""

    name: str
    table: str
    definition: str
    size_bytes: int
    """Over all shards."""
    drop: bool
    reason: str
    evidence: tuple[str, ...] = ()


def superfluous(
    shards: Mapping[str, Sequence[StandingIndex]], *, unused_after_s: float = UNUSED_AFTER_S
) -> list[Superfluous]:
    """What could be dropped on every shard, from what stands on each."""
    found: dict[str, list[tuple[str, StandingIndex]]] = {}
    for shard, indexes in shards.items():
        for index in indexes:
            found.setdefault(index.name, []).append((shard, index))
    told = []
    for name in sorted(found):
        copies = found[name]
        judgement = _judged(copies, shards, unused_after_s)
        if judgement is not None:
            index, size = copies[0][1], sum(each.size_bytes for _, each in copies)
            reason, drop, evidence = judgement
            told.append(Superfluous(name, index.table, index.definition, size, drop, reason, evidence))
    return told


def _judged(
    copies: Copies, shards: Mapping[str, Sequence[StandingIndex]], unused_after_s: float
) -> tuple[str, bool, tuple[str, ...]] | None:
    """Reason, whether to drop it, and evidence; None: nothing to say."""
    index = copies[0][1]
    broken = [shard for shard, each in copies if not each.valid]
    if broken:
        return f"invalid on {', '.join(broken)}: Postgres writes to it, and does not read it", False, ()
    if _must_stay(index) or any(each.definition != index.definition for _, each in copies):
        return None
    covers = [_cover(each, shards[shard]) for shard, each in copies]
    cover = covers[0]
    if cover is not None and all(each is not None and each.name == cover.name for each in covers):
        is_copy = cover.key == index.key and set(cover.include) == set(index.include)
        return f"{'the same as' if is_copy else 'a beginning of'} {cover.name}", True, (cover.definition,)
    return _unused(copies, unused_after_s)


def _unused(copies: Copies, unused_after_s: float) -> tuple[str, bool, tuple[str, ...]] | None:
    if any(each.scans for _, each in copies):
        return None
    ages = [each.age_s for _, each in copies if each.age_s is not None]
    age_s = min(ages, default=0.0) if len(ages) == len(copies) else 0.0
    evidence = (
        f"0 scans on {', '.join(shard for shard, _ in copies)} in {age_s / 86_400:.1f} days of statistics",
        "scans on replicas are not counted",
    )
    if refers := next((each.refers for _, each in copies if each.refers), None):
        return (
            f"never read, but deleting what {refers} refers to would read the whole table without it",
            False,
            evidence,
        )
    if age_s < unused_after_s:
        reason = f"never read, but the statistics are younger than {unused_after_s / 86_400:.0f} days"
        return reason, False, evidence
    return "never read", True, evidence


def _must_stay(index: StandingIndex) -> bool:
    return index.unique or index.constraint is not None or index.identity


def _cover(index: StandingIndex, others: Iterable[StandingIndex]) -> StandingIndex | None:
    """Another index of the table that does all that this one does. Of two copies the one that is named first stays."""
    for other in others:
        if other.name == index.name or other.table != index.table or not other.valid:
            continue
        if other.method != index.method or other.where != index.where:
            continue
        is_beginning = other.key[: len(index.key)] == index.key and set(index.include) <= {*other.key, *other.include}
        if index.method != "btree":
            is_beginning = other.key == index.key and other.include == index.include
        if not is_beginning:
            continue
        is_copy = other.key == index.key and set(other.include) == set(index.include)
        if not is_copy or _must_stay(other) or other.name < index.name:
            return other
    return None
