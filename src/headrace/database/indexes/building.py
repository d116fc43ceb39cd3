"""Making and dropping an index on one shard while it is used: CONCURRENTLY, with bounded waits, nothing left behind.

A build that fails or is cut off leaves an index that Postgres writes to and never reads. So the journal knows of it
before it exists. A failed build drops it at once, or, where a transaction is in the way of that as well, as soon as
that has ended; what a killed process left is dropped by the next one.
"""

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Final, NamedTuple

from headrace.clock import Clock
from headrace.database.indexes.advice import IndexChange, State
from headrace.database.indexes.journal import NAMESPACE, note, read_journal
from headrace.database.postgres.nodes import Node
from headrace.database.postgres.pipeline import DriverError, PipelinedConnection
from headrace.errors import BackendError, IndexBuildFailed
from headrace.events import IndexBuilt, IndexDropped, IndexLeftoverDropped, Observer

Progress = Callable[[str], None]
"""Is told in a few words what is being done, several times a second at most."""

_ATTEMPTS: Final = 3
_PAUSE_S: Final = 1.0
_LOOK_S: Final = 0.5
_FOUND: Final = """
SELECT i.indisvalid, pg_relation_size(i.indexrelid) FROM pg_index i WHERE i.indexrelid = to_regclass($1)"""
_HOW_FAR: Final = """
SELECT phase, CASE WHEN blocks_total > 0 THEN blocks_done::float8 / blocks_total WHEN tuples_total > 0
    THEN tuples_done::float8 / tuples_total END
FROM pg_stat_progress_create_index WHERE pid = $1"""
_LOCK_NOT_AVAILABLE: Final = "55P03"


class Built(NamedTuple):
    """An index that is there and valid."""

    size_bytes: int
    seconds: float


class Hold(NamedTuple):
    """The right to change one index on one shard, and the connection that has it."""

    node: Node
    name: str
    """As SQL writes it."""
    connection: PipelinedConnection


