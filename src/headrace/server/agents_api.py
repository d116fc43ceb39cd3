"""The agents' part of the HTTP API: deploy, list, look, execute."""

import base64
import binascii
import re
from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta

from headrace.agents import Agent, AgentHost, AgentStatus, Execution, Progress, Totals
from headrace.errors import AgentNotFound, ExecutionNotFound, InvalidRequest
from headrace.server.exchange import Answer, Exchange, Operation, answer

PREFIX = "/api/v1/agents"
AGENT = f"{PREFIX}/{{agent_id}}"
RESERVED = frozenset({"deploy"})
"""Words that stand where an agent's id does in a path."""

# In Python `$` also matches before a newline at the end; in the regular expressions of JSON Schema it does not, and
# they have no `\Z`. This means the same in both.
_END = r"$(?!\n)"
_ID = rf"^[A-Za-z0-9][A-Za-z0-9._-]{{0,127}}{_END}"
_VERSION = rf"^[0-9]{{1,9}}\.[0-9]{{1,9}}\.[0-9]{{1,9}}([-+][0-9A-Za-z.+-]{{1,64}})?{_END}"

Id = Annotated[str, Meta(pattern=_ID, description="Letters, digits, `.`, `_`, `-`.")]
Version = Annotated[str, Meta(pattern=_VERSION, description="A semantic version.")]
Line = Annotated[
    str, Meta(max_length=200, pattern=rf"^[^\x00-\x1f\x7f]*{_END}", description="Text without control characters.")
]


class AgentMetadata(msgspec.Struct, forbid_unknown_fields=True, kw_only=True):
    """Who the agent is."""

    agent_id: Id
    version: Version
    name: Line | None = None
    tags: Annotated[tuple[Line, ...], Meta(max_length=50)] = ()


class AgentConfiguration(msgspec.Struct, forbid_unknown_fields=True, frozen=True, kw_only=True):
    """Limits of its executions."""

    timeout: Annotated[float, Meta(gt=0, description="Seconds.")] | None = None


class AgentCode(msgspec.Struct, forbid_unknown_fields=True, kw_only=True):
    """What it runs."""

    source_code: Annotated[str, Meta(description="Python source, UTF-8, base64.")]
    entrypoint: Annotated[str, Meta(pattern=rf"^[A-Za-z_][A-Za-z0-9_]{{0,127}}{_END}")] = "Agent"
    configuration: AgentConfiguration = AgentConfiguration()


class DeployRequest(msgspec.Struct, forbid_unknown_fields=True, kw_only=True):
    """A version of an agent to put into service."""

    agent_metadata: AgentMetadata
    agent_code: AgentCode


class DeployAnswer(msgspec.Struct, kw_only=True):
    """The version is in service."""

    deployment_id: str
    agent_id: str
    version: str
    status: Literal["deployed"] = "deployed"
    compile_ms: float
    status_url: str
    execute_url: str


class AgentView(msgspec.Struct, kw_only=True):
    """An agent and the version that is in service. Times are seconds since 1970."""

    agent_id: str
    name: str
    tags: tuple[str, ...]
    version: str
    status: str = "active"
    source_sha256: str
    created_at: float
    updated_at: float
    executions: Totals | None = None


class AgentPage(msgspec.Struct, kw_only=True):
    """Agents by id."""

    agents: list[AgentView]
    page: int
    limit: int
    total: int


class PageQuery(msgspec.Struct, forbid_unknown_fields=True, kw_only=True):
    """Which part of a list."""

    page: Annotated[int, Meta(ge=1, le=1_000_000)] = 1
    limit: Annotated[int, Meta(ge=1, le=200)] = 50


class ExecuteRequest(msgspec.Struct, forbid_unknown_fields=True, kw_only=True):
    """An input for the agent."""

    input: Any = None
    execution_id: Annotated[Id, Meta(description="Idempotency key: one execution, one result.")] | None = None
    timeout: Annotated[float, Meta(gt=0, description="Seconds.")] | None = None
    priority: Literal["low", "normal", "high"] = "normal"
    run_async: bool = msgspec.field(name="async", default=False)


class ExecutionView(msgspec.Struct, kw_only=True):
    """An execution. Durations are milliseconds, times seconds since 1970."""

    execution_id: str
    agent_id: str
    version: str
    status: Literal["queued", "running", "completed", "failed", "timeout", "cancelled", "interrupted"]
    output: msgspec.Raw
    error: str | None
    progress: Progress | None
    queue_ms: float
    run_ms: float
    cpu_ms: float
    memory_bytes: int | None
    started_at: float | None
    finished_at: float | None
    status_url: str


_NULL = msgspec.Raw(b"null")
_SHOWN_MAX = 80
"""Characters of a wrong id that its problem repeats."""

_is_id = re.compile(_ID).match
_deploy_decoder = msgspec.json.Decoder(DeployRequest)
_execute_decoder = msgspec.json.Decoder(ExecuteRequest)


