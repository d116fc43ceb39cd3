"""Latency histograms that add up: base-2 exponential buckets, the same in every process.

Intuition: draw the bucket limits where `log2(seconds)` crosses the next 1/32, and every bucket is 2.2 % wider than the
one before. Whatever value a bucket reports for its content is then off by a bounded *share* of it, a microsecond at
the bottom and a second at the top. Two histograms over the same limits merge by adding their counts, which loses
nothing, so the quantile of ten workers is the quantile of one histogram, never an average of ten quantiles.

Growth is 2^(1/32) ("schema 5" of OpenTelemetry and of Prometheus' native histograms; DDSketch [1] with that gamma), so
a quantile is within (g - 1) / (g + 1) = 1.083 % of the true one. 639 buckets span 98 us to 101 s; below and above
there is one bucket each. Beside them stand exact counts of durations above 100, 200, 500 and 1000 ms: those are the
limits that promises are made of, and compliance should be counted, not estimated. They cost the fast requests one
comparison.

The module is typed so that mypyc can compile it, and runs unchanged as plain Python.

[1] Masson, Rim, Lee: DDSketch: A Fast and Fully-Mergeable Quantile Sketch with Relative-Error Guarantees. VLDB 2019.
"""

import math
import zlib
from array import array
from bisect import bisect_left
from collections.abc import Callable, Iterable
from itertools import accumulate
from typing import Final

from headrace.errors import CallerError

SCALE: Final = 32.0
"""Buckets per doubling."""
FIRST: Final = -426
"""The lowest bucket begins at 2^(FIRST/32) s = 98.3 us."""
LAST: Final = 213
"""The highest bucket ends at 2^(LAST/32) s = 100.9 s."""
BUCKETS: Final = 639
LOWEST_S: Final = 2.0 ** (-426.0 / 32.0)
HIGHEST_S: Final = 2.0 ** (213.0 / 32.0)
DAY_S: Final = 86_400.0

# One histogram is this row of 64-bit cells:
#   [sum in ns] [above 100 ms] [above 200 ms] [above 500 ms] [above 1 s] [underflow] [639 buckets] [overflow]
# A tuple of any length to mypyc: one of four native floats is, to the code it makes, never set.
LIMITS_S: Final[tuple[float, ...]] = (0.1, 0.2, 0.5, 1.0)
"""Durations above each of these are counted exactly."""
SUM: Final = 0
OVER: Final = 1
UNDERFLOW: Final = 5
CELLS: Final = 646
BYTES: Final = CELLS * 8

SAMPLES_BEYOND: Final = 10.0
"""A quantile is told from this many samples beyond it on: p99 from 1,000 samples, p99.9 from 10,000."""

# `math.log` is the one logarithm that mypyc calls without a detour through Python. The billionth of a bucket forgives
# its last digit, so that a duration of exactly 2^-3 s counts as at most 2^-3 s.
_PER_E: Final = SCALE / math.log(2.0)
_FROM_TOP: Final = 213.000000001

_LANE: Final = (1 << 64) - 1
_TOP_BITS: Final = int.from_bytes(b"\x00\x00\x00\x00\x00\x00\x00\x80" * CELLS, "little")


class Bound:
    """A series bound to its place in memory. A place can be withdrawn (fork, close): writes then land in `settle`.

    The write path asks no question: a series without a place points at an empty memory, whose IndexError leads to the
    slow path, which finds a new place or says that there is none.
    """

    __slots__ = ("_at", "_cells", "_settle")

    def __init__(self, settle: Callable[[], bool] | None = None) -> None:
        self._settle = settle
        self._cells: memoryview[int] = memoryview(array("Q"))
        self._at = 0

    def move(self, cells: "memoryview[int]", floats: "memoryview[float]", at: int) -> None:
        """Write from now on at cell `at` of a memory, seen as unsigned integers and as doubles."""
        self._cells = cells
        self._at = at

    def withdraw(self) -> None:
        """Forget the place; the next write settles anew."""
        self._cells = memoryview(array("Q"))

    def _settled(self) -> bool:
        return self._settle is not None and self._settle()


class Histogram(Bound):
    """Records durations. A row of cells with a single writing process; see the module for what the cells are."""

    __slots__ = ()

    def __init__(self, settle: Callable[[], bool] | None = None) -> None:
        super().__init__(settle)
        if settle is None:
            self._cells = memoryview(bytearray(BYTES)).cast("Q")

    def record(self, seconds: float) -> None:
        """Count one duration. A negative one counts as zero, NaN nowhere, and the sum takes at most a day of each."""
        # What needs a call comes first. From the look at the place to the store there is then no point at which
        # CPython would run another thread, which might move the series meanwhile or count in the same cell (see
        # `counters`).
        if LOWEST_S < seconds <= HIGHEST_S:
            bucket = UNDERFLOW + BUCKETS - int(_FROM_TOP - math.log(seconds) * _PER_E)
            nanoseconds = int(seconds * 1e9)
        elif seconds <= LOWEST_S:
            bucket = UNDERFLOW
            nanoseconds = int(seconds * 1e9) if seconds > 0.0 else 0
        elif seconds > HIGHEST_S:
            bucket = UNDERFLOW + BUCKETS + 1
            nanoseconds = int(min(seconds, DAY_S) * 1e9)
        else:
            return
        try:
            self._cells[self._at + bucket] += 1
            if seconds > 0.1:
                self._count_over(seconds)
            self._cells[self._at + SUM] += nanoseconds
        except IndexError:
            if self._settled():
                self.record(seconds)

    def _count_over(self, seconds: float) -> None:
        over = OVER
        for limit in LIMITS_S:
            if seconds > limit:
                self._cells[self._at + over] += 1
            over += 1

    def distribution(self) -> "Distribution":
        """What this process recorded so far."""
        return Distribution.read(self._cells, self._at)


