"""One execution in a worker, as its host knows it."""

import asyncio
from collections.abc import Callable
from typing import Literal

from headrace.agents.execution import Outcome, Progress
from headrace.agents.isolation import frames

OnProgress = Callable[[Progress], None]
OnEvent = Callable[[bytes], None]
OnOutput = Callable[[frames.StreamName, str], None]


class ProcessOutcome(Outcome, frozen=True, kw_only=True):
    """How a run in a worker ended, and what it took."""

    cpu_ms: float = 0.0
    memory_bytes: int | None = None
    """Resident memory of the worker at the end of the run, shared by all that run in it; None when it died."""
    dropped_bytes: int = 0
    """What it printed beyond `Limits.printed_bytes`, and events that came too fast."""
    state_json: bytes | None = None
    """What its instance remembers from now on; None when it did not complete, or has no instance."""


class Stopped(asyncio.CancelledError):
    """A call was cancelled, and its work has stopped."""

    def __init__(self, outcome: ProcessOutcome) -> None:
        super().__init__()
        self.outcome = outcome
        """What it had taken until then."""


class Running:
    """An execution in a worker, as the host knows it."""

    __slots__ = (
        "deadline_s", "done", "due_at", "ended_by", "has_state", "number", "on_event", "on_output", "on_progress",
        "outcome", "printed_left", "timer",
    )  # fmt: skip

    def __init__(
        self,
        number: int,
        *,
        deadline_s: float,
        due_at: float,
        printed_left: int,
        has_state: bool,
        on_progress: OnProgress | None,
        on_event: OnEvent | None,
        on_output: OnOutput | None,
    ) -> None:
        self.number = number
        self.deadline_s = deadline_s
        self.due_at = due_at
        self.printed_left = printed_left
        self.on_progress = on_progress
        self.has_state = has_state
        self.on_event = on_event
        self.on_output = on_output
        self.ended_by: Literal["timeout", "cancelled"] | None = None
        self.done: asyncio.Future[ProcessOutcome] = asyncio.get_running_loop().create_future()
        self.outcome: ProcessOutcome | None = None
        self.timer: asyncio.TimerHandle | None = None

    def settle(self, outcome: ProcessOutcome) -> None:
        """It has stopped."""
        self.outcome = outcome
        if self.timer is not None:
            self.timer.cancel()
        if not self.done.done():
            self.done.set_result(outcome)

    @property
    def longer_than(self) -> str:
        """What is said of one whose time is over."""
        return f"It ran longer than {self.deadline_s:g} s"

    def is_late(self, now: float) -> bool:
        """Whether its time was over before it ended, so that what it returned is cut short.

        One that sees for itself that it should stop may be heard before the timer here is.
        """
        return self.ended_by == "timeout" or (self.ended_by is None and now >= self.due_at)

    def last_outcome(self, culprit: int | None, reason: str) -> ProcessOutcome:
        """How it ended when its worker did, which the execution `culprit` made end."""
        if self.ended_by == "timeout":
            return ProcessOutcome("timeout", error=f"{self.longer_than}; its worker was killed.")
        if self.ended_by == "cancelled":
            return ProcessOutcome("cancelled", error="It did not stop when it was told to; its worker was killed.")
        if self.number == culprit:
            return ProcessOutcome("failed", error=f"Its worker ended: {reason}")
        return ProcessOutcome("interrupted", error=f"Its worker ended before it did: {reason}")
