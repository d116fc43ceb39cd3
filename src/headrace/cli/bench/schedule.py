"""When requests are due. Pure: `now` comes in, counts and times go out."""

from dataclasses import dataclass
from math import floor, inf


@dataclass(frozen=True, slots=True, kw_only=True)
class Schedule:
    """Requests 0, 1, 2 ... `count - 1` are due at `start + i / rate_per_s`, whatever the server does.

    That is the whole of open-loop load: the users of a stalled server do not stop coming, so a request that could not
    be sent in time has been waiting since it was due (to leave that out is called *coordinated omission*).
    """

    start: float
    """Monotonic seconds at which request 0 is due."""
    rate_per_s: float
    """Requests a second."""
    count: int
    """Number of requests in all."""

    def due(self, now: float) -> int:
        """How many requests are due at `now`: those below this index."""
        # A thousandth of an interval forgives rounding, so that `due(intended(i))` always includes i.
        passed = (now - self.start) * self.rate_per_s + 1e-3
        return 0 if passed < 0 else min(self.count, floor(passed) + 1)

    def intended(self, index: int) -> float:
        """Monotonic seconds at which request `index` is due; infinite past the last one."""
        return self.start + index / self.rate_per_s if index < self.count else inf

    @property
    def end(self) -> float:
        """Monotonic seconds at which the last interval is over."""
        return self.start + self.count / self.rate_per_s
