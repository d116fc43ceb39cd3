"""The door of the agent room: deploy source, execute it, look at what happened."""

import asyncio
import os
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack
from functools import partial
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

import msgspec

from headrace.agents.acceptance import Acceptance, Request
from headrace.agents.admission import Admission
from headrace.agents.callbacks import Callbacks
from headrace.agents.code.compilation import CodePolicy
from headrace.agents.config import AgentsConfig, Isolation, TierConfig
from headrace.agents.definition import Source
from headrace.agents.execution import Execution, Priority, timed_id
from headrace.agents.isolated import IsolatedVersions
from headrace.agents.isolation import Limits
from headrace.agents.nodes import BEATS_IN_A_LEASE, Membership
from headrace.agents.places import Places
from headrace.agents.queue import Queue
from headrace.agents.rollout import RolloutPolicy
from headrace.agents.running.guard import Guard
from headrace.agents.running.run import Run
from headrace.agents.running.runs import Runs
from headrace.agents.running.states import States
from headrace.agents.running.streams import Emitted, Streams
from headrace.agents.running.turnstile import Turnstile
from headrace.agents.shelf import Shelf
from headrace.agents.store import Agent, AgentStore, Deployment, Submission, Totals, Version, agent_not_found
from headrace.agents.stores.memory import MemoryStore
from headrace.agents.threads import DaemonThreads
from headrace.agents.trials import Trials
from headrace.agents.versions import Versions
from headrace.clock import Clock, SystemClock
from headrace.errors import BackendError, InvalidRequest, IsolationUnavailable
from headrace.events import Observer, Silent

if TYPE_CHECKING:  # drivers are loaded when a host is made that needs them, not with this room
    from headrace.agents.code.cache import CodeCache
    from headrace.cache import Cache
    from headrace.database import Database

