"""Transactions over several shards that commit everywhere or nowhere, whoever dies in between.

Each shard prepares its part (PREPARE TRANSACTION), which from then on survives every crash. Then one row decides: the
first decision in `headrace_decisions` on the decision shard is the decision, because its key is the transaction's id
and nobody can insert a second one. Then each part is ended by it.

Nobody has to know who is alive. Whoever finds a part that is older than `two_phase_abandoned_s` and has no decision
tries to decide that it is undone; if its process lives after all and wanted to commit, one of the two inserts is the
first, and both obey it. The name of a part says where its decision stands: headrace:<decision shard>:<id>:<shard>.

What this does not give: readers may see one shard's part before another's (there is no common snapshot), and a
decision or a part that a failover loses is lost: shards that take part need synchronous replication for that.
"""

import asyncio
import re
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Any, Final, NamedTuple

import msgspec

from headrace.clock import Clock
from headrace.database.config import DatabaseConfig
from headrace.database.placement.keys import Key
from headrace.database.postgres.nodes import Node
from headrace.database.postgres.pipeline import Params
from headrace.database.postgres.rows import Row
from headrace.database.postgres.transaction import Transaction
from headrace.errors import (
    BackendError,
    CallerError,
    ConfigError,
    DatabaseUnavailable,
    OutcomeUnknown,
    StatementFailed,
    StatementRefused,
)
from headrace.events import CommitDelayed, Observer, TransactionsInDoubt, TransactionsRecovered

_LOCK: Final = 0x32706370  # "2pcp": any number, as long as it is always the same
_GID_BYTES_MAX: Final = 199
_GID: Final = re.compile(r"headrace:(.+):([0-9a-f]{32}):(.+)", re.DOTALL)
_SWEEP_S: Final = 5.0
_PAUSE_S: Final = 0.05
_YOUNG_S: Final = 1.0
"""Parts that are younger are just being ended by their own process."""
_CREATE: Final = (
    f"SELECT pg_advisory_xact_lock({_LOCK})",
    """
CREATE TABLE IF NOT EXISTS headrace_decisions (
    id uuid PRIMARY KEY,
    is_committed boolean NOT NULL,
    decided_at timestamptz NOT NULL DEFAULT now(),
    shards text[]
)""",
    # To be undone is also what no decision means, for all but a process that has slept since then.
    "DELETE FROM headrace_decisions WHERE NOT is_committed AND decided_at < now() - interval '7 days'",
)
# Of a decision that is not on disk a crash would make another one. PREPARE itself always waits for the disk.
_DURABLY: Final = """
SELECT set_config('synchronous_commit', 'on', true) WHERE current_setting('synchronous_commit') IN ('off', 'local')"""
_DECIDE: Final = """
INSERT INTO headrace_decisions (id, is_committed, shards) VALUES ($1, $2, $3::text[]) ON CONFLICT DO NOTHING"""
_DECISION: Final = "SELECT is_committed FROM headrace_decisions WHERE id = $1"
_FORGET: Final = "DELETE FROM headrace_decisions WHERE id = $1"
# All parts are prepared before the decision is made: one that is on none of its shards now is on none for ever.
_CLEAR: Final = """
DELETE FROM headrace_decisions
WHERE is_committed AND decided_at < now() - interval '7 days' AND shards <@ $1::text[] AND id <> ALL ($2::uuid[])"""
_CLEAR_S: Final = 3600.0
_PARTS: Final = """
SELECT gid, extract(epoch FROM now() - prepared)::float8 FROM pg_prepared_xacts
WHERE database = current_database() AND starts_with(gid, 'headrace:')"""
_ROOM: Final = "SELECT current_setting('max_prepared_transactions')::int"
_VERBS: Final = {True: "COMMIT", False: "ROLLBACK"}
_GONE, _BUSY, _NO_TABLE = "42704", "55000", "42P01"


class Part(NamedTuple):
    """One shard's part of a transaction."""

    decision_shard: str
    id: uuid.UUID
    shard: str

    @property
    def gid(self) -> str:
        """How the server calls it; unique although several shards may be databases of one server."""
        return f"headrace:{self.decision_shard}:{self.id.hex}:{self.shard}"

    @classmethod
    def of(cls, gid: str) -> "Part | None":
        """Read a name; None: it is not one of ours."""
        found = _GID.fullmatch(gid)
        return cls(found[1], uuid.UUID(found[2]), found[3]) if found else None


def due(*, is_committed: bool | None, age_s: float, abandoned_s: float) -> bool | None:
    """What recovery does with a part: True commits it, False undoes it, None leaves it to its process. Pure.

    Without a decision it is undone only after one was made: then this is asked again.
    """
    if is_committed is not None:
        return is_committed
    return False if age_s >= abandoned_s else None


Place = Callable[[str, Params, Any], Awaitable[str]]
"""The shard that a statement runs on, by its text and parameters or its key."""


