"""Figures of an agent's finished executions over time: counts, error rates and exact percentiles, asked of Postgres.

They are computed from the executions themselves when somebody asks, so they cost nothing when nobody does and are as
exact as the record. The price is a scan of what ended in the window, found by the BRIN index over `finished_at`; a
window may have at most `STEPS_MAX` steps, and one that is too large for the shard is ended by
`database.statement_timeout_s`.
"""

from typing import Final, Literal

import msgspec

from headrace.database import Database
from headrace.errors import InvalidRequest, NeedsDatabase

Granularity = Literal["1m", "5m", "1h", "1d"]
SECONDS: Final[dict[Granularity, int]] = {"1m": 60, "5m": 300, "1h": 3_600, "1d": 86_400}
STEPS_MAX = 1_500

_FIGURES = """
SELECT (floor(extract(epoch FROM finished_at) / $5::float8) * $5::float8)::float8 AS at,
       count(*) AS executions,
       count(*) FILTER (WHERE status IN ('failed', 'interrupted')) AS failed,
       count(*) FILTER (WHERE status = 'timeout') AS timeouts,
       coalesce(percentile_cont(ARRAY[0.5, 0.95, 0.99]) WITHIN GROUP (ORDER BY run_ms), '{0,0,0}')::float8[] AS run,
       coalesce(percentile_cont(0.95) WITHIN GROUP (ORDER BY queue_ms), 0)::float8 AS queue,
       coalesce(sum(cpu_ms), 0)::float8 AS cpu, max(memory_bytes) AS memory
FROM headrace_executions
WHERE tenant = $1 AND agent_id = $2
  AND finished_at >= to_timestamp($3::float8) AND finished_at < to_timestamp($4::float8)
  AND ($6::text IS NULL OR version = $6)
GROUP BY 1 ORDER BY 1"""


class Figures(msgspec.Struct, frozen=True, kw_only=True):
    """What ended within one step. Times are milliseconds, `at` is the step's beginning in wall seconds."""

    at: float
    executions: int
    failed: int
    timeout: int
    error_rate: float
    """Share of those that failed, were interrupted or timed out."""
    run_ms_p50: float
    run_ms_p95: float
    run_ms_p99: float
    queue_ms_p95: float
    cpu_ms: float
    """Of all together."""
    memory_bytes_max: int | None


class AgentFigures:
    """Reads figures; without a database there are none."""

    def __init__(self, database: Database | None) -> None:
        self._database = database

    @property
    def has_any(self) -> bool:
        """Whether there is something to read them from."""
        return self._database is not None

    async def read(
        self,
        tenant: str,
        agent_id: str,
        *,
        since: float,
        until: float,
        granularity: Granularity,
        version: str | None = None,
    ) -> list[Figures]:
        """Figures by step, oldest first; steps in which nothing ended are left out."""
        step_s = SECONDS[granularity]
        first = since // step_s * step_s
        if not until > since:
            raise InvalidRequest(f"The window ends at {until:.0f}, which is not after its beginning, {since:.0f}.")
        if (until - first) / step_s > STEPS_MAX:
            raise InvalidRequest(
                f"The window has {(until - first) / step_s:,.0f} steps of {granularity}; at most {STEPS_MAX:,} may be"
                " asked for.",
                fix="Ask for a shorter window or a coarser granularity.",
            )
        return await self._rows(tenant, agent_id, first, until, float(step_s), version)

    async def overall(self, tenant: str, agent_id: str, *, since: float, version: str) -> Figures | None:
        """All of a version's executions since then as one; None when there are none."""
        # One step that no window fills.
        rows = await self._rows(tenant, agent_id, since, 1e11, 1e12, version)
        return rows[0] if rows else None

    async def _rows(
        self, tenant: str, agent_id: str, since: float, until: float, step_s: float, version: str | None
    ) -> list[Figures]:
        if self._database is None:
            raise NeedsDatabase("Figures over time are read from the record of executions, which is in a database.")
        rows = await self._database.fetch(
            _FIGURES, *(tenant, agent_id, since, until, step_s, version), key=tenant, read_only=True
        )
        return [
            Figures(
                at=row[0],
                executions=row[1],
                failed=row[2],
                timeout=row[3],
                error_rate=(row[2] + row[3]) / row[1],
                run_ms_p50=row[4][0],
                run_ms_p95=row[4][1],
                run_ms_p99=row[4][2],
                queue_ms_p95=row[5],
                cpu_ms=row[6],
                memory_bytes_max=row[7],
            )
            for row in rows
        ]
