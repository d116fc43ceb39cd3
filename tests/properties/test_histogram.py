"""The histogram against the exact answer, which is to keep all samples and sort them."""

import math
from random import Random

from hypothesis import given, settings
from hypothesis import strategies as st

from headrace.monitor.histogram import HIGHEST_S, LOWEST_S, Distribution, Histogram

ERROR = (2 ** (1 / 32) - 1) / (2 ** (1 / 32) + 1)

within = st.floats(min_value=math.nextafter(LOWEST_S, 1.0), max_value=HIGHEST_S)
anything = st.floats(allow_nan=False, allow_infinity=False, min_value=-1e6, max_value=1e6)
samples = st.lists(within, min_size=1, max_size=60)


def recorded(durations):
    histogram = Histogram()
    for duration in durations:
        histogram.record(duration)
    return histogram.distribution()


@given(samples, st.sampled_from([0.0, 0.01, 0.25, 0.5, 0.75, 0.9, 0.95, 0.99]), st.integers(1, 40))
def test_a_quantile_is_within_one_point_one_percent(durations, q, copies):
    """Whatever the samples, a quantile that is told differs from the nearest-rank one by at most 1.083 %."""
    durations = durations * copies
    told = recorded(durations).quantile(q)
    rank = max(1, math.ceil(q * len(durations) - 1e-6))
    exact = sorted(durations)[rank - 1]

    if told is None:
        assert len(durations) * (1 - q) < 10
    else:
        assert abs(told - exact) <= exact * (ERROR + 1e-9)


@settings(max_examples=25)
@given(st.floats(0.3, 3.0), st.floats(-6.0, 0.0), st.integers(0, 2**32))
def test_the_bound_holds_for_the_tail_of_a_heavy_distribution(spread, median_log, seed):
    """p50, p95 and p99 of thousands of log-normal latencies are within the bound, where they are within the range."""
    random = Random(seed)
    durations = [min(90.0, max(1.1e-4, random.lognormvariate(median_log, spread))) for _ in range(2_000)]
    distribution, ordered = recorded(durations), sorted(durations)

    for q in (0.5, 0.95, 0.99):
        exact = ordered[math.ceil(q * len(ordered) - 1e-6) - 1]
        assert abs(distribution.quantile(q) - exact) <= exact * (ERROR + 1e-9)


@given(st.lists(st.lists(anything, max_size=30), max_size=6))
def test_merging_parts_equals_recording_all(parts):
    """However samples are spread over workers, and in whatever order they are merged, the result is the same."""
    merged = Distribution.total(recorded(part) for part in reversed(parts))

    assert merged == recorded([duration for part in parts for duration in part])


@given(st.lists(anything, max_size=30), st.lists(anything, max_size=30))
def test_subtraction_undoes_addition(earlier, later):
    """What came since a reading is exactly what was recorded since, or the order is wrong and nothing is told."""
    before, between = recorded(earlier), recorded(later)
    after = before + between

    assert after.since(before) == between
    assert after.since(between) == before
    if later:
        assert before.since(after) is None


@given(st.lists(anything, max_size=40))
def test_keeping_loses_nothing(durations):
    """Packed and unpacked, it is what it was."""
    distribution = recorded(durations)

    assert Distribution.unpack(distribution.pack()) == distribution


@given(st.lists(anything, min_size=1, max_size=60))
def test_the_cells_agree_with_each_other(durations):
    """Counts are those of the samples: in all, over each promise, and up to each power of two."""
    distribution = recorded(durations)

    assert distribution.count == len(durations)
    for limit in (0.1, 0.2, 0.5, 1.0):
        assert distribution.over(limit) == sum(duration > limit for duration in durations)
    below = [distribution.at_most(exponent) for exponent in range(-13, 7)]
    assert below == sorted(below)
    assert below[-1] <= distribution.count
