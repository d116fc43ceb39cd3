"""The highest rate that holds, in few probes. Pure: the prober reports, the search proposes."""

from dataclasses import dataclass

RATE_MIN = 50.0
"""Not worth going below."""


@dataclass(slots=True, kw_only=True)
class RateSearch:
    """Doubles while the rate holds (halves while it does not), then bisects between what held and what did not.

    A rate is not held sharply: near the limit the same rate holds once and fails once. So the answer is as good as
    `precision` and no better, and the rounds around it give the spread.
    """

    rate_first: float = 2_000.0
    """Where to begin."""
    rate_max: float = 64_000.0
    """More than one generator can offer."""
    precision: float = 1.06
    """Stop when the lowest rate that failed is at most this factor above the highest that held."""
    probes_max: int = 12
    """Stop after so many probes in any case."""
    held: float = 0.0
    """Highest rate that held; 0 when none did."""
    failed: float = float("inf")
    """Lowest rate that did not."""
    _probes: int = 0

    def proposal(self) -> float | None:
        """The rate to probe next; None when the search is over."""
        if self._probes >= self.probes_max:
            return None
        if self._probes == 0:
            return self.rate_first
        if self.failed == float("inf"):
            return min(self.held * 2, self.rate_max) if self.held < self.rate_max else None
        if self.held == 0.0:
            return max(self.failed / 2, RATE_MIN) if self.failed > RATE_MIN else None
        return (self.held * self.failed) ** 0.5 if self.failed / self.held > self.precision else None

    def report(self, rate: float, *, held: bool) -> None:
        """Tell what came of probing `rate`."""
        self._probes += 1
        if held:
            self.held = max(self.held, rate)
        else:
            self.failed = min(self.failed, rate)