class SpanningTransaction:
    """One transaction on several shards; each statement runs on the shard of its key."""

    def __init__(self, id: uuid.UUID, parts: Mapping[str, Transaction], place: Place) -> None:
        self.id = id
        """Under it the parts can be found while they are prepared."""
        self._parts = parts
        self._place = place

    @property
    def texts(self) -> dict[str, set[str]]:
        """The statements that it ran, by shard."""
        return {shard: part.texts for shard, part in self._parts.items() if part.texts}

    async def fetch(self, sql: str, *params: Any, key: Key | msgspec.UnsetType = msgspec.UNSET) -> list[Row]:
        """The rows of a statement."""
        return await (await self._part(sql, params, key)).fetch(sql, *params)

    async def execute(self, sql: str, *params: Any, key: Key | msgspec.UnsetType = msgspec.UNSET) -> int:
        """Run a statement; the number of rows that it touched."""
        return await (await self._part(sql, params, key)).execute(sql, *params)

    async def _part(self, sql: str, params: Params, key: Key | msgspec.UnsetType) -> Transaction:
        shard = await self._place(sql, params, key)
        part = self._parts.get(shard)
        if part is None:
            raise StatementRefused(
                f"The statement belongs to shard {shard}; the transaction spans {', '.join(self._parts)}.",
                fix="Name a key of that shard, too, in transaction(keys=[...]).",
            )
        return part


