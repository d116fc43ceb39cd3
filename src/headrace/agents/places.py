"""Room in one process: how many executions fit, and who goes first when it gets narrow."""

from headrace.agents.config import AgentsConfig
from headrace.agents.execution import Priority
from headrace.agents.threads import DaemonThreads
from headrace.errors import Overloaded

# Under pressure the less urgent go first: shares of `executions_max` that a priority may fill.
_SHARE: dict[Priority, float] = {"low": 0.80, "normal": 0.95, "high": 1.0}


class Places:
    """Counts executions under way, and the threads of the synchronous ones."""

    def __init__(self, config: AgentsConfig, threads: DaemonThreads) -> None:
        self._config = config
        self._threads = threads
        self.running = 0
        """Places taken."""

    def take(self, priority: Priority, *, threaded: bool) -> None:
        """Take a place, or raise `Overloaded`."""
        if self.running >= self._config.executions_max * _SHARE[priority]:
            raise Overloaded(f"{self.running:,} executions run in this process; no more of priority {priority!r} fit.")
        if threaded and not self._threads.reserve():
            raise Overloaded(f"All {self._config.threads_max} threads for synchronous agents are busy.")
        self.running += 1

    def free(self, *, threaded: bool) -> int:
        """How many queued executions would fit."""
        free = int(self._config.executions_max * _SHARE["normal"]) - self.running
        return max(0, min(free, self._threads.free) if threaded else free)

    def leave(self, *, threaded: bool) -> None:
        """Give back a place that was taken and not used."""
        self.running -= 1
        if threaded:
            self._threads.release()

    def ended(self) -> None:
        """An execution ended; its thread, if it has one, is free when its function returns."""
        self.running -= 1
