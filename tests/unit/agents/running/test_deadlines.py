"""The wheel of deadlines: never early, hardly late, and silent when nothing waits."""

import asyncio

import pytest

from headrace.agents.running.deadlines import TICKS_PER_S, Deadlines, Wheel
from headrace.clock import SystemClock

TICK_S = 1 / TICKS_PER_S


class Entry:
    """Something with a deadline, which notes that it has passed."""

    def __init__(self, due_at, passed=None):
        self.due_at = due_at
        self.earlier = self.later = None
        self.passed = passed

    def overdue(self):
        self.passed.append(self)


def rung(wheel, entry, until=200_000.0):
    """When an entry comes out of a wheel that is asked whenever it wants to be."""
    while (at := wheel.next_at()) is not None and at <= until:
        if entry in wheel.passed(at, limit=10):
            return at
    return None


@pytest.mark.parametrize("ahead_s", [0.0, 0.001, 0.5, 0.999, 1.0, 1.01, 30.0, 63.99, 64.0, 600.0, 4_096.0, 100_000.0])
@pytest.mark.parametrize("now", [0.0, 1_000.003, 4_095.99, 123_456.789])
def test_a_deadline_rings_within_a_tick_and_never_early(now, ahead_s):
    """From the next tick to beyond the largest wheel."""
    wheel, entry = Wheel(now), Entry(now + ahead_s)

    wheel.add(entry)

    at = rung(wheel, entry, until=now + ahead_s + 1)
    assert entry.due_at <= at <= entry.due_at + 2 * TICK_S


def test_what_is_late_already_rings_with_the_next_tick():
    """A deadline in the past is not lost."""
    wheel, entry = Wheel(100.0), Entry(7.0)

    wheel.add(entry)

    assert wheel.passed(100.0 + TICK_S, limit=10) == [entry]


def test_what_was_removed_does_not_ring():
    """Neither from a fine bucket nor from a coarse one, and removing it again is harmless."""
    wheel = Wheel(0.0)
    entries = [Entry(0.5), Entry(50.0), Entry(5_000.0)]
    for entry in entries:
        wheel.add(entry)

    for entry in entries * 2:
        wheel.remove(entry)

    assert wheel.next_at() is None
    assert wheel.passed(10_000.0, limit=10) == []


def test_many_at_once_come_in_bounded_portions():
    """The rest stays due, and what is removed meanwhile is not handed out."""
    wheel = Wheel(0.0)
    entries = [Entry(1.0) for _ in range(10)]
    for entry in entries:
        wheel.add(entry)

    first = wheel.passed(2.0, limit=4)
    wheel.remove(entries[4])

    assert first == entries[:4]
    assert wheel.next_at() <= 2.0
    assert wheel.passed(2.0, limit=100) == entries[5:]


def test_an_entry_may_wait_again():
    """As an execution does for its grace after the deadline."""
    wheel, entry = Wheel(0.0), Entry(1.0)
    wheel.add(entry)
    wheel.passed(2.0, limit=1)

    entry.due_at = 3.0
    wheel.add(entry)

    assert wheel.passed(2.9, limit=1) == []
    assert wheel.passed(3.0, limit=1) == [entry]


def test_it_wants_to_be_asked_no_later_than_the_earliest_deadline():
    """So that one timer of the loop is enough, whatever waits."""
    wheel = Wheel(0.0)
    for due_at in (5_000.0, 70.0, 3.0, 0.3):
        wheel.add(Entry(due_at))

        assert wheel.next_at() <= due_at + TICK_S


async def test_an_earlier_deadline_is_not_held_up_by_a_later_one():
    """The timer of the loop is set anew; after the last one there is none."""
    passed = []
    clock = SystemClock()
    deadlines = Deadlines(clock)
    late, early, never = (Entry(clock.monotonic() + s, passed) for s in (1.0, 0.5, 0.75))

    for entry in (late, early, never):
        deadlines.add(entry)
    deadlines.remove(never)
    async with asyncio.timeout(60):
        while len(passed) < 2:
            await asyncio.sleep(0.001)

    assert passed == [early, late]
    assert deadlines._timer is None


async def test_closed_deadlines_ring_no_more():
    """The loop keeps no timer of theirs."""
    deadlines = Deadlines(SystemClock())
    deadlines.add(Entry(0.0, []))

    deadlines.close()

    assert deadlines._timer is None
