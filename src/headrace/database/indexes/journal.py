"""What was done to the indexes of a shard: a table on the shard itself, written before each step and after it.

So a step that was cut off, by kill -9 or by the end of the server, stands there as begun; whoever opens the shard next
finds it. A session lock says whether its author is still at it: Postgres gives it up when the connection ends.
"""

from typing import Any, Final

from headrace.database.indexes.advice import IndexChange, State
from headrace.database.postgres.nodes import Node

NAMESPACE: Final = 0x696E6478  # "indx"; the other half of the lock is the hash of the index's name
_LOCK: Final = 0x696E646578  # "index", around CREATE TABLE
_HISTORY_MAX: Final = 1000

_TABLE: Final = """
CREATE TABLE IF NOT EXISTS headrace_index_history (
    id bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    name text NOT NULL,
    table_name text NOT NULL,
    sql text NOT NULL,
    state text NOT NULL,
    reason text NOT NULL DEFAULT '',
    size_bytes bigint,
    estimated_gain float8,
    before_ms float8,
    after_ms float8,
    seconds float8,
    begun_at timestamptz NOT NULL DEFAULT now(),
    changed_at timestamptz NOT NULL DEFAULT now()
)"""
_BEGIN: Final = """
INSERT INTO headrace_index_history (name, table_name, sql, state, reason, estimated_gain)
VALUES ($1, $2, $3, $4, $5, $6) RETURNING id"""
_NOTE: Final = """
UPDATE headrace_index_history SET state = $2, reason = $3, size_bytes = coalesce($4, size_bytes),
    before_ms = coalesce($5, before_ms), after_ms = coalesce($6, after_ms), seconds = coalesce($7, seconds),
    changed_at = now() WHERE id = $1"""
_READ: Final = """
SELECT id, name, table_name AS table, sql, state, reason, size_bytes, estimated_gain, before_ms, after_ms, seconds,
    extract(epoch FROM begun_at)::float8 AS begun_at
FROM headrace_index_history WHERE $1::text[] IS NULL OR state = ANY($1) ORDER BY id DESC LIMIT $2"""
_IS_THERE: Final = "SELECT to_regclass('headrace_index_history') IS NOT NULL"


async def make_journal(node: Node) -> None:
    """The table, if it is not there."""
    async with node.transaction() as transaction:
        await transaction.fetch("SELECT pg_advisory_xact_lock($1)", _LOCK)
        await transaction.execute(_TABLE)


async def begin(
    node: Node, *, name: str, table: str, sql: str, state: State, reason: str, gain: float | None = None
) -> int:
    """A step begins; its number."""
    async with node.transaction() as transaction:
        rows = await transaction.fetch(_BEGIN, name, table, sql, state.value, reason, gain)
    number: int = rows[0][0]
    return number


async def note(
    node: Node,
    number: int,
    state: State,
    reason: str,
    *,
    size_bytes: int | None = None,
    before_ms: float | None = None,
    after_ms: float | None = None,
    seconds: float | None = None,
) -> None:
    """A step has come so far."""
    await node.execute(_NOTE, (number, state.value, reason, size_bytes, before_ms, after_ms, seconds))


async def read_journal(
    node: Node, states: tuple[State, ...] | None = None, count: int = _HISTORY_MAX
) -> list[IndexChange]:
    """The latest steps, the newest first; of these states, or of all."""
    wanted: Any = None if states is None else [state.value for state in states]
    if not (await node.fetch(_IS_THERE, read_only=True))[0][0]:
        return []
    rows = await node.fetch(_READ, (wanted, count), read_only=True)
    return [_change(node.name, row.asdict()) for row in rows]


def _change(shard: str, values: dict[str, Any]) -> IndexChange:
    return IndexChange(shard=shard, **(values | {"state": State(values["state"])}))