_IDEMPOTENT_ATTEMPTS = 3
_TURN = 32
"""Executions that begin or end in one turn of the event loop; each takes some tens of microseconds."""


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

    `code_cache` is closed by whoever gave it; without one there is one of its own, as `config` says.
    `tier_of` names the tier of a tenant, for those that `AgentsConfig.tenants` does not; `writer` tells this process
    from the others on the database.
    """

    def __init__(
        self,
        config: AgentsConfig | None = None,
        *,
        cache: "Cache | None" = None,
        database: "Database | None" = None,
        observer: Observer | None = None,
        clock: Clock | None = None,
        writer: str = "0",
        store: AgentStore | None = None,
        code_cache: "CodeCache | None" = None,
        tier_of: Callable[[str], str | None] | None = None,
    ) -> None:
        self.config = config = config or AgentsConfig()
        self._clock = clock = clock or SystemClock()
        self._observer = observer = observer or Silent()
        self._cache = cache
        self._store = store = store or self._make_store(database, writer)
        self._owns_code_cache = code_cache is None
        self.code_cache = code_cache = code_cache or self._make_code_cache()
        """What compiles the trusted sources, and shares all of them."""
        self._isolated = IsolatedVersions(config, clock=clock, observer=observer)
        self._turnstile = Turnstile(_TURN)
        self.guard = Guard(config, clock=clock, observer=observer)
        """Interrupts agents that hold the event loop, once it is armed; the workers of `headrace up` do that."""
        self._threads = DaemonThreads(config.threads_max, name="headrace-agent")
        self._shelf = Shelf(config, self._isolated, code_cache, clock=clock)
        self._versions = Versions(config, store, self._shelf, code_cache=code_cache, cache=cache, observer=observer)
        self._places = Places(config, self._threads)
        self._admission = Admission(_tiers(config, tier_of), queued_max=config.queued_max)
        self._streams = Streams(store, config, clock=clock)
        self._states = States(store, config, clock=clock)
        self._callbacks = Callbacks(store, config, clock=clock, observer=observer)
        self._runs = self._make_runs()
        self._trials = self._make_trials(writer)
        self._runs.trials = self._trials
        self._membership = Membership(
            store,
            config,
            self._admission,
            name=writer,
            clock=clock,
            observer=observer,
            cancel=lambda key: self._acceptance.stop(key),
            interrupt=self._runs.interrupt,
            known=lambda: [*self._runs.known(), *self._acceptance.claims.values(), *self._queue.starting()],
        )
        self._acceptance = self._make_acceptance()
        self._queue = Queue(
            store,
            config,
            places=self._places,
            admission=self._admission,
            membership=self._membership,
            start=self._acceptance.start,
        )

    def _make_store(self, database: "Database | None", writer: str) -> AgentStore:
        if database is None:
            return MemoryStore(clock=self._clock)
        from headrace.agents.stores.postgres import PostgresStore

        return PostgresStore(database, self.config, writer=writer, clock=self._clock, observer=self._observer)

    def _make_code_cache(self) -> "CodeCache":
        from headrace.agents.code.cache import CodeCache

        return CodeCache(
            self.config.code_directory,
            bytes_max=self.config.code_bytes_max,
            disk_bytes_max=4 * self.config.code_bytes_max,
            policy=CodePolicy(source_bytes_max=self.config.source_bytes_max),
            cache=self._cache,
            observer=self._observer,
            clock=self._clock,
        )

    def _make_runs(self) -> Runs:
        return Runs(
            self._store,
            self.config,
            places=self._places,
            admission=self._admission,
            shelf=self._shelf,
            streams=self._streams,
            states=self._states,
            threads=self._threads,
            turnstile=self._turnstile,
            clock=self._clock,
            observer=self._observer,
            ended=self._ended,
            doubt=lambda shard: self._membership.doubt(shard),
        )

    def _make_trials(self, writer: str) -> Trials:
        return Trials(
            self._store,
            self._versions,
            RolloutPolicy(
                runs_min=self.config.canary_runs_min,
                failure_margin=self.config.canary_failure_margin,
                slowdown_max=self.config.canary_slowdown_max,
            ),
            writer=f"{writer}-{os.urandom(4).hex()}",
            spawn=self._runs.spawn,
        )

    def _make_acceptance(self) -> Acceptance:
        return Acceptance(
            self._store,
            self.config,
            versions=self._versions,
            runs=self._runs,
            places=self._places,
            admission=self._admission,
            states=self._states,
            membership=self._membership,
            turnstile=self._turnstile,
            guard=self.guard,
            clock=self._clock,
            new_id=self._new_id,
        )

    @property
    def running(self) -> int:
        """Executions under way in this process."""
        return self._places.running

    @property
    def started(self) -> int:
        """Executions that began in this process."""
        return self._runs.started

    async def __aenter__(self) -> Self:
        """Open the store, join the other nodes, begin to take what is queued."""
        try:
            await self._store.open()
            await self._membership.open()
            self._runs.open()
            self._runs.spawn(self._exchange_counts())
            self._runs.spawn(self._open_isolation())
            self._callbacks.open()
            await self._queue.open()
        except BaseException:
            await self._close()
            raise
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Take no more, let running executions end, put those that do not on record as interrupted, and close."""
        await self._close()

    async def _close(self) -> None:
        """Close every part, from the last line to the first, whatever becomes of the others."""
        async with AsyncExitStack() as parts:
            if self._owns_code_cache:
                parts.push_async_callback(asyncio.to_thread, self.code_cache.close)
            parts.push_async_callback(self._isolated.close)
            parts.push_async_callback(self._shelf.close)
            parts.callback(self._threads.close)
            parts.push_async_callback(self._store.close)
            parts.push_async_callback(self._membership.close)
            parts.push_async_callback(self._runs.close)
            parts.push_async_callback(self._acceptance.close)
            parts.push_async_callback(self._callbacks.close)
            parts.push_async_callback(self._runs.drain)
            parts.push_async_callback(self._acceptance.settle)
            parts.push_async_callback(self._queue.close)

    # -- deployments -----------------------------------------------------------------------------------------------

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
        dependencies: tuple[str, ...] | None = None,
        idempotent: bool = False,
        attempts_max: int | None = None,
        canary: float | None = None,
        isolation: Isolation | None = None,
        limits: Limits | None = None,
        tenant: str | None = None,
    ) -> Deployment:
        """Load, start and check a version, keep it, and put it into service.

        With `canary`, a share between 0 and 1, it is put on trial beside the version in service instead: it gets that
        share of the executions until `promote` or `abort`, or until it is surely worse and the trial ends by itself.
        An `idempotent` agent may be run again for the same execution after a failure or the death of its process, up
        to `attempts_max` times in all.

        A version with `isolation="process"` is loaded, checked and executed in processes without rights, within
        `limits`, and nowhere else: `IsolationUnavailable` names the parts that this machine lacks for it. `trusted`
        runs in this one, if `agents.trusted_allowed`.

        Raises `AgentInvalid` when it does not load, `AgentUnhealthy` when its `start` or `check` fails, and
        `VersionConflict` when this version stands for another source, isolation or limits; the version in service is
        unchanged then. Deploying the same version again is harmless.
        """
        tenant = tenant or "default"
        described = self._described(
            Source(
                agent_id=agent_id,
                version=version,
                text=source,
                entrypoint=entrypoint,
                timeout_s=timeout_s,
                dependencies=dependencies or (),
            ),
            idempotent=idempotent,
            attempts_max=attempts_max,
            isolation=isolation,
            limits=limits,
        )
        if canary is not None:
            if not 0 < canary < 1:
                raise InvalidRequest(f"The share of the canary is {canary}; it must be between 0 and 1.")
            await self._versions.in_service(tenant, agent_id)
        return await self._deploy(tenant, described, name=name or agent_id, tags=tags, canary=canary)

    async def rollback(self, agent_id: str, version: str, *, tenant: str | None = None) -> Agent:
        """Put a version that was deployed before back into service; a trial ends."""
        return await self._versions.rollback(tenant or "default", agent_id, version)

    async def promote(self, agent_id: str, *, tenant: str | None = None) -> Agent:
        """Put the version on trial into service. Raises `TrialNotFound` when there is none."""
        return await self._versions.promote(tenant or "default", agent_id)

    async def abort(self, agent_id: str, *, reason: str = "by hand", tenant: str | None = None) -> Agent:
        """End the trial; the version in service gets everything again. Raises `TrialNotFound` when there is none."""
        return await self._versions.abort_by_hand(tenant or "default", agent_id, reason=reason)

    async def alias(self, agent_id: str, alias: str, version: str | None, *, tenant: str | None = None) -> Agent:
        """Let a name stand for a version in `execute(version=name)`; None removes it."""
        return await self._versions.alias(tenant or "default", agent_id, alias, version)

    async def undeploy(self, agent_id: str, *, tenant: str | None = None) -> int:
        """Take an agent out of service. Executions under way end, queued ones are cancelled: how many.

        Its versions and executions stay on record; deploying one of the versions again puts it back.
        """
        return await self._versions.undeploy(tenant or "default", agent_id)

    async def version(self, agent_id: str, version: str, *, tenant: str | None = None) -> Version:
        """A version as it was deployed, with its capabilities."""
        return await self._versions.version(tenant or "default", agent_id, version)

    async def agent(self, agent_id: str, *, tenant: str | None = None, fresh: bool = False) -> Agent:
        """The agent, with the version that is in service.

        With a cache it may be up to a second old; `fresh` is for who decides by it what to switch to.
        """
        return await self._versions.in_service(tenant or "default", agent_id, fresh=fresh)

    async def load(self, agent_id: str, *, tenant: str | None = None) -> None:
        """Have the version in service loaded in this process, before it is first executed or instantiated here."""
        await self._versions.choose(tenant or "default", agent_id, "", None)

    def instantiate(self, agent_id: str, *, tenant: str | None = None) -> Any:
        """A fresh instance of the agent, as every execution gets one: an object of its class, or its function.

        All instances share the definition. It is of the version that this process saw in service last; raises
        `AgentNotFound` when that is not loaded here, which `load`, `deploy` or an execution changes.
        """
        return self._versions.instance(tenant or "default", agent_id)

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

    # -- executions ------------------------------------------------------------------------------------------------

    async def execute(
        self,
        agent_id: str,
        input: Any,
        *,
        execution_id: str | None = None,
        timeout: float | None = None,
        priority: Priority = "normal",
        tenant: str | None = None,
        version: str | None = None,
        instance: str | None = None,
    ) -> Execution:
        """Run an agent to its end and return the finished, durable execution.

        An `execution_id` is an idempotency key: the first call runs, any other with the same agent and input, at the
        same time or later, on any node, gets that run's result; with another input it is an `ExecutionConflict`. The
        agent's own failure is an execution with status `failed`, not an exception here. An execution that is not over
        when `timeout` is, because it waits for another attempt, is returned as it is then.

        `version` is a version or an alias; without it, the version in service or on trial. `instance` names whose
        `context.state` it gets; executions of one instance take turns.

        Raises `Overloaded` when the process is full, `RateLimited` when the tenant's tier allows no more.
        """
        request = Request(agent_id, input, execution_id, timeout, priority, tenant or "default", version, instance)
        begun = await self._acceptance.execute(request)
        del request
        return await begun.end() if isinstance(begun, Run) else begun

    async def submit(
        self,
        agent_id: str,
        input: Any,
        *,
        execution_id: str | None = None,
        timeout: float | None = None,
        priority: Priority = "normal",
        tenant: str | None = None,
        version: str | None = None,
        instance: str | None = None,
        callback_url: str | None = None,
    ) -> Execution:
        """Queue an execution and return it; `execution` tells how it goes, `events` what it says.

        It is on record before this returns and survives every process: any node runs it. One that had begun when its
        node died is `interrupted`, or tried again if its agent is idempotent. `callback_url` gets a signed POST when
        it has ended. Raises `Overloaded` when the tenant's queue is full.
        """
        tenant = tenant or "default"
        if callback_url is not None:
            self._callbacks.check(tenant, callback_url)
        request = Request(agent_id, input, execution_id, timeout, priority, tenant, version, instance, callback_url)
        execution, threaded = await self._acceptance.submit(request)
        self._queue.wake(self._store.shard_of(tenant), threaded=threaded)
        return execution

    async def execution(self, agent_id: str, execution_id: str, *, tenant: str | None = None) -> Execution:
        """An execution, finished or under way."""
        return await self._store.execution(tenant or "default", agent_id, execution_id)

    async def cancel(self, execution_id: str, *, agent_id: str | None = None, tenant: str | None = None) -> Execution:
        """Cancel an execution, wherever it is; what it is now.

        A queued one is `cancelled` at once. One that runs is `cancelling` until its work has stopped: on this node
        that is waited for up to `cancel_grace_s`; another node hears of it with its next beat. A synchronous agent
        stops when its function returns. A finished one stays as it is.
        """
        return await self._acceptance.cancel(tenant or "default", agent_id, execution_id)

    async def events(
        self, execution_id: str, *, after: int | None = None, agent_id: str | None = None, tenant: str | None = None
    ) -> AsyncIterator[Emitted]:
        """What an execution emits, beginning after the event with the id `after`, until it has ended.

        The newest `events_max` are kept; a reader that comes or falls behind them is told by `dropped` how many it
        missed. Submitted executions can be read from any process, direct ones where they run.
        """
        key = (tenant or "default", execution_id)
        run = self._runs.find(key)
        if run is None or agent_id not in {None, run.execution.agent_id}:
            await self._store.execution(key[0], agent_id, execution_id)
        else:
            self._streams.of(run.execution, is_durable=self._runs.is_durable(key))
        async for event in self._streams.read(*key, after=after or 0):
            yield event

    # -- inside ----------------------------------------------------------------------------------------------------

    def _ended(self, submission: Submission | None) -> None:
        self._queue.place_is_free()
        if submission is not None and submission.callback_url is not None:
            self._callbacks.wake()

    def _described(
        self,
        source: Source,
        *,
        idempotent: bool,
        attempts_max: int | None,
        isolation: Isolation | None,
        limits: Limits | None,
    ) -> Version:
        """What is to be deployed, if it may be asked for."""
        self._acceptance.bounded_timeout(source.timeout_s)
        isolation = isolation or self.config.isolation_default
        if limits is not None and isolation == "trusted":
            raise InvalidRequest(
                "Limits are of isolated workers; this version would run in the host.",
                fix="Deploy it with isolation `process`, or without limits.",
            )
        return Version(
            source=source,
            is_idempotent=idempotent,
            attempts_max=self._attempts(attempts_max, idempotent=idempotent),
            isolation=isolation,
            limits=limits,
        )

    async def _deploy(
        self, tenant: str, version: Version, *, name: str, tags: tuple[str, ...], canary: float | None
    ) -> Deployment:
        started = self._clock.monotonic()
        loaded = await self._shelf.load(tenant, version)
        compile_ms = (self._clock.monotonic() - started) * 1000
        deployment = Deployment(
            deployment_id=f"dep_{self._new_id()}",
            tenant=tenant,
            agent_id=version.source.agent_id,
            name=name,
            tags=tags,
            source=version.source,
            compile_ms=compile_ms,
            is_idempotent=version.is_idempotent,
            attempts_max=version.attempts_max,
            capabilities=await self._shelf.capabilities(loaded),
            isolation=version.isolation,
            limits=version.limits,
            canary=canary,
        )
        await self._versions.deploy(deployment, loaded)
        return deployment

    async def _open_isolation(self) -> None:
        """Have warm workers before the first execution asks for one."""
        try:
            if await self._store.has_isolated():
                await self._isolated.open()
        except (BackendError, IsolationUnavailable):
            return  # whoever executes such a version gets the reason

    async def _exchange_counts(self) -> None:
        while True:
            await self._clock.sleep(self.config.node_lease_s / BEATS_IN_A_LEASE)
            await self._trials.exchange()

    def _attempts(self, asked: int | None, *, idempotent: bool) -> int:
        attempts = (_IDEMPOTENT_ATTEMPTS if idempotent else 1) if asked is None else asked
        if not 1 <= attempts <= self.config.attempts_max:
            raise InvalidRequest(f"attempts_max is {attempts}; it must be between 1 and {self.config.attempts_max}.")
        if attempts > 1 and not idempotent:
            raise InvalidRequest(
                f"attempts_max is {attempts}, but the agent is not declared idempotent.",
                fix="Deploy it with idempotent=True if running it twice does no harm.",
            )
        return attempts

    def _new_id(self) -> str:
        # Time first, so that new rows land side by side in the index.
        return timed_id(self._clock.wall())


def _tiers(config: AgentsConfig, tier_of: Callable[[str], str | None] | None) -> Callable[[str], TierConfig | None]:
    tiers = {tier.name: tier for tier in config.tiers}
    named = {tenant.name: tenant.tier for tenant in config.tenants if tenant.tier is not None}

    def find(tenant: str) -> TierConfig | None:
        name = named.get(tenant) or (tier_of(tenant) if tier_of is not None else None) or config.tier_default
        return None if name is None else tiers.get(name)

    return find
