import pytest

from headrace.cli.bench.distribution import distribution, histogram, quantile


def test_quantiles_are_values_that_occurred():
    """By nearest rank: of 1 to 1000, the 99.9th percentile is 999 and nothing in between is made up."""
    sample = [float(value) for value in range(1000, 0, -1)]

    found = distribution(sample)

    assert (found.p50, found.p90, found.p95, found.p99, found.p999, found.max) == (500, 900, 950, 990, 999, 1000)
    assert found.count == 1000
    assert found.mean == pytest.approx(500.5)


def test_a_single_value_is_every_quantile():
    """The smallest sample has all quantiles."""
    found = distribution([7.0])

    assert found.p50 == found.p999 == found.max == 7.0


@pytest.mark.parametrize(("q", "expected"), [(0.0, 1.0), (0.25, 1.0), (0.5, 2.0), (0.51, 3.0), (1.0, 4.0)])
def test_a_quantile_is_the_smallest_value_that_covers_its_share(q, expected):
    """A share that falls between two ranks takes the upper one."""
    assert quantile([1.0, 2.0, 3.0, 4.0], q) == expected


def test_histogram_buckets_are_an_eighth_of_a_doubling_wide_and_exact_at_powers_of_two():
    """Bucket i ends at 2**((i+1)/8), inclusive: 1 ms is the end of bucket -1, 2 ms that of bucket 7."""
    assert histogram([1.0, 2.0, 0.5, 2.0]) == {-9: 1, -1: 1, 7: 2}
    assert list(histogram([1.0001])) == [0]
    for value in (0.013, 0.4, 1.3, 99.0, 12_345.6):
        (index,) = histogram([value])
        assert 2 ** (index / 8) < value <= 2 ** ((index + 1) / 8)


def test_histogram_takes_what_a_coarse_clock_measures():
    """Zero has no logarithm; it counts as a nanosecond."""
    (index,) = histogram([0.0])

    assert 2 ** ((index + 1) / 8) >= 1e-6