class TwoPhase:
    """The transactions over several shards of one process, and the recovery of everybody's."""

    def __init__(self, nodes: Mapping[str, Node], config: DatabaseConfig, *, clock: Clock, observer: Observer) -> None:
        self._nodes = nodes
        self._config = config
        self._clock = clock
        self._observer = observer
        self._able: set[str] = set()
        self._cleared_at = -float("inf")

    @asynccontextmanager
    async def transaction(self, shards: Sequence[str], place: Place) -> AsyncIterator[SpanningTransaction]:
        """Commits on all shards when the block ends, and on none when it raises.

        Raises `OutcomeUnknown` only if the decision could not be heard; then it holds for all shards alike.
        """
        names = sorted(set(shards))
        if len(names) == 1:
            async with self._nodes[names[0]].transaction() as only:
                yield SpanningTransaction(uuid.uuid4(), {names[0]: only}, place)
            return
        for name in names:
            await self._check_able(name, names[0])
        id = uuid.uuid4()
        prepared: list[Part] = []
        try:
            async with AsyncExitStack() as stack:
                parts = {name: await stack.enter_async_context(self._nodes[name].unfinished()) for name in names}
                spanning = SpanningTransaction(id, parts, place)
                yield spanning
                for name in spanning.texts:
                    part = Part(names[0], id, name)
                    prepared.append(part)  # before it is: if the answer is lost, it may be
                    await parts[name].prepare(part.gid)
        except BaseException:
            if prepared:
                # Nobody has decided to commit, so nobody has to be asked; what is not reached recovery will undo.
                await self._end(prepared, is_committed=False, wait_s=0.0)
            raise
        if prepared:
            await self._conclude(prepared)

    async def _conclude(self, parts: Sequence[Part]) -> None:
        first = parts[0]
        is_committed = await self._decide(first, is_committed=True, shards=[part.shard for part in parts])
        late = await self._end(parts, is_committed=is_committed)
        if not is_committed:
            raise DatabaseUnavailable(
                f"The transaction {first.id} took longer than two_phase_abandoned_s to prepare and was undone.",
                fix="Repeat it; raise database.two_phase_abandoned_s if that is how long it takes.",
            )
        if late:
            self._observer.on(CommitDelayed(str(first.id), tuple(late)))
        else:
            await self._forget(first)

    async def _decide(self, part: Part, *, is_committed: bool, shards: Sequence[str] = ()) -> bool:
        """Make the decision, or learn which one was made before. Raises `OutcomeUnknown` if that cannot be heard."""
        node = self._nodes[part.decision_shard]
        ends = self._clock.monotonic() + self._config.resolve_wait_s
        while True:
            try:
                async with node.transaction() as transaction:
                    await transaction.execute(_DURABLY)
                    await transaction.execute(_DECIDE, part.id, is_committed, list(shards))
                rows = await node.fetch(_DECISION, (part.id,), read_only=True)
                if rows:  # else it was made, carried out and forgotten since
                    return bool(rows[0][0])
            except (BackendError, CallerError) as error:
                if isinstance(error, CallerError) or self._clock.monotonic() >= ends:
                    raise OutcomeUnknown(
                        f"The decision on transaction {part.id} was not heard from {node.name}: {error.message}",
                        fix=f"Recovery ends it alike on all shards: see headrace_decisions on {node.name}.",
                    ) from error
            await self._clock.sleep(_PAUSE_S)

    async def _end(self, parts: Sequence[Part], *, is_committed: bool, wait_s: float | None = None) -> list[str]:
        """Commit or undo parts; the shards where that could not be done within the time."""
        wait_s = self._config.resolve_wait_s if wait_s is None else wait_s
        done = await asyncio.gather(*(self._end_one(part, _VERBS[is_committed], wait_s) for part in parts))
        return [part.shard for part, is_done in zip(parts, done, strict=True) if is_done is False]

    async def _end_one(self, part: Part, verb: str, wait_s: float) -> bool | None:
        """True: done; None: somebody who obeyed the same decision was first; False: it could not be done."""
        ends = self._clock.monotonic() + wait_s
        quoted = part.gid.replace("'", "''")
        while True:
            try:
                await self._nodes[part.shard].execute(f"{verb} PREPARED '{quoted}'")
                return True
            except (BackendError, CallerError) as error:
                sqlstate = error.sqlstate if isinstance(error, StatementFailed) else None
                if sqlstate == _GONE:
                    return None
                is_hopeless = isinstance(error, CallerError) and sqlstate != _BUSY
                if is_hopeless or self._clock.monotonic() >= ends:
                    return False
            await self._clock.sleep(_PAUSE_S)

    async def _forget(self, part: Part) -> None:
        """A decision that was carried out everywhere is not needed; one that stays does no harm."""
        try:
            await self._nodes[part.decision_shard].execute(_FORGET, (part.id,))
        except BackendError:
            return

    async def _check_able(self, name: str, decision_shard: str) -> None:
        if len(Part(decision_shard, uuid.UUID(int=0), name).gid.encode()) > _GID_BYTES_MAX:
            raise ConfigError(f"The shard names {decision_shard!r} and {name!r} are too long for two-phase commit.")
        if name in self._able:
            return
        node = self._nodes[name]
        if (await node.fetch(_ROOM, read_only=True))[0][0] == 0:
            raise ConfigError(
                f"Shard {name} has max_prepared_transactions = 0, so it can take part in no two-phase transaction.",
                fix="Set max_prepared_transactions to at least the number of connections, and restart that Postgres.",
            )
        async with node.transaction() as transaction:
            for statement in _CREATE:
                await transaction.execute(statement)
        self._able.add(name)

    # -- recovery -----------------------------------------------------------------------------------------------------

    async def watch(self) -> None:
        """Recover now and again, until cancelled."""
        while True:
            await self._clock.sleep(min(_SWEEP_S, self._config.two_phase_abandoned_s / 2))
            await self.recover()

    async def recover(self) -> None:
        """End the parts on every reached shard whose decision is made, or whose process must be gone."""
        open_ids: dict[str, set[uuid.UUID]] = {}
        for node in self._nodes.values():
            if node.available:
                try:
                    open_ids[node.name] = await self._recover(node)
                except (BackendError, CallerError):
                    continue  # it may have no decisions table yet, or be read-only, or gone: looked at again
        if self._clock.monotonic() - self._cleared_at >= _CLEAR_S:
            self._cleared_at = self._clock.monotonic()
            await self._clear(list(open_ids), [id for ids in open_ids.values() for id in ids])

    async def _clear(self, shards: list[str], open_ids: list[uuid.UUID]) -> None:
        """Forget decisions that were carried out late: nobody else does."""
        for name in shards:
            try:
                await self._nodes[name].execute(_CLEAR, (shards, open_ids))
            except (BackendError, CallerError):
                continue

    async def _recover(self, node: Node) -> set[uuid.UUID]:
        """The transactions that had a part there."""
        found = [(Part.of(gid), age_s) for gid, age_s in await node.fetch(_PARTS, read_only=True)]
        old = [(part, age_s) for part, age_s in found if part is not None and age_s >= _YOUNG_S]
        ids = {part.id for part, _ in found if part is not None}
        if not old:
            return ids
        # Several processes may be at it: each part is ended by one of them, and all obey the same decision.
        ended, left = {True: 0, False: 0}, 0
        for part, age_s in old:
            verdict = await self._verdict(part, age_s)
            is_done = verdict is not None and await self._end_one(part, _VERBS[verdict], 0.0)
            if is_done and verdict is not None:
                ended[verdict] += 1
            elif is_done is False:
                left += 1
        if any(ended.values()):
            self._observer.on(TransactionsRecovered(node.name, committed=ended[True], rolled_back=ended[False]))
        oldest_s = max(age_s for _, age_s in old)
        if left and oldest_s >= self._config.two_phase_alert_s:
            self._observer.on(TransactionsInDoubt(node.name, left, oldest_s))
        return ids

    async def _verdict(self, part: Part, age_s: float) -> bool | None:
        """How the part has to end; None: nobody may say yet."""
        decider = self._nodes.get(part.decision_shard)
        if decider is None or part.shard not in self._nodes:
            return None  # of another cluster on the same database, or of a shard that was taken out: told by its age
        try:
            decided = await self._decision(decider, part)
            verdict = due(is_committed=decided, age_s=age_s, abandoned_s=self._config.two_phase_abandoned_s)
            if verdict is None or decided is not None:
                return verdict
            return await self._decide(part, is_committed=False)
        except (BackendError, CallerError):
            return None  # its decision shard is not reached: nobody may guess

    async def _decision(self, node: Node, part: Part) -> bool | None:
        try:
            rows = await node.fetch(_DECISION, (part.id,), read_only=True)
        except StatementFailed as error:
            if error.sqlstate != _NO_TABLE:
                raise
            return None
        return bool(rows[0][0]) if rows else None