class AgentsApi:
    """The agents' operations over one host."""

    def __init__(self, host: AgentHost) -> None:
        self._host = host

    def operations(self) -> tuple[Operation, ...]:
        """Everything that this API can do."""
        return (*self._on_agents(), *self._on_executions())

    def _on_agents(self) -> tuple[Operation, ...]:
        return (
            Operation(
                method="POST",
                path=f"{PREFIX}/deploy",
                name="deployAgent",
                summary="Put a version of an agent into service.",
                handler=self.deploy,
                request=DeployRequest,
                answers={201: DeployAnswer},
                failures=(403, 409, 413, 415, 422, 503),
            ),
            Operation(
                method="GET",
                path=PREFIX,
                name="listAgents",
                summary="The agents, by id.",
                handler=self.list,
                query=PageQuery,
                answers={200: AgentPage},
                failures=(422, 503),
            ),
            Operation(
                method="GET",
                path=f"{AGENT}/status",
                name="agentStatus",
                summary="The version in service and its totals, from the cache.",
                handler=self.status,
                answers={200: AgentStatus},
                failures=(404, 503),
            ),
            Operation(
                method="GET",
                path=AGENT,
                name="getAgent",
                summary="One agent.",
                handler=self.get,
                answers={200: AgentView},
                failures=(404, 503),
            ),
        )

    def _on_executions(self) -> tuple[Operation, ...]:
        return (
            Operation(
                method="POST",
                path=f"{AGENT}/execute",
                name="executeAgent",
                summary="Run the agent; with `async` the answer is 202 and the work goes on.",
                handler=self.execute,
                request=ExecuteRequest,
                answers={200: ExecutionView, 202: ExecutionView},
                failures=(403, 404, 409, 413, 415, 422, 503, 504),
            ),
            Operation(
                method="GET",
                path=f"{AGENT}/executions/{{execution_id}}",
                name="agentExecution",
                summary="One execution, under way or finished.",
                handler=self.execution,
                answers={200: ExecutionView},
                failures=(404, 503),
            ),
        )

    async def deploy(self, exchange: Exchange) -> Answer:
        """Put a version into service."""
        request = await exchange.body(_deploy_decoder)
        metadata, code = request.agent_metadata, request.agent_code
        if metadata.agent_id in RESERVED:
            raise InvalidRequest(
                f"agent_metadata.agent_id is {metadata.agent_id!r}, which is a path of the API.", fix="Choose another."
            )
        try:
            source = base64.b64decode(code.source_code, validate=True).decode()
        except (binascii.Error, ValueError) as error:
            raise InvalidRequest(
                f"agent_code.source_code is no base64 of UTF-8 text: {error}.", fix="base64-encode the source file."
            ) from error
        deployment = await self._host.deploy(
            metadata.agent_id,
            source,
            version=metadata.version,
            entrypoint=code.entrypoint,
            name=metadata.name,
            tags=metadata.tags,
            timeout_s=code.configuration.timeout,
        )
        url = f"{exchange.mounted_at}{PREFIX}/{metadata.agent_id}"
        deployed = DeployAnswer(
            deployment_id=deployment.deployment_id,
            agent_id=metadata.agent_id,
            version=metadata.version,
            compile_ms=deployment.compile_ms,
            status_url=f"{url}/status",
            execute_url=f"{url}/execute",
        )
        return answer(deployed, 201, (b"location", url.encode()))

    async def list(self, exchange: Exchange) -> Answer:
        """A page of agents."""
        query = exchange.query(PageQuery)
        found, total = await self._host.agents(offset=(query.page - 1) * query.limit, limit=query.limit)
        views = [_agent_view(agent, totals) for agent, totals in found]
        return answer(AgentPage(agents=views, page=query.page, limit=query.limit, total=total))

    async def get(self, exchange: Exchange) -> Answer:
        """One agent."""
        return answer(_agent_view(await self._host.agent(_agent_id(exchange))))

    async def status(self, exchange: Exchange) -> Answer:
        """One agent's status."""
        return answer(await self._host.status(_agent_id(exchange)))

    async def execute(self, exchange: Exchange) -> Answer:
        """Run an agent."""
        agent_id = _agent_id(exchange)
        request = await exchange.body(_execute_decoder)
        run = self._host.submit if request.run_async else self._host.execute
        execution = await run(
            agent_id,
            request.input,
            execution_id=request.execution_id,
            timeout=request.timeout,
            priority=request.priority,
        )
        return answer(_execution_view(execution, exchange), 200 if execution.is_finished else 202)

    async def execution(self, exchange: Exchange) -> Answer:
        """One execution."""
        agent_id, execution_id = _agent_id(exchange), exchange.path("execution_id")
        if not _is_id(execution_id):
            raise ExecutionNotFound(f"No execution has the id {_shown(execution_id)}, which breaks the rule for ids.")
        execution = await self._host.execution(agent_id, execution_id)
        return answer(_execution_view(execution, exchange))


def _agent_id(exchange: Exchange) -> str:
    """What stands in the path, if an agent can be called so; the rooms below take ids as they are."""
    agent_id = exchange.path("agent_id")
    if not _is_id(agent_id):
        raise AgentNotFound(f"No agent has the id {_shown(agent_id)}, which breaks the rule for ids.")
    return agent_id


def _shown(text: str) -> str:
    return repr(text) if len(text) <= _SHOWN_MAX else f"{text[:_SHOWN_MAX]!r}…"


def _agent_view(agent: Agent, totals: Totals | None = None) -> AgentView:
    return AgentView(
        agent_id=agent.agent_id,
        name=agent.name,
        tags=agent.tags,
        version=agent.version,
        source_sha256=agent.source_sha256,
        created_at=agent.created_at,
        updated_at=agent.updated_at,
        executions=totals,
    )


def _execution_view(execution: Execution, exchange: Exchange) -> ExecutionView:
    return ExecutionView(
        execution_id=execution.id,
        agent_id=execution.agent_id,
        version=execution.version,
        status=execution.status,
        output=_NULL if execution.output_json is None else msgspec.Raw(execution.output_json),
        error=execution.error,
        progress=execution.progress,
        queue_ms=execution.queue_ms,
        run_ms=execution.run_ms,
        cpu_ms=execution.cpu_ms,
        memory_bytes=execution.memory_bytes,
        started_at=execution.started_at,
        finished_at=execution.finished_at,
        status_url=f"{exchange.mounted_at}{PREFIX}/{execution.agent_id}/executions/{execution.id}",
    )
