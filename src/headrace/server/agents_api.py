"""The agents in service: list them, look at one, its status and its figures, take it out."""

from typing import Annotated, Literal

import msgspec
from msgspec import Meta

from headrace.agents import Agent, AgentHost, AgentStatus, Totals
from headrace.clock import Clock
from headrace.errors import InvalidRequest
from headrace.server.agent_figures import SECONDS, AgentFigures, Figures, Granularity
from headrace.server.agent_paths import AGENT, PREFIX, Line, Version, agent_id_of
from headrace.server.exchange import Answer, Exchange, Operation, answer

ENVIRONMENT = "environment:"
"""Begins the tag that names the environment of an agent."""

_SCANNED_MAX = 20_000
"""Agents that a filtered list looks at."""
_SCAN = 1_000


class Trial(msgspec.Struct, frozen=True, kw_only=True):
    """A version on trial beside the one in service."""

    version: str
    traffic_percentage: float
    deployment_id: str


class AgentView(msgspec.Struct, kw_only=True):
    """An agent and the version that is in service. Times are seconds since 1970."""

    agent_id: str
    name: str
    tags: tuple[str, ...]
    environment: str | None
    version: str
    status: Literal["active", "testing"]
    """`testing` while a version is on trial."""
    canary: Trial | None
    aliases: dict[str, str]
    source_sha256: str
    created_at: float
    updated_at: float
    executions: Totals | None = None
    capabilities: msgspec.Raw
    """What the version in service says that it can do; only of a single agent."""


class AgentPage(msgspec.Struct, kw_only=True):
    """Agents by id."""

    agents: list[AgentView]
    page: int
    limit: int
    total: int


class AgentsQuery(msgspec.Struct, forbid_unknown_fields=True, kw_only=True):
    """Which agents, and which part of their list."""

    page: Annotated[int, Meta(ge=1, le=1_000_000)] = 1
    limit: Annotated[int, Meta(ge=1, le=200)] = 50
    tag: Line | None = None
    environment: Line | None = None
    status: Literal["active", "testing"] | None = None

    @property
    def has_filter(self) -> bool:
        """Whether some agents may be left out."""
        return not (self.tag is self.environment is self.status is None)

    def takes(self, view: AgentView) -> bool:
        """Whether an agent is asked for."""
        return (
            (self.tag is None or self.tag in view.tags)
            and self.environment in {None, view.environment}
            and self.status in {None, view.status}
        )


class Undeployed(msgspec.Struct, kw_only=True):
    """An agent that is out of service. Its versions and executions stay on record."""

    agent_id: str
    cancelled: int
    """Queued executions that were cancelled; those under way end."""


class MetricsQuery(msgspec.Struct, forbid_unknown_fields=True, kw_only=True):
    """Which window, in seconds since 1970; without a beginning, the last 60 steps."""

    granularity: Granularity = "1m"
    since: Annotated[float, Meta(ge=0, le=1e11)] | None = None
    until: Annotated[float, Meta(ge=0, le=1e11)] | None = None
    version: Version | None = None


class Metrics(msgspec.Struct, kw_only=True):
    """Figures by step, oldest first; steps in which nothing ended are left out."""

    agent_id: str
    granularity: Granularity
    since: float
    until: float
    steps: list[Figures]


