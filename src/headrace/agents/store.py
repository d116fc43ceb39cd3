"""Where agents and executions are kept: in memory, for tests and small uses."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import msgspec

from headrace.agents.definition import Source
from headrace.agents.execution import Execution
from headrace.clock import Clock
from headrace.errors import AgentNotFound, ExecutionNotFound, VersionConflict, VersionNotFound


class Agent(msgspec.Struct, frozen=True, kw_only=True):
    """An agent and the version of it that is in service. Times are wall seconds."""

    tenant: str
    agent_id: str
    name: str
    tags: tuple[str, ...] = ()
    version: str
    source_sha256: str
    created_at: float
    updated_at: float


class Totals(msgspec.Struct, frozen=True):
    """Finished executions of an agent over all time."""

    completed: int = 0
    failed: int = 0
    timeout: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Deployment:
    """A version of an agent that entered service."""

    deployment_id: str
    tenant: str
    agent_id: str
    name: str
    tags: tuple[str, ...]
    source: Source
    compile_ms: float


class AgentStore(Protocol):
    """What the host needs of a store. Every write is safe to repeat."""

    async def open(self) -> None:
        """Get ready."""

    async def close(self) -> None:
        """Finish what waits and let go."""

    async def deploy(self, deployment: Deployment) -> Agent:
        """Keep a version and put it into service; the same version with another source is a `VersionConflict`."""

    async def put_in_service(self, tenant: str, agent_id: str, version: str) -> Agent:
        """Switch to a version that was deployed before."""

    async def agent(self, tenant: str, agent_id: str) -> Agent | None:
        """One agent."""

    async def agents(self, tenant: str, *, offset: int, limit: int) -> tuple[list[tuple[Agent, Totals]], int]:
        """A page of agents by id with their totals, and how many there are."""

    async def totals(self, tenant: str, agent_id: str) -> Totals:
        """The finished executions of an agent."""

    async def source(self, tenant: str, agent_id: str, version: str) -> Source:
        """The source of a version."""

    async def claim(self, execution: Execution, *, claim: str, lease_until: float) -> Execution | None:
        """Reserve the execution's id; None if it is ours now, else what that id stands for already.

        To repeat a call with the same `claim` is safe: it is recognised as ours.
        """

    async def report(self, execution: Execution) -> None:
        """Keep the progress of a claimed execution."""

    async def finish(self, execution: Execution) -> None:
        """Keep a finished execution; return when it is durable. The first result of an id stays."""

    async def execution(self, tenant: str, agent_id: str, execution_id: str) -> Execution:
        """An execution; one whose lease ended without a result is `interrupted`."""


def merged(parts: Sequence[Totals]) -> Totals:
    """The sum of several totals."""
    return Totals(
        sum(part.completed for part in parts), sum(part.failed for part in parts), sum(part.timeout for part in parts)
    )


class MemoryStore:
    """Keeps everything in this process, of finished executions the newest `executions_max`; gone when it ends."""

    def __init__(self, *, clock: Clock, executions_max: int = 10_000) -> None:
        self._clock = clock
        self._executions_max = executions_max
        self._claims: dict[tuple[str, str], str] = {}
        self._agents: dict[tuple[str, str], Agent] = {}
        self._versions: dict[tuple[str, str, str], Source] = {}
        self._executions: dict[tuple[str, str], tuple[Execution, float]] = {}
        self._totals: dict[tuple[str, str], Totals] = {}

    async def open(self) -> None:
        """Nothing to open."""

    async def close(self) -> None:
        """Forget everything."""
        self._agents.clear()
        self._versions.clear()
        self._executions.clear()
        self._claims.clear()
        self._totals.clear()

    async def deploy(self, deployment: Deployment) -> Agent:
        """Keep a version and put it into service."""
        source = deployment.source
        key = (deployment.tenant, deployment.agent_id, source.version)
        known = self._versions.setdefault(key, source)
        if known.text != source.text or known.entrypoint != source.entrypoint:
            raise version_conflict(source)
        self._versions[key] = source
        now = self._clock.wall()
        before = self._agents.get(key[:2])
        agent = Agent(
            tenant=deployment.tenant,
            agent_id=deployment.agent_id,
            name=deployment.name,
            tags=deployment.tags,
            version=source.version,
            source_sha256=source.sha256,
            created_at=before.created_at if before else now,
            updated_at=now,
        )
        self._agents[key[:2]] = agent
        return agent

    async def put_in_service(self, tenant: str, agent_id: str, version: str) -> Agent:
        """Switch to a version that was deployed before."""
        agent = self._agents.get((tenant, agent_id))
        if agent is None:
            raise agent_not_found(agent_id)
        source = await self.source(tenant, agent_id, version)
        agent = msgspec.structs.replace(
            agent, version=version, source_sha256=source.sha256, updated_at=self._clock.wall()
        )
        self._agents[tenant, agent_id] = agent
        return agent

    async def agent(self, tenant: str, agent_id: str) -> Agent | None:
        """One agent."""
        return self._agents.get((tenant, agent_id))

    async def agents(self, tenant: str, *, offset: int, limit: int) -> tuple[list[tuple[Agent, Totals]], int]:
        """A page of agents by id."""
        mine = sorted(key for key in self._agents if key[0] == tenant)
        page = [(self._agents[key], self._totals.get(key, Totals())) for key in mine[offset : offset + limit]]
        return page, len(mine)

    async def totals(self, tenant: str, agent_id: str) -> Totals:
        """The finished executions of an agent."""
        return self._totals.get((tenant, agent_id), Totals())

    async def source(self, tenant: str, agent_id: str, version: str) -> Source:
        """The source of a version."""
        source = self._versions.get((tenant, agent_id, version))
        if source is None:
            raise version_not_found(agent_id, version)
        return source

    async def claim(self, execution: Execution, *, claim: str, lease_until: float) -> Execution | None:
        """Reserve the execution's id."""
        key = (execution.tenant, execution.id)
        held = self._executions.get(key)
        if held is not None:
            return None if self._claims.get(key) == claim else self._as_of_now(*held)
        self._executions[key] = (msgspec.structs.replace(execution), lease_until)
        self._claims[key] = claim
        return None

    async def report(self, execution: Execution) -> None:
        """Keep the progress of a claimed execution."""
        held, lease_until = self._executions[execution.tenant, execution.id]
        if not held.is_finished:
            replaced = msgspec.structs.replace(held, status=execution.status, progress=execution.progress)
            self._executions[execution.tenant, execution.id] = (replaced, lease_until)

    async def finish(self, execution: Execution) -> None:
        """Keep a finished execution."""
        key = (execution.tenant, execution.id)
        held = self._executions.get(key)
        if held is not None and held[0].is_finished:
            return
        self._claims.pop(key, None)
        self._executions.pop(key, None)
        self._executions[key] = (msgspec.structs.replace(execution), 0.0)
        self._forget_oldest()
        agent = (execution.tenant, execution.agent_id)
        self._totals[agent] = merged([self._totals.get(agent, Totals()), counted(execution)])

    async def execution(self, tenant: str, agent_id: str, execution_id: str) -> Execution:
        """An execution."""
        held = self._executions.get((tenant, execution_id))
        if held is None or held[0].agent_id != agent_id:
            raise execution_not_found(agent_id, execution_id)
        return self._as_of_now(*held)

    def _forget_oldest(self) -> None:
        """Bound the memory: of finished executions only the newest are kept. Those under way stand in front or not
        at all, since finishing moves an execution to the end."""
        while len(self._executions) > self._executions_max:
            key = next((key for key, (held, _) in self._executions.items() if held.is_finished), None)
            if key is None:
                return
            del self._executions[key]

    def _as_of_now(self, execution: Execution, lease_until: float) -> Execution:
        if not execution.is_finished and self._clock.wall() > lease_until:
            return interrupted(execution)
        return msgspec.structs.replace(execution)


def counted(execution: Execution) -> Totals:
    """What one finished execution adds to its agent's totals."""
    return Totals(
        completed=execution.status == "completed",
        failed=execution.status in {"failed", "interrupted", "cancelled"},
        timeout=execution.status == "timeout",
    )


def interrupted(execution: Execution) -> Execution:
    """An execution whose process ended before it did."""
    return msgspec.structs.replace(
        execution, status="interrupted", error="The process that ran it ended; it may have run in part."
    )


def agent_not_found(agent_id: str) -> AgentNotFound:
    """The error for an agent that is not deployed."""
    return AgentNotFound(f"No agent {agent_id!r} is deployed.")


def version_not_found(agent_id: str, version: str) -> VersionNotFound:
    """The error for a version that was never deployed."""
    return VersionNotFound(f"The agent {agent_id!r} has no version {version!r}.")


def version_conflict(source: Source) -> VersionConflict:
    """The error for a version that stands for another source already."""
    return VersionConflict(f"The agent {source.agent_id!r} has a version {source.version!r} with another source.")


def execution_not_found(agent_id: str, execution_id: str) -> ExecutionNotFound:
    """The error for an execution that nobody started."""
    return ExecutionNotFound(f"The agent {agent_id!r} has no execution {execution_id!r}.")
