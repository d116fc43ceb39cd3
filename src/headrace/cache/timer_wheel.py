"""Expiry without a thread, a heap or a sweep: a hierarchical timer wheel.

Intuition: the hands of a clock. What is due within a minute waits on a wheel of seconds, the rest on coarser wheels;
when a coarse wheel moves on, its bucket is dealt out to the finer ones. Scheduling and cancelling are O(1); each
deadline is touched at most once per wheel. Source: G. Varghese and T. Lauck, Hashed and Hierarchical Timing Wheels,
SOSP 1987; the five wheels follow Caffeine's.
"""

from typing import TYPE_CHECKING, Final

from headrace.cache.policies.node import NOWHERE, Node
from headrace.errors import BugError

if TYPE_CHECKING:
    from mypy_extensions import i64

FOREVER: Final = 1e300
"""The deadline of what never expires."""

SHIFTS: Final = (0, 6, 12, 17, 19)
"""Width of a bucket in each wheel, as a power of two of seconds: 1 s, 64 s, 1.1 h, 1.5 d, 6.1 d."""
BUCKETS: Final = (64, 64, 32, 4, 1)
"""The last wheel holds everything further away, again and again, until its time has come."""


class Timer(Node):
    """A node with a deadline."""

    __slots__ = ("earlier", "later")

    def __init__(self, key_hash: "i64", weight: "i64", deadline: float) -> None:
        super().__init__(key_hash, weight)
        self.deadline = deadline
        """Monotonic seconds from which on it must not be seen."""
        self.earlier: Timer = IDLE
        self.later: Timer = IDLE


class Bucket(Timer):
    """The ends of a row of timers."""

    __slots__ = ()

    def __init__(self) -> None:
        self.newer = NOWHERE
        self.older = NOWHERE
        self.earlier = self
        self.later = self


IDLE: Final = Bucket()
"""The neighbour of a timer that does not wait: no link keeps it alive."""


class TimerWheel:
    """Timers by deadline. `advance` moves time, `due` hands out what may have expired, both in bounded steps.

    A timer comes out less than a second after its deadline, as long as `due` is asked; whoever reads an entry
    compares the deadline itself.
    """

    __slots__ = ("_due", "_wheels", "second")

    def __init__(self, now: float) -> None:
        self.second: i64 = int(now)
        """The second that time stands at."""
        self._wheels = [[Bucket() for _ in range(buckets)] for buckets in BUCKETS]
        self._due = Bucket()

    def schedule(self, timer: Timer) -> None:
        """Wait for the deadline of a timer that is not waiting. FOREVER is never waited for."""
        if timer.deadline == FOREVER:
            return
        tick: i64 = int(timer.deadline)
        ahead = tick - self.second
        if ahead < 64:
            # What is late already goes where the next step looks.
            head = self._wheels[0][(tick if ahead >= 0 else self.second) & 63]
        elif ahead < 4096:
            head = self._wheels[1][(tick >> 6) & 63]
        elif ahead < 131072:
            head = self._wheels[2][(tick >> 12) & 31]
        elif ahead < 524288:
            head = self._wheels[3][(tick >> 17) & 3]
        else:
            head = self._wheels[4][0]
        last = head.earlier
        timer.later = head
        timer.earlier = last
        last.later = timer
        head.earlier = timer

    def cancel(self, timer: Timer) -> None:
        """Stop waiting, if it was."""
        earlier = timer.earlier
        later = timer.later
        earlier.later = later
        later.earlier = earlier
        timer.earlier = IDLE
        timer.later = IDLE

    def advance(self, now: float) -> bool:
        """Move to `now`; whether something is due.

        Looks at 165 buckets at most, however long it was, and at no timer.
        """
        second: i64 = int(now)
        before = self.second
        if second > before:
            self.second = second
            self._collect(before, second)
        return self._due.later is not self._due

    def due(self) -> Timer | None:
        """The next timer whose bucket has passed, no longer waiting. It may have to be scheduled again."""
        timer = self._due.later
        if timer is self._due:
            return None
        self.cancel(timer)
        return timer

    def _collect(self, before: "i64", second: "i64") -> None:
        # A bucket of the finest wheel is due when its second is over, a coarser one is dealt out when its time begins.
        entered: i64 = 0
        for level, wheel in enumerate(self._wheels):
            shift: i64 = SHIFTS[level]
            steps = (second >> shift) - (before >> shift)
            if steps == 0:
                return
            first = (before >> shift) + entered
            for tick in range(first, first + min(steps, len(wheel))):
                self._splice(wheel[tick & (len(wheel) - 1)])
            entered = 1

    def _splice(self, bucket: Timer) -> None:
        first = bucket.later
        if first is bucket:
            return
        last = bucket.earlier
        bucket.later = bucket
        bucket.earlier = bucket
        tail = self._due.earlier
        tail.later = first
        first.earlier = tail
        last.later = self._due
        self._due.earlier = last

    def validate(self, waiting: set[int]) -> None:
        """Raise BugError unless exactly the timers of these ids wait, but for some that need not any more."""
        found = set()
        for wheel in [*self._wheels, [self._due]]:
            for bucket in wheel:
                timer = bucket.later
                while timer is not bucket:
                    if timer.later.earlier is not timer or id(timer) in found:
                        raise BugError("a timer is linked wrongly.")
                    found.add(id(timer))
                    if id(timer) not in waiting and timer.deadline != FOREVER:
                        raise BugError("a timer of a removed entry still waits.")
                    timer = timer.later
        if waiting - found:
            raise BugError(f"{len(waiting - found)} entries with a deadline are not waited for.")
