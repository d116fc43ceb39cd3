"""Agents and executions in Postgres, on the shard of their tenant."""

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from importlib.resources import files
from typing import Any

import msgspec

from headrace.agents.config import AgentsConfig
from headrace.agents.definition import Source
from headrace.agents.execution import Execution, Progress
from headrace.agents.journal import Journal
from headrace.agents.store import (
    Agent,
    Deployment,
    Totals,
    agent_not_found,
    execution_not_found,
    interrupted,
    version_conflict,
    version_not_found,
)
from headrace.clock import Clock
from headrace.database import Database
from headrace.database.migrations import load_migrations, migrate
from headrace.events import Observer

_AGENT = """
SELECT a.tenant, a.agent_id, a.name, a.tags, a.version, v.source_sha256,
       extract(epoch FROM a.created_at)::float8 AS created_at, extract(epoch FROM a.updated_at)::float8 AS updated_at
FROM headrace_agents a JOIN headrace_agent_versions v USING (tenant, agent_id, version)
WHERE a.tenant = $1 AND a.agent_id = $2"""

_AGENTS = """
SELECT a.tenant, a.agent_id, a.name, a.tags, a.version, v.source_sha256,
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
    (tenant, agent_id, version, deployment_id, source, source_sha256, entrypoint, timeout_s, compile_ms)
VALUES ($1, $2, $3, $4, $5, $6, $7, $8, $9)
ON CONFLICT (tenant, agent_id, version) DO UPDATE SET timeout_s = excluded.timeout_s
RETURNING source_sha256, entrypoint"""

_PUT_IN_SERVICE = """
INSERT INTO headrace_agents (tenant, agent_id, name, tags, version) VALUES ($1, $2, $3, $4, $5)
ON CONFLICT (tenant, agent_id)
DO UPDATE SET name = excluded.name, tags = excluded.tags, version = excluded.version, updated_at = now()"""

_EXECUTION = """
SELECT execution_id, agent_id, version, status, tenant, output::text AS output, error, progress::text AS progress,
       queue_ms, run_ms, cpu_ms, memory_bytes, extract(epoch FROM started_at)::float8 AS started_at,
       extract(epoch FROM finished_at)::float8 AS finished_at, input_sha256,
       lease_until IS NOT NULL AND lease_until < now() AS is_expired
FROM headrace_executions WHERE tenant = $1 AND execution_id = $2"""

_CLAIM = """
INSERT INTO headrace_executions AS e
    (tenant, execution_id, agent_id, version, status, input_sha256, started_at, claim, lease_until)
VALUES ($1, $2, $3, $4, $5, $6, to_timestamp($7), $8, to_timestamp($9))
ON CONFLICT (tenant, execution_id) DO UPDATE SET claim = excluded.claim WHERE e.claim = excluded.claim"""

_REPORT = """
UPDATE headrace_executions SET status = $3, progress = $4::json
WHERE tenant = $1 AND execution_id = $2 AND status IN ('queued', 'running')"""

# One statement for a whole batch. What is finished already is left alone and not counted again, so that a batch whose
# commit was in doubt can be written once more.
_FINISH = """
WITH record AS (
    SELECT * FROM json_to_recordset($1::json) AS r (
        tenant text, execution_id text, agent_id text, version text, status text, input_sha256 text, output text,
        error text, progress text, queue_ms float8, run_ms float8, cpu_ms float8, memory_bytes bigint,
        started_at float8, finished_at float8)
), kept AS (
    INSERT INTO headrace_executions AS e
        (tenant, execution_id, agent_id, version, status, input_sha256, output, error, progress,
         queue_ms, run_ms, cpu_ms, memory_bytes, started_at, finished_at)
    SELECT tenant, execution_id, agent_id, version, status, input_sha256, output::json, error, progress::json,
           queue_ms, run_ms, cpu_ms, memory_bytes, to_timestamp(started_at), to_timestamp(finished_at)
    FROM record
    ON CONFLICT (tenant, execution_id) DO UPDATE SET
        status = excluded.status, output = excluded.output, error = excluded.error, progress = excluded.progress,
        queue_ms = excluded.queue_ms, run_ms = excluded.run_ms, cpu_ms = excluded.cpu_ms,
        memory_bytes = excluded.memory_bytes, started_at = excluded.started_at, finished_at = excluded.finished_at,
        lease_until = NULL
    WHERE e.status IN ('queued', 'running')
    RETURNING tenant, agent_id, status
)
INSERT INTO headrace_agent_totals AS t (tenant, agent_id, writer, completed, failed, timeouts)
SELECT tenant, agent_id, $2::text, count(*) FILTER (WHERE status = 'completed'),
       count(*) FILTER (WHERE status IN ('failed', 'cancelled', 'interrupted')),
       count(*) FILTER (WHERE status = 'timeout')
FROM kept GROUP BY tenant, agent_id ORDER BY tenant, agent_id
ON CONFLICT (tenant, agent_id, writer) DO UPDATE SET
    completed = t.completed + excluded.completed, failed = t.failed + excluded.failed,
    timeouts = t.timeouts + excluded.timeouts"""

