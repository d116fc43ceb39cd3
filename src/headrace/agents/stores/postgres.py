"""Agents, their versions and their trials in Postgres, on the shard of their tenant; with the executions, a store."""

import asyncio
from importlib.resources import files
from typing import Any

import msgspec

from headrace.agents.config import AgentsConfig
from headrace.agents.definition import Source
from headrace.agents.isolation.limits import Limits
from headrace.agents.rollout import Tally
from headrace.agents.store import (
    NOT_BEGUN,
    Agent,
    Canary,
    Deployment,
    SharedSource,
    Totals,
    Version,
    agent_not_found,
    version_conflict,
    version_not_found,
)
from headrace.agents.stores import execution_sql as sql
from headrace.agents.stores.executions import PostgresExecutions
from headrace.clock import Clock
from headrace.database import Database
from headrace.database.migrations import load_migrations, migrate
from headrace.events import Observer

_AGENT = """
SELECT a.tenant, a.agent_id, a.name, a.tags, a.version, v.source_sha256, a.canary, a.canary_share, a.canary_trial,
       a.aliases::text AS aliases,
       extract(epoch FROM a.created_at)::float8 AS created_at, extract(epoch FROM a.updated_at)::float8 AS updated_at
FROM headrace_agents a JOIN headrace_agent_versions v USING (tenant, agent_id, version)
WHERE a.tenant = $1 AND a.agent_id = $2"""

_AGENTS = """
SELECT a.tenant, a.agent_id, a.name, a.tags, a.version, v.source_sha256, a.canary, a.canary_share, a.canary_trial,
       a.aliases::text AS aliases,
       extract(epoch FROM a.created_at)::float8 AS created_at, extract(epoch FROM a.updated_at)::float8 AS updated_at,
       coalesce(t.completed, 0)::bigint AS completed, coalesce(t.failed, 0)::bigint AS failed,
       coalesce(t.timeouts, 0)::bigint AS timeouts, count(*) OVER () AS total
FROM headrace_agents a JOIN headrace_agent_versions v USING (tenant, agent_id, version)
LEFT JOIN LATERAL (
    SELECT sum(completed) AS completed, sum(failed) AS failed, sum(timeouts) AS timeouts
    FROM headrace_agent_totals t WHERE t.tenant = a.tenant AND t.agent_id = a.agent_id
) t ON true
WHERE a.tenant = $1 ORDER BY a.agent_id COLLATE "C" OFFSET $2 LIMIT $3"""

_KEEP_VERSION = """
INSERT INTO headrace_agent_versions
    (tenant, agent_id, version, deployment_id, source, source_sha256, entrypoint, timeout_s, compile_ms,
     is_idempotent, attempts_max, capabilities, dependencies, isolation, limits)
VALUES ($1, $2, $3, $4, $5, $6, $7, $8, $9, $10, $11, $12::json, $13, $14, $15::json)
ON CONFLICT (tenant, agent_id, version) DO UPDATE SET timeout_s = excluded.timeout_s,
    is_idempotent = excluded.is_idempotent, attempts_max = excluded.attempts_max, capabilities = excluded.capabilities,
    dependencies = excluded.dependencies
RETURNING source_sha256, entrypoint, isolation, limits::text"""

_WHAT_IT_IS = """entrypoint, timeout_s, dependencies, is_idempotent, attempts_max,
       capabilities::text AS capabilities, isolation, limits::text AS limits
FROM headrace_agent_versions WHERE tenant = $1 AND agent_id = $2 AND version = $3"""
_VERSION = f"SELECT source, {_WHAT_IT_IS}"
_VERSION_WITHOUT_SOURCE = f"SELECT source_sha256, {_WHAT_IT_IS}"
_SOURCE = "SELECT source FROM headrace_agent_versions WHERE tenant = $1 AND agent_id = $2 AND version = $3"

_HAS_ISOLATED = "SELECT EXISTS (SELECT 1 FROM headrace_agent_versions WHERE isolation = 'process')"

_PUT_IN_SERVICE = """
INSERT INTO headrace_agents (tenant, agent_id, name, tags, version) VALUES ($1, $2, $3, $4, $5)
ON CONFLICT (tenant, agent_id)
DO UPDATE SET name = excluded.name, tags = excluded.tags, version = excluded.version, updated_at = now(),
    canary = NULL, canary_share = NULL, canary_trial = NULL"""

_PUT_ON_TRIAL = """
UPDATE headrace_agents SET canary = $3, canary_share = $4, canary_trial = $5, updated_at = now()
WHERE tenant = $1 AND agent_id = $2"""

_END_TRIAL = """
UPDATE headrace_agents a SET version = CASE WHEN $3 THEN a.canary ELSE a.version END, updated_at = now(),
    canary = NULL, canary_share = NULL, canary_trial = NULL
FROM (SELECT tenant, agent_id, canary, canary_share, canary_trial FROM headrace_agents
      WHERE tenant = $1 AND agent_id = $2 FOR UPDATE) b
WHERE a.tenant = b.tenant AND a.agent_id = b.agent_id AND b.canary IS NOT NULL
  AND ($4::text IS NULL OR b.canary_trial = $4)
RETURNING b.canary, b.canary_share, b.canary_trial"""

