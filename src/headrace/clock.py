"""Time comes in by the door: everything that needs it takes a `Clock`.

Deadlines, TTLs and rates inside a process use `monotonic`, which no NTP step can move. Only what leaves the process
(an envelope in Redis, an HTTP date, a row, a log line) uses `wall`.
"""

import asyncio
import time
from typing import Protocol


class Clock(Protocol):
    """The three things a component may ask of time."""

    def monotonic(self) -> float:
        """Seconds from an arbitrary origin; never goes back, meaningful inside this process only."""

    def wall(self) -> float:
        """Seconds since 1970-01-01 UTC; may jump either way."""

    async def sleep(self, seconds: float) -> None:
        """Return after at least `seconds` of this clock's monotonic time."""


class SystemClock:
    """The machine's own clock."""

    __slots__ = ()

    # The methods are the C functions themselves: a Python frame around them would double the cost of a cache hit.
    monotonic = staticmethod(time.monotonic)  # noqa: TID251 - the one place where time enters
    wall = staticmethod(time.time)  # noqa: TID251 - the one place where time enters

    async def sleep(self, seconds: float) -> None:
        """Return after at least `seconds`."""
        await asyncio.sleep(seconds)