class AgentsApi:
    """The operations on agents over one host."""

    def __init__(self, host: AgentHost, figures: AgentFigures, *, clock: Clock) -> None:
        self._host = host
        self._figures = figures
        self._clock = clock

    def operations(self) -> tuple[Operation, ...]:
        """Everything that this API can do."""
        return (
            Operation(
                method="GET",
                path=PREFIX,
                name="listAgents",
                summary="The agents, by id.",
                handler=self.list,
                permission="agent:monitor",
                query=AgentsQuery,
                answers={200: AgentPage},
                failures=(422, 503),
            ),
            Operation(
                method="GET",
                path=f"{AGENT}/status",
                name="agentStatus",
                summary="The version in service and its totals, from the cache.",
                handler=self.status,
                permission="agent:monitor",
                answers={200: AgentStatus},
                failures=(404, 503),
            ),
            Operation(
                method="GET",
                path=AGENT,
                name="getAgent",
                summary="One agent.",
                handler=self.get,
                permission="agent:monitor",
                answers={200: AgentView},
                failures=(404, 503),
            ),
            Operation(
                method="DELETE",
                path=AGENT,
                name="undeployAgent",
                summary="Take an agent out of service.",
                handler=self.undeploy,
                permission="agent:delete",
                answers={200: Undeployed},
                failures=(403, 404, 503),
            ),
            Operation(
                method="GET",
                path=f"{AGENT}/metrics",
                name="agentMetrics",
                summary="Counts, error rates and percentiles over time.",
                handler=self.metrics,
                permission="agent:monitor",
                query=MetricsQuery,
                answers={200: Metrics},
                failures=(404, 409, 422, 503),
            ),
        )

    async def list(self, exchange: Exchange) -> Answer:
        """A page of agents."""
        query = exchange.query(AgentsQuery)
        first = (query.page - 1) * query.limit
        if query.has_filter:
            found = await _filtered(self._host, exchange.tenant, query)
            views, total = found[first : first + query.limit], len(found)
        else:
            page, total = await self._host.agents(tenant=exchange.tenant, offset=first, limit=query.limit)
            views = [agent_view(agent, totals) for agent, totals in page]
        return answer(AgentPage(agents=views, page=query.page, limit=query.limit, total=total))

    async def get(self, exchange: Exchange) -> Answer:
        """One agent."""
        agent_id, tenant = agent_id_of(exchange), exchange.tenant
        agent = await self._host.agent(agent_id, tenant=tenant)
        view = agent_view(agent)
        version = await self._host.version(agent_id, agent.version, tenant=tenant)
        if version.capabilities is not None:
            view.capabilities = version.capabilities
        return answer(view)

    async def status(self, exchange: Exchange) -> Answer:
        """One agent's status."""
        return answer(await self._host.status(agent_id_of(exchange), tenant=exchange.tenant))

    async def undeploy(self, exchange: Exchange) -> Answer:
        """Take an agent out of service."""
        agent_id = agent_id_of(exchange)
        cancelled = await self._host.undeploy(agent_id, tenant=exchange.tenant)
        return answer(Undeployed(agent_id=agent_id, cancelled=cancelled))

    async def metrics(self, exchange: Exchange) -> Answer:
        """Figures over time."""
        agent_id, tenant = agent_id_of(exchange), exchange.tenant
        query = exchange.query(MetricsQuery)
        await self._host.agent(agent_id, tenant=tenant)
        until = self._clock.wall() if query.until is None else query.until
        since = until - 60 * SECONDS[query.granularity] if query.since is None else query.since
        steps = await self._figures.read(
            tenant, agent_id, since=since, until=until, granularity=query.granularity, version=query.version
        )
        return answer(Metrics(agent_id=agent_id, granularity=query.granularity, since=since, until=until, steps=steps))


def agent_view(agent: Agent, totals: Totals | None = None) -> AgentView:
    """An agent as the API shows it."""
    canary = None
    if agent.canary is not None:
        share = round(agent.canary.share * 100, 6)
        canary = Trial(version=agent.canary.version, traffic_percentage=share, deployment_id=agent.canary.trial)
    environments = (tag.removeprefix(ENVIRONMENT) for tag in agent.tags if tag.startswith(ENVIRONMENT))
    return AgentView(
        agent_id=agent.agent_id,
        name=agent.name,
        tags=agent.tags,
        environment=next(environments, None),
        version=agent.version,
        status="active" if canary is None else "testing",
        canary=canary,
        aliases=agent.aliases,
        source_sha256=agent.source_sha256,
        created_at=agent.created_at,
        updated_at=agent.updated_at,
        executions=totals,
        capabilities=msgspec.Raw(b"null"),
    )


async def _filtered(host: AgentHost, tenant: str, query: AgentsQuery) -> list[AgentView]:
    found: list[AgentView] = []
    for offset in range(0, _SCANNED_MAX, _SCAN):
        page, total = await host.agents(tenant=tenant, offset=offset, limit=_SCAN)
        if total > _SCANNED_MAX:
            raise InvalidRequest(
                f"There are {total:,} agents; lists of more than {_SCANNED_MAX:,} are not filtered.",
                fix="Walk through the unfiltered pages.",
            )
        found += filter(query.takes, (agent_view(agent, totals) for agent, totals in page))
        if offset + _SCAN >= total:
            break
    return found
