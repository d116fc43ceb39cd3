"""CPython's cyclic collector in a process that holds much for long: seldom, over little, and timed.

Reference counts free nearly everything; the collector only looks for cycles. Its full pass stops the process for as
long as it takes to visit every container that is alive: some 50 ms for 50,000 waiting executions. So what start-up
made is frozen, which means never visited again. A pass over the young comes at every 2,000 new containers instead of
700, one over those that survived it is over 10,000, and a full one waits for 2.5 million more and until what is new is
a quarter of what is old, as CPython has it. So cycles that live long are freed later than without this.

It is frozen once. To freeze again after each deployment would also freeze whatever happens to be alive, executions
under way included, and cycles among that would never be found; a full pass before it would stop everything just when
a version is switched.
"""

import gc
from typing import Literal

from headrace.clock import Clock

_THRESHOLDS = (2_000, 5, 250)


class Garbage:
    """The collector of this process; `settle` it when the process has started, `leave` it at the end."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._before = gc.get_threshold()
        self._started_at = 0.0
        self.pauses = 0
        """Passes since `settle`, of all generations."""
        self.paused_s = 0.0
        self.longest_s = 0.0

    def settle(self) -> None:
        """Collect what start-up left, freeze what it made, and begin to measure."""
        gc.collect()
        gc.freeze()
        self._before = gc.get_threshold()
        gc.set_threshold(*_THRESHOLDS)
        gc.callbacks.append(self._on_pass)

    def leave(self) -> None:
        """Put everything back."""
        if self._on_pass in gc.callbacks:
            gc.callbacks.remove(self._on_pass)
            gc.set_threshold(*self._before)
            gc.unfreeze()

    def measured(self) -> dict[str, float]:
        """For the monitor."""
        return {
            "gc_pauses_total": self.pauses,
            "gc_pause_seconds_total": self.paused_s,
            "gc_pause_longest_seconds": self.longest_s,
        }

    def _on_pass(self, phase: Literal["start", "stop"], _: dict[str, int]) -> None:
        now = self._clock.monotonic()
        if phase == "start":
            self._started_at = now
            return
        self.pauses += 1
        self.paused_s += now - self._started_at
        self.longest_s = max(self.longest_s, now - self._started_at)