class Builder:
    """Changes indexes on the nodes that it is given."""

    def __init__(self, *, clock: Clock, observer: Observer, lock_timeout_s: float) -> None:
        self._clock = clock
        self._observer = observer
        self._lock_timeout_s = lock_timeout_s

    @asynccontextmanager
    async def holding(self, node: Node, name: str) -> AsyncIterator["Hold"]:
        """The right to change this index on this shard; raises `IndexBuildFailed` if another process has it."""
        async with self._lock(node, name) as connection:
            if connection is None:
                raise IndexBuildFailed(
                    f"{node.name}: another process is changing {name}.", fix="Wait until it is done."
                )
            yield Hold(node, name, connection)

    async def build(self, hold: Hold, sql: str, progress: Progress) -> Built:
        """Make the index. Raises `IndexBuildFailed` and leaves nothing if that cannot be done."""
        began = self._clock.monotonic()
        if not await self._sweep(hold):
            raise IndexBuildFailed(f"{hold.node.name}: {hold.name} is there, invalid, and held by somebody.")
        try:
            await self._attempt(hold, sql, progress)
        except BaseException:
            await self._sweep(hold)
            raise
        size = await self.size(hold)
        if size is None:
            await self._sweep(hold)
            raise IndexBuildFailed(f"{hold.node.name}: {hold.name} was built, and is not valid.")
        seconds = self._clock.monotonic() - began
        self._observer.on(IndexBuilt(hold.node.name, hold.name, seconds, size))
        return Built(size, seconds)

    async def size(self, hold: Hold) -> int | None:
        """The bytes of the index; None: there is no valid one."""
        found = await _standing(hold.connection, hold.name)
        return found[1] if found is not None and found[0] else None

    async def drop(self, hold: Hold, reason: str) -> None:
        """Drop the index while it is used."""
        await self._attempt(hold, f"DROP INDEX CONCURRENTLY IF EXISTS {hold.name}", _silent)
        self._observer.on(IndexDropped(hold.node.name, hold.name, reason))

    async def recover(self, node: Node) -> list[IndexChange]:
        """Finish or take back what a process that is gone had begun; what was found.

        What another process is still at is left alone.
        """
        settled = []
        for change in await read_journal(node, (State.BUILDING, State.BUILT, State.DROPPING)):
            async with self._lock(node, change.name) as connection:
                if connection is None:
                    continue
                hold = Hold(node, change.name, connection)
                await self._discard(hold)
                found = await _standing(connection, change.name)
            state, reason = _settled(change.state, is_there=found is not None)
            await note(node, change.id, state, reason)
            settled.append(change)
        return settled

    async def _attempt(self, hold: Hold, sql: str, progress: Progress) -> None:
        """Run it, again if it waited too long for a lock: longer each time, with a pause for those in between."""
        for attempt in range(1, _ATTEMPTS + 1):
            try:
                await self._watched(hold, sql, attempt, progress)
            except DriverError as error:
                is_clean = await self._sweep(hold)
                if error.sqlstate != _LOCK_NOT_AVAILABLE or attempt == _ATTEMPTS or not is_clean:
                    left = "" if is_clean else "; what it left is held by somebody, and dropped as soon as that ends"
                    raise IndexBuildFailed(f"{hold.node.name}: {hold.name}: {str(error).strip()}{left}.") from error
            else:
                return
            await self._clock.sleep(_PAUSE_S * attempt)

    async def _watched(self, hold: Hold, sql: str, attempt: int, progress: Progress) -> None:
        watch = asyncio.get_running_loop().create_task(self._tell(hold, progress))
        try:
            await self._run(hold.connection, sql, lock_timeout_s=self._lock_timeout_s * attempt)
        finally:
            watch.cancel()
            await asyncio.gather(watch, return_exceptions=True)

    async def _tell(self, hold: Hold, progress: Progress) -> None:
        pid = hold.connection.info.backend_pid
        while True:
            await self._clock.sleep(_LOOK_S)
            try:
                rows = await hold.node.fetch(_HOW_FAR, (pid,), read_only=True)
            except BackendError:
                return  # nobody has to know how far it is
            for phase, share in rows:
                progress(f"{hold.node.name}: {phase}" + (f", {share:.0%}" if share is not None else ""))

    async def _run(self, connection: PipelinedConnection, sql: str, *, lock_timeout_s: float | None = None) -> None:
        """Without a limit on its time: an index takes as long as it takes. With one on each of its waits for locks."""
        limit_ms = round((lock_timeout_s or self._lock_timeout_s) * 1000)
        cursor = await connection.execute(
            "SELECT current_setting('statement_timeout'), current_setting('lock_timeout')", prepare=False
        )
        before = (await cursor.fetchall())[0]
        await _set(connection, "0", str(limit_ms))
        try:
            await connection.execute(sql, prepare=False)
        finally:
            if not connection.broken and not connection.closed:
                await _set(connection, *before)

    @asynccontextmanager
    async def _lock(self, node: Node, name: str) -> AsyncIterator[PipelinedConnection | None]:
        """A connection that alone may change this index; None: another one does."""
        async with node.reading() as connection:
            lock = "SELECT pg_try_advisory_lock($1, hashtext($2))"
            cursor = await connection.execute(lock, (NAMESPACE, name), prepare=False)
            if not (await cursor.fetchall())[0][0]:
                yield None
                return
            try:
                yield connection
            finally:
                if not connection.broken and not connection.closed:
                    unlock = "SELECT pg_advisory_unlock($1, hashtext($2))"
                    await connection.execute(unlock, (NAMESPACE, name), prepare=False)

    async def _discard(self, hold: Hold) -> None:
        """Drop what a build that failed or was cut off left; not what is valid."""
        found = await _standing(hold.connection, hold.name)
        if found is not None and not found[0]:
            await self._run(hold.connection, f"DROP INDEX CONCURRENTLY IF EXISTS {hold.name}")
            self._observer.on(IndexLeftoverDropped(hold.node.name, hold.name))

    async def _sweep(self, hold: Hold) -> bool:
        """Drop what a build left, if that can be done now; whether nothing is left. The journal sees to the rest.

        The transaction that a build waited for in vain is often in the way of dropping its rest, too.
        """
        try:
            await self._discard(hold)
        except DriverError:
            return False
        return True

    async def is_settled(self, hold: Hold) -> bool:
        """Whether the index is either valid or not there."""
        try:
            found = await _standing(hold.connection, hold.name)
        except DriverError:
            return False  # the connection is gone: not known
        return found is None or found[0]


async def _standing(connection: PipelinedConnection, name: str) -> tuple[bool, int] | None:
    """Whether an index is valid, and its size; None: it is not there."""
    cursor = await connection.execute(_FOUND, (name,), prepare=False)
    rows = await cursor.fetchall()
    return (rows[0][0], rows[0][1]) if rows else None


def _settled(before: State, *, is_there: bool) -> tuple[State, str]:
    """What became of a step whose author is gone."""
    if before is State.DROPPING and is_there:
        return State.FAILED, "not dropped: the process ended before"
    if before is State.DROPPING:
        return State.DROPPED, "the process ended while it was dropped"
    if is_there:
        return State.KEPT, "not measured: the process ended after it was built"
    return State.FAILED, "the process ended while it was built; what it left is dropped"


async def _set(connection: PipelinedConnection, statement_timeout: str, lock_timeout: str) -> None:
    sql = "SELECT set_config('statement_timeout', $1, false), set_config('lock_timeout', $2, false)"
    await connection.execute(sql, (statement_timeout, lock_timeout), prepare=False)


def _silent(words: str) -> None:
    """Nobody asked."""
