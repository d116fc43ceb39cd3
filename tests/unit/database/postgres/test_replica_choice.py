"""Which replica may answer: one that is known to show enough; pure, on positions and moments."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from headrace.database.config import ReplicaConfig
from headrace.database.postgres.leader import Sighting
from headrace.database.postgres.replicas import Facts, Log, Need, Note, choose

LIMITS = ReplicaConfig(lag_max_s=10.0, lag_max_bytes=1000, look_s=1.0)
NOW = 100.0


def primary(*, timeline=1, standby=False):
    return Sighting("p", "s", standby, timeline)


def log(*notes):
    found = Log()
    for at, lsn in notes:
        found.add(primary(), Note(at, lsn))
    return found


def replica(name="r", *, lsn=100, heard_at=NOW, timeline=1, standby=True, load=0.0):
    return Facts(name, Sighting(name, "s", standby, timeline), lsn, heard_at, load)


@pytest.mark.parametrize(
    ("facts", "notes", "need", "reason"),
    [
        (replica(lsn=100), [(99, 100)], Need(), None),
        (replica(lsn=100), [(99, 100)], Need(wrote_at=98.9), None),
        (replica(lsn=100), [(99, 100)], Need(wrote_at=99.1), "behind what the caller wrote"),
        (replica(lsn=99), [(98, 50), (99, 100)], Need(wrote_at=98.5), "behind what the caller wrote"),
        (replica(lsn=99), [(98, 50), (99, 100)], Need(), None),
        (replica(lsn=99), [(80, 50), (99, 100)], Need(), "more than 10 s behind"),
        (replica(lsn=40), [(98, 50)], Need(), "more than 10 s behind"),
        (replica(lsn=100), [(98, 50), (99, 2000)], Need(), "1900 bytes of log behind"),
        (replica(lsn=100), [(99, 100)], Need(lsn=101), "behind what the caller saw"),
        (replica(heard_at=95.0), [(99, 100)], Need(), "not answered lately"),
        (replica(timeline=2), [(99, 100)], Need(), "another timeline"),
        (replica(standby=False), [(99, 100)], Need(), "no standby"),
        (replica(), [], Need(), "another timeline"),
        (replica(), [(99, 100)], Need(name="other"), "nothing was heard of any"),
    ],
)
def test_a_replica_is_used_only_if_it_is_known_to_show_enough(facts, notes, need, reason):
    """Freshness, own writes, bookmarks, silence, timelines; and the reason is said."""
    choice = choose([facts], log(*notes), need, LIMITS, NOW)
    if reason is None:
        assert choice.name == "r"
    else:
        assert choice.name is None
        assert reason in choice.reasons[0]


def test_the_least_busy_answers():
    """Of those that may."""
    facts = [replica("a", load=2.0), replica("b", load=1.0), replica("c", load=0.0, lsn=1)]
    assert choose(facts, log((99, 100)), Need(), LIMITS, NOW).name == "b"


def test_a_promoted_primary_begins_a_new_log():
    """Positions of the timeline before say nothing about replicas of this one."""
    found = log((90, 100), (91, 200))
    found.add(primary(timeline=2), Note(99, 150))
    assert found.shown_until(150) == 99
    assert found.shown_until(149) is None


@given(
    st.lists(st.tuples(st.floats(0.01, 1), st.integers(0, 50)), min_size=1, max_size=30),
    st.integers(0, 1500),
    st.floats(0, 40),
)
def test_what_was_written_before_a_note_is_shown(steps, replayed, wrote_at):
    """A replica is chosen for a writer only if some note after the write was replayed."""
    at, lsn, notes = 0.0, 0, []
    for seconds, size in steps:
        at, lsn = at + seconds, lsn + size
        notes.append((at, lsn))
    wide = ReplicaConfig(lag_max_s=1e9, lag_max_bytes=10**9)
    facts = replica(lsn=replayed, heard_at=at)
    chosen = choose([facts], log(*notes), Need(wrote_at=wrote_at), wide, at).name
    assert (chosen is not None) == any(when >= wrote_at and position <= replayed for when, position in notes)
