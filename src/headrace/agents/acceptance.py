"""From a call to a run: what can be refused is refused, an id is claimed once, and what is queued gets its turn."""

import asyncio
import hashlib
from collections.abc import Callable
from contextlib import ExitStack
from sys import intern
from typing import Any

import msgspec

from headrace.agents.admission import Admission, Refusal
from headrace.agents.config import AgentsConfig
from headrace.agents.execution import Execution, Priority, Status
from headrace.agents.nodes import Membership
from headrace.agents.places import Places
from headrace.agents.running.guard import Guard
from headrace.agents.running.run import Run
from headrace.agents.running.runs import Runs, wait
from headrace.agents.running.states import States
from headrace.agents.running.turnstile import Turnstile
from headrace.agents.shelf import Loaded
from headrace.agents.store import HEAD_STARTS, NOT_BEGUN, AgentStore, Canary, Key, Submission
from headrace.agents.versions import Versions
from headrace.clock import Clock
from headrace.errors import (
    AgentNotFound,
    BackendError,
    BugError,
    CallerError,
    ExecutionConflict,
    ExecutionNotFound,
    HeadraceError,
    InvalidRequest,
    IsolationRequired,
    IsolationUnavailable,
    Overloaded,
    RateLimited,
)

_POLL_FIRST_S = 0.02
_POLL_MAX_S = 0.5
_GIVE_BACK_S = 0.25
"""How long what did not fit here is left to others before it is taken again."""
_UNFIT_FIRST_S, _UNFIT_MAX_S = 1.0, 30.0
"""How long what this node cannot isolate is left to others each time; as long as it was already, in between."""
_OTHERS_S = 600.0
"""How long others are given for it in all."""
_UNFIT_KNOWN_MAX = 10_000
_TICK_S = 1e-6
"""The finest time that the store keeps, by which it tells beginnings apart."""


class Request(msgspec.Struct, frozen=True):
    """An execution as somebody asks for it."""

    agent_id: str
    input: Any
    execution_id: str | None
    timeout: float | None
    priority: Priority
    tenant: str
    version: str | None
    instance: str | None
    callback_url: str | None = None


