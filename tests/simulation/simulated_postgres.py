"""The shard as the nodes see it, in memory: what each of their statements does to the rows, in simulated time.

One method stands for one statement of `execution_sql`; nothing else is carried out. A statement is one step: what
several do to each other while they run is Postgres' own matter, and is tried on Postgres itself. That the methods say
what the statements say is tried too: `tests/simulation/timed_postgres.py` carries out both and compares.
"""

import json
import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from headrace.agents.stores import execution_sql as sql
from headrace.database.postgres.rows import row_of

Key = tuple[str, str]
UNFINISHED = {"queued", "running"}

_EXECUTION = row_of(
    ("execution_id", "agent_id", "version", "status", "tenant", "output", "error", "progress", "queue_ms", "run_ms")
    + ("cpu_ms", "memory_bytes", "started_at", "finished_at", "input_sha256", "attempt", "is_expired")
)
_TAKEN = row_of(
    ("tenant", "execution_id", "agent_id", "version", "input_sha256", "attempt", "attempts_max", "input")
    + ("head_start_s", "threaded", "timeout_s", "asked_version", "instance", "callback_url", "claim", "rank")
    + ("waited_ms",)
)
_LEDGER = row_of(("tenant", "used", "queued"))


@dataclass(slots=True, kw_only=True)
class Record:
    """A row of `headrace_executions`, of the columns that decide something."""

    tenant: str
    execution_id: str
    agent_id: str
    version: str
    status: str
    input_sha256: str
    claim: str | None = None
    owner: str | None = None
    attempt: int = 1
    attempts_max: int = 1
    input: str | None = None
    available_at: float | None = None
    rank: float | None = None
    head_start_s: float = 0.0
    threaded: bool = False
    timeout_s: float | None = None
    asked_version: str | None = None
    instance: str | None = None
    callback_url: str | None = None
    cancel_at: float | None = None
    started_at: float | None = None
    finished_at: float | None = None
    output: str | None = None
    error: str | None = None
    queue_ms: float = 0.0
    run_ms: float = 0.0
    cpu_ms: float = 0.0
    memory_bytes: int | None = None
    progress: str | None = None

    @property
    def key(self) -> Key:
        return self.tenant, self.execution_id

    @property
    def name(self) -> str:
        return f"{self.tenant} {self.execution_id}"


