"""Executions, the queue and the nodes in Postgres, on the shard of their tenant. Frequent writes go in groups."""

from collections.abc import Callable, Sequence
from typing import Any

import msgspec

from headrace.agents.admission import Ledger
from headrace.agents.config import AgentsConfig
from headrace.agents.execution import Execution, Progress
from headrace.agents.store import (
    INTERRUPTED,
    NOT_BEGUN,
    Beat,
    Callback,
    Change,
    Kept,
    Key,
    Reaped,
    State,
    Submission,
    execution_not_found,
    interrupted,
)
from headrace.agents.stores import execution_sql as sql
from headrace.agents.stores.journal import Journal
from headrace.clock import Clock
from headrace.database import Database
from headrace.errors import BugError

_encode = msgspec.json.Encoder().encode
_BATCH_BYTES_MAX = 8 << 20
"""Of inputs, outputs and states in one statement; written as JSON in JSON it takes several times as much memory."""


class _Record(msgspec.Struct, omit_defaults=True):
    """A finished execution as one element of the JSON array that `FINISH` reads.

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
    attempt: int
    owner: str | None
    instance: str | None = None
    """Whose state it changed, to which version and value."""
    state_version: int | None = None
    state: str | None = None


class _Asked:
    """A submission, a beginning or an end on its way, and whether the shard agreed; None: the row is not ours."""

    __slots__ = ("agreed", "execution", "key", "submission")

    def __init__(
        self,
        execution: Execution,
        submission: Submission | None = None,
        *,
        owner: str | None = None,
        change: Change | None = None,
    ) -> None:
        self.key: Key = (execution.tenant, execution.id)
        self.execution = _record(execution, owner, change)
        self.submission = submission
        self.agreed: bool | None = None


class PostgresExecutions:
    """What happens to executions, on every shard of a database."""

    def __init__(self, database: Database, config: AgentsConfig, *, writer: str, clock: Clock) -> None:
        self._database = database
        self._config = config
        self._writer = writer
        self._clock = clock
        self._submits: dict[str, Journal[_Asked]] = {}
        self._begins: dict[str, Journal[_Asked]] = {}
        self._ends: dict[str, Journal[_Asked]] = {}

    @property
    def shards(self) -> Sequence[str]:
        """The shards' names."""
        return tuple(self._database.nodes)

    def shard_of(self, tenant: str) -> str:
        """The shard that holds a tenant."""
        return self._database.locate(tenant).shard

    def _open_journals(self) -> None:
        for shard in self.shards:
            self._submits[shard] = self._journal(shard, sql.SUBMIT, _submitted)
            self._begins[shard] = self._journal(shard, sql.BEGIN, _begun)
            self._ends[shard] = self._journal(shard, sql.FINISH, lambda asked: asked.execution, self._writer)

    async def _close_journals(self) -> None:
        for journal in (*self._submits.values(), *self._begins.values(), *self._ends.values()):
            await journal.close()

    def _journal(self, shard: str, statement: str, record: Callable[[_Asked], Any], *more: str) -> Journal[_Asked]:
        """A grouped writer of a statement that returns the keys of rows that are ours, and whether it wrote them."""
        node = self._database.nodes[shard]

        async def write(batch: Sequence[_Asked]) -> None:
            # Of two with one key the first counts: a statement may touch a row only once.
            first = {asked.key: asked for asked in reversed(batch)}
            records = _encode([record(asked) for asked in first.values()]).decode()
            for tenant, execution_id, agreed in await node.fetch(statement, (records, *more)):
                first[tenant, execution_id].agreed = agreed

        return Journal(
            write,
            batch_max=self._config.journal_batch_max,
            retry_s=self._config.journal_retry_s,
            clock=self._clock,
            weight_of=_weight,
            weight_max=_BATCH_BYTES_MAX,
        )

    # -- executions ------------------------------------------------------------------------------------------------

    async def submit(self, submission: Submission) -> Execution | None:
        """Put an execution on record; None if its id is ours now, else what that id stands for already."""
        asked = _Asked(submission.execution, submission)
        await self._submits[self.shard_of(asked.key[0])].append(asked)
        return None if asked.agreed else await self.execution(asked.key[0], None, asked.key[1])

    async def withdraw(self, submission: Submission) -> bool:
        """Take off the record what was begun with it and did not begin; False if it is not ours or was cancelled."""
        key, owner = submission.key, submission.owner
        return await self._database.execute(sql.WITHDRAW, *key, submission.claim, owner, key=key[0]) == 1

    async def take(
        self, shard: str, *, owner: str, threaded: bool, limit: int, free: dict[str, int], free_default: int
    ) -> list[Submission]:
        """Own up to `limit` queued executions, tenants in turn, within the places that each has left."""
        places = _encode([{"tenant": tenant, "places": count} for tenant, count in free.items()]).decode()
        rows = await self._database.nodes[shard].fetch(sql.TAKE, (owner, threaded, limit, places, free_default))
        return [_submission(row, owner) for row in sorted(rows, key=lambda row: row.rank)]

    async def begin(self, submission: Submission) -> bool:
        """Note that an attempt begins; False if it is not ours any more."""
        asked = _Asked(submission.execution, submission, owner=submission.owner)
        await self._begins[self.shard_of(asked.key[0])].append(asked)
        return asked.agreed is True

    async def give_back(self, submission: Submission, *, delay_s: float) -> None:
        """Let others have what was taken and has not begun."""
        await self._database.execute(sql.GIVE_BACK, *submission.key, submission.owner, delay_s, key=submission.key[0])

    async def give_back_unknown(self, shard: str, *, owner: str, threaded: bool, known: Sequence[Key]) -> None:
        """Let others have what was taken without our knowing, after an answer was lost."""
        keys = [" ".join(key) for key in known]
        await self._database.nodes[shard].execute(sql.GIVE_BACK_UNKNOWN, (owner, keys, threaded))

    async def disown(self, shard: str, *, owner: str, known: Sequence[Key], older_than_s: float) -> None:
        """Leave what began under our name without our knowing to the next reaping."""
        keys = [" ".join(key) for key in known]
        await self._database.nodes[shard].execute(sql.DISOWN, (owner, keys, older_than_s))

    async def retry(self, submission: Submission, *, error: str | None, delay_s: float) -> bool:
        """Queue an attempt that failed again; False if it is not ours any more or was cancelled."""
        changed = await self._database.execute(
            sql.RETRY,
            *(*submission.key, submission.owner, submission.execution.attempt, error, delay_s),
            key=submission.key[0],
        )
        return changed == 1

    async def report(self, shard: str, submissions: Sequence[Submission]) -> None:
        """Keep the progress of executions that are ours."""
        records = [
            {
                "tenant": submission.key[0],
                "execution_id": submission.key[1],
                "owner": submission.owner,
                "attempt": submission.execution.attempt,
                "progress": _progress_json(submission.execution),
            }
            for submission in sorted(submissions, key=lambda submission: submission.key)
        ]
        await self._database.nodes[shard].execute(sql.REPORT, (_encode(records).decode(),))

    async def finish(
        self, execution: Execution, *, owner: str | None = None, change: Change | None = None
    ) -> Execution | None:
        """Keep a finished execution, with its change of a state; return what is on record when it is durable."""
        asked = _Asked(execution, owner=owner, change=change)
        await self._ends[self.shard_of(execution.tenant)].append(asked)
        if asked.agreed is False:
            return None
        return execution if asked.agreed else await self.execution(execution.tenant, None, execution.id)

    async def cancel(self, tenant: str, agent_id: str | None, execution_id: str) -> Execution:
        """Cancel what is queued, tell the owner of what runs; what it is now."""
        await self._database.execute(sql.CANCEL, tenant, execution_id, agent_id, NOT_BEGUN, self._writer, key=tenant)
        return await self.execution(tenant, agent_id, execution_id)

    async def execution(self, tenant: str, agent_id: str | None, execution_id: str) -> Execution:
        """An execution."""
        row = await self._database.fetch_one(sql.EXECUTION, tenant, execution_id, key=tenant, read_only=True)
        if row is None or agent_id not in {None, row.agent_id}:
            raise execution_not_found(agent_id, execution_id)
        return _execution(row)

    async def forget(self, shard: str, *, older_than_s: float, limit: int) -> int:
        """Delete finished executions of before; how many."""
        rows = await self._database.nodes[shard].fetch(sql.FORGET, (older_than_s, limit))
        return int(rows[0][0])

    # -- nodes -----------------------------------------------------------------------------------------------------

    async def join(self, shard: str, node: str, *, lease_s: float) -> None:
        """Be a node."""
        await self._database.nodes[shard].execute(
            "INSERT INTO headrace_nodes (node, lease_until) VALUES ($1, now() + $2 * interval '1 second')"
            " ON CONFLICT (node) DO UPDATE SET lease_until = excluded.lease_until",
            (node, lease_s),
        )

    async def beat(self, shard: str, node: str, *, lease_s: float, tenants: Sequence[str]) -> Beat:
        """Renew the lease. A lease that ended and was not yet noticed by anybody goes on."""
        database = self._database.nodes[shard]
        renewed = await database.execute(
            "UPDATE headrace_nodes SET lease_until = now() + $2 * interval '1 second' WHERE node = $1", (node, lease_s)
        )
        living = await database.fetch("SELECT count(*) FROM headrace_nodes WHERE lease_until >= now()", read_only=True)
        cancelled = await database.fetch(sql.CANCELLED, (node,), read_only=True)
        ledgers = {}
        if mine := [tenant for tenant in tenants if self.shard_of(tenant) == shard]:
            rows = await database.fetch(sql.LEDGERS, (mine, self._config.queued_max), read_only=True)
            ledgers = {row.tenant: Ledger(row.used, row.queued) for row in rows}
        return Beat(renewed == 1, living[0][0], tuple((row[0], row[1]) for row in cancelled), ledgers)

    async def reap(self, shard: str, node: str, *, retry_first_s: float, retry_max_s: float) -> Reaped:
        """End the other nodes whose lease is over, and decide what becomes of the executions of dead ones.

        Who asks lives, however long it took to get here since it renewed its own lease. Two statements: the second
        must see who has renewed while the first waited for it.
        """
        database = self._database.nodes[shard]
        dead = await database.fetch(
            "DELETE FROM headrace_nodes WHERE lease_until < now() AND node <> $1 RETURNING node", (node,)
        )
        rows = await database.fetch(sql.REAP, (INTERRUPTED, retry_first_s, retry_max_s, self._writer))
        return Reaped(tuple(row[0] for row in dead), rows[0][0], rows[0][1])

    async def leave(self, shard: str, node: str) -> None:
        """End one's own lease."""
        await self._database.nodes[shard].execute("DELETE FROM headrace_nodes WHERE node = $1", (node,))

    # -- events, states, callbacks ---------------------------------------------------------------------------------

    async def keep_events(self, shard: str, events: Sequence[Kept], *, events_max: int) -> None:
        """Keep emitted events, of each execution the newest."""
        records = [
            {"tenant": event.tenant, "execution_id": event.execution_id, "id": event.id, "data": data}
            for event in events
            if (data := event.data_json.decode())
        ]
        await self._database.nodes[shard].execute(sql.KEEP_EVENTS, (_encode(records).decode(), events_max))

    async def events(self, tenant: str, execution_id: str, *, after: int, limit: int) -> list[Kept]:
        """Kept events with higher ids."""
        rows = await self._database.fetch(
            "SELECT id, data::text FROM headrace_execution_events"
            " WHERE tenant = $1 AND execution_id = $2 AND id > $3 ORDER BY id LIMIT $4",
            *(tenant, execution_id, after, limit),
            key=tenant,
            read_only=True,
        )
        return [Kept(tenant, execution_id, row[0], row[1].encode()) for row in rows]

    async def state(self, tenant: str, agent_id: str, instance: str, *, known: int) -> State | None:
        """The state of an instance; None if it is still the version that is known."""
        row = await self._database.fetch_one(
            "SELECT version, CASE WHEN version <> $4 THEN value::text END FROM headrace_agent_states"
            " WHERE tenant = $1 AND agent_id = $2 AND instance = $3",
            *(tenant, agent_id, instance, known),
            key=tenant,
            read_only=True,
        )
        if row is None:
            return State(0, b"{}") if known else None
        return None if row[1] is None else State(row[0], row[1].encode())

    async def due_callbacks(
        self, shard: str, *, limit: int, within_s: float, free: dict[str, int], free_default: int
    ) -> list[Callback]:
        """Callbacks to try now, within the places that each tenant has left; nobody else gets them for `within_s`."""
        places = _encode([{"tenant": tenant, "places": count} for tenant, count in free.items()]).decode()
        rows = await self._database.nodes[shard].fetch(sql.DUE_CALLBACKS, (limit, within_s, places, free_default))
        return [Callback(await self.execution(row[0], None, row[1]), row[2], row[3]) for row in rows]

    async def callback_done(self, callback: Callback, *, again_in_s: float | None) -> None:
        """It was sent or given up, or is to be tried again."""
        await self._database.execute(
            "UPDATE headrace_executions SET callback_due_at = now() + $4::float8 * interval '1 second'"
            " WHERE tenant = $1 AND execution_id = $2 AND callback_attempt = $3",
            *(callback.execution.tenant, callback.execution.id, callback.attempt, again_in_s),
            key=callback.execution.tenant,
        )


