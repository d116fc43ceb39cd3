"""Carries out what concerns several shards and changes them: all of them run it, then all of them commit.

Any error before the first commit undoes it everywhere. Between the first commit and the last there is a moment in
which a crash leaves some shards without it; that is `OutcomeUnknown`, which names the shards. Whoever cannot live with
that uses a two-phase transaction. A caller who leaves in that moment does not stop the commits. Shards are asked in
one order by everybody, so that two such writes wait for each other on the first shard rather than in a circle.
"""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from enum import Enum
from typing import Any, Final, NamedTuple, TypeVar

from headrace.database.postgres.nodes import Node
from headrace.database.postgres.rows import Row
from headrace.database.postgres.transaction import Transaction
from headrace.errors import BackendError, HeadraceError, OutcomeUnknown

T = TypeVar("T")
_LOCK: Final = 0x636F7079  # "copy": any number, as long as it is always the same
Task = tuple[str, Sequence[Any]]
"""A statement and its parameters."""


class Written(NamedTuple):
    """What one shard answered."""

    rows: list[Row]
    touched: int


class _Fate(Enum):
    COMMITTED = "committed"
    UNKNOWN = "unknown"
    UNDONE = "not committed"


async def write_all(nodes: Mapping[str, Node], tasks: Mapping[str, Task], *, same: bool = False) -> list[Written]:
    """Run a statement on each of the shards.

    With `same` it is one on copies, which come after each other in one order on all shards, and all must touch equally
    many rows and return the same.
    """
    shards = sorted(tasks)

    def work(shard: str) -> Callable[[Transaction], Awaitable[Written]]:
        sql, params = tasks[shard]

        async def run(transaction: Transaction) -> Written:
            if same and shard == shards[0]:
                # Rows' own locks do not order an INSERT before what would have seen it. The first shard commits last.
                await transaction.execute("SELECT pg_advisory_xact_lock($1)", _LOCK)
            return Written(*await transaction.fetch_counted(sql, *params))

        return run

    def check(written: Sequence[Written]) -> None:
        if same:
            _check_same(shards, written)

    return await _on_each(nodes, {shard: work(shard) for shard in shards}, check=check)


async def write_many(nodes: Mapping[str, Node], sql: str, rows: Mapping[str, Sequence[Sequence[Any]]]) -> None:
    """Run a statement for each row of parameters, on the shard that it stands under."""

    def work(shard: str) -> Callable[[Transaction], Awaitable[None]]:
        return lambda transaction: transaction.execute_many(sql, rows[shard])

    await _on_each(nodes, {shard: work(shard) for shard in sorted(rows)})


async def _on_each(
    nodes: Mapping[str, Node],
    works: Mapping[str, Callable[[Transaction], Awaitable[T]]],
    *,
    check: Callable[[Sequence[T]], None] | None = None,
) -> list[T]:
    """Work in a transaction on each of the shards, all of which commit when all is done; `check` may still refuse."""
    done: list[T] = []
    fates = dict.fromkeys(works, _Fate.UNDONE)
    try:
        # Left from the inside out: a commit that fails undoes those that have not come yet.
        async with AsyncExitStack() as stack:
            for shard, work in works.items():
                transaction = await stack.enter_async_context(_noted(nodes[shard], fates))
                done.append(await work(transaction))
            if check is not None:
                check(done)
            commits = stack.pop_all()
        await _finished(commits.aclose())
    except HeadraceError as error:
        if all(fate is _Fate.UNDONE for fate in fates.values()):
            raise
        raise OutcomeUnknown(
            f"{_told(fates)}: {error.message}",
            fix="Read the rows on the named shards and write what is missing; a two-phase transaction avoids this.",
        ) from error
    finally:
        for shard in works:
            nodes[shard].note_write()  # the commits ran in a context of their own
    return done


@asynccontextmanager
async def _noted(node: Node, fates: dict[str, _Fate]) -> AsyncIterator[Transaction]:
    is_committing = False
    try:
        async with node.transaction() as transaction:
            yield transaction
            is_committing = True
    except OutcomeUnknown:
        if is_committing:
            fates[node.name] = _Fate.UNKNOWN
        raise
    fates[node.name] = _Fate.COMMITTED


async def _finished(work: Coroutine[Any, Any, None]) -> None:
    """Wait for it to the end, and be cancelled only then."""
    task = asyncio.get_running_loop().create_task(work)
    cancelled: asyncio.CancelledError | None = None
    while not task.done():
        try:
            await asyncio.wait({task})
        except asyncio.CancelledError as error:
            cancelled = error
    if cancelled is not None:
        raise cancelled from task.exception()
    task.result()


def _told(fates: Mapping[str, _Fate]) -> str:
    """Which shards have it: `Committed on a; not committed on b, c`."""
    names = {fate: ", ".join(shard for shard, its in fates.items() if its is fate) for fate in _Fate}
    told = "; ".join(f"{fate.value} on {shards}" for fate, shards in names.items() if shards)
    return told[0].upper() + told[1:]  # not `capitalize`: shards keep their names


def _check_same(shards: Sequence[str], written: Sequence[Written]) -> None:
    if len({each.touched for each in written}) > 1:
        counts = ", ".join(f"{shard}: {each.touched}" for shard, each in zip(shards, written, strict=True))
        raise BackendError(
            f"The write would touch different numbers of rows ({counts}): the shards' copies of the table differ.",
            fix="Bring the copies of the reference table in line first; nothing was written.",
        )
    if len({tuple(sorted(map(repr, each.rows))) for each in written}) > 1:
        raise BackendError(
            f"The write would return different rows on {', '.join(shards)}: the shards' copies of the table differ.",
            fix="A trigger that computes on each shard for itself belongs on no reference table; nothing was written.",
        )
