"""Who may be written to: the primary of the highest timeline, and nobody where that is not one."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from headrace.database.postgres.leader import Leader, Lineage, NoLeader, Sighting, choose_leader


def seen(address, *, timeline=1, standby=False, system="s"):
    return Sighting(address, system, standby, timeline)


def test_the_only_primary_leads():
    """Standbys beside it do not matter, and its timeline is remembered."""
    found, lineage = choose_leader([seen("a", standby=True), seen("b")], Lineage(), asked=2)
    assert found == Leader("b", 1)
    assert lineage == Lineage("s", 1)


def test_the_higher_timeline_wins():
    """Of two primaries the one that was promoted later; the other was replaced."""
    found, _ = choose_leader([seen("old", timeline=2), seen("new", timeline=3)], Lineage(), asked=2)
    assert found == Leader("new", 3)


@pytest.mark.parametrize(
    ("sightings", "lineage", "reason", "is_fenced"),
    [
        ([seen("old")], Lineage("s", 2), "old is a primary of timeline 1, and there is one of timeline 2", True),
        ([seen("old"), seen("x", timeline=2, standby=True)], Lineage(), "it was replaced; x is a standby", True),
        ([seen("a", timeline=2), seen("b", timeline=2)], Lineage(), "a and b are both primaries of timeline 2", True),
        ([seen("a"), seen("b", system="t")], Lineage(), "a, b are not copies of one Postgres", True),
        ([seen("b", system="t")], Lineage("s", 1), "b is not a copy of the Postgres that this shard was", True),
        ([seen("a", standby=True)], Lineage("s", 1), "a is a standby; 1 more do not answer", False),
        ([], Lineage("s", 1), "none of 2 servers answers", False),
    ],
)
def test_where_nobody_leads_for_sure_nobody_does(sightings, lineage, reason, is_fenced):
    """The reason is said, and whether what is connected must be left, too."""
    found, _ = choose_leader(sightings, lineage, asked=2)
    assert isinstance(found, NoLeader)
    assert reason in found.reason
    assert found.is_fenced is is_fenced


@given(st.lists(st.lists(st.tuples(st.sampled_from("abc"), st.integers(1, 4), st.booleans()), max_size=4), max_size=6))
def test_no_two_looks_lead_back(looks):
    """Whatever is seen in whatever order, a leader never has a lower timeline than anything seen before."""
    lineage, highest = Lineage(), 0
    for look in looks:
        sightings = [seen(address, timeline=timeline, standby=standby) for address, timeline, standby in look]
        found, lineage = choose_leader(sightings, lineage, asked=4)
        highest = max([highest, *(each.timeline for each in sightings)])
        assert lineage.timeline == highest
        if isinstance(found, Leader):
            assert found.timeline == highest
