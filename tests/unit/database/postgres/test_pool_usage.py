"""How well a pool is used, and what share of a server it may have."""

import pytest

from headrace.database.postgres.pool_usage import Room, UsageMeter, fair_share


def meter(*, limit_s=0.1):
    return UsageMeter(wait_p99_max_s=limit_s, now=1000.0)


def test_busy_of_opened_connection_seconds():
    """Two of four connections at work for a second are a half."""
    found = meter()
    found.change(1000.0, busy=2, opened=4)
    assert found.usage(1001.0).efficiency == pytest.approx(0.5)


def test_a_starved_second_is_no_efficient_one():
    """All connections were at work, and everybody waited: that second counts as idle, the next one as busy."""
    found = meter()
    found.change(1000.0, busy=4, opened=4)
    found.waited(1000.5, 0.2)
    found.waited(1001.5, 0.01)
    usage = found.usage(1002.0)
    assert usage.efficiency == pytest.approx(0.5)
    assert usage.wait_p99_s == 0.2


def test_seconds_without_demand_are_left_out():
    """A pool that is kept open for the next burst is not called wasteful."""
    found = meter()
    found.change(1000.0, busy=4, opened=4)
    found.change(1001.0, busy=0, opened=4)
    assert found.usage(1030.0).efficiency == pytest.approx(1.0)
    assert meter().usage(1030.0).efficiency is None


def test_only_the_last_minute_counts():
    """What was long ago is forgotten, also after a long silence."""
    found = meter()
    found.change(1000.0, busy=4, opened=4)
    found.change(1001.0, busy=0, opened=4)
    assert found.usage(1100.0).efficiency is None
    assert found.usage(90_000.0).efficiency is None


@pytest.mark.parametrize(
    ("limit", "others", "pools", "wanted", "share"),
    [(97, 0, 1, 10, 10), (97, 0, 20, 10, 4), (97, 90, 7, 10, 1), (97, 97, 3, 10, 1), (97, 0, 0, 10, 10)],
)
def test_the_pools_of_all_processes_fit_into_the_server(limit, others, pools, wanted, share):
    """Each has the same share, none more than it wants, and at least one."""
    assert fair_share(Room(limit, others, pools), wanted) == share
