"""The ids of one lease: rising, within its time, and refused rather than made up."""

import pytest

from headrace.database.ids import EPOCH_MS, NODES, SEQUENCES, IdParts, IdSequence, Lease, Wait, parts_of
from headrace.errors import BugError, CallerError

START = EPOCH_MS + 1_000_000


def sequence(*, node=7, length_ms=30_000, ahead_ms_max=1000):
    """The ids of a lease that was asked for at monotonic time 100."""
    return IdSequence(Lease(node, START, START + length_ms, 100.0), ahead_ms_max=ahead_ms_max)


def test_an_id_says_when_and_by_whom_it_was_made():
    """The documented layout: 41 bits of time, 10 of node, 12 of sequence."""
    ids = sequence()
    assert parts_of(ids.take(100.0)) == IdParts(START, 7, 0)
    assert parts_of(ids.take(100.0)) == IdParts(START, 7, 1)
    assert parts_of(ids.take(100.0025)) == IdParts(START + 2, 7, 0)


def test_the_largest_id_fits_a_bigint():
    """In 2094, of the last node."""
    last = EPOCH_MS + (1 << 41) - 1
    ids = IdSequence(Lease(NODES - 1, last, last + 1, 0.0), ahead_ms_max=1000)
    assert [ids.take(0.0) for _ in range(SEQUENCES)][-1] == 2**63 - 1


@pytest.mark.parametrize("wrong", [-1, 2**63])
def test_what_is_no_id_is_not_taken_apart(wrong):
    """A number of another size was not made here."""
    with pytest.raises(CallerError, match="no id of headrace"):
        parts_of(wrong)


def test_a_burst_borrows_from_the_next_millisecond():
    """More than 4096 ids in one millisecond go on in the next one, without waiting."""
    ids = sequence()
    made = [ids.take(100.0) for _ in range(SEQUENCES + 1)]
    assert made == sorted(set(made))
    assert parts_of(made[-1]) == IdParts(START + 1, 7, 0)


def test_a_burst_borrows_no_more_than_it_may():
    """Then the caller is told how long to wait until time has caught up."""
    ids = sequence(ahead_ms_max=2)
    assert all(isinstance(ids.take(100.0), int) for _ in range(3 * SEQUENCES))
    wait = ids.take(100.0)
    assert isinstance(wait, Wait)
    assert wait.seconds == pytest.approx(0.001)
    assert isinstance(ids.take(100.0 + wait.seconds), int)


def test_no_id_is_made_after_the_lease():
    """Also not by a process that was asleep while it ended."""
    ids = sequence(length_ms=10)
    assert isinstance(ids.take(100.009), int)
    for late in (100.01, 3700.0):
        assert "was not renewed" in ids.take(late).reason


def test_a_renewal_goes_on_above():
    """With the same number, from the time that the home shard tells."""
    ids = sequence(length_ms=10)
    first = ids.take(100.009)
    ids.renewed(Lease(7, START + 20, START + 30, 100.02))
    assert parts_of(ids.take(100.02)) == IdParts(START + 20, 7, 0)
    assert ids.take(100.02) > first


def test_a_clock_that_was_set_back_makes_nobody_repeat_himself():
    """A little: ids go on from the last one. More than may be borrowed: the caller waits, or is refused."""
    ids = sequence()
    last = ids.take(105.0)
    ids.renewed(Lease(7, START + 4500, START + 34_500, 105.0))
    assert ids.take(105.0) == last + 1
    ids.renewed(Lease(7, START - 600_000, START + 34_500, 105.0))
    wait = ids.take(105.0)
    assert wait.reason == "the last id is 605 s ahead of time"
    assert wait.seconds == pytest.approx(604)


def test_a_renewal_of_another_node_is_a_bug():
    """Its stretch of time belongs to another number."""
    with pytest.raises(BugError):
        sequence(node=7).renewed(Lease(8, START, START + 1, 0.0))
