from math import inf

import pytest

from headrace.cli.bench.schedule import Schedule


def test_requests_are_due_at_even_intervals_from_the_start():
    """Request i is due at start + i / rate, the first one at the start."""
    schedule = Schedule(start=100.0, rate_per_s=10.0, count=5)

    assert [schedule.intended(index) for index in range(5)] == pytest.approx([100.0, 100.1, 100.2, 100.3, 100.4])


def test_nothing_is_due_before_the_start_nor_beyond_the_count():
    """The schedule has a beginning and an end."""
    schedule = Schedule(start=100.0, rate_per_s=10.0, count=5)

    assert schedule.due(99.999) == 0
    assert schedule.due(100.0) == 1
    assert schedule.due(1_000.0) == 5
    assert schedule.intended(5) == inf
    assert schedule.end == pytest.approx(100.5)


def test_a_late_look_finds_everything_that_became_due_meanwhile():
    """A stall of the one who looks makes nothing disappear: what was due while it lasted is due now."""
    schedule = Schedule(start=0.0, rate_per_s=1_000.0, count=10_000)

    assert schedule.due(0.0105) == 11
    assert schedule.due(0.5105) == 511


@pytest.mark.parametrize("rate", [3.0, 7.0, 999.0, 10_000.0, 12_345.678])
@pytest.mark.parametrize("start", [0.0, 12.3456789, 4_000_000.1])
def test_a_request_is_due_at_its_intended_time_whatever_the_rounding(rate, start):
    """Who wakes exactly when a request is due finds it due, or the wake-up would be repeated in a loop."""
    schedule = Schedule(start=start, rate_per_s=rate, count=5_000)

    for index in range(5_000):
        assert schedule.due(schedule.intended(index)) == index + 1
