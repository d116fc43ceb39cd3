"""How the window of W-TinyLFU finds its size."""

import pytest

from headrace.cache.policies.climber import DENSITY_FLOOR, SHARE_FIRST, SHARE_MAX, STEP, Climber

SMALL, LARGE = 100, 10_000


def sample(climber: Climber, nodes: int, *, window: int, main: int) -> None:
    """One complete sample with these hits, the rest misses."""
    length = nodes * (10 if nodes == SMALL else 4)
    for index in range(length):
        if index < window:
            climber.hit(in_window=True)
        elif index < window + main:
            climber.hit(in_window=False)
        else:
            climber.miss()
        if index < length - 1:
            before = climber.share
            climber.climb(nodes)
            assert climber.share == before
    climber.climb(nodes)


def test_a_small_cache_climbs_on_while_the_hit_rate_rises_and_turns_back_when_it_falls():
    """Comparing each sample with the one before."""
    climber = Climber()
    assert climber.share == SHARE_FIRST
    sample(climber, SMALL, window=0, main=500)
    first = climber.share
    assert first == pytest.approx(SHARE_FIRST + STEP)
    sample(climber, SMALL, window=0, main=520)
    second = climber.share
    assert second > first
    sample(climber, SMALL, window=0, main=500)
    assert climber.share < second


def test_steps_shrink_until_the_hit_rate_jumps():
    """By half a per cent each time; five points of hit rate are other traffic, and start afresh."""
    climber = Climber()
    sample(climber, SMALL, window=0, main=500)
    shares = []
    for _ in range(3):
        before = climber.share
        sample(climber, SMALL, window=0, main=500)
        shares.append(climber.share - before)
    assert shares[1] == pytest.approx(0.995 * shares[0])
    assert shares[2] == pytest.approx(0.995 * shares[1])
    sample(climber, SMALL, window=0, main=600)
    before = climber.share
    sample(climber, SMALL, window=0, main=600)
    assert climber.share - before == pytest.approx(STEP)


def test_a_large_cache_gives_room_to_where_hits_are_denser():
    """Within one sample: hits per share of the window against hits per share of the rest."""
    climber = Climber()
    sample(climber, LARGE, window=10_000, main=10_000)
    grown = climber.share
    assert grown > SHARE_FIRST
    sample(climber, LARGE, window=10, main=20_000)
    assert climber.share < grown


def test_the_window_stays_within_its_limits():
    """However long one side wins."""
    climber = Climber()
    for _ in range(40):
        sample(climber, LARGE, window=20_000, main=0)
    assert climber.share <= SHARE_MAX
    for _ in range(40):
        sample(climber, LARGE, window=0, main=20_000)
    assert climber.share == DENSITY_FLOOR
