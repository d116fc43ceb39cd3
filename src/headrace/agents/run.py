"""One run of an agent under its deadline.

A run is one task, one timer and one future. The timer cancels the agent at its deadline; an agent that has not stopped
a grace later is left behind: its execution is concluded without it, and whatever it still returns is nobody's. An
agent that runs in a thread cannot be cancelled and is left behind at once.
"""

import asyncio
from collections.abc import Awaitable, Callable
from time import thread_time
from typing import Any

from headrace.agents.config import AgentsConfig
from headrace.agents.definition import Definition
from headrace.agents.execution import Context, Execution, Metered, Outcome, encoded, failure
from headrace.agents.threads import DaemonThreads
from headrace.clock import Clock

Conclude = Callable[[Execution, Outcome], Awaitable[None]]

INTERRUPTED = Outcome("interrupted", error="Its process was stopped before it ended; it may have run in part.")


class Run:
    """An execution under way: `start` it once, await `finished` behind a shield."""

    __slots__ = (
        "_accepted_at",
        "_clock",
        "_conclude",
        "_config",
        "_context",
        "_deadline_s",
        "_definition",
        "_ended_by",
        "_input",
        "_is_concluding",
        "_last_words",
        "_threads",
        "_timer",
        "execution",
        "finished",
        "task",
    )

    def __init__(
        self,
        definition: Definition,
        execution: Execution,
        value: Any,
        *,
        deadline_s: float,
        config: AgentsConfig,
        threads: DaemonThreads,
        clock: Clock,
        conclude: Conclude,
    ) -> None:
        self.execution = execution
        self._definition = definition
        self._input = value
        self._deadline_s = deadline_s
        self._config = config
        self._threads = threads
        self._clock = clock
        self._conclude = conclude
        self._accepted_at = clock.monotonic()
        self._context = Context(execution, clock, self._accepted_at + deadline_s)
        self._is_concluding = False
        self._ended_by: Outcome | None = None
        self._last_words: asyncio.Task[None] | None = None
        self._timer: asyncio.TimerHandle | None = None
        self.finished: asyncio.Future[Execution]
        """Done when the execution is on record, or could not be put there."""
        self.task: asyncio.Task[None]
        """The agent itself; outlives `finished` only if it was left behind."""

    def start(self) -> None:
        """Begin."""
        loop = asyncio.get_running_loop()
        self.finished = loop.create_future()
        self.task = loop.create_task(self._work())
        self._timer = loop.call_later(self._deadline_s, self._overdue)

    def interrupt(self) -> None:
        """Ask the agent to stop because its process does; `abandon` when it has not after a while."""
        if not self._is_concluding:
            self._ended_by = INTERRUPTED
            self.task.cancel()

    def abandon(self) -> None:
        """Conclude the execution without waiting for its agent."""
        if not self._is_concluding:
            outcome = self._ended_by or INTERRUPTED
            self._is_concluding = True
            self._last_words = asyncio.get_running_loop().create_task(self._settle(outcome))

    async def _work(self) -> None:
        try:
            outcome = await (self._in_loop() if self._definition.is_async else self._in_thread())
        except asyncio.CancelledError:
            outcome = Outcome("cancelled", error="It cancelled itself.")
        if self._is_concluding:
            return
        self._is_concluding = True
        await self._settle(self._ended_by or outcome)

    async def _settle(self, outcome: Outcome) -> None:
        if self._timer is not None:
            self._timer.cancel()
        self.execution.run_ms = (self._clock.monotonic() - self._accepted_at) * 1000 - self.execution.queue_ms
        try:
            await self._conclude(self.execution, outcome)
        except BaseException as error:  # handed on to whoever waits for the result
            if not self.finished.done():
                self.finished.set_exception(error)
                # Asked for once here: an execution that nobody waits for has told the observer.
                self.finished.exception()
            if not isinstance(error, Exception):
                raise
        else:
            if not self.finished.done():
                self.finished.set_result(self.execution)

    def _overdue(self) -> None:
        seconds = f"It ran longer than {self._deadline_s:g} s"
        if self._definition.is_async:
            self._ended_by = Outcome("timeout", error=f"{seconds} and was stopped.")
            self.task.cancel()
            loop = asyncio.get_running_loop()
            self._timer = loop.call_later(self._config.cancel_grace_s, self._leave_behind, seconds)
        else:
            self._leave_behind(seconds)

    def _leave_behind(self, seconds: str) -> None:
        self._ended_by = Outcome("timeout", error=f"{seconds} and has not stopped yet.")
        self.abandon()

    def _begun(self) -> None:
        self.execution.queue_ms = (self._clock.monotonic() - self._accepted_at) * 1000

    async def _in_loop(self) -> Outcome:
        self._begun()
        metered: Metered | None = None
        try:
            metered = Metered(self._definition.make()(self._input, self._context))
            output = await metered
        except (asyncio.CancelledError, KeyboardInterrupt, GeneratorExit):
            raise
        except BaseException as error:  # noqa: BLE001 - foreign code: whatever it raises, sys.exit too, is its result
            return failure(error)
        finally:
            if metered is not None:
                self.execution.cpu_ms = metered.cpu_s * 1000
        return encoded(output, bytes_max=self._config.output_bytes_max)

    async def _in_thread(self) -> Outcome:
        outcome: Outcome = await self._threads.run(self._call)
        return outcome

    def _call(self) -> Outcome:
        self._begun()
        started = thread_time()
        try:
            output = self._definition.make()(self._input, self._context)
        except BaseException as error:  # noqa: BLE001 - foreign code: whatever it raises, sys.exit too, is its result
            return failure(error)
        finally:
            self.execution.cpu_ms = (thread_time() - started) * 1000
        return encoded(output, bytes_max=self._config.output_bytes_max)
