"""One run of an agent under its deadline.

A run is a record, a task and an entry in the wheel of deadlines. It is itself the coroutine of its task: each step of
the loop goes through it straight into the agent, timed, and when the agent has ended, into what puts the result on
record. So between the loop and a waiting agent there is no frame of ours.

At its deadline the agent is cancelled; one that has not stopped a grace later is left behind: its execution is
concluded without it, and whatever it still returns is nobody's. An agent that runs in a thread cannot be cancelled and
is left behind at once.
"""

import asyncio
from collections.abc import Awaitable, Callable, Coroutine, Generator
from dataclasses import dataclass
from time import thread_time
from typing import Any

from headrace.agents.config import AgentsConfig
from headrace.agents.execution import Context, Execution, Outcome, Room, encoded, failure
from headrace.agents.running.deadlines import Deadlines, Due
from headrace.agents.running.turnstile import Turnstile
from headrace.agents.shelf import Loaded
from headrace.agents.store import Canary, Key, Submission
from headrace.agents.threads import DaemonThreads
from headrace.clock import Clock
from headrace.errors import BugError

INTERRUPTED = Outcome("interrupted", error="Its process was stopped before it ended; it may have run in part.")
CANCELLED = Outcome("cancelled", error="It was cancelled; it may have run in part.")
_CANCELLED_ITSELF = Outcome("cancelled", error="It cancelled itself.")

_RUNS, _CONCLUDES, _LEFT_BEHIND = range(3)
"""Phases of a run: its agent has not ended; it has, and the result is put on record; that is done without its end."""


class _Overdue(Outcome, frozen=True, kw_only=True):
    """The agent was asked to stop at its deadline."""

    seconds: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Surroundings:
    """What all runs of a process share."""

    config: AgentsConfig
    clock: Clock
    threads: DaemonThreads
    deadlines: Deadlines
    turnstile: Turnstile
    room: Room | None
    """What agents speak to."""
    conclude: "Callable[[Run, Outcome], Awaitable[None]]"
    """Puts a result on record."""
    spawn: Callable[[Coroutine[Any, Any, None]], object]
    """Has a task of its own for work that must not be lost."""
    ended: "Callable[[Run], None]"
    """Called once, when it is there or could not be put there."""