class Acceptance:
    """Turns requests, and what the queue hands over, into runs."""

    def __init__(
        self,
        store: AgentStore,
        config: AgentsConfig,
        *,
        versions: Versions,
        runs: Runs,
        places: Places,
        admission: Admission,
        states: States,
        membership: Membership,
        turnstile: Turnstile,
        guard: Guard,
        clock: Clock,
        new_id: Callable[[], str],
    ) -> None:
        self._store = store
        self._config = config
        self._versions = versions
        self._runs = runs
        self._places = places
        self._admission = admission
        self._states = states
        self._membership = membership
        self._turnstile = turnstile
        self._guard = guard
        self._clock = clock
        self._new_id = new_id
        self.claims: dict[asyncio.Task[Run | Execution], Key] = {}
        """Ids that are being claimed."""
        self._waiting: dict[Key, asyncio.Task[Any]] = {}
        """Of those the ones on record that wait for their turn, until somebody cancels them."""
        self._unfit: dict[Key, float] = {}
        """What this node could not isolate and left to others, and when it first did."""
        self._started_at = 0.0

    async def settle(self) -> None:
        """Let what is being claimed begin."""
        await wait([*self.claims], within_s=self._config.cancel_grace_s)

    async def close(self) -> None:
        """Give up what is still being claimed."""
        for claim in list(self.claims):
            claim.cancel()
        await wait([*self.claims], within_s=self._config.cancel_grace_s)

    # -- calls -----------------------------------------------------------------------------------------------------

    async def execute(self, request: Request) -> Run | Execution:
        """Begin an execution: its run, whose end is waited for without any of this, or what became of its id."""
        loaded, trial, execution, deadline_s = await self._accept(request, queued=False)
        self._take_place(loaded, request.tenant, self._priority(request))
        if request.execution_id is not None or loaded.version.attempts_max > 1:
            return await self._execute_once(request, loaded, trial, execution, deadline_s)
        self._hold(loaded)
        try:
            if request.instance is not None:
                await self._wait_for_turn(loaded, execution, request.instance, deadline_s)
            run = self._runs.begin(loaded, execution, request.input, deadline_s=deadline_s, trial=trial)
        finally:
            self._versions.release(loaded)
        return run

    async def _execute_once(
        self, request: Request, loaded: Loaded, trial: Canary | None, execution: Execution, deadline_s: float
    ) -> Execution:
        give_up_at = self._clock.monotonic() + deadline_s
        begun = await self._begin_once(request, loaded, trial, execution, deadline_s)
        held = await begun.end() if isinstance(begun, Run) else begun
        if held.is_finished and isinstance(begun, Run):
            return held
        return await self._settled(held, execution, within_s=give_up_at - self._clock.monotonic())

    async def submit(self, request: Request) -> tuple[Execution, bool]:
        """Queue an execution; what its id stands for now, and whether it needs a thread."""
        loaded, _, execution, deadline_s = await self._accept(request, queued=True)
        execution.status, execution.started_at, execution.attempt = "queued", None, 0
        submission = self._submission(request, loaded, execution, deadline_s)
        submission.input_json = msgspec.json.encode(request.input)
        held = await self._store.submit(submission)
        if held is not None:
            self._same_request(held, execution)
        return held or execution, submission.threaded

    async def cancel(self, tenant: str, agent_id: str | None, execution_id: str) -> Execution:
        """Cancel an execution; see `AgentHost.cancel`."""
        run = self._runs.find((tenant, execution_id))
        if run is None or agent_id not in {None, run.execution.agent_id}:
            held = await self._store.cancel(tenant, agent_id, execution_id)
            if (claim := self.stop((tenant, execution_id))) is None:
                return held
            await wait([claim], within_s=self._config.cancel_grace_s)
            return await self._store.execution(tenant, agent_id, execution_id)
        try:
            if self._runs.is_durable(run.key):
                # Noted on record before it stops: neither this node nor one that takes over is to try it again.
                await self._store.cancel(tenant, agent_id, execution_id)
        finally:
            run.cancel()
        await run.wait(within_s=self._config.cancel_grace_s)
        if not run.is_finished:
            # Its agent may have stopped already. How it ended is nobody's to tell before it is on record.
            held = run.execution
            return msgspec.structs.replace(held, status="cancelling", output_json=None, error=None, finished_at=None)
        ended = await run.end()
        if ended.status == "queued":  # it failed just before, and was to be tried again
            return await self._store.execution(tenant, agent_id, execution_id)
        return msgspec.structs.replace(ended)

    def stop(self, key: Key) -> asyncio.Task[Any] | None:
        """Ask what runs here to stop, and what waits here for its turn not to begin; the task of the latter."""
        self._runs.cancel(key)
        claim = self._waiting.pop(key, None)
        if claim is not None:
            claim.cancel()
        return claim

    def bounded_timeout(self, timeout: float | None) -> None:
        """Refuse a timeout that nothing may have."""
        if timeout is not None and not 0 < timeout <= self._config.timeout_max_s:
            raise InvalidRequest(
                f"The timeout is {timeout} s; it must be above 0 and at most {self._config.timeout_max_s:g} s.",
                fix="Ask for less, or raise agents.timeout_max_s.",
            )

    async def _accept(self, request: Request, *, queued: bool) -> tuple[Loaded, Canary | None, Execution, float]:
        """Everything that can be refused before anything is taken or written."""
        self.bounded_timeout(request.timeout)
        await self._turnstile.go_through()
        refusal = self._admission.admit(
            request.tenant, monotonic=self._clock.monotonic(), wall=self._clock.wall(), queued=queued
        )
        if refusal is not None:
            raise _refused(refusal)
        execution_id = request.execution_id or self._new_id()
        loaded, trial = await self._versions.choose(request.tenant, request.agent_id, execution_id, request.version)
        self._admit(loaded)
        execution = Execution(
            id=execution_id,
            # Of strings that all executions of the agent share, where the request has copies of its own.
            agent_id=loaded.definition.agent_id,
            version=loaded.definition.version,
            status="running",
            tenant=intern(request.tenant),
            started_at=self._runs.now(),
        )
        return loaded, trial, execution, request.timeout or loaded.definition.timeout_s or self._config.timeout_s

    def _admit(self, loaded: Loaded) -> None:
        if loaded.isolated is None:  # those are watched, and ended, in their workers
            self._guard.admit(loaded.definition)

    def _priority(self, request: Request) -> Priority:
        return self._admission.capped(request.tenant, request.priority)

    def _take_place(self, loaded: Loaded, tenant: str, priority: Priority) -> None:
        threaded = not loaded.definition.is_async
        loaded.require_room()
        self._places.take(priority, threaded=threaded)
        try:
            self._begin_admitted(tenant)
        except Overloaded:
            self._places.leave(threaded=threaded)
            raise

    def _leave_place(self, tenant: str, *, threaded: bool) -> None:
        self._places.leave(threaded=threaded)
        self._admission.end(tenant)

    async def _wait_for_turn(self, loaded: Loaded, execution: Execution, instance: str, within_s: float) -> None:
        """Wait until the execution is the only one of its instance; gives its place back if that fails."""
        try:
            async with asyncio.timeout(within_s):
                await self._states.begin(execution, instance)
        except TimeoutError as error:
            self._leave_place(execution.tenant, threaded=not loaded.definition.is_async)
            raise Overloaded(f"The instance {instance!r} was not free within {within_s:g} s.") from error
        except BaseException:
            self._leave_place(execution.tenant, threaded=not loaded.definition.is_async)
            raise

    # -- ids -------------------------------------------------------------------------------------------------------

    def _submission(self, request: Request, loaded: Loaded, execution: Execution, deadline_s: float) -> Submission:
        """What the record needs, with a digest that tells whether a repeat asks for the same."""
        execution.input_sha256 = _digest(request)
        return Submission(
            execution=execution,
            claim=self._new_id(),
            attempts_max=loaded.version.attempts_max,
            head_start_s=HEAD_STARTS[self._priority(request)] * self._config.ageing_s,
            timeout_s=deadline_s,
            threaded=not loaded.definition.is_async,
            asked_version=request.version,
            instance=request.instance,
            callback_url=request.callback_url,
        )

    async def _begin_once(
        self, request: Request, loaded: Loaded, trial: Canary | None, execution: Execution, deadline_s: float
    ) -> Run | Execution:
        """The run of this execution id, or what the id stands for already.

        To claim and to begin is one step that no leaving caller can cut in two: an id that is claimed gets its run.
        """
        self._hold(loaded)
        step = asyncio.get_running_loop().create_task(
            self._claim_and_begin(request, loaded, trial, execution, deadline_s)
        )
        step.add_done_callback(lambda _: self._versions.release(loaded))
        self.claims[step] = (execution.tenant, execution.id)
        step.add_done_callback(self.claims.pop)
        step.add_done_callback(lambda step: step.cancelled() or step.exception())  # the caller may have left
        return await asyncio.shield(step)

    async def _claim_and_begin(
        self, request: Request, loaded: Loaded, trial: Canary | None, execution: Execution, deadline_s: float
    ) -> Run | Execution:
        threaded = not loaded.definition.is_async
        try:
            submission = self._submission(request, loaded, execution, deadline_s)
            submission.owner = self._membership.owner(self._store.shard_of(request.tenant))
            if submission.attempts_max > 1:
                submission.input_json = msgspec.json.encode(request.input)
            held = await self._store.submit(submission)
        except BaseException as error:
            if isinstance(error, BackendError):
                self._membership.doubt(self._store.shard_of(request.tenant))
            self._leave_place(request.tenant, threaded=threaded)
            raise
        if held is not None:
            self._leave_place(request.tenant, threaded=threaded)
            return held
        if request.instance is not None and not await self._has_turn(loaded, submission, request.instance):
            return execution
        return self._runs.begin(
            loaded, execution, request.input, deadline_s=deadline_s, submission=submission, trial=trial
        )

    async def _has_turn(self, loaded: Loaded, submission: Submission, instance: str) -> bool:
        """Wait for the turn of what is on record; False if it was cancelled before that, and has ended."""
        claim = asyncio.current_task()
        assert claim is not None, "an id is claimed in a task"
        self._waiting[submission.key] = claim
        try:
            await self._wait_for_turn(loaded, submission.execution, instance, submission.timeout_s)
        except asyncio.CancelledError:
            if submission.key in self._waiting:
                raise  # the process stops: others find it when the lease ends
            claim.uncancel()
            await self._end(submission, NOT_BEGUN, "cancelled")
            return False
        except HeadraceError as error:
            await self._withdraw(submission, error)
            raise
        finally:
            self._waiting.pop(submission.key, None)
        return True

    async def _withdraw(self, submission: Submission, error: HeadraceError) -> None:
        """Free the id of what was refused before it began."""
        try:
            if not await self._store.withdraw(submission):
                await self._end(submission, error.message)
        except BackendError:
            self._membership.doubt(self._store.shard_of(submission.key[0]))  # on record, and nobody runs it

    @staticmethod
    def _same_request(held: Execution, asked: Execution) -> None:
        if (held.agent_id, held.input_sha256) != (asked.agent_id, asked.input_sha256):
            raise ExecutionConflict(
                f"The execution id {asked.id!r} was used with another agent, input, version or instance."
            )

    async def _settled(self, held: Execution, asked: Execution, *, within_s: float) -> Execution:
        """The result of an execution that runs elsewhere or later: waited for, never run again from here."""
        self._same_request(held, asked)
        give_up_at = self._clock.monotonic() + within_s
        pause = _POLL_FIRST_S
        while not held.is_finished and (left_s := give_up_at - self._clock.monotonic()) > 0:
            here = self._runs.find((held.tenant, held.id))
            if here is not None:
                await here.wait(within_s=left_s)
            else:
                await self._clock.sleep(pause)
                pause = min(pause * 2, _POLL_MAX_S)
            try:
                held = await self._store.execution(held.tenant, held.agent_id, held.id)
            except ExecutionNotFound as error:
                raise Overloaded(f"The execution {held.id!r} was refused before it began.") from error
        return held

    # -- the queue -------------------------------------------------------------------------------------------------

    async def start(self, submission: Submission) -> None:
        """Begin what the queue handed over, or let others have it."""
        try:
            await self._start(submission)
        except (IsolationUnavailable, IsolationRequired) as error:
            await self._leave_to_others(submission, error)
        except CallerError as error:
            await self._end_refused(submission, error)
        except (BackendError, TimeoutError):
            if submission.execution.status == "running":
                # Nobody knows whether the beginning is on record; if so, it is one that nobody runs.
                self._membership.doubt(self._store.shard_of(submission.key[0]))
            await self._give_back(submission, delay_s=self._again_s(submission))
        except Exception as error:  # noqa: BLE001 - a fault of ours must not come back with every node that takes it
            asyncio.get_running_loop().call_exception_handler({"message": "no execution began", "exception": error})
            await self._end(submission, BugError(f"It could not begin: {type(error).__name__}: {error}.").message)

    async def _start(self, submission: Submission) -> None:
        execution = submission.execution
        with ExitStack() as undo:
            await self._turnstile.go_through()
            loaded, trial = await self._versions.choose(
                execution.tenant, execution.agent_id, execution.id, submission.asked_version
            )
            self._admit(loaded)
            loaded.require_room()
            self._hold(loaded)
            undo.callback(self._versions.release, loaded)
            self._require_alone(submission)
            # The version that serves now may be of the other kind than the one that it was submitted for.
            threaded = not loaded.definition.is_async
            self._places.take("normal", threaded=threaded)
            undo.callback(lambda: self._places.leave(threaded=threaded))
            self._begin_admitted(execution.tenant)
            undo.callback(self._admission.end, execution.tenant)
            if submission.instance is not None:
                async with asyncio.timeout(submission.timeout_s):
                    await self._states.begin(execution, submission.instance)
                undo.callback(self._states.end, execution)
            execution.status, execution.version = "running", loaded.definition.version
            execution.attempt += 1
            execution.started_at = self._new_start()
            if await self._store.begin(submission):
                value = msgspec.json.decode(submission.input_json or b"null")
                self._runs.begin(
                    loaded, execution, value, deadline_s=submission.timeout_s, submission=submission, trial=trial
                )
                undo.pop_all()  # the run gives all of it back when it ends
                self._versions.release(loaded)
                return
        # Not ours any more. If it is all the same, like what was taken twice and refused once, nobody else runs it.
        await self._give_back(submission, delay_s=0)

    def _new_start(self) -> float:
        """Now, but not the time of the beginning before, which may be of another taking of the same execution."""
        now = self._runs.now()
        is_taken = now <= self._started_at < now + 1  # further ahead, the clock was set back
        self._started_at = round(self._started_at + _TICK_S, 6) if is_taken else now
        return self._started_at

    @staticmethod
    def _hold(loaded: Loaded) -> None:
        """Keep a version from being stopped before the run that is to have it has begun."""
        loaded.users += 1

    def _require_alone(self, submission: Submission) -> None:
        """Refuse to begin beside another execution that must have stopped first; others may have it meanwhile."""
        if self._runs.find(submission.key) is not None:
            # A node that lost its lease may be given back what it still runs.
            raise Overloaded(f"An earlier attempt of {submission.key[1]!r} has not stopped yet.")
        execution, instance = submission.execution, submission.instance
        if instance is not None and self._states.is_busy(execution.tenant, execution.agent_id, instance):
            # Not waited for: a busy instance with a long queue would hold up the queue of everybody.
            raise Overloaded(f"The instance {instance!r} is busy.")

    def _begin_admitted(self, tenant: str) -> None:
        if refusal := self._admission.begin(tenant):
            raise _refused(refusal)

    async def _leave_to_others(self, submission: Submission, error: HeadraceError) -> None:
        """Give back what this node may not or cannot run, for another that can; end it when nobody does in time."""
        now = self._clock.monotonic()
        for_s = now - self._unfit.setdefault(submission.key, now)
        if self._admission.nodes > 1 and for_s < _OTHERS_S:
            await self._give_back(submission, delay_s=min(max(_UNFIT_FIRST_S, for_s), _UNFIT_MAX_S))
            if len(self._unfit) > _UNFIT_KNOWN_MAX:
                del self._unfit[next(iter(self._unfit))]
            return
        del self._unfit[submission.key]
        await self._end_refused(submission, error)

    def _again_s(self, submission: Submission) -> float:
        execution, instance = submission.execution, submission.instance
        if instance is not None and self._states.is_busy(execution.tenant, execution.agent_id, instance):
            return self._states.pass_over(execution.tenant, execution.agent_id, instance)
        return _GIVE_BACK_S

    async def _give_back(self, submission: Submission, *, delay_s: float) -> None:
        try:
            await self._store.give_back(submission, delay_s=delay_s)
        except BackendError:
            self._membership.doubt(self._store.shard_of(submission.key[0]))  # ours on record, and nobody begins it

    async def _end_refused(self, submission: Submission, error: HeadraceError) -> None:
        await self._end(submission, error.message, "cancelled" if isinstance(error, AgentNotFound) else "failed")

    async def _end(self, submission: Submission, error: str, status: Status = "failed") -> None:
        """End what cannot run, on record."""
        execution = submission.execution
        execution.status, execution.error, execution.finished_at = status, error, self._runs.now()
        try:
            await self._store.finish(execution, owner=submission.owner)
        except BackendError:
            self._membership.doubt(self._store.shard_of(execution.tenant))  # ours on record, and nobody runs it


def _digest(request: Request) -> str:
    """Of all that decides what is executed; of an input alone as it always was."""
    asked: list[Any] = [request.input]
    if request.version is not None or request.instance is not None:
        asked += [request.version, request.instance]
    try:
        parts = [msgspec.json.encode(part, order="deterministic") for part in asked]
    except (TypeError, ValueError, RecursionError) as error:
        raise InvalidRequest(f"The input cannot be written as JSON ({error}).") from error
    return hashlib.sha256(b"\n".join(parts)).hexdigest()


def _refused(refusal: Refusal) -> Overloaded:
    kind = Overloaded if refusal.reason == "queue" else RateLimited
    return kind(refusal.message, retry_after_s=refusal.retry_after_s)
