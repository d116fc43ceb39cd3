"""Exact quantiles of a sample that is held whole, and its shape in a few numbers. Pure."""

from collections.abc import Sequence
from math import ceil, frexp, log2

import msgspec

BUCKETS_PER_DOUBLING = 8
"""Scale 3 of a base-2 exponential histogram (OpenTelemetry's data model): a bucket is 9 % wide."""


class Distribution(msgspec.Struct, frozen=True, kw_only=True):
    """Milliseconds, over every request of one run. Quantiles are by nearest rank: each is a value that occurred."""

    count: int
    mean: float
    p50: float
    p90: float
    p95: float
    p99: float
    p999: float
    max: float


def quantile(ascending: Sequence[float], q: float) -> float:
    """The smallest value that at least the share `q` of a sorted, non-empty sample does not exceed."""
    return ascending[max(0, ceil(q * len(ascending) - 1e-9) - 1)]


def distribution(sample_ms: Sequence[float]) -> Distribution:
    """Summarise a non-empty sample in any order."""
    ascending = sorted(sample_ms)
    return Distribution(
        count=len(ascending),
        mean=sum(ascending) / len(ascending),
        p50=quantile(ascending, 0.5),
        p90=quantile(ascending, 0.9),
        p95=quantile(ascending, 0.95),
        p99=quantile(ascending, 0.99),
        p999=quantile(ascending, 0.999),
        max=ascending[-1],
    )


def histogram(sample_ms: Sequence[float]) -> dict[int, int]:
    """Counts by bucket, ascending; bucket `i` holds the values in (2**(i/8), 2**((i+1)/8)] milliseconds.

    Empty buckets are left out. Values of zero and below (a clock's granularity) fall into the bucket of a nanosecond.
    """
    counts: dict[int, int] = {}
    for value in sample_ms:
        index = _bucket(max(value, 1e-6))
        counts[index] = counts.get(index, 0) + 1
    return dict(sorted(counts.items()))


def _bucket(value: float) -> int:
    # frexp is exact at the powers of two, where rounding of a logarithm could choose the neighbour.
    mantissa, exponent = frexp(value)
    return ceil(log2(mantissa) * BUCKETS_PER_DOUBLING) + exponent * BUCKETS_PER_DOUBLING - 1
