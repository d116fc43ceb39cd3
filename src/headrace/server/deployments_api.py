"""How versions come into service over HTTP: deploy, update, canary, roll back, and the record of it."""

from dataclasses import replace
from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta

from headrace.agents import Agent, AgentHost
from headrace.agents.execution import timed_id
from headrace.clock import Clock
from headrace.errors import AgentNotFound, CallerError, DeploymentNotFound, InvalidRequest, VersionNotFound
from headrace.server import deployments
from headrace.server.agent_figures import AgentFigures
from headrace.server.agent_paths import (
    AGENT,
    DEPLOYMENT,
    PREFIX,
    RESERVED,
    VERSION,
    agent_id_of,
    deployment_id_of,
    version_of,
)
from headrace.server.agents_api import AgentView, agent_view
from headrace.server.deploy_request import AgentCode, AliasRequest, DeployRequest, RollbackRequest, UpdateRequest
from headrace.server.deployment_store import DeploymentStore, Phase, Record
from headrace.server.deployments import DeploymentView
from headrace.server.exchange import Answer, Exchange, Operation, answer

_ALIAS = f"{AGENT}/aliases/{{alias}}"


class DeployAnswer(msgspec.Struct, kw_only=True):
    """The version is in service, or on trial."""

    deployment_id: str
    agent_id: str
    version: str
    status: Literal["deployed", "deploying"]
    compile_ms: float
    status_url: str
    execute_url: str
    deployment_url: str


class DeploymentPage(msgspec.Struct, kw_only=True):
    """Deployments, newest first."""

    deployments: list[DeploymentView]
    page: int
    limit: int
    total: int


class PageQuery(msgspec.Struct, forbid_unknown_fields=True, kw_only=True):
    """Which part of a list."""

    page: Annotated[int, Meta(ge=1, le=1_000_000)] = 1
    limit: Annotated[int, Meta(ge=1, le=200)] = 50


class VersionView(msgspec.Struct, kw_only=True):
    """A version as it was deployed; what it stands for never changes."""

    agent_id: str
    version: str
    source_sha256: str
    entrypoint: str
    timeout: float | None
    dependencies: tuple[str, ...]
    idempotent: bool
    attempts_max: int
    isolation: Literal["trusted", "process"]
    memory_limit: int | None
    """MiB, of an isolated worker; None: `agents.limits`."""
    is_in_service: bool


_deploy_decoder = msgspec.json.Decoder(DeployRequest)
_update_decoder = msgspec.json.Decoder(UpdateRequest)
_rollback_decoder = msgspec.json.Decoder(RollbackRequest)
_alias_decoder = msgspec.json.Decoder(AliasRequest)


