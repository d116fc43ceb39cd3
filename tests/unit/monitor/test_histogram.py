"""Recording durations and reading them back; the error bounds are under properties."""

import math

import pytest

from headrace.errors import CallerError
from headrace.monitor.histogram import (
    BUCKETS,
    CELLS,
    DAY_S,
    FIRST,
    HIGHEST_S,
    LAST,
    LIMITS_S,
    LOWEST_S,
    SCALE,
    Distribution,
    Histogram,
)

GROWTH = 2.0 ** (1.0 / 32.0)


def recorded(*seconds):
    histogram = Histogram()
    for duration in seconds:
        histogram.record(duration)
    return histogram.distribution()


def test_the_buckets_span_a_hundred_microseconds_to_a_hundred_seconds():
    """The constants of the layout belong together and hold the promised range."""
    assert LAST - FIRST == BUCKETS
    assert LOWEST_S == 2.0 ** (FIRST / SCALE) < 100e-6
    assert HIGHEST_S == 2.0 ** (LAST / SCALE) > 100.0
    assert 1 + len(LIMITS_S) + 1 + BUCKETS + 1 == CELLS


def test_an_empty_histogram_has_nothing_to_tell():
    """No sample: count and sum are zero, and no quantile is known."""
    distribution = Histogram().distribution()

    assert distribution.count == 0
    assert distribution.sum_s == 0.0
    assert distribution.quantile(0.5) is None


def test_count_and_sum_are_exact():
    """The sum is kept in nanoseconds and not derived from the buckets."""
    distribution = recorded(0.001, 0.25, 7.5)

    assert distribution.count == 3
    assert distribution.sum_s == pytest.approx(7.751, abs=3e-9)


@pytest.mark.parametrize(("q", "enough"), [(0.5, 20), (0.9, 100), (0.95, 200), (0.99, 1_000), (0.999, 10_000)])
def test_a_quantile_needs_ten_samples_beyond_it(q, enough):
    """One sample fewer than 10 / (1 - q), and the answer is that there is none."""
    assert recorded(*[0.01] * (enough - 1)).quantile(q) is None
    assert recorded(*[0.01] * enough).quantile(q) == pytest.approx(0.01, rel=0.011)


def test_below_and_above_the_range_a_quantile_is_the_limit():
    """Durations out of range are counted, and told as the end of the range that they are beyond."""
    assert recorded(*[1e-7] * 20).quantile(0.5) == LOWEST_S
    assert recorded(*[5_000.0] * 20).quantile(0.5) == HIGHEST_S


@pytest.mark.parametrize("strange", [-1.0, -0.0, 0.0, -math.inf, 5e-324])
def test_what_is_not_above_zero_counts_as_zero(strange):
    """A negative duration is a clock's fault: the request happened, its time is unknown and adds nothing."""
    distribution = recorded(strange)

    assert (distribution.count, distribution.sum_s) == (1, 0.0)


def test_an_endless_duration_counts_as_a_day():
    """Infinity is counted beyond every limit, and cannot make the sum infinite."""
    distribution = recorded(math.inf)

    assert distribution.count == 1
    assert distribution.sum_s == DAY_S
    assert [distribution.over(limit) for limit in LIMITS_S] == [1, 1, 1, 1]


def test_nan_counts_nowhere():
    """What is not a number is not a duration."""
    assert recorded(math.nan) == Distribution()


def test_the_limits_of_promises_are_counted_exactly():
    """At the limit is within the promise; the smallest step above it is not."""
    for index, limit in enumerate(LIMITS_S):
        above = math.nextafter(limit, math.inf)
        distribution = recorded(limit, above, limit / 2)

        assert distribution.over(limit) == 1
        assert distribution.over(LIMITS_S[0]) == (1 if index == 0 else 2 + (limit / 2 > LIMITS_S[0]))


def test_only_those_limits_are_counted_exactly():
    """Another limit is refused with the ones that there are, rather than estimated."""
    with pytest.raises(CallerError, match=r"0\.3"):
        Distribution().over(0.3)


@pytest.mark.parametrize("exponent", range(-13, 7))
def test_powers_of_two_are_limits_of_buckets(exponent):
    """Exactly at the power of two is at most it; a millionth above is not, so classic buckets can be derived."""
    bound = 2.0**exponent
    distribution = recorded(bound, bound * (1 + 1e-6), bound * (1 - 1e-6))

    assert distribution.at_most(exponent) == 2


def test_other_exponents_have_no_bucket():
    """Outside the range nothing is counted apart, so nothing can be told."""
    with pytest.raises(CallerError, match="no limit of a bucket"):
        Distribution().at_most(7)


@pytest.mark.parametrize("q", [-0.1, 1.1, math.nan])
def test_a_quantile_lies_between_zero_and_one(q):
    """Anything else is refused with the value."""
    with pytest.raises(CallerError, match=str(q)):
        Distribution().quantile(q)


def test_merging_is_addition():
    """What two workers recorded is what one would have recorded."""
    assert recorded(0.001, 0.5) + recorded(0.3, 200.0) == recorded(0.3, 0.001, 200.0, 0.5)
    assert Distribution.total([recorded(0.1), recorded(0.2), recorded(0.3)]) == recorded(0.1, 0.2, 0.3)


def test_since_is_what_came_after():
    """The difference of two readings of one histogram is what was recorded between them."""
    histogram = Histogram()
    histogram.record(0.2)
    earlier = histogram.distribution()
    histogram.record(0.004)

    assert histogram.distribution().since(earlier) == recorded(0.004)


def test_since_a_larger_one_is_unknown():
    """A cell that went back means another history; a difference of it would be a lie."""
    assert recorded(0.2).since(recorded(0.2, 0.2)) is None
    assert recorded(0.2, 0.3, 0.4).since(recorded(0.1)) is None


def test_packing_keeps_everything_in_little_room():
    """A busy histogram of an hour fits into a few hundred bytes and comes back whole."""
    distribution = recorded(*(0.001 * GROWTH**step for step in range(100) for _ in range(40)))

    assert len(distribution.pack()) < 400
    assert Distribution.unpack(distribution.pack()) == distribution


def test_a_row_of_cells_can_be_written_and_read():
    """Distributions live in shared memory as plain cells at any offset."""
    cells = memoryview(bytearray(8 * (CELLS + 5))).cast("Q")
    distribution = recorded(0.01, 3.0)

    distribution.write(cells, 5)

    assert Distribution.read(cells, 5) == distribution
    assert cells[:5].tolist() == [0] * 5


def test_a_distribution_says_what_it_holds():
    """Its repr is readable, and equal ones are one in a set."""
    assert repr(recorded(0.5)) == "Distribution(count=1, sum_s=0.500000)"
    assert len({recorded(0.5), recorded(0.5), recorded(0.6)}) == 2
    assert recorded(0.5) != "a string"
