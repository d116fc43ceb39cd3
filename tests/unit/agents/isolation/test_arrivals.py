"""How many warm workers are wanted, from how often they were asked for."""

import pytest

from headrace.agents.isolation.arrivals import Arrivals


def wanted(arrivals: Arrivals, now: float, *, least: int = 1, most: int = 8) -> int:
    return arrivals.wanted(now, horizon_s=0.25, least=least, most=most)


def test_without_arrivals_the_least_is_wanted() -> None:
    """Nothing came, so nothing is expected."""
    assert wanted(Arrivals(), 100.0) == 1
    assert wanted(Arrivals(), 100.0, least=0) == 0


@pytest.mark.parametrize("per_second", [1, 5, 20])
def test_a_steady_rate_is_measured(per_second: int) -> None:
    """After some time constants the fading average is the rate."""
    arrivals = Arrivals(memory_s=10.0)
    for index in range(60 * per_second):
        arrivals.note(index / per_second)

    assert arrivals.rate(60.0) == pytest.approx(per_second, rel=0.1)


def test_a_burst_raises_the_number_and_quiet_lowers_it_again() -> None:
    """Between the bounds the number follows the arrivals, both ways."""
    arrivals = Arrivals(memory_s=10.0)
    for index in range(200):
        arrivals.note(index / 20)

    during = wanted(arrivals, 10.0)
    after = wanted(arrivals, 100.0)

    assert 3 <= during <= 8
    assert after == 1


def test_the_most_is_never_exceeded() -> None:
    """However many come at once."""
    arrivals = Arrivals()
    for _ in range(100_000):
        arrivals.note(1.0)

    assert wanted(arrivals, 1.0) == 8