class DeploymentsApi:
    """The operations on versions and deployments over one host."""

    def __init__(self, host: AgentHost, store: DeploymentStore, figures: AgentFigures, *, clock: Clock) -> None:
        self._host = host
        self._store = store
        self._figures = figures
        self._clock = clock

    def operations(self) -> tuple[Operation, ...]:
        """Everything that this API can do."""
        return (*self._on_versions(), *self._on_names(), *self._on_deployments())

    def _on_versions(self) -> tuple[Operation, ...]:
        return (
            Operation(
                method="POST",
                path=f"{PREFIX}/deploy",
                name="deployAgent",
                summary="Put a version of an agent into service, or on trial beside the one that is.",
                handler=self.deploy,
                permission="agent:deploy",
                request=DeployRequest,
                answers={201: DeployAnswer},
                failures=(403, 404, 409, 413, 415, 422, 503),
            ),
            Operation(
                method="PUT",
                path=VERSION,
                name="updateAgent",
                summary="Switch to a version at once (blue_green), or try it with a share (canary); blue_green of the"
                " version on trial promotes it.",
                handler=self.update,
                permission="agent:update",
                request=UpdateRequest,
                answers={200: DeployAnswer},
                failures=(403, 404, 409, 413, 415, 422, 503),
            ),
            Operation(
                method="GET",
                path=VERSION,
                name="getVersion",
                summary="One version.",
                handler=self.version,
                permission="agent:monitor",
                answers={200: VersionView},
                failures=(404, 503),
            ),
            Operation(
                method="POST",
                path=f"{AGENT}/rollback",
                name="rollbackAgent",
                summary="Back to a version, or one step back: a trial ends, else what served before serves again.",
                handler=self.rollback,
                permission="agent:update",
                request=RollbackRequest,
                answers={200: AgentView},
                failures=(403, 404, 415, 422, 503),
            ),
        )

    def _on_names(self) -> tuple[Operation, ...]:
        return (
            Operation(
                method="PUT",
                path=_ALIAS,
                name="setAlias",
                summary="Let a name stand for a version in execute.",
                handler=self.set_alias,
                permission="agent:update",
                request=AliasRequest,
                answers={200: AgentView},
                failures=(403, 404, 415, 422, 503),
            ),
            Operation(
                method="DELETE",
                path=_ALIAS,
                name="deleteAlias",
                summary="Let a name stand for no version.",
                handler=self.delete_alias,
                permission="agent:update",
                answers={200: AgentView},
                failures=(403, 404, 422, 503),
            ),
        )

    def _on_deployments(self) -> tuple[Operation, ...]:
        return (
            Operation(
                method="GET",
                path=f"{AGENT}/deployments",
                name="listDeployments",
                summary="How its versions came into service, newest first.",
                handler=self.list,
                permission="agent:monitor",
                query=PageQuery,
                answers={200: DeploymentPage},
                failures=(404, 422, 503),
            ),
            Operation(
                method="GET",
                path=DEPLOYMENT,
                name="getDeployment",
                summary="One deployment: its phases, and how its version does since.",
                handler=self.get,
                permission="agent:monitor",
                answers={200: DeploymentView},
                failures=(404, 503),
            ),
        )

    async def deploy(self, exchange: Exchange) -> Answer:
        """Put a version into service."""
        request = await exchange.body(_deploy_decoder)
        metadata = request.agent_metadata
        if metadata.agent_id in RESERVED:
            raise InvalidRequest(
                f"agent_metadata.agent_id is {metadata.agent_id!r}, which is a path of the API.", fix="Choose another."
            )
        request.check(self._host.config)
        draft = self._draft(exchange, metadata.agent_id, metadata.version, share=request.deployment_config.share)
        deployed = await self._deployed(exchange, draft, request.agent_code, name=metadata.name, tags=request.tags)
        url = f"{exchange.mounted_at}{PREFIX}/{metadata.agent_id}"
        return answer(deployed, 201, (b"location", url.encode()))

    async def update(self, exchange: Exchange) -> Answer:
        """Switch to a version, or try it."""
        agent_id, version, tenant = agent_id_of(exchange), version_of(exchange), exchange.tenant
        request = await exchange.body(_update_decoder)
        request.check(self._host.config)
        agent = await self._host.agent(agent_id, tenant=tenant, fresh=True)
        is_on_trial = agent.canary is not None and agent.canary.version == version
        if request.strategy == "blue_green" and request.agent_code is None and is_on_trial:
            return await self._promote(exchange, agent)
        draft = self._draft(exchange, agent_id, version, share=request.share)
        return answer(await self._deployed(exchange, draft, request.agent_code, name=agent.name, tags=agent.tags))

    async def version(self, exchange: Exchange) -> Answer:
        """One version."""
        agent_id, tenant = agent_id_of(exchange), exchange.tenant
        agent = await self._host.agent(agent_id, tenant=tenant)
        version = await self._host.version(agent_id, version_of(exchange), tenant=tenant)
        source = version.source
        found = VersionView(
            agent_id=agent_id,
            version=source.version,
            source_sha256=source.sha256,
            entrypoint=source.entrypoint,
            timeout=source.timeout_s,
            dependencies=source.dependencies,
            idempotent=version.is_idempotent,
            attempts_max=version.attempts_max,
            isolation=version.isolation,
            memory_limit=None if version.limits is None else version.limits.memory_bytes >> 20,
            is_in_service=agent.version == source.version,
        )
        return answer(found)

    async def rollback(self, exchange: Exchange) -> Answer:
        """One step back, or to a version."""
        agent_id, tenant = agent_id_of(exchange), exchange.tenant
        request = await exchange.body(_rollback_decoder)
        agent = await self._host.agent(agent_id, tenant=tenant, fresh=True)
        if request.version is None and agent.canary is not None:
            back = await self._host.abort(agent_id, reason=request.reason, tenant=tenant)
            await self._close_trial(tenant, agent_id, agent.canary.trial, promoted=False)
            return answer(agent_view(back))
        version = request.version or await self._before(agent)
        draft = self._draft(exchange, agent_id, version, share=None)
        back = await self._host.rollback(agent_id, version, tenant=tenant)
        switch = Phase(name="switch", status="completed", took_ms=self._since_ms(draft))
        await self._store.add(
            msgspec.structs.replace(draft.record, strategy="rollback", replaced=agent.version, phases=(switch,))
        )
        if agent.canary is not None:
            await self._close_trial(tenant, agent_id, agent.canary.trial, promoted=False)
        return answer(agent_view(back))

    async def set_alias(self, exchange: Exchange) -> Answer:
        """Name a version."""
        agent_id, alias = agent_id_of(exchange), exchange.path("alias")
        request = await exchange.body(_alias_decoder)
        return answer(agent_view(await self._host.alias(agent_id, alias, request.version, tenant=exchange.tenant)))

    async def delete_alias(self, exchange: Exchange) -> Answer:
        """Forget a name."""
        agent_id, alias = agent_id_of(exchange), exchange.path("alias")
        return answer(agent_view(await self._host.alias(agent_id, alias, None, tenant=exchange.tenant)))

    async def list(self, exchange: Exchange) -> Answer:
        """The newest deployments."""
        agent_id, tenant = agent_id_of(exchange), exchange.tenant
        query = exchange.query(PageQuery)
        agent = await self._host.agent(agent_id, tenant=tenant)
        first = (query.page - 1) * query.limit
        records, total = await self._store.newest(tenant, agent_id, offset=first, limit=query.limit)
        views = [deployments.view(record, agent, None, has_figures=False) for record in records]
        return answer(DeploymentPage(deployments=views, page=query.page, limit=query.limit, total=total))

    async def get(self, exchange: Exchange) -> Answer:
        """One deployment."""
        agent_id, tenant = agent_id_of(exchange), exchange.tenant
        deployment_id = deployment_id_of(exchange)
        record = await self._store.find(tenant, agent_id, deployment_id)
        if record is None:
            raise DeploymentNotFound(f"The agent {agent_id!r} has no deployment {deployment_id!r}.")
        try:
            agent: Agent | None = await self._host.agent(agent_id, tenant=tenant)
        except AgentNotFound:
            agent = None
        figures = None
        if self._figures.has_any and record.error is None:
            figures = await self._figures.overall(tenant, agent_id, since=record.created_at, version=record.version)
        return answer(deployments.view(record, agent, figures, has_figures=self._figures.has_any))

    # -- inside ----------------------------------------------------------------------------------------------------

    def _draft(self, exchange: Exchange, agent_id: str, version: str, *, share: float | None) -> "_Draft":
        now = self._clock.wall()
        record = Record(
            tenant=exchange.tenant,
            agent_id=agent_id,
            # As the host makes them: time first, so that the order of ids is that of the deployments.
            deployment_id=f"dep_{timed_id(now)}",
            version=version,
            strategy="blue_green" if share is None else "canary",
            share=share,
            created_at=now,
        )
        return _Draft(record=record, began=self._clock.monotonic())

    def _since_ms(self, draft: "_Draft") -> float:
        return (self._clock.monotonic() - draft.began) * 1000

    async def _deployed(
        self, exchange: Exchange, draft: "_Draft", code: AgentCode | None, *, name: str | None, tags: tuple[str, ...]
    ) -> DeployAnswer:
        """Have the host deploy it, and keep how that went."""
        record = draft.record
        tenant, agent_id = record.tenant, record.agent_id
        replaced = await self._serving(tenant, agent_id)
        try:
            options = await self._options(tenant, agent_id, record.version, code)
            deployment = await self._host.deploy(
                agent_id,
                options.pop("source"),
                version=record.version,
                name=name,
                tags=tags,
                canary=record.share,
                tenant=tenant,
                **options,
            )
        except CallerError as error:
            if replaced is not None:
                failed = Phase(name="load", status="failed", took_ms=self._since_ms(draft))
                await self._store.add(
                    msgspec.structs.replace(record, error=error.message, replaced=replaced, phases=(failed,))
                )
            raise
        phases = (
            Phase(name="load", status="completed", took_ms=deployment.compile_ms),
            Phase(name="switch", status="completed", took_ms=self._since_ms(draft) - deployment.compile_ms),
        )
        await self._store.add(
            msgspec.structs.replace(record, deployment_id=deployment.deployment_id, replaced=replaced, phases=phases)
        )
        return _answer_of(exchange, record, deployment.deployment_id, compile_ms=deployment.compile_ms)

    async def _serving(self, tenant: str, agent_id: str) -> str | None:
        try:
            return (await self._host.agent(agent_id, tenant=tenant, fresh=True)).version
        except AgentNotFound:
            return None

    async def _options(self, tenant: str, agent_id: str, version: str, code: AgentCode | None) -> dict[str, Any]:
        """What the host is told of a version: what the request says, else what it was deployed with before."""
        if code is None:
            kept = await self._host.version(agent_id, version, tenant=tenant)
            return {
                "source": kept.source.text,
                "entrypoint": kept.source.entrypoint,
                "timeout_s": kept.source.timeout_s,
                "dependencies": kept.source.dependencies,
                "idempotent": kept.is_idempotent,
                "attempts_max": kept.attempts_max,
                "isolation": kept.isolation,
                "limits": kept.limits,
            }
        limits = code.configuration
        memory_bytes = None if limits.memory_limit is None else limits.memory_limit << 20
        return {
            "source": code.source(),
            "entrypoint": code.entrypoint,
            "timeout_s": limits.timeout,
            "dependencies": code.dependencies.python,
            "idempotent": limits.idempotent,
            "attempts_max": limits.attempts_max,
            "isolation": limits.isolation,
            "limits": memory_bytes and replace(self._host.config.limits, memory_bytes=memory_bytes),
        }

    async def _promote(self, exchange: Exchange, agent: Agent) -> Answer:
        assert agent.canary is not None, "only what is on trial is promoted"
        await self._host.promote(agent.agent_id, tenant=agent.tenant)
        record = await self._close_trial(agent.tenant, agent.agent_id, agent.canary.trial, promoted=True)
        if record is None:
            # It was begun past this API, or its record was one too many.
            draft = self._draft(exchange, agent.agent_id, agent.canary.version, share=None)
            record = msgspec.structs.replace(draft.record, replaced=agent.version)
            await self._store.add(record)
        return answer(_answer_of(exchange, record, record.deployment_id, compile_ms=0.0, is_over=True))

    async def _close_trial(self, tenant: str, agent_id: str, trial: str, *, promoted: bool) -> Record | None:
        record = await self._store.find(tenant, agent_id, trial)
        if record is not None:
            record = msgspec.structs.replace(record, outcome="promoted" if promoted else "aborted")
            await self._store.add(record)
        return record

    async def _before(self, agent: Agent) -> str:
        """What was in service before the version that is; roll-backs are passed over, or two would cancel out."""
        records, _ = await self._store.newest(agent.tenant, agent.agent_id, offset=0, limit=200)
        for record in records:
            is_its_own = record.version == agent.version and record.strategy != "rollback" and record.error is None
            served = record.strategy != "canary" or record.outcome == "promoted"
            if is_its_own and served and record.replaced not in {None, record.version}:
                assert record.replaced is not None, "just looked"
                return record.replaced
        raise VersionNotFound(
            f"It is not on record what served before version {agent.version} of {agent.agent_id!r}.",
            fix="Name the version to go back to.",
        )


class _Draft(msgspec.Struct, frozen=True):
    record: Record
    began: float
    """Monotonic."""


def _answer_of(
    exchange: Exchange, record: Record, deployment_id: str, *, compile_ms: float, is_over: bool = False
) -> DeployAnswer:
    url = f"{exchange.mounted_at}{PREFIX}/{record.agent_id}"
    return DeployAnswer(
        deployment_id=deployment_id,
        agent_id=record.agent_id,
        version=record.version,
        status="deployed" if record.share is None or is_over else "deploying",
        compile_ms=compile_ms,
        status_url=f"{url}/status",
        execute_url=f"{url}/execute",
        deployment_url=f"{url}/deployments/{deployment_id}",
    )
