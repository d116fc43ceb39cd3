"""Executions under way in this process: begun, watched, and brought to an end that is on record.

Some have a row before they end, because they were submitted, or their id is an idempotency key, or they may be tried
again: those have a `Submission`, with the owner and the attempt that every write of theirs names. The others exist
nowhere else until they have ended, and cost one write.
"""

import asyncio
import random
from collections.abc import Callable, Coroutine, Sequence
from typing import Any

import msgspec

from headrace.agents.admission import Admission
from headrace.agents.config import AgentsConfig
from headrace.agents.execution import Execution, Outcome
from headrace.agents.places import Places
from headrace.agents.retry import RetryBudgets, backoff_s
from headrace.agents.running.deadlines import Deadlines
from headrace.agents.running.run import Run, Surroundings
from headrace.agents.running.states import States
from headrace.agents.running.streams import Streams
from headrace.agents.running.turnstile import Turnstile
from headrace.agents.shelf import Loaded, Shelf
from headrace.agents.store import AgentStore, Canary, Change, Key, Submission
from headrace.agents.threads import DaemonThreads
from headrace.agents.trials import Trials
from headrace.clock import Clock
from headrace.errors import BackendError, CallerError, InvalidRequest, ResultNotRecorded
from headrace.events import ExecutionFinished, ExecutionNotRecorded, Observer

_AGAIN = frozenset({"failed", "timeout", "interrupted"})
_OVERTAKEN = Outcome(
    "failed", error="The state was changed elsewhere meanwhile; nothing of this execution's change is kept."
)
_WRITE_S = 0.25
"""How often progress and events of executions on record are written down."""
_SLEEP_S = 5.0
"""How often idle states are looked for."""


