"""Carries out what `route` planned for writing on several shards: all of them run it, then all of them commit.

Any error before the first commit undoes it everywhere. Between the first commit and the last there is a moment in
which a crash leaves some shards without it; that is `OutcomeUnknown`, which names the shards. Whoever cannot live with
that uses a two-phase transaction. Shards are asked in one order by everybody, so that two such writes wait for each
other on the first shard rather than in a circle.
"""

from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Any, NamedTuple

from headrace.database.postgres.nodes import Node
from headrace.database.postgres.rows import Row
from headrace.database.postgres.transaction import Transaction
from headrace.errors import BackendError, HeadraceError, OutcomeUnknown

Task = tuple[str, Sequence[Any]]
"""A statement and its parameters."""


class Written(NamedTuple):
    """What one shard answered."""

    rows: list[Row]
    touched: int


async def write_all(nodes: Mapping[str, Node], tasks: Mapping[str, Task], *, same: bool = False) -> list[Written]:
    """Run a statement on each of the shards. With `same`, all of them must touch equally many rows."""
    written: list[Written] = []
    committed: list[str] = []
    try:
        # Left from the inside out: a commit that fails undoes those that have not come yet.
        async with AsyncExitStack() as stack:
            for shard, (sql, params) in tasks.items():
                transaction = await stack.enter_async_context(_noted(nodes[shard], committed))
                written.append(Written(*await transaction.fetch_counted(sql, *params)))
            if same:
                _check_same(list(tasks), written)
    except HeadraceError as error:
        if not committed:
            raise
        others = [shard for shard in tasks if shard not in committed]
        raise OutcomeUnknown(
            f"Committed on {', '.join(committed)}, not on {', '.join(others)}: {error.message}",
            fix="Read the rows on the named shards and write what is missing; a two-phase transaction avoids this.",
        ) from error
    return written


@asynccontextmanager
async def _noted(node: Node, committed: list[str]) -> AsyncIterator[Transaction]:
    async with node.transaction() as transaction:
        yield transaction
    committed.append(node.name)


def _check_same(shards: Sequence[str], written: Sequence[Written]) -> None:
    if len({each.touched for each in written}) > 1:
        counts = ", ".join(f"{shard}: {each.touched}" for shard, each in zip(shards, written, strict=True))
        raise BackendError(
            f"The write would touch different numbers of rows ({counts}): the shards' copies of the table differ.",
            fix="Bring the copies of the reference table in line first; nothing was written.",
        )
