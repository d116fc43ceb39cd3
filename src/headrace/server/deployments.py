"""What a deployment has come to, told from its record and the agent as it is now. Pure."""

from typing import Annotated, Literal

import msgspec
from msgspec import Meta

from headrace.agents import Agent
from headrace.server.agent_figures import Figures
from headrace.server.deployment_store import Phase, Record, Strategy

Status = Literal["deploying", "deployed", "failed", "rolled_back", "superseded"]
Health = Literal["healthy", "unhealthy", "unknown"]

_FAILING = 0.5
"""Error rate above which a version is called unhealthy."""


class DeploymentView(msgspec.Struct, kw_only=True):
    """A deployment. `deploying` is a canary on trial; `superseded` one whose version served until another came."""

    deployment_id: str
    agent_id: str
    version: str
    strategy: Strategy
    traffic_percentage: float
    status: Status
    progress: Annotated[int, Meta(ge=0, le=100, description="Percent of the phases that are over.")]
    phases: list[Phase]
    health: Health
    executions: int | None
    """Of this version since the deployment; None: there is no record of executions to count in."""
    response_time_p95: float | None
    """Milliseconds."""
    error_rate: float | None
    replaced: str | None
    """The version that was in service before."""
    error: str | None
    created_at: float


def status_of(record: Record, agent: Agent | None) -> Status:
    """Where a deployment stands."""
    if record.error is not None:
        return "failed"
    if agent is not None and agent.canary is not None and agent.canary.trial == record.deployment_id:
        return "deploying"
    if record.strategy == "canary" and record.outcome != "promoted":
        return "rolled_back"
    return "deployed" if agent is not None and agent.version == record.version else "superseded"


def view(record: Record, agent: Agent | None, figures: Figures | None, *, has_figures: bool) -> DeploymentView:
    """A deployment as the API shows it."""
    status = status_of(record, agent)
    phases = list(record.phases)
    if record.strategy == "canary" and status != "failed":
        phases.append(Phase(name="trial", status=_TRIALS[status]))
    over = sum(phase.status != "running" for phase in phases)
    return DeploymentView(
        deployment_id=record.deployment_id,
        agent_id=record.agent_id,
        version=record.version,
        strategy=record.strategy,
        traffic_percentage=100.0 if record.share is None else round(record.share * 100, 6),
        status=status,
        progress=100 * over // len(phases) if phases else 100,
        phases=phases,
        health=_health(status, figures),
        executions=(figures.executions if figures else 0) if has_figures else None,
        response_time_p95=figures.run_ms_p95 if figures else None,
        error_rate=figures.error_rate if figures else None,
        replaced=record.replaced,
        error=record.error,
        created_at=record.created_at,
    )


_TRIALS: dict[Status, Literal["running", "completed", "failed"]] = {
    "deploying": "running",
    "deployed": "completed",
    "superseded": "completed",
    "rolled_back": "failed",
}


def _health(status: Status, figures: Figures | None) -> Health:
    if status in {"failed", "rolled_back"}:
        return "unhealthy"
    if figures is None:
        return "unknown"
    return "unhealthy" if figures.error_rate > _FAILING else "healthy"
