"""Which of a shard's servers may be written to. Pure.

The leader is elected elsewhere: by Patroni, by a cloud, by an operator. We follow, and keep ourselves from writing to
a server that was replaced. Every promotion begins a new timeline, and timelines only rise, so the number works as a
fencing token: who has seen timeline 3 refuses a primary on timeline 2, however alive it is. A standby that follows
timeline 3 tells of its primary even when that one cannot be reached.

What a number cannot tell apart is refused as a whole: two primaries on the same timeline (two standbys that were both
promoted), and servers that do not stem from one initdb.
"""

from collections.abc import Sequence
from typing import Final, NamedTuple

# The control file learns of a new timeline only at the next checkpoint. A primary knows its own from the log that it
# writes; a standby from its receiver, as far as its role may look there.
SIGHTING: Final = """
SELECT (SELECT system_identifier::text FROM pg_control_system()), pg_is_in_recovery(),
       CASE WHEN pg_is_in_recovery() THEN (
           SELECT greatest(c.timeline_id, r.min_recovery_end_timeline, (SELECT received_tli FROM pg_stat_wal_receiver))
           FROM pg_control_checkpoint() c, pg_control_recovery() r)
       ELSE ('x' || substr(pg_walfile_name(pg_current_wal_insert_lsn()), 1, 8))::bit(32)::int END"""
"""Asks a server who it is; `Sighting.of` reads the row."""


class Sighting(NamedTuple):
    """What one server said of itself."""

    address: str
    system: str
    """Made by initdb, inherited by every copy."""
    is_standby: bool
    timeline: int

    @classmethod
    def of(cls, address: str, row: Sequence[object]) -> "Sighting":
        """Read a row of SIGHTING."""
        system, is_standby, timeline = row
        return cls(address, str(system), bool(is_standby), int(str(timeline)))


class Lineage(NamedTuple):
    """The highest that was ever seen of a shard."""

    system: str | None = None
    timeline: int = 0

    def after(self, sighting: Sighting) -> "Lineage":
        """The lineage, with this server seen, too; one of another system does not count."""
        if self.system is not None and sighting.system != self.system:
            return self
        return Lineage(sighting.system, max(self.timeline, sighting.timeline))

    def objection(self, sighting: Sighting) -> str | None:
        """Why this server may not be written to."""
        if self.system is not None and sighting.system != self.system:
            return f"{sighting.address} is not a copy of the Postgres that this shard was (other system identifier)"
        if sighting.is_standby:
            return f"{sighting.address} is a standby"
        if sighting.timeline < self.timeline:
            return (
                f"{sighting.address} is a primary of timeline {sighting.timeline}, and there is one of timeline"
                f" {self.timeline}: it was replaced"
            )
        return None


class Leader(NamedTuple):
    """The server to write to."""

    address: str
    timeline: int


class NoLeader(NamedTuple):
    """There is none."""

    reason: str
    is_fenced: bool
    """What is connected now must not be written to either; False: nothing better is known than what is connected."""


def choose_leader(sightings: Sequence[Sighting], lineage: Lineage, *, asked: int) -> tuple[Leader | NoLeader, Lineage]:
    """Who leads, of the servers that answered out of `asked`; and the lineage with all of them seen."""
    if not sightings:
        return NoLeader(f"none of {asked} servers answers", is_fenced=False), lineage
    systems = {each.system for each in sightings}
    if lineage.system is None and len(systems) > 1:
        addresses = ", ".join(each.address for each in sightings)
        return NoLeader(f"{addresses} are not copies of one Postgres", is_fenced=True), lineage
    for each in sightings:
        lineage = lineage.after(each)
    objections = {each: lineage.objection(each) for each in sightings}
    leaders = [each for each, objection in objections.items() if objection is None]
    if len(leaders) == 1:
        return Leader(leaders[0].address, leaders[0].timeline), lineage
    if leaders:
        addresses = " and ".join(each.address for each in leaders)
        reason = f"{addresses} are both primaries of timeline {lineage.timeline}, and only one of them can be right"
        return NoLeader(reason, is_fenced=True), lineage
    reason = "; ".join(objection for objection in objections.values() if objection is not None)
    replaced = any(not each.is_standby for each in sightings)
    silent = asked - len(sightings)
    return NoLeader(f"{reason}{f'; {silent} more do not answer' if silent else ''}", is_fenced=replaced), lineage
