"""A real Postgres in simulated time: it carries out the statements of the nodes, and is compared with the model.

Its `now()` and `random()` are functions of ours in a schema that stands before the catalogue in the search path, so
the real statements run on whatever time it is in the simulation. One connection carries out one after another.
"""

import math
from collections.abc import Callable, Sequence
from importlib.resources import files
from typing import Any

import psycopg

from headrace.agents.stores import execution_sql as sql
from headrace.database.postgres.pipeline import named_rows
from tests.simulation.simulated_postgres import SimulatedPostgres

SCHEMA = """
DROP SCHEMA IF EXISTS simulated CASCADE;
CREATE SCHEMA simulated;
SET search_path = simulated, pg_catalog;
SET synchronous_commit = off;
CREATE FUNCTION now() RETURNS timestamptz STABLE LANGUAGE sql
    AS $$ SELECT to_timestamp(current_setting('simulated.now')::float8) $$;
CREATE FUNCTION random() RETURNS float8 STABLE LANGUAGE sql
    AS $$ SELECT current_setting('simulated.random')::float8 $$;
SELECT set_config('simulated.now', '0', false), set_config('simulated.random', '0', false)"""
_SETTINGS = "SELECT set_config('simulated.now', $1, false), set_config('simulated.random', $2, false)"
_ROWS = """
SELECT tenant, execution_id, agent_id, version, status, owner, attempt, error, threaded, instance,
       input IS NULL AS has_no_input, cancel_at IS NULL AS is_wanted, output::text AS output,
       extract(epoch FROM available_at)::float8 AS available_at, rank,
       extract(epoch FROM started_at)::float8 AS started_at,
       extract(epoch FROM finished_at)::float8 AS finished_at
FROM headrace_executions"""
_TOTALS = """
SELECT tenant, agent_id, sum(completed)::int, sum(failed)::int, sum(timeouts)::int
FROM headrace_agent_totals GROUP BY tenant, agent_id"""
_COUNTED = """
SELECT tenant, agent_id, count(*) FILTER (WHERE status = 'completed')::int,
       count(*) FILTER (WHERE status IN ('failed', 'cancelled', 'interrupted'))::int,
       count(*) FILTER (WHERE status = 'timeout')::int
FROM headrace_executions GROUP BY tenant, agent_id"""


class TimedPostgres(SimulatedPostgres):
    """Answers what Postgres answers, and notes where the model would have answered something else."""

    def __init__(
        self, connection: "psycopg.Connection[Any]", now: Callable[[], float], draw: Callable[[], float]
    ) -> None:
        super().__init__(now, lambda: self._drawn)
        self._drawn = 0.0
        self._random = draw
        self._connection = connection
        self.differences: list[str] = []
        self.statements = 0
        connection.execute(SCHEMA)
        for migration in sorted((files("headrace.agents") / "migrations").iterdir(), key=lambda file: file.name):
            connection.execute(migration.read_text().encode())

    def carry_out(self, statement: str, parameters: Sequence[Any]) -> Any:
        """On both."""
        if statement == sql.FORGET:  # its `current_date` cannot be replaced
            return super().carry_out(statement, parameters)
        self.statements += 1
        if statement == sql.REAP:
            self._drawn = self._random()
        with psycopg.RawCursor(self._connection, row_factory=named_rows) as cursor:
            cursor.execute(_SETTINGS, (repr(self._now()), repr(self._drawn)))
            cursor.execute(statement.encode(), parameters)
            answer = cursor.fetchall() if cursor.description else cursor.rowcount
        self._compare(statement, answer, super().carry_out(statement, parameters))
        return answer

    def compare_rows(self) -> list[str]:
        """How the tables differ from the model, and the counts of what ended from the rows."""
        modelled = dict(self.executions)
        with psycopg.RawCursor(self._connection, row_factory=named_rows) as cursor:
            for row in cursor.execute(_ROWS).fetchall():
                mine = modelled.pop((row.tenant, row.execution_id), None)
                self._compare(row.execution_id, [row], [] if mine is None else [_columns(mine, row.columns)])
            totals, counted = cursor.execute(_TOTALS).fetchall(), cursor.execute(_COUNTED).fetchall()
        self._compare("rows", [], list(modelled))
        self._compare("totals", totals, counted)
        return self.differences

    def _compare(self, what: str, answer: Any, modelled: Any) -> None:
        same = answer == modelled
        if isinstance(answer, list) and isinstance(modelled, list) and len(answer) == len(modelled):
            pairs = zip(sorted(answer, key=_first), sorted(modelled, key=_first), strict=True)
            same = all(_are_close(theirs, mine) for theirs, mine in pairs)
        if not same:
            self.differences.append(f"{what.strip()[:60]}: {answer!r:.300}, the model says {modelled!r:.300}")


def _columns(record: Any, names: Sequence[str]) -> tuple[Any, ...]:
    special = {"has_no_input": record.input is None, "is_wanted": record.cancel_at is None}
    return tuple(special[name] if name in special else getattr(record, name) for name in names)


def _first(row: Sequence[Any]) -> list[str]:
    return [str(value) for value in row[:2]]


def _are_close(theirs: Sequence[Any], mine: Sequence[Any]) -> bool:
    """The same but for what is rounded on the way."""
    return len(theirs) == len(mine) and all(
        math.isclose(one, other, rel_tol=1e-12, abs_tol=2e-3)
        if isinstance(one, float) and isinstance(other, float)
        else one == other
        for one, other in zip(theirs, mine, strict=True)
    )