def _weight(asked: _Asked) -> int:
    record, submission = asked.execution, asked.submission
    size = len(record.output or "") + len(record.state or "")
    return size + (len(submission.input_json) if submission is not None and submission.input_json else 0)


def _progress_json(execution: Execution) -> str | None:
    return None if execution.progress is None else _encode(execution.progress).decode()


def _submitted(asked: _Asked) -> dict[str, Any]:
    submission = asked.submission
    if submission is None:
        raise BugError("A submission was written without what it needs to run.")
    execution = submission.execution
    return {
        "tenant": execution.tenant,
        "execution_id": execution.id,
        "agent_id": execution.agent_id,
        "version": execution.version,
        "status": execution.status,
        "input_sha256": execution.input_sha256,
        "started_at": execution.started_at,
        "claim": submission.claim,
        "owner": submission.owner,
        "attempt": execution.attempt,
        "attempts_max": submission.attempts_max,
        "input": None if submission.input_json is None else submission.input_json.decode(),
        "head_start_s": submission.head_start_s,
        "threaded": submission.threaded,
        "timeout_s": submission.timeout_s,
        "asked_version": submission.asked_version,
        "instance": submission.instance,
        "callback_url": submission.callback_url,
    }


def _begun(asked: _Asked) -> dict[str, Any]:
    record = asked.execution
    return {
        "tenant": record.tenant,
        "execution_id": record.execution_id,
        "owner": record.owner,
        "attempt": record.attempt,
        "version": record.version,
        "started_at": record.started_at,
    }


