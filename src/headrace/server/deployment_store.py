"""What was deployed through the API, and how that went: of each agent the newest `KEPT_MAX` deployments.

The host keeps versions, not how they came into service. So who deploys in Python, past the API, leaves no line here.
"""

from collections.abc import Sequence
from typing import Literal, Protocol

import msgspec

from headrace.database import Database

KEPT_MAX = 200

Strategy = Literal["blue_green", "canary", "rollback"]
PhaseName = Literal["load", "switch", "trial"]


class Phase(msgspec.Struct, frozen=True, kw_only=True):
    """A step: `load` compiles, starts and checks; `switch` puts into service; `trial` is a canary's."""

    name: PhaseName
    status: Literal["running", "completed", "failed", "skipped"]
    took_ms: float | None = None


class Record(msgspec.Struct, frozen=True, kw_only=True):
    """A deployment as it ended; of a canary, as its trial began. Times are wall seconds."""

    tenant: str
    agent_id: str
    deployment_id: str
    version: str
    strategy: Strategy
    share: float | None = None
    """Of a canary, between 0 and 1."""
    replaced: str | None = None
    """The version that was in service before."""
    error: str | None = None
    """Why it failed."""
    outcome: Literal["promoted", "aborted"] | None = None
    """How a person ended a canary's trial; None: nobody did, or it ended by itself."""
    phases: tuple[Phase, ...] = ()
    created_at: float


class DeploymentStore(Protocol):
    """What is needed of a store of deployments."""

    async def add(self, record: Record) -> None:
        """Keep a deployment, forget the oldest ones of its agent above `KEPT_MAX`."""

    async def find(self, tenant: str, agent_id: str, deployment_id: str) -> Record | None:
        """One deployment."""

    async def newest(self, tenant: str, agent_id: str, *, offset: int, limit: int) -> tuple[Sequence[Record], int]:
        """The newest deployments of an agent, and how many are kept."""


class MemoryDeployments:
    """Deployments of one process, gone with it."""

    def __init__(self) -> None:
        self._records: dict[tuple[str, str], dict[str, Record]] = {}

    async def add(self, record: Record) -> None:
        """Keep a deployment."""
        kept = self._records.setdefault((record.tenant, record.agent_id), {})
        kept[record.deployment_id] = record
        for deployment_id in sorted(kept)[:-KEPT_MAX]:
            del kept[deployment_id]

    async def find(self, tenant: str, agent_id: str, deployment_id: str) -> Record | None:
        """One deployment."""
        return self._records.get((tenant, agent_id), {}).get(deployment_id)

    async def newest(self, tenant: str, agent_id: str, *, offset: int, limit: int) -> tuple[Sequence[Record], int]:
        """The newest deployments of an agent."""
        kept = self._records.get((tenant, agent_id), {})
        ids = sorted(kept, reverse=True)[offset : offset + limit]
        return [kept[deployment_id] for deployment_id in ids], len(kept)


class PostgresDeployments:
    """Deployments on the shard of their tenant. Their ids begin with the time, so their order is that of the ids."""

    def __init__(self, database: Database) -> None:
        self._database = database

    async def add(self, record: Record) -> None:
        """Keep a deployment."""
        async with self._database.transaction(key=record.tenant) as transaction:
            await transaction.execute(
                "INSERT INTO headrace_deployments (tenant, agent_id, deployment_id, record)"
                " VALUES ($1, $2, $3, $4::json)"
                " ON CONFLICT (tenant, agent_id, deployment_id) DO UPDATE SET record = excluded.record",
                *(record.tenant, record.agent_id, record.deployment_id, msgspec.json.encode(record).decode()),
            )
            await transaction.execute(
                "DELETE FROM headrace_deployments WHERE tenant = $1 AND agent_id = $2 AND deployment_id <"
                " (SELECT deployment_id FROM headrace_deployments WHERE tenant = $1 AND agent_id = $2"
                " ORDER BY deployment_id DESC OFFSET $3 LIMIT 1)",
                *(record.tenant, record.agent_id, KEPT_MAX - 1),
            )

    async def find(self, tenant: str, agent_id: str, deployment_id: str) -> Record | None:
        """One deployment."""
        text = await self._database.fetch_value(
            "SELECT record::text FROM headrace_deployments WHERE tenant = $1 AND agent_id = $2 AND deployment_id = $3",
            *(tenant, agent_id, deployment_id),
            key=tenant,
            read_only=True,
        )
        return None if text is None else msgspec.json.decode(text, type=Record)

    async def newest(self, tenant: str, agent_id: str, *, offset: int, limit: int) -> tuple[Sequence[Record], int]:
        """The newest deployments of an agent."""
        rows = await self._database.fetch(
            "SELECT record::text FROM headrace_deployments WHERE tenant = $1 AND agent_id = $2"
            " ORDER BY deployment_id DESC OFFSET $3 LIMIT $4",
            *(tenant, agent_id, offset, limit),
            key=tenant,
            read_only=True,
        )
        total = await self._database.fetch_value(
            "SELECT count(*) FROM headrace_deployments WHERE tenant = $1 AND agent_id = $2",
            *(tenant, agent_id),
            key=tenant,
            read_only=True,
        )
        return [msgspec.json.decode(row[0], type=Record) for row in rows], total