class Run(Coroutine[Any, Any, None]):
    """An execution under way: `start` it once, await its `end`."""

    __slots__ = (
        "_coroutine",
        "_deadline_s",
        "_ended_by",
        "_error",
        "_input",
        "_phase",
        "_surroundings",
        "_waiters",
        "due_at",
        "earlier",
        "execution",
        "is_finished",
        "later",
        "loaded",
        "reported",
        "submission",
        "task",
        "trial",
    )

    def __init__(
        self,
        loaded: Loaded,
        execution: Execution,
        value: Any,
        *,
        deadline_s: float,
        surroundings: Surroundings,
        submission: Submission | None = None,
        trial: Canary | None = None,
    ) -> None:
        self.execution = execution
        self.loaded = loaded
        self.submission = submission
        """Its record, if it has one before it ends."""
        self.trial = trial
        """The trial that its end counts for."""
        self.reported: object = None
        """The progress that is on record."""
        self.task: asyncio.Task[None] | None = None
        """The agent itself, until it has stopped; outlives the run only if it was left behind."""
        self.is_finished = False
        """Whether the result is on record, or could not be put there."""
        self._surroundings = surroundings
        self._input = value
        self._coroutine: Coroutine[Any, Any, Any] | None = None
        self._phase = _RUNS
        self._ended_by: Outcome | None = None
        self._error: BaseException | None = None
        # Most have one, or none when they were submitted; a list is made for the second.
        self._waiters: asyncio.Future[Execution] | list[asyncio.Future[Execution]] | None = None
        self._deadline_s = deadline_s
        self.due_at = surroundings.clock.monotonic() + deadline_s
        self.earlier: Due | None = None
        self.later: Due | None = None

    @property
    def key(self) -> Key:
        """What its execution is known by."""
        return self.execution.tenant, self.execution.id

    @property
    def is_left_behind(self) -> bool:
        """Whether its agent goes on although it is over."""
        return self._phase == _LEFT_BEHIND and self.task is not None

    @property
    def is_async(self) -> bool:
        """Whether its agent runs in the loop, not in a thread."""
        return self.loaded.definition.is_async

    def start(self) -> None:
        """Begin."""
        # A name that all runs of the agent share; one of the loop's own making would be another string for each.
        self.task = asyncio.get_running_loop().create_task(self, name=self.loaded.definition.agent_id)
        self._surroundings.deadlines.add(self)

    def waiter(self) -> "asyncio.Future[Execution]":
        """A future of the finished execution that is the caller's own: whoever cancels it stops no one but itself."""
        waiter = asyncio.get_running_loop().create_future()
        if self.is_finished:
            self._tell(waiter)
        elif self._waiters is None:
            self._waiters = waiter
        elif isinstance(self._waiters, list):
            self._waiters.append(waiter)
        else:
            self._waiters = [self._waiters, waiter]
        return waiter

    async def end(self) -> Execution:
        """Wait for the finished execution. Whoever leaves meanwhile does not end it."""
        waiter = self.waiter()
        try:
            return await waiter
        except asyncio.CancelledError:
            self._forget(waiter)
            raise

    async def wait(self, *, within_s: float) -> None:
        """Return when it is finished or the time is over."""
        waiter = self.waiter()
        try:
            await asyncio.wait((waiter,), timeout=within_s)
        finally:
            self._forget(waiter)

    def _forget(self, waiter: "asyncio.Future[Execution]") -> None:
        # A cancelled future holds the frames of who waited, for as long as somebody holds it.
        if self._waiters is waiter:
            self._waiters = None
        elif isinstance(self._waiters, list) and waiter in self._waiters:
            self._waiters.remove(waiter)

    @property
    def _can_be_stopped(self) -> bool:
        """Whether a cancellation reaches the agent: not one that has begun in a thread."""
        return self.is_async or self._coroutine is None

    def interrupt(self) -> None:
        """Ask the agent to stop because its process does; `abandon` when it has not after a while."""
        if self._phase == _RUNS and self._can_be_stopped:
            self._ended_by = self._ended_by or INTERRUPTED
            self._cancel_task()

    def cancel(self) -> None:
        """Ask the agent to stop because somebody wants it to; it is `cancelling` until it has.

        One in a thread is not interrupted: it ends when its function returns, or is left behind at its deadline.
        """
        if self._phase != _RUNS or self._ended_by is not None:
            return  # asked already: a second cancellation would cut the agent's own clean-up short
        self._ended_by = CANCELLED
        self.execution.status = "cancelling"
        if self._can_be_stopped:
            self._cancel_task()

    def abandon(self) -> None:
        """Conclude the execution without waiting for its agent."""
        if self._phase == _RUNS:
            self._phase = _LEFT_BEHIND
            # Cancelled is what has stopped.
            ended_by = INTERRUPTED if self._ended_by is None or self._ended_by is CANCELLED else self._ended_by
            self._surroundings.spawn(self._settle(ended_by))

    def overdue(self) -> None:
        """The deadline has passed, or the grace after it."""
        if self._phase != _RUNS:
            return
        seconds = f"It ran longer than {self._deadline_s:g} s"
        if not self._can_be_stopped:
            self._leave_behind(seconds)
        elif isinstance(self._ended_by, _Overdue):
            self._leave_behind(self._ended_by.seconds)
        else:
            self._ended_by = _Overdue("timeout", error=f"{seconds} and was stopped.", seconds=seconds)
            self._cancel_task()
            # The two grow together: their difference stays the time at which it was accepted.
            accepted_at = self.due_at - self._deadline_s
            self.due_at = self._surroundings.clock.monotonic() + self._surroundings.config.cancel_grace_s
            self._deadline_s = self.due_at - accepted_at
            self._surroundings.deadlines.add(self)

    def _leave_behind(self, seconds: str) -> None:
        self._ended_by = Outcome("timeout", error=f"{seconds} and has not stopped yet.")
        self.abandon()

    def _for_ms(self) -> float:
        """Since it was accepted. That time is not kept: 50,000 times, it would be a megabyte and a half."""
        return (self._surroundings.clock.monotonic() - self.due_at + self._deadline_s) * 1000

    def _cancel_task(self) -> None:
        if self.task is not None:
            self.task.cancel()

    # -- the coroutine of its task ---------------------------------------------------------------------------------

    def send(self, value: Any) -> Any:
        """Take the next step."""
        return self._step(None, value)

    def throw(self, error: Any, *_: Any) -> Any:
        """Take the next step with an error, which cancellation is."""
        return self._step(error, None)

    def close(self) -> None:
        """End it where it is."""
        if self._coroutine is not None:
            self._coroutine.close()

    def __await__(self) -> Generator[Any, Any, None]:
        """Nobody awaits a run: its task drives it."""
        raise BugError("A run was awaited; await its `end`.")

    # What anyio asks before it cancels a task, and debuggers to print its stack: the agent's answers.

    @property
    def cr_running(self) -> bool:
        """Whether it takes a step now."""
        return bool(getattr(self._coroutine, "cr_running", False))

    @property
    def cr_suspended(self) -> bool:
        """Whether it waits between two steps."""
        return bool(getattr(self._coroutine, "cr_suspended", False))

    @property
    def cr_frame(self) -> Any:
        """Where it is; None before its first step and after its last."""
        return getattr(self._coroutine, "cr_frame", None)

    @property
    def cr_await(self) -> Any:
        """What it waits for."""
        return getattr(self._coroutine, "cr_await", None)

    @property
    def cr_code(self) -> Any:
        """Its code."""
        return getattr(self._coroutine, "cr_code", None)

    def _step(self, error: BaseException | None, value: Any) -> Any:
        if self._phase == _CONCLUDES:
            return self._conclude(error, value)
        started = thread_time()
        try:
            coroutine = self._coroutine or self._begin(error)
            return coroutine.send(value) if error is None else coroutine.throw(error)
        except StopIteration as stop:
            outcome = self._encoded(stop.value) if self.is_async and self.loaded.isolated is None else stop.value
        except (KeyboardInterrupt, GeneratorExit):
            raise
        except asyncio.CancelledError:
            outcome = _CANCELLED_ITSELF
        except BaseException as raised:  # noqa: BLE001 - foreign code: whatever it raises, sys.exit too, is its result
            outcome = failure(raised)
        finally:
            if self.is_async:
                self.execution.cpu_ms += (thread_time() - started) * 1000
        if self._phase == _LEFT_BEHIND:
            # It was left behind and has stopped after all; what it returned is nobody's.
            self._coroutine = self.task = None
            raise StopIteration
        self._phase = _CONCLUDES
        self._coroutine = self._settle(self._ended_by or self._in_time(outcome))
        return self._conclude(None, None)

    def _in_time(self, outcome: Outcome) -> Outcome:
        """What it is worth: one that saw that its time was over, before the wheel's tick did, returns a part."""
        if outcome.status == "timeout" or self._surroundings.clock.monotonic() < self.due_at:
            return outcome
        return Outcome("timeout", error=f"It ran longer than {self._deadline_s:g} s.")

    def _conclude(self, error: BaseException | None, value: Any) -> Any:
        assert self._coroutine is not None, "what concludes has something to conclude with"
        try:
            return self._coroutine.send(value) if error is None else self._coroutine.throw(error)
        except BaseException:
            # The run and its task hold each other: whoever ends lets go, so that nothing waits for the collector.
            self._coroutine = self.task = None
            raise

    def _begin(self, error: BaseException | None) -> Coroutine[Any, Any, Any]:
        if error is not None:
            # It was stopped before its first step: nothing of the agent has run, and nothing is to.
            if not self.is_async:
                self._surroundings.threads.release()
            raise error
        self._begun()
        if self.is_async:
            value, self._input = self._input, None
            if self.loaded.isolated is not None:
                self._coroutine = self.loaded.isolated.execute(
                    self.execution,
                    value,
                    deadline_s=self._deadline_s,
                    due_at=self.due_at,
                    room=self._surroundings.room,
                )
                return self._coroutine
            context = Context(self.execution, self._surroundings.clock, self.due_at, self._surroundings.room)
            try:
                self._coroutine = self.loaded.definition.make()(value, context)
            except StopIteration as error:
                # Let through, it would look like the end of a coroutine that returned.
                raise RuntimeError(f"StopIteration: {error}") from error
        else:
            self._coroutine = self._in_thread()
        return self._coroutine

    def _begun(self) -> None:
        self.execution.queue_ms = self._for_ms()

    async def _in_thread(self) -> Outcome:
        outcome: Outcome = await self._surroundings.threads.run(self._call)
        return outcome

    def _call(self) -> Outcome:
        self._begun()
        context = Context(self.execution, self._surroundings.clock, self.due_at, self._surroundings.room)
        started = thread_time()
        try:
            output = self.loaded.definition.make()(self._input, context)
        except BaseException as error:  # noqa: BLE001 - foreign code: whatever it raises, sys.exit too, is its result
            return failure(error)
        finally:
            self.execution.cpu_ms = (thread_time() - started) * 1000
        return self._encoded(output)

    def _encoded(self, output: Any) -> Outcome:
        return encoded(output, bytes_max=self._surroundings.config.output_bytes_max)

    # -- the end ---------------------------------------------------------------------------------------------------

    async def _settle(self, outcome: Outcome) -> None:
        self._surroundings.deadlines.remove(self)
        self.execution.run_ms = self._for_ms() - self.execution.queue_ms
        await self._surroundings.turnstile.go_through()
        try:
            await self._surroundings.conclude(self, outcome)
        except BaseException as error:  # handed on to whoever waits for the result
            self._error = error
            if not isinstance(error, Exception):
                raise
        finally:
            self._finish()

    def _finish(self) -> None:
        self.is_finished = True
        self._surroundings.ended(self)
        waiters, self._waiters = self._waiters, None
        if isinstance(waiters, list):
            for waiter in waiters:
                self._tell(waiter)
        elif waiters is not None:
            self._tell(waiters)

    def _tell(self, waiter: "asyncio.Future[Execution]") -> None:
        if waiter.done():
            return
        if self._error is None:
            waiter.set_result(self.execution)
        else:
            waiter.set_exception(self._error)
            waiter.exception()  # an observer was told: who waits for the end alone need not look at it
