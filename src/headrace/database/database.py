"""The door of the database room: name a key and the statement runs on the shard that holds it."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from types import TracebackType
from typing import Any, NamedTuple, Self

import msgspec

from headrace.clock import Clock, SystemClock
from headrace.database.config import DatabaseConfig
from headrace.database.kept_map import KeptMap, check_map, keep_map, read_map
from headrace.database.nodes import Node, NodeStatistics, Transaction
from headrace.database.placement.postgres_hash import Key, hash_key
from headrace.database.rows import Row
from headrace.database.shard_map import Placement, ShardMap
from headrace.errors import BugError, CallerError, DatabaseUnavailable, NotOpen
from headrace.events import Observer, Silent

_WATCH_S = 1.0
"""A shard that has said nothing for so long is asked whether it is there."""
_SAMPLE_KEYS: tuple[str | int, ...] = (
    "",
    "a",
    "headrace",
    "a key of more than twelve bytes",
    0,
    1,
    -1,
    2**40,
    -(2**63),
)


class DatabaseStatistics(NamedTuple):
    """The connections of this process, by shard."""

    shards: dict[str, NodeStatistics]


class Database:
    """Several Postgres shards as one database.

    A statement names its key and runs on the one shard that holds it; `fetch_everywhere` asks all of them. With a
    single shard the key may be left out.
    """

    def __init__(
        self, config: DatabaseConfig, *, clock: Clock | None = None, observer: Observer | None = None
    ) -> None:
        self.config = config
        self.shard_map = ShardMap.plan(
            config.slots, {shard.name: shard.weight for shard in config.shards if shard.active}
        )
        self._clock, observer = clock or SystemClock(), observer or Silent()
        self.nodes = {shard.name: Node(shard, config, clock=self._clock, observer=observer) for shard in config.shards}
        self._watches: set[asyncio.Task[None]] = set()
        self._open = False

    async def __aenter__(self) -> Self:
        """Connect to every shard and compare the shard map with the one that each keeps.

        A shard that is down does not keep the others from serving: it is asked again every second, and compared before
        it serves. Raises `ConfigError` if a shard keeps another map than the configuration makes.
        """
        try:
            for node in self.nodes.values():
                await node.open()
            await asyncio.gather(*(node.probe() for node in self.nodes.values()))
            await self._compare_maps()
            await self.prepare(_verify_hash)
            await self.prepare(lambda node: keep_map(node, self.shard_map))
        except BaseException:
            await self._close()
            raise
        loop = asyncio.get_running_loop()
        self._watches = {loop.create_task(self._watch(node)) for node in self.nodes.values()}
        self._open = True
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Close every connection."""
        await self._close()

    async def _close(self) -> None:
        self._open = False
        for watch in self._watches:
            watch.cancel()
        await asyncio.gather(*self._watches, return_exceptions=True)
        await asyncio.gather(*(node.close() for node in self.nodes.values()))

    async def _watch(self, node: Node) -> None:
        while True:
            await self._clock.sleep(_WATCH_S)
            if node.is_silent(_WATCH_S):
                await node.probe()

    async def _compare_maps(self) -> None:
        """Compare with all shards before one of them is told to keep a map that another would refuse."""
        for node in self._reached():
            try:
                kept = await read_map(node)
            except DatabaseUnavailable:
                continue
            if kept is not None:
                check_map(kept, KeptMap(node.name, self.shard_map))

    async def prepare(self, preparation: Callable[[Node], Awaitable[None]]) -> None:
        """Run this on every shard before it serves anything else: now, or when a shard that is down is reached."""
        for node in self.nodes.values():
            node.prepare(preparation)
        for node in self._reached():
            try:
                await node.ready()
            except DatabaseUnavailable:
                continue

    def _reached(self) -> list[Node]:
        return [node for node in self.nodes.values() if node.available]

    def locate(self, key: Key) -> Placement:
        """The shard and slot of a key."""
        return self.shard_map.locate(key)

    async def fetch(
        self, sql: str, *params: Any, key: Key | msgspec.UnsetType = msgspec.UNSET, read_only: bool = False
    ) -> list[Row]:
        """The rows of a statement; parameters are `$1`, `$2` ...

        A `read_only` statement is repeated once if its connection died; say so only of statements that change nothing.
        """
        return await self._node(key).fetch(sql, params, read_only=read_only)

    async def fetch_one(
        self, sql: str, *params: Any, key: Key | msgspec.UnsetType = msgspec.UNSET, read_only: bool = False
    ) -> Row | None:
        """The first row of a statement, or None."""
        rows = await self.fetch(sql, *params, key=key, read_only=read_only)
        return rows[0] if rows else None

    async def fetch_value(
        self, sql: str, *params: Any, key: Key | msgspec.UnsetType = msgspec.UNSET, read_only: bool = False
    ) -> Any:
        """The first column of the first row, or None."""
        row = await self.fetch_one(sql, *params, key=key, read_only=read_only)
        return row[0] if row else None

    async def execute(self, sql: str, *params: Any, key: Key | msgspec.UnsetType = msgspec.UNSET) -> int:
        """Run a statement; the number of rows that it touched."""
        return await self._node(key).execute(sql, params)

    async def execute_many(
        self, sql: str, rows: Sequence[Sequence[Any]], *, key: Key | msgspec.UnsetType = msgspec.UNSET
    ) -> None:
        """Run a statement for each row of parameters, all in one transaction."""
        await self._node(key).execute_many(sql, rows)

    async def fetch_everywhere(self, sql: str, *params: Any) -> list[Row]:
        """The rows of every shard, shard after shard. A shard that does not answer fails the whole call."""
        answers = await asyncio.gather(
            *(node.fetch(sql, params, read_only=True) for node in self.nodes.values()), return_exceptions=True
        )
        rows: list[Row] = []
        for answer in answers:
            if isinstance(answer, BaseException):
                raise answer
            rows += answer
        return rows

    @asynccontextmanager
    async def transaction(self, *, key: Key | msgspec.UnsetType = msgspec.UNSET) -> AsyncIterator[Transaction]:
        """A transaction on the shard of the key; commits when the block ends, rolls back when it raises."""
        async with self._node(key).transaction() as transaction:
            yield transaction

    def statistics(self) -> DatabaseStatistics:
        """The pools, now."""
        return DatabaseStatistics({name: node.statistics() for name, node in self.nodes.items()})

    def _node(self, key: Key | msgspec.UnsetType) -> Node:
        if not self._open:
            raise NotOpen("The Database is not open.", fix="Use it inside `async with Database(config) as db`.")
        if key is not msgspec.UNSET:
            return self.nodes[self.shard_map.locate(key).shard]
        if len(self.nodes) == 1:
            return next(iter(self.nodes.values()))
        raise CallerError(
            f"The statement names no key, and there are {len(self.nodes)} shards.",
            fix="Pass key=..., or use fetch_everywhere for a query over all shards.",
        )


async def _verify_hash(node: Node) -> None:
    """Compare our slot hash with the shard's own; a key must never have two homes."""
    functions = (
        f"hashint8extended(${number}::bigint, 0)" if isinstance(key, int) else f"hashtextextended(${number}::text, 0)"
        for number, key in enumerate(_SAMPLE_KEYS, 1)
    )
    rows = await node.fetch(f"SELECT {', '.join(functions)}", _SAMPLE_KEYS, read_only=True)
    for key, theirs in zip(_SAMPLE_KEYS, rows[0], strict=True):
        if theirs % 2**64 != hash_key(key):
            raise BugError(f"Shard {node.name} hashes {key!r} differently than headrace does.")