def _record(execution: Execution, owner: str | None, change: Change | None) -> _Record:
    return _Record(
        execution.tenant,
        execution.id,
        execution.agent_id,
        execution.version,
        execution.status,
        execution.input_sha256,
        None if execution.output_json is None else execution.output_json.decode(),
        execution.error,
        _progress_json(execution),
        execution.queue_ms,
        execution.run_ms,
        execution.cpu_ms,
        execution.memory_bytes,
        execution.started_at,
        execution.finished_at,
        execution.attempt,
        owner,
        *(() if change is None else (change.instance, change.state.version, change.state.value_json.decode())),
    )


def _submission(row: Any, owner: str) -> Submission:
    execution = Execution(
        id=row.execution_id,
        agent_id=row.agent_id,
        version=row.version,
        status="queued",
        tenant=row.tenant,
        input_sha256=row.input_sha256,
        attempt=row.attempt,
    )
    return Submission(
        execution=execution,
        claim=row.claim,
        owner=owner,
        input_json=row.input.encode(),
        attempts_max=row.attempts_max,
        head_start_s=row.head_start_s,
        timeout_s=row.timeout_s,
        threaded=row.threaded,
        asked_version=row.asked_version,
        instance=row.instance,
        callback_url=row.callback_url,
        waited_ms=row.waited_ms,
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
        attempt=row.attempt,
    )
    return interrupted(execution) if row.is_expired and not execution.is_finished else execution