_TOTALS = """
SELECT coalesce(sum(completed), 0)::bigint, coalesce(sum(failed), 0)::bigint, coalesce(sum(timeouts), 0)::bigint
FROM headrace_agent_totals WHERE tenant = $1 AND agent_id = $2"""

_KEEP_TALLY = """
INSERT INTO headrace_canary_tallies (tenant, agent_id, trial, version, writer, tally)
SELECT $1, $2, $3, r.key, $5, r.value FROM json_each($4::json) r
ON CONFLICT (tenant, agent_id, trial, version, writer) DO UPDATE SET tally = excluded.tally"""


class PostgresStore(PostgresExecutions):
    """Agents and executions on the shard of their tenant."""

    def __init__(
        self, database: Database, config: AgentsConfig, *, writer: str, clock: Clock, observer: Observer
    ) -> None:
        super().__init__(database, config, writer=writer, clock=clock)
        self._observer = observer

    async def open(self) -> None:
        """Bring every shard's schema up to date; of one that is down, when it is first reached."""
        migrations = await asyncio.to_thread(load_migrations, files("headrace.agents") / "migrations")
        await self._database.prepare(
            lambda node: migrate(node, migrations, clock=self._clock, observer=self._observer)
        )
        self._open_journals()

    async def close(self) -> None:
        """Write what waits."""
        await self._close_journals()

    async def deploy(self, deployment: Deployment) -> Agent:
        """Keep a version and put it into service or on trial, in one transaction."""
        source, capabilities = deployment.source, deployment.capabilities
        tenant, agent_id = deployment.tenant, deployment.agent_id
        async with self._database.transaction(key=tenant) as transaction:
            rows = await transaction.fetch(
                _KEEP_VERSION,
                *(tenant, agent_id, source.version, deployment.deployment_id, source.text, source.sha256),
                *(source.entrypoint, source.timeout_s, deployment.compile_ms, deployment.is_idempotent),
                *(
                    deployment.attempts_max,
                    None if capabilities is None else bytes(capabilities).decode(),
                    list(source.dependencies),
                ),
                *(
                    deployment.isolation,
                    None if deployment.limits is None else msgspec.json.encode(deployment.limits).decode(),
                ),
            )
            sha256, entrypoint, isolation, limits = rows[0]
            kept = (sha256, entrypoint, isolation, _limits(limits))
            if kept != (source.sha256, source.entrypoint, deployment.isolation, deployment.limits):
                raise version_conflict(source)
            await transaction.execute(
                "DELETE FROM headrace_canary_tallies WHERE tenant = $1 AND agent_id = $2", tenant, agent_id
            )
            if deployment.canary is None:
                await transaction.execute(
                    _PUT_IN_SERVICE, tenant, agent_id, deployment.name, list(deployment.tags), source.version
                )
            elif not await transaction.execute(
                _PUT_ON_TRIAL, tenant, agent_id, source.version, deployment.canary, deployment.deployment_id
            ):
                raise agent_not_found(agent_id)
            return _agent((await transaction.fetch(_AGENT, tenant, agent_id))[0])

    async def put_in_service(self, tenant: str, agent_id: str, version: str) -> Agent:
        """Switch to a version that was deployed before; a trial ends."""
        async with self._database.transaction(key=tenant) as transaction:
            await self._require(transaction, tenant, agent_id, version)
            changed = await transaction.execute(
                "UPDATE headrace_agents SET version = $3, updated_at = now(), canary = NULL, canary_share = NULL,"
                " canary_trial = NULL WHERE tenant = $1 AND agent_id = $2",
                *(tenant, agent_id, version),
            )
            if not changed:
                raise agent_not_found(agent_id)
            return _agent((await transaction.fetch(_AGENT, tenant, agent_id))[0])

    async def end_trial(
        self, tenant: str, agent_id: str, *, promote: bool, trial: str | None = None
    ) -> tuple[Agent, Canary] | None:
        """End the trial, and with `promote` put its version into service; None if there is no such trial."""
        async with self._database.transaction(key=tenant) as transaction:
            rows = await transaction.fetch(_END_TRIAL, tenant, agent_id, promote, trial)
            if not rows:
                return None
            agent = _agent((await transaction.fetch(_AGENT, tenant, agent_id))[0])
            return agent, Canary(version=rows[0][0], share=rows[0][1], trial=rows[0][2])

    async def name_version(self, tenant: str, agent_id: str, alias: str, version: str | None) -> Agent:
        """Let an alias stand for a version; None removes it."""
        async with self._database.transaction(key=tenant) as transaction:
            if version is not None:
                await self._require(transaction, tenant, agent_id, version)
            named = "{}" if version is None else msgspec.json.encode({alias: version}).decode()
            changed = await transaction.execute(
                "UPDATE headrace_agents SET aliases = (aliases - $3::text) || $4::jsonb, updated_at = now()"
                " WHERE tenant = $1 AND agent_id = $2",
                *(tenant, agent_id, alias, named),
            )
            if not changed:
                raise agent_not_found(agent_id)
            return _agent((await transaction.fetch(_AGENT, tenant, agent_id))[0])

    async def undeploy(self, tenant: str, agent_id: str) -> int:
        """Take an agent out of service; its versions stay. Queued executions are cancelled: how many."""
        async with self._database.transaction(key=tenant) as transaction:
            gone = await transaction.execute(
                "DELETE FROM headrace_agents WHERE tenant = $1 AND agent_id = $2", tenant, agent_id
            )
            if not gone:
                raise agent_not_found(agent_id)
            rows = await transaction.fetch(sql.CANCEL_QUEUED, tenant, agent_id, NOT_BEGUN, self._writer)
            return int(rows[0][0])

    async def agent(self, tenant: str, agent_id: str) -> Agent | None:
        """One agent."""
        row = await self._database.fetch_one(_AGENT, tenant, agent_id, key=tenant, read_only=True)
        return _agent(row) if row else None

    async def agents(self, tenant: str, *, offset: int, limit: int) -> tuple[list[tuple[Agent, Totals]], int]:
        """A page of agents by id."""
        rows = await self._database.fetch(_AGENTS, tenant, offset, limit, key=tenant, read_only=True)
        page = [(_agent(row), Totals(row.completed, row.failed, row.timeouts)) for row in rows]
        if rows or not offset:
            return page, rows[0].total if rows else 0
        total = await self._database.fetch_value(
            "SELECT count(*) FROM headrace_agents WHERE tenant = $1", tenant, key=tenant, read_only=True
        )
        return page, total

    async def totals(self, tenant: str, agent_id: str) -> Totals:
        """The finished executions of an agent."""
        rows = await self._database.fetch(_TOTALS, tenant, agent_id, key=tenant, read_only=True)
        return Totals(*rows[0])

    async def version(
        self, tenant: str, agent_id: str, version: str, *, shared: SharedSource | None = None
    ) -> Version:
        """A version; its source from here only if `shared` does not have it."""
        key = (tenant, agent_id, version)
        row = await self._database.fetch_one(
            _VERSION if shared is None else _VERSION_WITHOUT_SOURCE, *key, key=tenant, read_only=True
        )
        if row is None:
            raise version_not_found(agent_id, version)
        text = row.source if shared is None else await shared(row.source_sha256)
        if text is None:
            text = await self._database.fetch_value(_SOURCE, *key, key=tenant, read_only=True)
        source = Source(
            agent_id=agent_id,
            version=version,
            text=text,
            entrypoint=row.entrypoint,
            timeout_s=row.timeout_s,
            dependencies=tuple(row.dependencies),
        )
        return Version(
            source=source,
            is_idempotent=row.is_idempotent,
            attempts_max=row.attempts_max,
            capabilities=None if row.capabilities is None else msgspec.Raw(row.capabilities.encode()),
            isolation=row.isolation,
            limits=_limits(row.limits),
        )

    async def has_isolated(self) -> bool:
        """Whether a version of any tenant runs in isolated processes."""
        for shard in self.shards:
            rows = await self._database.nodes[shard].fetch(_HAS_ISOLATED, ())
            if rows[0][0]:
                return True
        return False

    async def tally(
        self, tenant: str, agent_id: str, trial: str, mine: dict[str, Tally], *, writer: str
    ) -> dict[str, Tally]:
        """Keep this writer's counts of a trial by version; those of all others together."""
        counts = msgspec.json.encode(mine).decode()
        await self._database.execute(_KEEP_TALLY, tenant, agent_id, trial, counts, writer, key=tenant)
        rows = await self._database.fetch(
            "SELECT version, tally::text FROM headrace_canary_tallies"
            " WHERE tenant = $1 AND agent_id = $2 AND trial = $3 AND writer <> $4",
            *(tenant, agent_id, trial, writer),
            key=tenant,
            read_only=True,
        )
        together: dict[str, Tally] = {}
        for version, text in rows:
            tally = msgspec.json.decode(text, type=Tally)
            together[version] = together[version].plus(tally) if version in together else tally
        return together

    @staticmethod
    async def _require(transaction: Any, tenant: str, agent_id: str, version: str) -> None:
        known = await transaction.fetch(
            "SELECT 1 FROM headrace_agent_versions WHERE tenant = $1 AND agent_id = $2 AND version = $3",
            *(tenant, agent_id, version),
        )
        if not known:
            raise version_not_found(agent_id, version)


def _limits(text: str | None) -> Limits | None:
    return None if text is None else msgspec.json.decode(text, type=Limits)


def _agent(row: Any) -> Agent:
    canary = None
    if row.canary is not None:
        canary = Canary(version=row.canary, share=row.canary_share, trial=row.canary_trial)
    return Agent(
        tenant=row.tenant,
        agent_id=row.agent_id,
        name=row.name,
        tags=tuple(row.tags),
        version=row.version,
        source_sha256=row.source_sha256,
        created_at=row.created_at,
        updated_at=row.updated_at,
        canary=canary,
        aliases=msgspec.json.decode(row.aliases, type=dict[str, str]),
    )