class Distribution:
    """The content of a histogram as an immutable value.

    It is kept as one big integer with a cell in each 64 bits. Cells stay far below 2^63 (that is 292 years in
    nanoseconds), so no carry crosses from one into the next, and adding two distributions is adding two integers:
    under a microsecond, where a Python loop over the cells needs fifteen.
    """

    __slots__ = ("_cumulative", "_lanes")

    def __init__(self, lanes: int = 0) -> None:
        self._lanes = lanes
        self._cumulative: list[int] | None = None

    @staticmethod
    def read(cells: "memoryview[int]", at: int) -> "Distribution":
        """The histogram whose row of cells begins at `at`."""
        return Distribution(int.from_bytes(cells[at : at + CELLS], "little"))

    @staticmethod
    def total(parts: "Iterable[Distribution]") -> "Distribution":
        """All of them merged, exactly."""
        lanes = 0
        for part in parts:
            lanes += part._lanes
        return Distribution(lanes)

    @staticmethod
    def unpack(packed: bytes) -> "Distribution":
        """The inverse of `pack`."""
        return Distribution(int.from_bytes(zlib.decompress(packed), "little"))

    def pack(self) -> bytes:
        """A short form for keeping: most cells are zero, so 5 KB become some 300 bytes."""
        return zlib.compress(self._lanes.to_bytes((self._lanes.bit_length() + 7) // 8, "little"), 1)

    def write(self, cells: "memoryview[int]", at: int) -> None:
        """Store it as a row of cells that begins at `at`."""
        cells[at : at + CELLS] = memoryview(self._lanes.to_bytes(BYTES, "little")).cast("Q")

    def __add__(self, other: "Distribution") -> "Distribution":
        return Distribution(self._lanes + other._lanes)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Distribution) and self._lanes == other._lanes

    def __hash__(self) -> int:
        return hash(self._lanes)

    def __repr__(self) -> str:
        return f"Distribution(count={self.count}, sum_s={self.sum_s:.6f})"

    def since(self, earlier: "Distribution") -> "Distribution | None":
        """What was recorded after `earlier`; None when any cell went back, which means another history."""
        # With the top bit of each cell set first, a cell that is too small borrows that bit instead of its
        # neighbour's.
        borrowed = (self._lanes | _TOP_BITS) - earlier._lanes
        if borrowed & _TOP_BITS != _TOP_BITS:
            return None
        return Distribution(borrowed ^ _TOP_BITS)

    @property
    def count(self) -> int:
        """How many durations: the sum of the buckets, so that it agrees with them by construction."""
        return self._ranks()[-1]

    @property
    def sum_s(self) -> float:
        """All durations together, in seconds."""
        return (self._lanes & _LANE) / 1e9

    def over(self, limit_s: float) -> int:
        """How many were longer than `limit_s`, one of LIMITS_S; exact."""
        if limit_s not in LIMITS_S:
            raise CallerError(
                f"Only durations over {LIMITS_S} s are counted exactly, not over {limit_s}.",
                fix="Ask for one of those limits, or use `at_most` for any bucket's limit.",
            )
        return (self._lanes >> (64 * (OVER + LIMITS_S.index(limit_s)))) & _LANE

    def at_most(self, exponent: int) -> int:
        """How many lasted at most 2^exponent seconds, for -13 <= exponent <= 6: those are limits of buckets."""
        if not -13 <= exponent <= 6:
            raise CallerError(
                f"2^{exponent} s is no limit of a bucket: exponents run from -13 to 6.",
                fix="Ask for a power of two within the range.",
            )
        return self._ranks()[exponent * 32 - FIRST]

    def quantile(self, q: float) -> float | None:
        """The duration in seconds that a share `q` does not exceed (nearest rank), within 1.1 % of the true one.

        None below 10 / (1 - q) samples: an answer would be one sample's luck. Durations under 98 us are told as 98 us
        and those over 101 s as 101 s.
        """
        if not 0.0 <= q <= 1.0:
            raise CallerError(f"A quantile lies between 0 and 1, not at {q}.", fix="Write 0.99 for p99.")
        ranks = self._ranks()
        count = ranks[-1]
        # The slack forgives 1 - 0.9 being a little less than 0.1.
        if count == 0 or count * (1.0 - q) < SAMPLES_BEYOND - 1e-6:
            return None
        bucket = bisect_left(ranks, max(1, math.ceil(q * count - 1e-6)))
        if bucket == 0:
            return LOWEST_S
        if bucket > BUCKETS:
            return HIGHEST_S
        # The point whose relative distance to both ends of the bucket is the same.
        return math.exp2((bucket + FIRST) / SCALE) * 2.0 / (1.0 + math.exp2(1.0 / SCALE))

    def _ranks(self) -> list[int]:
        """For each bucket, underflow first, how many durations lie in it or below."""
        ranks = self._cumulative
        if ranks is None:
            cells = memoryview(self._lanes.to_bytes(BYTES, "little")).cast("Q")
            ranks = list(accumulate(cells[UNDERFLOW:]))
            self._cumulative = ranks
        return ranks
