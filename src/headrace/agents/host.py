"""The door of the agent room: deploy source, execute it, look at what happened."""

import asyncio
import hashlib
import os
from collections import OrderedDict
from collections.abc import Sequence
from functools import partial
from types import TracebackType
from typing import Any, Self

import msgspec

from headrace.agents.config import AgentsConfig
from headrace.agents.definition import Definition, Source, load
from headrace.agents.execution import Execution, Outcome, Priority
from headrace.agents.postgres_store import PostgresStore
from headrace.agents.run import Run
from headrace.agents.store import Agent, AgentStore, Deployment, MemoryStore, Totals, agent_not_found
from headrace.agents.threads import DaemonThreads
from headrace.cache import Cache
from headrace.clock import Clock, SystemClock
from headrace.database import Database
from headrace.errors import (
    AgentInvalid,
    BackendError,
    DatabaseUnavailable,
    ExecutionConflict,
    InvalidRequest,
    Overloaded,
    ResultNotRecorded,
)
from headrace.events import AgentDeployed, ExecutionFinished, ExecutionNotRecorded, Observer, Silent

_POLL_FIRST_S = 0.02
_POLL_MAX_S = 0.5
_REPORT_S = 0.5
_CLAIM_RETRY_S = 0.2
_LOADS_MAX = 8

# Under pressure the less urgent go first: shares of `executions_max` that a priority may fill.
_SHARE = {"low": 0.80, "normal": 0.95, "high": 1.0}


class AgentStatus(msgspec.Struct, frozen=True, kw_only=True):
    """An agent in service and what became of its executions."""

    agent_id: str
    name: str
    version: str
    status: str
    updated_at: float
    executions: Totals


