"""The door of the agent room: deploy source, execute it, look at what happened."""

import asyncio
import hashlib
import os
from collections import OrderedDict
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from time import thread_time
from types import TracebackType
from typing import Any, Self

import msgspec

from headrace.agents.config import AgentsConfig
from headrace.agents.definition import Definition, Source, load
from headrace.agents.execution import (
    Context,
    Execution,
    Metered,
    Outcome,
    Priority,
    encoded,
    failure,
    stopped,
)
from headrace.agents.postgres_store import PostgresStore
from headrace.agents.store import Agent, AgentStore, Deployment, MemoryStore, Totals, agent_not_found
from headrace.cache import Cache
from headrace.clock import Clock, SystemClock
from headrace.database import Database
from headrace.errors import ExecutionConflict, InvalidRequest, Overloaded
from headrace.events import AgentDeployed, ExecutionFinished, Observer, Silent

_POLL_FIRST_S = 0.02
_POLL_MAX_S = 0.5
_REPORT_S = 0.5

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
        self._executions: dict[tuple[str, str], asyncio.Task[Execution]] = {}
        self._left_behind: set[asyncio.Task[Any]] = set()
        self._threads = ThreadPoolExecutor(self.config.threads_max, thread_name_prefix="headrace-agent")
        self._threads_busy = 0
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
        """Let running executions finish within their grace, write what waits, and close."""
        tasks = [*self._executions.values(), *self._loads.values()]
        if tasks:
            _, pending = await asyncio.wait(tasks, timeout=self.config.cancel_grace_s)
            for task in pending:
                task.cancel()
        for task in self._left_behind:
            task.cancel()
        await asyncio.gather(*tasks, *self._left_behind, return_exceptions=True)
        await self._store.close()
        self._threads.shutdown(wait=False, cancel_futures=True)
        for definition in self._definitions.values():
            definition.unload()
        self._definitions.clear()

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
        # A thread of its own rather than the pool of the agents: a deployment must not wait for busy ones.
        return await asyncio.to_thread(load, source, bytes_max=self.config.source_bytes_max)

    def _remember(self, tenant: str, definition: Definition) -> None:
        self._definitions[tenant, definition.agent_id, definition.version] = definition
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
        definition, execution, deadline_s = await self._accept(
            agent_id, input, execution_id, timeout, priority, tenant
        )
        if execution_id is not None:
            held = await self._claim(execution, input, deadline_s)
            if held is not None:
                return await self._settled(held, execution, within_s=deadline_s)
        return await asyncio.shield(
            self._started(definition, execution, input, deadline_s, is_claimed=bool(execution_id))
        )

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
        definition, execution, deadline_s = await self._accept(
            agent_id, input, execution_id, timeout, priority, tenant
        )
        held = await self._claim(execution, input, deadline_s)
        if held is not None:
            self._same_request(held, execution)
            return held
        self._started(definition, execution, input, deadline_s, is_claimed=True)
        return execution

    async def execution(self, agent_id: str, execution_id: str, *, tenant: str | None = None) -> Execution:
        """An execution, finished or under way."""
        return await self._store.execution(tenant or "default", agent_id, execution_id)

    async def _accept(
        self,
        agent_id: str,
        value: Any,
        execution_id: str | None,
        timeout: float | None,
        priority: Priority,
        tenant: str | None,
    ) -> tuple[Definition, Execution, float]:
        """Everything that can be refused, before anything is written."""
        self._bounded_timeout(timeout)
        if self.running >= self.config.executions_max * _SHARE[priority]:
            raise Overloaded(f"{self.running:,} executions run in this process; no more of priority {priority!r} fit.")
        tenant = tenant or "default"
        definition = await self._definition(await self._in_service(tenant, agent_id))
        if not definition.is_async and self._threads_busy >= self.config.threads_max:
            raise Overloaded(f"All {self.config.threads_max} threads for synchronous agents are busy.")
        execution = Execution(
            id=execution_id or self._new_id(),
            agent_id=agent_id,
            version=definition.version,
            status="running",
            tenant=tenant,
            started_at=self._now(),
        )
        return definition, execution, timeout or definition.timeout_s or self.config.timeout_s

    def _bounded_timeout(self, timeout: float | None) -> None:
        if timeout is not None and not 0 < timeout <= self.config.timeout_max_s:
            raise InvalidRequest(
                f"The timeout is {timeout} s; it must be above 0 and at most {self.config.timeout_max_s:g} s.",
                fix="Ask for less, or raise agents.timeout_max_s.",
            )

    async def _claim(self, execution: Execution, value: Any, deadline_s: float) -> Execution | None:
        """Put the execution on record under its id, with a digest that tells whether a repeat asks for the same."""
        execution.input_sha256 = hashlib.sha256(msgspec.json.encode(value, order="deterministic")).hexdigest()
        lease_until = self._clock.wall() + deadline_s + self.config.cancel_grace_s + self.config.lease_grace_s
        return await self._store.claim(execution, lease_until=lease_until)

    @staticmethod
    def _same_request(held: Execution, asked: Execution) -> None:
        if (held.agent_id, held.input_sha256) != (asked.agent_id, asked.input_sha256):
            raise ExecutionConflict(f"The execution id {asked.id!r} was used with another agent or input.")

    async def _settled(self, held: Execution, asked: Execution, *, within_s: float) -> Execution:
        """The result of an execution that another call started: waited for, never run again."""
        self._same_request(held, asked)
        here = self._executions.get((held.tenant, held.id))
        if here is not None:
            return await asyncio.shield(here)
        give_up_at = self._clock.monotonic() + within_s
        pause = _POLL_FIRST_S
        while not held.is_finished and self._clock.monotonic() < give_up_at:
            await self._clock.sleep(pause)
            pause = min(pause * 2, _POLL_MAX_S)
            held = await self._store.execution(held.tenant, held.agent_id, held.id)
        return held

    def _started(
        self, definition: Definition, execution: Execution, value: Any, deadline_s: float, *, is_claimed: bool
    ) -> asyncio.Task[Execution]:
        """The execution as a task of this host, which a caller who leaves does not end."""
        key = (execution.tenant, execution.id)
        run = self._run(definition, execution, value, deadline_s, is_claimed=is_claimed)
        task = asyncio.get_running_loop().create_task(run)
        self._executions[key] = task
        self.running += 1
        self.started += 1
        task.add_done_callback(partial(self._ended, key))
        return task

    def _ended(self, key: tuple[str, str], task: "asyncio.Task[Execution]") -> None:
        self.running -= 1
        del self._executions[key]
        if not task.cancelled():
            task.exception()  # whoever waits gets it; an execution that nobody waits for reports through its record

    async def _run(
        self, definition: Definition, execution: Execution, value: Any, deadline_s: float, *, is_claimed: bool
    ) -> Execution:
        started = self._clock.monotonic()
        context = Context(execution, self._clock, started + deadline_s)
        reporter = asyncio.get_running_loop().create_task(self._report(execution)) if is_claimed else None
        try:
            outcome = await self._outcome(definition, execution, context, value, deadline_s)
        finally:
            if reporter is not None:
                await stopped(reporter, within_s=self.config.cancel_grace_s)
        execution.status, execution.output_json, execution.error = outcome.status, outcome.output_json, outcome.error
        execution.run_ms = (self._clock.monotonic() - started) * 1000
        execution.finished_at = self._now()
        await self._store.finish(execution)
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
        return execution

    async def _outcome(
        self, definition: Definition, execution: Execution, context: Context, value: Any, deadline_s: float
    ) -> Outcome:
        step = self._in_loop if definition.is_async else self._in_thread
        task = asyncio.get_running_loop().create_task(step(definition, execution, context, value))
        done, _ = await asyncio.wait({task}, timeout=deadline_s)
        if not done:
            if definition.is_async and await stopped(task, within_s=self.config.cancel_grace_s):
                return Outcome("timeout", error=f"It ran longer than {deadline_s:g} s and was stopped.")
            self._left_behind.add(task)
            task.add_done_callback(self._left_behind.discard)
            return Outcome("timeout", error=f"It ran longer than {deadline_s:g} s and has not stopped yet.")
        if task.cancelled():
            return Outcome("cancelled", error="It was cancelled.")
        return task.result()

    async def _in_loop(self, definition: Definition, execution: Execution, context: Context, value: Any) -> Outcome:
        try:
            metered = Metered(definition.make()(value, context))
            try:
                output = await metered
            finally:
                execution.cpu_ms = metered.cpu_s * 1000
        except Exception as error:  # noqa: BLE001 - foreign code: whatever it raises is its result
            return failure(error)
        return encoded(output, bytes_max=self.config.output_bytes_max)

    async def _in_thread(self, definition: Definition, execution: Execution, context: Context, value: Any) -> Outcome:
        self._threads_busy += 1
        try:
            return await asyncio.get_running_loop().run_in_executor(
                self._threads, self._call, definition, execution, context, value
            )
        finally:
            self._threads_busy -= 1

    def _call(self, definition: Definition, execution: Execution, context: Context, value: Any) -> Outcome:
        started = thread_time()
        try:
            output = definition.make()(value, context)
        except Exception as error:  # noqa: BLE001 - foreign code: whatever it raises is its result
            return failure(error)
        finally:
            execution.cpu_ms = (thread_time() - started) * 1000
        return encoded(output, bytes_max=self.config.output_bytes_max)

    async def _report(self, execution: Execution) -> None:
        """Write an execution's progress down now and then, while it runs."""
        reported = execution.progress
        while True:
            await self._clock.sleep(_REPORT_S)
            if execution.progress is not reported:
                reported = execution.progress
                await self._store.report(execution)

    def _now(self) -> float:
        # Whole microseconds, as the store keeps them: a result reads the same at once and later.
        return round(self._clock.wall(), 6)

    def _new_id(self) -> str:
        # Time first, so that new rows land side by side in the index; 80 random bits after it.
        return f"{int(self._clock.wall() * 1000):012x}{os.urandom(10).hex()}"