class SimulatedPostgres:
    """The rows of a shard. `now` is its clock, in wall seconds; `draw` its `random()`."""

    def __init__(self, now: Callable[[], float], draw: Callable[[], float]) -> None:
        self._now = now
        self._draw = draw
        self.executions: dict[Key, Record] = {}
        self.leases: dict[str, float] = {}
        self.states: dict[tuple[str, str, str], tuple[int, str]] = {}
        self.used: Counter[str] = Counter()
        self._statements: dict[str, Callable[..., Any]] = {
            sql.SUBMIT: self._submit,
            sql.WITHDRAW: self._withdraw,
            sql.TAKE: self._take,
            sql.BEGIN: self._begin,
            sql.GIVE_BACK: self._give_back,
            sql.GIVE_BACK_UNKNOWN: self._give_back_unknown,
            sql.DISOWN: self._disown,
            sql.RETRY: self._retry,
            sql.FINISH: self._finish,
            sql.CANCEL: self._cancel,
            sql.CANCELLED: self._cancelled,
            sql.EXECUTION: self._execution,
            sql.REAP: self._reap,
            sql.LEDGERS: self._ledgers,
            sql.FORGET: lambda *_: [(0,)],
        }
        self._short: dict[str, Callable[..., Any]] = {
            "INSERT INTO headrace_nodes": self._join,
            "UPDATE headrace_nodes": self._renew,
            "SELECT count(*) FROM headrace_nodes": self._living,
            "DELETE FROM headrace_nodes WHERE lease_until": self._bury,
            "DELETE FROM headrace_nodes WHERE node": self._leave,
            "SELECT version, CASE": self._state,
        }

    def carry_out(self, statement: str, parameters: Sequence[Any]) -> Any:
        """The rows of a statement that answers with rows, else how many it touched."""
        method = self._statements.get(statement)
        if method is None:
            method = next(each for start, each in self._short.items() if statement.startswith(start))
        return method(*parameters)

    def is_leased(self, owner: str | None) -> bool:
        """Whether a node of this name may still take, begin and write."""
        return owner is not None and self.leases.get(owner, -math.inf) >= self._now()

    # -- the queue ----------------------------------------------------------------------------------------------------

    def _submit(self, records: str) -> list[tuple[str, str, bool]]:
        ours = []
        for asked in sorted(json.loads(records), key=lambda asked: (asked["tenant"], asked["execution_id"])):
            key = asked["tenant"], asked["execution_id"]
            if key not in self.executions:
                now = self._now()
                self.executions[key] = Record(available_at=now, rank=now - asked["head_start_s"], **asked)
            if self.executions[key].claim == asked["claim"]:
                ours.append((*key, True))
        return ours

    def _withdraw(self, tenant: str, execution_id: str, claim: str, owner: str) -> int:
        row = self.executions.get((tenant, execution_id))
        if row is None or (row.claim, row.owner, row.status, row.cancel_at) != (claim, owner, "running", None):
            return 0
        del self.executions[row.key]
        return 1

    def _waits(self, row: Record, *, threaded: bool) -> bool:
        return row.status == "queued" and row.owner is None and row.threaded == threaded

    def _may_take(self, owner: str) -> bool:
        return self.is_leased(owner)

    def _take(self, owner: str, threaded: bool, limit: int, free: str, free_default: int) -> list[Any]:
        if not self._may_take(owner):
            return []
        places = {each["tenant"]: each["places"] for each in json.loads(free)}
        waiting = [row for row in self.executions.values() if self._waits(row, threaded=threaded)]
        tenants = {row.tenant for row in waiting if places.get(row.tenant, free_default) > 0}
        head: list[Record] = []
        for tenant in tenants:
            line = [row for row in waiting if row.tenant == tenant and row.available_at <= self._now()]
            part = min(places.get(tenant, free_default), (limit + len(tenants) - 1) // len(tenants))
            head += sorted(line, key=_place)[:part]
        head = sorted(head, key=_place)[:limit]
        for row in head:
            row.owner = owner
        return [_TAKEN(self._as_taken(row)) for row in head]

    def _as_taken(self, row: Record) -> list[Any]:
        waited_ms = (self._now() - row.available_at) * 1000
        return [waited_ms if name == "waited_ms" else getattr(row, name) for name in _TAKEN.columns]

    def _may_begin(self, row: Record, asked: dict[str, Any]) -> bool:
        if row.status == "queued":
            return row.attempt == asked["attempt"] - 1 and self.is_leased(row.owner)
        return row.attempt == asked["attempt"] and row.started_at == asked["started_at"]

    def _begin(self, records: str) -> list[tuple[str, str, bool]]:
        begun = []
        for asked in json.loads(records):
            row = self.executions.get((asked["tenant"], asked["execution_id"]))
            if row is None or row.status not in UNFINISHED or row.owner != asked["owner"]:
                continue
            if self._may_begin(row, asked):
                row.status, row.attempt = "running", asked["attempt"]
                row.version, row.started_at = asked["version"], asked["started_at"]
                begun.append((*row.key, True))
        return begun

    def _give_back(self, tenant: str, execution_id: str, owner: str, delay_s: float) -> int:
        row = self.executions.get((tenant, execution_id))
        if row is None or (row.owner, row.status) != (owner, "queued"):
            return 0
        row.owner, row.available_at, row.rank = None, self._now() + delay_s, row.rank + delay_s
        return 1

    def _give_back_unknown(self, owner: str, known: list[str], threaded: bool) -> int:
        lost = [
            row
            for row in self.executions.values()
            if (row.owner, row.status, row.threaded) == (owner, "queued", threaded) and row.name not in known
        ]
        for row in lost:
            row.owner = None
        return len(lost)

    def _disown(self, owner: str, known: list[str], older_than_s: float) -> int:
        before = self._now() - older_than_s
        lost = [
            row
            for row in self.executions.values()
            if (row.owner, row.status) == (owner, "running") and row.started_at < before and row.name not in known
        ]
        for row in lost:
            row.owner = f"{owner} unknown"
        return len(lost)

    def _retry(self, tenant: str, execution_id: str, owner: str, attempt: int, error: str, delay_s: float) -> int:
        row = self.executions.get((tenant, execution_id))
        is_ours = row is not None and (row.owner, row.attempt, row.status) == (owner, attempt, "running")
        if row is None or not is_ours or row.cancel_at is not None:
            return 0
        row.status, row.owner, row.error = "queued", None, error
        row.available_at = self._now() + delay_s
        row.rank = row.available_at - row.head_start_s
        return 1

    # -- ends ---------------------------------------------------------------------------------------------------------

    def _finish(self, records: str, _writer: str) -> list[tuple[str, str, bool]]:
        answers = []
        for asked in sorted(json.loads(records), key=lambda asked: (asked["tenant"], asked["execution_id"])):
            key = asked["tenant"], asked["execution_id"]
            state = {name: asked.pop(name, None) for name in ("instance", "state_version", "state")}
            row = self.executions.get(key)
            is_ours = row is None or (
                row.status in UNFINISHED and (row.owner, row.attempt) == (asked.get("owner"), asked["attempt"])
            )
            if state["state"] is not None and is_ours and not self._change(asked, **state):
                answers.append((*key, False))
            elif is_ours:
                self._end(row, asked)
                answers.append((*key, True))
        return answers

    def _change(self, asked: dict[str, Any], instance: str, state_version: int, state: str) -> bool:
        key = asked["tenant"], asked["agent_id"], instance
        version = self.states.get(key, (0, ""))[0]
        if version != state_version - 1:
            return False
        self.states[key] = state_version, state
        return True

    def _end(self, row: Record | None, asked: dict[str, Any]) -> None:
        self.used[asked["tenant"]] += 1
        if row is None:
            self.executions[asked["tenant"], asked["execution_id"]] = Record(**asked)
            return
        for name in ("version", "status", "output", "error", "progress", "queue_ms", "run_ms", "cpu_ms"):
            setattr(row, name, asked.get(name))
        row.started_at, row.finished_at = asked.get("started_at"), asked["finished_at"]
        row.owner = row.input = None

    def _cancel(self, tenant: str, execution_id: str, agent_id: str | None, error: str, _writer: str) -> int:
        row = self.executions.get((tenant, execution_id))
        if row is None or row.status not in UNFINISHED or agent_id not in {None, row.agent_id}:
            return 0
        row.cancel_at = self._now() if row.cancel_at is None else row.cancel_at
        if row.status == "queued":
            row.status, row.error, row.finished_at = "cancelled", error, self._now()
            row.owner = row.input = None
            return 1
        return 0  # it counts the ends

    def _cancelled(self, owner: str) -> list[Key]:
        return [
            row.key
            for row in self.executions.values()
            if row.owner == owner and row.cancel_at is not None and row.status == "running"
        ]

    def _execution(self, tenant: str, execution_id: str) -> list[Any]:
        row = self.executions.get((tenant, execution_id))
        if row is None:
            return []
        is_cancelling = row.status == "running" and row.cancel_at is not None
        special = {"status": "cancelling" if is_cancelling else row.status, "is_expired": False}
        values = [special[name] if name in special else getattr(row, name) for name in _EXECUTION.columns]
        return [_EXECUTION(values)]

    # -- nodes --------------------------------------------------------------------------------------------------------

    def _join(self, node: str, lease_s: float) -> int:
        self.leases[node] = self._now() + lease_s
        return 1

    def _renew(self, node: str, lease_s: float) -> int:
        if node not in self.leases:
            return 0
        return self._join(node, lease_s)

    def _living(self) -> list[tuple[int]]:
        return [(sum(until >= self._now() for until in self.leases.values()),)]

    def _bury(self, digger: str) -> list[tuple[str]]:
        dead = [node for node, until in self.leases.items() if until < self._now() and node != digger]
        for node in dead:
            del self.leases[node]
        return [(node,) for node in dead]

    def _leave(self, node: str) -> int:
        return 0 if self.leases.pop(node, None) is None else 1

    def _reap(self, error: str, retry_first_s: float, retry_max_s: float, _writer: str) -> list[tuple[int, int]]:
        draw, returned, ended = self._draw(), 0, 0
        for row in self.executions.values():
            if row.owner is None or row.owner in self.leases or row.status not in UNFINISHED:
                continue
            may_repeat = row.attempt < row.attempts_max and row.cancel_at is None and row.input is not None
            again, began = row.status == "queued" or may_repeat, row.status == "running"
            row.owner = None
            if began:
                row.error = error
            if again and began:
                row.available_at = self._now() + draw * min(retry_max_s, retry_first_s * 2 ** (row.attempt - 1))
            if again:
                row.status, returned = "queued", returned + 1
            else:
                row.status, ended = "interrupted" if row.cancel_at is None else "cancelled", ended + 1
                row.finished_at, row.input = self._now(), None
        return [(returned, ended)]

    def _ledgers(self, tenants: list[str], queued_max: int) -> list[Any]:
        waiting = Counter(row.tenant for row in self.executions.values() if row.status == "queued" and not row.owner)
        return [_LEDGER((tenant, self.used[tenant], min(waiting[tenant], queued_max))) for tenant in tenants]

    def _state(self, tenant: str, agent_id: str, instance: str, known: int) -> list[Any]:
        held = self.states.get((tenant, agent_id, instance))
        return [] if held is None else [(held[0], None if held[0] == known else held[1])]


def _place(row: Record) -> tuple[float, Key]:
    return row.rank, row.key
