"""How many workers to keep ready: as many as are likely to be asked for while new ones are made.

Intuition: a kitchen that lays out plates by how fast guests have been coming lately. The rate is an average over
exponentially fading time, so a burst raises it at once and is forgotten within a few `memory_s`.
"""

import math

# Arrivals scatter: two standard deviations of a Poisson count above its mean.
_SCATTER = 2.0


class Arrivals:
    """The fading rate of arrivals. Times are seconds of one monotonic clock."""

    __slots__ = ("_at", "_memory_s", "_weight")

    def __init__(self, *, memory_s: float = 10.0) -> None:
        self._memory_s = memory_s
        self._weight = 0.0
        self._at = 0.0

    def note(self, now: float) -> None:
        """One arrived."""
        self._weight = self._faded(now) + 1.0
        self._at = now

    def rate(self, now: float) -> float:
        """Arrivals a second."""
        return self._faded(now) / self._memory_s

    def wanted(self, now: float, *, horizon_s: float, least: int, most: int) -> int:
        """How many to have ready for the next `horizon_s`."""
        mean = self.rate(now) * horizon_s
        return max(least, min(most, math.ceil(mean + _SCATTER * math.sqrt(mean) - 0.5)))

    def _faded(self, now: float) -> float:
        return self._weight * math.exp(-max(0.0, now - self._at) / self._memory_s)
