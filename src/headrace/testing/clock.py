"""A clock that stands still until it is told to move."""

import asyncio
import heapq
from itertools import count


class FakeClock:
    """A `headrace.clock.Clock` for tests: an hour passes in a microsecond, and never by itself.

    ```python
    clock = FakeClock()
    cache = MemoryCache(ttl=60, clock=clock)
    clock.advance(61)          # everything in the cache has expired
    await clock.run_for(61)    # the same, and tasks that sleep on the clock run in the order of their alarms
    ```
    """

    def __init__(self, *, monotonic: float = 1_000.0, wall: float = 1_700_000_000.0) -> None:
        self._monotonic = monotonic
        self._wall = wall
        self._sleepers: list[tuple[float, int, asyncio.Future[None]]] = []
        self._turns = count()

    def monotonic(self) -> float:
        """The monotonic time, in seconds."""
        return self._monotonic

    def wall(self) -> float:
        """The wall time, in seconds since 1970-01-01 UTC."""
        return self._wall

    async def sleep(self, seconds: float) -> None:
        """Return once the clock was moved by `seconds`."""
        if seconds <= 0:
            await asyncio.sleep(0)
            return
        alarm: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        heapq.heappush(self._sleepers, (self._monotonic + seconds, next(self._turns), alarm))
        await alarm

    @property
    def sleepers(self) -> int:
        """How many calls to `sleep` wait."""
        return sum(not alarm.done() for _, _, alarm in self._sleepers)

    def advance(self, seconds: float) -> None:
        """Move both times forward and wake whoever's alarm has come; they run when the loop turns."""
        if seconds < 0:
            raise ValueError(
                f"advance({seconds}): monotonic time never goes back; set_wall moves the wall clock alone."
            )
        self._monotonic += seconds
        self._wall += seconds
        while self._sleepers and self._sleepers[0][0] <= self._monotonic:
            _, _, alarm = heapq.heappop(self._sleepers)
            if not alarm.done():
                alarm.set_result(None)

    async def run_for(self, seconds: float) -> None:
        """Move forward from alarm to alarm, letting the woken tasks run at the time of their own alarm."""
        end = self._monotonic + seconds
        await _settle()
        while self._sleepers and self._sleepers[0][0] <= end:
            self.advance(max(0.0, self._sleepers[0][0] - self._monotonic))
            await _settle()
        self.advance(end - self._monotonic)
        await _settle()

    def set_wall(self, wall: float) -> None:
        """Let the wall clock jump, as NTP or an administrator does; monotonic time stays."""
        self._wall = wall


async def _settle() -> None:
    """Give every task that is ready, and those that they wake, a turn."""
    for _ in range(20):
        await asyncio.sleep(0)