class AgentHost:
    """Hosts agents: Python source that is deployed and executed while the service runs.

    With a database everything is durable and shared by all processes on it; without one it lives in this process. A
    cache spares the database most look-ups of which version is in service: a switch made in another process is seen
    within a second.
    """

    def __init__(
        self,
        config: AgentsConfig | None = None,
        *,
        cache: Cache | None = None,
        database: Database | None = None,
        observer: Observer | None = None,
        clock: Clock | None = None,
        writer: str = "0",
    ) -> None:
        self.config = config or AgentsConfig()
        self._clock = clock or SystemClock()
        self._observer = observer or Silent()
        self._cache = cache
        self._store: AgentStore = (
            MemoryStore(clock=self._clock)
            if database is None
            else PostgresStore(database, self.config, writer=writer, clock=self._clock, observer=self._observer)
        )
        self._definitions: OrderedDict[tuple[str, str, str], Definition] = OrderedDict()
        self._loads: dict[tuple[str, str, str], asyncio.Task[Definition]] = {}
        self._runs: dict[tuple[str, str], Run] = {}
        self._claims: set[asyncio.Task[Run | Execution]] = set()
        self._reporters: set[asyncio.Task[None]] = set()
        self._left_behind: set[asyncio.Task[None]] = set()
        self._threads = DaemonThreads(self.config.threads_max, name="headrace-agent")
        self._loaders = DaemonThreads(_LOADS_MAX, name="headrace-load")
        self.running = 0
        """Executions under way in this process."""
        self.started = 0
        """Executions that began in this process."""

    async def __aenter__(self) -> Self:
        """Open the store."""
        await self._store.open()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Let running executions end, put those that do not on record as interrupted, and close."""
        await self._wait([*self._claims, *self._loads.values()], within_s=self.config.cancel_grace_s)
        await self._wait([run.finished for run in self._runs.values()], within_s=self.config.drain_s)
        for run in self._runs.values():
            run.interrupt()
        await self._wait([run.finished for run in self._runs.values()], within_s=self.config.cancel_grace_s)
        for run in self._runs.values():
            run.abandon()
        await self._wait([run.finished for run in self._runs.values()], within_s=self.config.journal_retry_s)
        tasks = [*self._claims, *self._loads.values(), *self._reporters, *self._left_behind]
        for task in tasks:
            task.cancel()
        # An agent may swallow its cancellation for ever; it gets a moment, and then only the process's end stops it.
        await self._wait(tasks, within_s=self.config.cancel_grace_s)
        await self._store.close()
        self._threads.close()
        self._loaders.close()
        for definition in self._definitions.values():
            definition.unload()
        self._definitions.clear()

    @staticmethod
    async def _wait(futures: "Sequence[asyncio.Future[Any]]", *, within_s: float) -> None:
        if futures:
            await asyncio.wait(futures, timeout=within_s)

    # -- deployments --------------------------------------------------------------------------------------------

    async def deploy(
        self,
        agent_id: str,
        source: str,
        *,
        version: str,
        entrypoint: str = "Agent",
        name: str | None = None,
        tags: tuple[str, ...] = (),
        timeout_s: float | None = None,
        tenant: str | None = None,
    ) -> Deployment:
        """Load a version to see that it works, keep it, and put it into service.

        Raises `AgentInvalid` when it does not load and `VersionConflict` when this version stands for another source;
        the version in service is unchanged then. Deploying the same version again is harmless.
        """
        tenant = tenant or "default"
        self._bounded_timeout(timeout_s)
        text = Source(agent_id=agent_id, version=version, text=source, entrypoint=entrypoint, timeout_s=timeout_s)
        started = self._clock.monotonic()
        definition = await self._load_in_thread(text)
        deployment = Deployment(
            deployment_id=f"dep_{self._new_id()}",
            tenant=tenant,
            agent_id=agent_id,
            name=name or agent_id,
            tags=tags,
            source=text,
            compile_ms=(self._clock.monotonic() - started) * 1000,
        )
        try:
            agent = await self._store.deploy(deployment)
        except BaseException:
            definition.unload()
            raise
        self._remember(tenant, definition)
        await self._now_in_service(agent)
        self._observer.on(AgentDeployed(agent_id, version, len(source.encode()), deployment.compile_ms))
        return deployment

    async def rollback(self, agent_id: str, version: str, *, tenant: str | None = None) -> Agent:
        """Put a version that was deployed before back into service."""
        agent = await self._store.put_in_service(tenant or "default", agent_id, version)
        await self._now_in_service(agent)
        return agent

    async def agent(self, agent_id: str, *, tenant: str | None = None) -> Agent:
        """The agent, with the version that is in service."""
        return await self._in_service(tenant or "default", agent_id)

    async def agents(
        self, *, tenant: str | None = None, offset: int = 0, limit: int = 50
    ) -> tuple[list[tuple[Agent, Totals]], int]:
        """A page of agents by id, each with the totals of its executions, and how many agents there are."""
        return await self._store.agents(tenant or "default", offset=offset, limit=limit)

    async def status(self, agent_id: str, *, tenant: str | None = None) -> AgentStatus:
        """The agent's version in service and its totals; may be as old as the cache policy of `agent-status:*`
        allows."""
        key = (tenant or "default", agent_id)
        status: AgentStatus | None
        if self._cache is None:
            status = await self._load_status(*key)
        else:
            status = await self._cache.get_or_load(
                f"agent-status:{key[0]}/{key[1]}", partial(self._load_status, *key), type=AgentStatus | None
            )
        if status is None:
            raise agent_not_found(agent_id)
        return status

    async def _load_status(self, tenant: str, agent_id: str) -> AgentStatus | None:
        agent = await self._store.agent(tenant, agent_id)
        if agent is None:
            return None
        return AgentStatus(
            agent_id=agent.agent_id,
            name=agent.name,
            version=agent.version,
            status="active",
            updated_at=agent.updated_at,
            executions=await self._store.totals(tenant, agent_id),
        )

    async def _in_service(self, tenant: str, agent_id: str) -> Agent:
        load_agent = partial(self._store.agent, tenant, agent_id)
        agent: Agent | None
        if self._cache is None:
            agent = await load_agent()
        else:
            agent = await self._cache.get_or_load(f"agent:{tenant}/{agent_id}", load_agent, type=Agent | None)
        if agent is None:
            raise agent_not_found(agent_id)
        return agent

    async def _now_in_service(self, agent: Agent) -> None:
        if self._cache is not None:
            await self._cache.set(f"agent:{agent.tenant}/{agent.agent_id}", agent, type=Agent | None)
            await self._cache.delete(f"agent-status:{agent.tenant}/{agent.agent_id}")

    # -- definitions --------------------------------------------------------------------------------------------

    async def _definition(self, agent: Agent) -> Definition:
        """The loaded version that is in service; one load per version however many ask."""
        key = (agent.tenant, agent.agent_id, agent.version)
        definition = self._definitions.get(key)
        if definition is not None and definition.sha256 == agent.source_sha256:
            self._definitions.move_to_end(key)
            return definition
        load_task = self._loads.get(key)
        if load_task is None:
            load_task = asyncio.get_running_loop().create_task(self._load_definition(agent))
            self._loads[key] = load_task
            load_task.add_done_callback(lambda _: self._loads.pop(key, None))
        return await asyncio.shield(load_task)

    async def _load_definition(self, agent: Agent) -> Definition:
        source = await self._store.source(agent.tenant, agent.agent_id, agent.version)
        definition = await self._load_in_thread(source)
        self._remember(agent.tenant, definition)
        return definition

    async def _load_in_thread(self, source: Source) -> Definition:
        # Threads of their own: a deployment must not wait for busy agents, nor a hanging one hold up anything else.
        if not self._loaders.reserve():
            raise Overloaded(f"{_LOADS_MAX} sources are being loaded in this process, and none of them ends.")
        loading = self._loaders.run(partial(load, source, bytes_max=self.config.source_bytes_max))
        done, _ = await asyncio.wait({loading}, timeout=self.config.load_timeout_s)
        if not done:
            loading.add_done_callback(_unload)
            raise AgentInvalid(
                f"The source of {source.agent_id!r} is not loaded after {self.config.load_timeout_s:g} s.",
                fix="Move slow work out of the module's top level, into `execute`.",
            )
        definition: Definition = loading.result()
        return definition

    def _remember(self, tenant: str, definition: Definition) -> None:
        key = (tenant, definition.agent_id, definition.version)
        replaced = self._definitions.pop(key, None)
        if replaced is not None:
            replaced.unload()
        self._definitions[key] = definition
        if len(self._definitions) > self.config.definitions_max:
            self._definitions.popitem(last=False)[1].unload()

    # -- executions ---------------------------------------------------------------------------------------------

    async def execute(
        self,
        agent_id: str,
        input: Any,
        *,
        execution_id: str | None = None,
        timeout: float | None = None,
        priority: Priority = "normal",
        tenant: str | None = None,
    ) -> Execution:
        """Run an agent to its end and return the finished, durable execution.

        An `execution_id` is an idempotency key: the first call runs, any other with the same agent and input, at the
        same time or later, gets that run's result; with another input it is an `ExecutionConflict`. The agent's own
        failure is an execution with status `failed`, not an exception here.
        """
        definition, execution, deadline_s = await self._accept(agent_id, execution_id, timeout, priority, tenant)
        if execution_id is None:
            run = self._begin(definition, execution, input, deadline_s)
            return await asyncio.shield(run.finished)
        begun = await self._begin_once(definition, execution, input, deadline_s)
        if isinstance(begun, Run):
            return await asyncio.shield(begun.finished)
        return await self._settled(begun, execution, within_s=deadline_s)

    async def submit(
        self,
        agent_id: str,
        input: Any,
        *,
        execution_id: str | None = None,
        timeout: float | None = None,
        priority: Priority = "normal",
        tenant: str | None = None,
    ) -> Execution:
        """Start an execution and return at once; `execution` tells how it goes.

        The execution is on record before this returns. If this process dies first, it is reported as `interrupted`.
        """
        definition, execution, deadline_s = await self._accept(agent_id, execution_id, timeout, priority, tenant)
        begun = await self._begin_once(definition, execution, input, deadline_s)
        if isinstance(begun, Run):
            return begun.execution
        self._same_request(begun, execution)
        return begun

    async def execution(self, agent_id: str, execution_id: str, *, tenant: str | None = None) -> Execution:
        """An execution, finished or under way."""
        return await self._store.execution(tenant or "default", agent_id, execution_id)

    async def _accept(
        self, agent_id: str, execution_id: str | None, timeout: float | None, priority: Priority, tenant: str | None
    ) -> tuple[Definition, Execution, float]:
        """Everything that can be refused, before anything is written; from its return on a place is taken."""
        self._bounded_timeout(timeout)
        tenant = tenant or "default"
        definition = await self._definition(await self._in_service(tenant, agent_id))
        execution = Execution(
            id=execution_id or self._new_id(),
            agent_id=agent_id,
            version=definition.version,
            status="running",
            tenant=tenant,
            started_at=self._now(),
        )
        self._take_place(definition, priority)
        return definition, execution, timeout or definition.timeout_s or self.config.timeout_s

    def _take_place(self, definition: Definition, priority: Priority) -> None:
        if self.running >= self.config.executions_max * _SHARE[priority]:
            raise Overloaded(f"{self.running:,} executions run in this process; no more of priority {priority!r} fit.")
        if not definition.is_async and not self._threads.reserve():
            raise Overloaded(f"All {self.config.threads_max} threads for synchronous agents are busy.")
        self.running += 1

    def _leave_place(self, definition: Definition) -> None:
        self.running -= 1
        if not definition.is_async:
            self._threads.release()

    def _bounded_timeout(self, timeout: float | None) -> None:
        if timeout is not None and not 0 < timeout <= self.config.timeout_max_s:
            raise InvalidRequest(
                f"The timeout is {timeout} s; it must be above 0 and at most {self.config.timeout_max_s:g} s.",
                fix="Ask for less, or raise agents.timeout_max_s.",
            )

    def _begin(self, definition: Definition, execution: Execution, value: Any, deadline_s: float) -> Run:
        """The execution as a run of this host, which a caller who leaves does not end."""
        run = Run(
            definition,
            execution,
            value,
            deadline_s=deadline_s,
            config=self.config,
            threads=self._threads,
            clock=self._clock,
            conclude=self._conclude,
        )
        run.start()
        self.started += 1
        key = (execution.tenant, execution.id)
        self._runs[key] = run
        run.finished.add_done_callback(partial(self._ended, key))
        return run

    def _ended(self, key: tuple[str, str], finished: "asyncio.Future[Execution]") -> None:
        self.running -= 1
        run = self._runs.pop(key)
        if not run.task.done():
            self._left_behind.add(run.task)
            run.task.add_done_callback(self._left_behind.discard)

    async def _begin_once(
        self, definition: Definition, execution: Execution, value: Any, deadline_s: float
    ) -> Run | Execution:
        """The run of this execution id, or what the id stands for already.

        To claim and to begin is one step that no leaving caller can cut in two: an id that is claimed gets its run.
        """
        step = asyncio.get_running_loop().create_task(self._claim_and_begin(definition, execution, value, deadline_s))
        self._claims.add(step)
        step.add_done_callback(self._claims.discard)
        return await asyncio.shield(step)

    async def _claim_and_begin(
        self, definition: Definition, execution: Execution, value: Any, deadline_s: float
    ) -> Run | Execution:
        try:
            held = await self._claim(execution, value, deadline_s)
        except BaseException:
            self._leave_place(definition)
            raise
        if held is not None:
            self._leave_place(definition)
            return held
        run = self._begin(definition, execution, value, deadline_s)
        reporter = asyncio.get_running_loop().create_task(self._report(run))
        self._reporters.add(reporter)
        reporter.add_done_callback(self._reporters.discard)
        return run

    async def _claim(self, execution: Execution, value: Any, deadline_s: float) -> Execution | None:
        """Put the execution on record under its id, with a digest that tells whether a repeat asks for the same.

        The claim carries a token of its own, so that it can be repeated when nobody knows whether it was committed.
        """
        execution.input_sha256 = hashlib.sha256(msgspec.json.encode(value, order="deterministic")).hexdigest()
        lease_until = self._clock.wall() + deadline_s + self.config.cancel_grace_s + self.config.lease_grace_s
        claim = self._new_id()
        give_up_at = self._clock.monotonic() + self.config.journal_retry_s
        while True:
            try:
                return await self._store.claim(execution, claim=claim, lease_until=lease_until)
            except DatabaseUnavailable:
                if self._clock.monotonic() >= give_up_at:
                    raise
            await self._clock.sleep(_CLAIM_RETRY_S)

    @staticmethod
    def _same_request(held: Execution, asked: Execution) -> None:
        if (held.agent_id, held.input_sha256) != (asked.agent_id, asked.input_sha256):
            raise ExecutionConflict(f"The execution id {asked.id!r} was used with another agent or input.")

    async def _settled(self, held: Execution, asked: Execution, *, within_s: float) -> Execution:
        """The result of an execution that another call started: waited for, never run again."""
        self._same_request(held, asked)
        here = self._runs.get((held.tenant, held.id))
        if here is not None:
            return await asyncio.shield(here.finished)
        give_up_at = self._clock.monotonic() + within_s
        pause = _POLL_FIRST_S
        while not held.is_finished and self._clock.monotonic() < give_up_at:
            await self._clock.sleep(pause)
            pause = min(pause * 2, _POLL_MAX_S)
            held = await self._store.execution(held.tenant, held.agent_id, held.id)
        return held

    async def _conclude(self, execution: Execution, outcome: Outcome) -> None:
        """Put a result on record and tell of it."""
        execution.status, execution.output_json, execution.error = outcome.status, outcome.output_json, outcome.error
        execution.finished_at = self._now()
        try:
            await self._store.finish(execution)
        except BackendError as error:
            self._observer.on(ExecutionNotRecorded(execution.agent_id, execution.id, execution.status, str(error)))
            raise ResultNotRecorded(
                f"The execution {execution.id!r} ended as {execution.status!r}, but its result could not be stored"
                f" ({error.message})"
            ) from error
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

    async def _report(self, run: Run) -> None:
        """Write an execution's progress down now and then, while it runs."""
        execution = run.execution
        reported = None
        while not run.finished.done():
            await asyncio.wait({run.finished}, timeout=_REPORT_S)
            if execution.progress is not reported and not run.finished.done():
                reported = execution.progress
                try:
                    await self._store.report(execution)
                except BackendError:
                    continue  # the shard's own event tells; the next report or the result will say it again

    def _now(self) -> float:
        # Whole microseconds, as the store keeps them: a result reads the same at once and later.
        return round(self._clock.wall(), 6)

    def _new_id(self) -> str:
        # Time first, so that new rows land side by side in the index; 80 random bits after it.
        return f"{int(self._clock.wall() * 1000):012x}{os.urandom(10).hex()}"


def _unload(loading: "asyncio.Future[Definition]") -> None:
    """Forget what was loaded too late."""
    if not loading.cancelled() and loading.exception() is None:
        loading.result().unload()