_TOTALS = """
SELECT coalesce(sum(completed), 0)::bigint, coalesce(sum(failed), 0)::bigint, coalesce(sum(timeouts), 0)::bigint
FROM headrace_agent_totals WHERE tenant = $1 AND agent_id = $2"""


class _Record(msgspec.Struct):
    """A finished execution as one element of the JSON array that `_FINISH` reads.

    Outputs travel as JSON inside a string: Postgres decodes the escapes of the array, and would refuse a `\\u0000`
    that the json column itself may well hold.
    """

    tenant: str
    execution_id: str
    agent_id: str
    version: str
    status: str
    input_sha256: str
    output: str | None
    error: str | None
    progress: str | None
    queue_ms: float
    run_ms: float
    cpu_ms: float
    memory_bytes: int | None
    started_at: float | None
    finished_at: float | None


_encode = msgspec.json.Encoder().encode


class PostgresStore:
    """Agents and executions on the shard of their tenant; finished executions are written in groups."""

    def __init__(
        self, database: Database, config: AgentsConfig, *, writer: str, clock: Clock, observer: Observer
    ) -> None:
        self._database = database
        self._config = config
        self._writer = writer
        self._clock = clock
        self._observer = observer
        self._journals: dict[str, Journal[Execution]] = {}

    async def open(self) -> None:
        """Bring every shard's schema up to date; of one that is down, when it is first reached."""
        migrations = await asyncio.to_thread(load_migrations, files("headrace.agents") / "migrations")
        await self._database.prepare(
            lambda node: migrate(node, migrations, clock=self._clock, observer=self._observer)
        )
        for node in self._database.nodes.values():
            self._journals[node.name] = Journal(
                self._write_to(node.name),
                batch_max=self._config.journal_batch_max,
                retry_s=self._config.journal_retry_s,
                clock=self._clock,
            )

    async def close(self) -> None:
        """Write what waits."""
        for journal in self._journals.values():
            await journal.close()

    async def deploy(self, deployment: Deployment) -> Agent:
        """Keep a version and put it into service, in one transaction."""
        source = deployment.source
        tenant, agent_id = deployment.tenant, deployment.agent_id
        async with self._database.transaction(key=tenant) as transaction:
            rows = await transaction.fetch(
                _KEEP_VERSION,
                *(tenant, agent_id, source.version, deployment.deployment_id, source.text, source.sha256),
                *(source.entrypoint, source.timeout_s, deployment.compile_ms),
            )
            if rows[0] != (source.sha256, source.entrypoint):
                raise version_conflict(source)
            await transaction.execute(
                _PUT_IN_SERVICE, tenant, agent_id, deployment.name, list(deployment.tags), source.version
            )
            return _agent((await transaction.fetch(_AGENT, tenant, agent_id))[0])

    async def put_in_service(self, tenant: str, agent_id: str, version: str) -> Agent:
        """Switch to a version that was deployed before."""
        async with self._database.transaction(key=tenant) as transaction:
            known = await transaction.fetch(
                "SELECT 1 FROM headrace_agent_versions WHERE tenant = $1 AND agent_id = $2 AND version = $3",
                *(tenant, agent_id, version),
            )
            if not known:
                raise version_not_found(agent_id, version)
            changed = await transaction.execute(
                "UPDATE headrace_agents SET version = $3, updated_at = now() WHERE tenant = $1 AND agent_id = $2",
                *(tenant, agent_id, version),
            )
            if not changed:
                raise agent_not_found(agent_id)
            return _agent((await transaction.fetch(_AGENT, tenant, agent_id))[0])

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

    async def source(self, tenant: str, agent_id: str, version: str) -> Source:
        """The source of a version."""
        row = await self._database.fetch_one(
            "SELECT source, entrypoint, timeout_s FROM headrace_agent_versions"
            " WHERE tenant = $1 AND agent_id = $2 AND version = $3",
            *(tenant, agent_id, version),
            key=tenant,
            read_only=True,
        )
        if row is None:
            raise version_not_found(agent_id, version)
        return Source(
            agent_id=agent_id, version=version, text=row.source, entrypoint=row.entrypoint, timeout_s=row.timeout_s
        )

    async def claim(self, execution: Execution, *, claim: str, lease_until: float) -> Execution | None:
        """Reserve the execution's id."""
        tenant = execution.tenant
        claimed = await self._database.execute(
            _CLAIM,
            *(tenant, execution.id, execution.agent_id, execution.version, execution.status, execution.input_sha256),
            *(execution.started_at, claim, lease_until),
            key=tenant,
        )
        if claimed:
            return None
        row = await self._database.fetch_one(_EXECUTION, tenant, execution.id, key=tenant, read_only=True)
        return None if row is None else _execution(row)

    async def report(self, execution: Execution) -> None:
        """Keep the progress of a claimed execution."""
        progress = None if execution.progress is None else _encode(execution.progress).decode()
        await self._database.execute(
            _REPORT, execution.tenant, execution.id, execution.status, progress, key=execution.tenant
        )

    async def finish(self, execution: Execution) -> None:
        """Keep a finished execution."""
        await self._journals[self._database.locate(execution.tenant).shard].append(execution)

    async def execution(self, tenant: str, agent_id: str, execution_id: str) -> Execution:
        """An execution."""
        row = await self._database.fetch_one(_EXECUTION, tenant, execution_id, key=tenant, read_only=True)
        if row is None or row.agent_id != agent_id:
            raise execution_not_found(agent_id, execution_id)
        return _execution(row)

    def _write_to(self, shard: str) -> Callable[[Sequence[Execution]], Awaitable[None]]:
        node = self._database.nodes[shard]

        async def write(executions: Sequence[Execution]) -> None:
            records = _encode([_record(execution) for execution in executions]).decode()
            await node.execute(_FINISH, (records, self._writer))

        return write