class Runs:
    """The runs of one process; also the room that their agents speak to."""

    def __init__(
        self,
        store: AgentStore,
        config: AgentsConfig,
        *,
        places: Places,
        admission: Admission,
        shelf: Shelf,
        streams: Streams,
        states: States,
        threads: DaemonThreads,
        turnstile: Turnstile,
        clock: Clock,
        observer: Observer,
        ended: Callable[[Submission | None], None],
        doubt: Callable[[str], None],
    ) -> None:
        self._store = store
        self._config = config
        self._places = places
        self._admission = admission
        self._shelf = shelf
        self._streams = streams
        self._states = states
        self._clock = clock
        self._observer = observer
        self._tell_end = ended
        self._doubt = doubt
        self._budgets = RetryBudgets()
        self._rng = random.Random()  # noqa: S311 - for jitter, not for secrets
        self._runs: dict[Key, Run] = {}
        self._on_record: dict[Key, Run] = {}
        self._deadlines = Deadlines(clock)
        self._surroundings = Surroundings(
            config=config,
            clock=clock,
            threads=threads,
            deadlines=self._deadlines,
            turnstile=turnstile,
            room=self,
            conclude=self._conclude,
            spawn=self.spawn,
            ended=self._ended,
        )
        self._left_behind: dict[asyncio.Task[None], Key] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self.trials: Trials | None = None
        self.started = 0
        """Executions that began in this process."""

    def open(self) -> None:
        """Begin to write down what runs report."""
        self.spawn(self._write())

    def spawn(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        """A task that is cancelled when the runs are closed."""
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    async def drain(self) -> None:
        """Let executions end by themselves, then interrupt them, then leave behind those that do not stop."""
        await wait(self._finishing(), within_s=self._config.drain_s)
        for run in self._runs.values():
            run.interrupt()
        await wait(self._finishing(), within_s=self._config.cancel_grace_s)
        for run in self._runs.values():
            run.abandon()
        await wait(self._finishing(), within_s=self._config.journal_retry_s)

    async def close(self) -> None:
        """End what is left of them."""
        self._deadlines.close()
        tasks = [*self._tasks, *self._left_behind]
        for task in tasks:
            task.cancel()
        # An agent may swallow its cancellation for ever; it gets a moment, and then only the process's end stops it.
        await wait(tasks, within_s=self._config.cancel_grace_s)

    def find(self, key: Key) -> Run | None:
        """An execution that is under way here."""
        return self._runs.get(key)

    def known(self) -> list[Key]:
        """All executions that are under way here, and those that are over without their agent."""
        return [*self._runs, *self._left_behind.values()]

    def is_durable(self, key: Key) -> bool:
        """Whether an execution that is under way here is on record already."""
        return key in self._on_record

    def begin(
        self,
        loaded: Loaded,
        execution: Execution,
        value: Any,
        *,
        deadline_s: float,
        submission: Submission | None = None,
        trial: Canary | None = None,
    ) -> Run:
        """Run an execution that has a place, which is given back when it ends. A caller who leaves does not end it."""
        run = Run(
            loaded,
            execution,
            value,
            deadline_s=deadline_s,
            surroundings=self._surroundings,
            submission=submission,
            trial=trial,
        )
        run.start()
        self.started += 1
        if execution.attempt == 1:
            self._budgets.pay_in(execution.tenant)
        loaded.users += 1
        key = run.key
        self._runs[key] = run
        if submission is not None:
            self._on_record[key] = run
        return run

    def cancel(self, key: Key) -> None:
        """Ask an execution to stop, if it is under way here."""
        if (run := self.find(key)) is not None:
            run.cancel()

    def interrupt(self, owner: str) -> int:
        """Stop what ran under a name that this node has lost; others have it now. How many."""
        lost = [run for run in self._on_record.values() if run.submission and run.submission.owner == owner]
        for run in lost:
            run.interrupt()
        return len(lost)

    # -- what agents speak to --------------------------------------------------------------------------------------

    def emit(self, execution: Execution, event: Any) -> None:
        """Give an event to whoever listens."""
        if not self._speaks(execution):
            return  # what it still says is nobody's
        self._streams.emit(execution, event, is_durable=self.is_durable((execution.tenant, execution.id)))
        if not self._speaks(execution):
            self._streams.close(execution)  # it ended while a thread of it spoke

    def state_of(self, execution: Execution) -> dict[str, Any]:
        """What the execution's instance remembers."""
        if not self._speaks(execution):
            raise InvalidRequest(f"The execution {execution.id!r} is over, and so is its turn.")
        return self._states.of(execution)

    def _speaks(self, execution: Execution) -> bool:
        """Whether it is under way here: its agent may have been left behind, and another attempt have begun."""
        run = self._runs.get((execution.tenant, execution.id))
        return run is not None and run.execution is execution

    # -- the end ---------------------------------------------------------------------------------------------------

    def _ended(self, run: Run) -> None:
        self._places.ended()
        key = run.key
        self._admission.end(key[0])
        del self._runs[key]
        self._on_record.pop(key, None)
        self._states.end(run.execution)
        self._streams.close(run.execution)
        if run.is_left_behind and run.task is not None:
            self._left_behind[run.task] = key
            run.task.add_done_callback(self._left_behind.pop)
            run.task.add_done_callback(lambda _: self._shelf.release(run.loaded))
        else:
            self._shelf.release(run.loaded)
        self._tell_end(run.submission)

    async def _conclude(self, run: Run, outcome: Outcome) -> None:
        """Put a result on record and tell of it."""
        execution = run.execution
        if execution in self._streams:
            await self._streams.end(execution)
        if run.submission is not None:
            execution.queue_ms += run.submission.waited_ms
        try:
            kept, outcome = await self._put_on_record(run, outcome)
        except BackendError as error:
            self._observer.on(ExecutionNotRecorded(execution.agent_id, execution.id, outcome.status, str(error)))
            if run.submission is not None:
                self._doubt_end_of(run)
            raise ResultNotRecorded(
                f"The execution {execution.id!r} ended as {outcome.status!r}, but its result could not be stored"
                f" ({error.message})"
            ) from error
        if run.trial is not None and self.trials is not None:
            self.trials.count(execution, outcome.status, run.trial)
        if execution.status == "queued":
            return
        if kept is not execution:
            # Others decided meanwhile what became of it: whoever waits here is told the same.
            for name in execution.__struct_fields__:
                setattr(execution, name, getattr(kept, name))
        self._observer.on(
            ExecutionFinished(
                execution.agent_id,
                execution.version,
                execution.id,
                execution.status,
                execution.queue_ms,
                execution.run_ms,
            )
        )

    def _doubt_end_of(self, run: Run) -> None:
        """It is on record as running, when nobody runs it, or will once an agent that was left behind has stopped."""
        shard = self._store.shard_of(run.execution.tenant)
        if run.is_left_behind and run.task is not None:
            run.task.add_done_callback(lambda _: self._doubt(shard))
        else:
            self._doubt(shard)

    async def _put_on_record(self, run: Run, outcome: Outcome) -> tuple[Execution, Outcome]:
        """What is on record now, and how the attempt ended in the light of what it made of its state."""
        execution, change = run.execution, None
        try:
            change = self._states.change(execution) if outcome.status == "completed" else None
        except InvalidRequest as error:
            outcome = Outcome("failed", error=error.message)
        try:
            kept = await self._finish(run, outcome, change)
        except CallerError as error:
            # The result itself is refused. That it failed is not, and nobody is left to wait for it.
            outcome, change = Outcome("failed", error=f"Its result could not be stored: {error.message}"), None
            kept = await self._finish(run, outcome, None)
        if kept is None:
            outcome = _OVERTAKEN
            kept = await self._finish(run, outcome, None)
        elif change is not None and kept is execution:
            self._states.kept(execution, change)
        return kept or execution, outcome

    async def _finish(self, run: Run, outcome: Outcome, change: Change | None) -> Execution | None:
        """What is on record now; None if the change of the state is out of date, and nothing was put there."""
        execution, submission = run.execution, run.submission
        execution.status, execution.output_json = outcome.status, outcome.output_json
        execution.error, execution.finished_at = outcome.error, self.now()
        if submission is None:
            return await self._store.finish(execution, change=change)
        if await self._is_queued_again(run, submission):
            return execution
        return await self._store.finish(execution, owner=submission.owner, change=change)

    async def _is_queued_again(self, run: Run, submission: Submission) -> bool:
        execution = run.execution
        if execution.status not in _AGAIN or execution.attempt >= submission.attempts_max:
            return False
        if run.is_left_behind:
            return False  # it has not stopped: the next attempt would run beside it
        if not self._budgets.take(execution.tenant):
            return False
        delay_s = backoff_s(
            execution.attempt,
            first_s=self._config.retry_first_s,
            limit_s=self._config.retry_max_s,
            rng=self._rng.random,
        )
        if not await self._store.retry(submission, error=execution.error, delay_s=delay_s):
            return False
        execution.status, execution.finished_at = "queued", None
        return True

    async def _write(self) -> None:
        """Write down what runs report, and let idle states sleep."""
        sleep_at = self._clock.monotonic() + _SLEEP_S
        while True:
            await self._clock.sleep(_WRITE_S)
            try:
                await self._report()
                await self._streams.write()
            except BackendError:
                continue  # the shard's own event tells; the next time or the result will say it again
            except Exception as error:  # noqa: BLE001 - a fault of ours must not end the writing
                loop = asyncio.get_running_loop()
                loop.call_exception_handler({"message": "reports were not written", "exception": error})
            if self._clock.monotonic() >= sleep_at:
                self._states.sleep_idle()
                sleep_at = self._clock.monotonic() + _SLEEP_S

    async def _report(self) -> None:
        by_shard: dict[str, list[tuple[Run, Submission]]] = {}
        for key, run in self._on_record.items():
            if run.submission is not None and run.execution.progress is not run.reported:
                submission = msgspec.structs.replace(run.submission, execution=run.execution)
                by_shard.setdefault(self._store.shard_of(key[0]), []).append((run, submission))
        for shard, told in by_shard.items():
            progress = [run.execution.progress for run, _ in told]
            await self._store.report(shard, [submission for _, submission in told])
            for (run, _), reported in zip(told, progress, strict=True):
                run.reported = reported  # not before: what failed is said again

    def _finishing(self) -> "list[asyncio.Future[Execution]]":
        return [run.waiter() for run in self._runs.values()]

    def now(self) -> float:
        """Whole microseconds, as the store keeps them: a result reads the same at once and later."""
        return round(self._clock.wall(), 6)


async def wait(futures: "Sequence[asyncio.Future[Any]]", *, within_s: float) -> None:
    """Return when all are done or the time is over."""
    if futures:
        await asyncio.wait(futures, timeout=within_s)