def _record(execution: Execution) -> _Record:
    return _Record(
        execution.tenant,
        execution.id,
        execution.agent_id,
        execution.version,
        execution.status,
        execution.input_sha256,
        None if execution.output_json is None else execution.output_json.decode(),
        execution.error,
        None if execution.progress is None else _encode(execution.progress).decode(),
        execution.queue_ms,
        execution.run_ms,
        execution.cpu_ms,
        execution.memory_bytes,
        execution.started_at,
        execution.finished_at,
    )


def _agent(row: Any) -> Agent:
    return Agent(
        tenant=row.tenant,
        agent_id=row.agent_id,
        name=row.name,
        tags=tuple(row.tags),
        version=row.version,
        source_sha256=row.source_sha256,
        created_at=row.created_at,
        updated_at=row.updated_at,
    )


def _execution(row: Any) -> Execution:
    execution = Execution(
        id=row.execution_id,
        agent_id=row.agent_id,
        version=row.version,
        status=row.status,
        tenant=row.tenant,
        output_json=None if row.output is None else row.output.encode(),
        error=row.error,
        progress=None if row.progress is None else msgspec.json.decode(row.progress, type=Progress),
        queue_ms=row.queue_ms,
        run_ms=row.run_ms,
        cpu_ms=row.cpu_ms,
        memory_bytes=row.memory_bytes,
        started_at=row.started_at,
        finished_at=row.finished_at,
        input_sha256=row.input_sha256,
    )
    return interrupted(execution) if row.is_expired and not execution.is_finished else execution
