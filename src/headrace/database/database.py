"""The door of the database room: name a key and the statement runs on the shard that holds it."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import AbstractAsyncContextManager, AbstractContextManager, asynccontextmanager
from functools import partial
from types import TracebackType
from typing import Any, Literal, NamedTuple, Self, overload

import msgspec

from headrace.cache import Cache
from headrace.clock import Clock, SystemClock
from headrace.database.catalog import declared
from headrace.database.config import DatabaseConfig
from headrace.database.fanout.point_reads import PointReads
from headrace.database.fanout.spread import Spread, each_row, one_shard
from headrace.database.fanout.writing import write_many
from headrace.database.indexes.advisor import Indexes
from headrace.database.indexes.observation import StatementHistogram
from headrace.database.kept_map import FENCED
from headrace.database.key_columns import verify_columns, verify_hash
from headrace.database.map_keeper import MapKeeper
from headrace.database.placement.postgres_hash import Key
from headrace.database.planning.route import AnyShard, OneShard, Plan
from headrace.database.postgres.nodes import Node
from headrace.database.postgres.pool_usage import NodeStatistics
from headrace.database.postgres.replicas import LSN, Replicas
from headrace.database.postgres.rows import Partial, Row
from headrace.database.postgres.sessions import session, wrote_at
from headrace.database.postgres.transaction import Transaction
from headrace.database.postgres.two_phase import SpanningTransaction, TwoPhase
from headrace.database.query_cache.cache import CacheVerdict, QueryCache, QueryCacheStatistics, inside
from headrace.database.query_policy import QueryPolicy
from headrace.database.shard_map import Placement, ShardMap, holds_slots
from headrace.errors import CallerError, ConfigError, DatabaseUnavailable, NotOpen, StatementFailed, StatementRefused
from headrace.events import Observer, Silent

_WATCH_S = 1.0
"""A shard that has said nothing for so long is asked whether it is there."""


class DatabaseStatistics(NamedTuple):
    """The connections of this process, by shard and replica."""

    shards: dict[str, NodeStatistics]
    queries: QueryCacheStatistics | None = None
    """The query cache; None: the Database was made without one."""


class Database:
    """Several Postgres shards as one database.

    A statement runs on the shard that holds its key: the `key` of the call, or what its text says of the keys of
    declared tables. One that concerns several shards is answered as a single Postgres would, or refused with the
    reason. With a single shard nothing needs to be said.
    """

    def __init__(
        self,
        config: DatabaseConfig,
        *,
        cache: Cache | None = None,
        clock: Clock | None = None,
        observer: Observer | None = None,
    ) -> None:
        self.config = config
        self.shard_map = ShardMap.of(config)
        self._clock, observer = clock or SystemClock(), observer or Silent()
        nodes = {shard.name: Node(shard, config, clock=self._clock, observer=observer) for shard in config.shards}
        self.nodes = {shard.name: nodes[shard.name] for shard in config.shards if shard.replica_of is None}
        self.replicas = {
            name: Replicas(
                node,
                {each.name: (nodes[each.name], each.weight) for each in config.shards if each.replica_of == name},
                config.replicas,
                clock=self._clock,
            )
            for name, node in self.nodes.items()
        }
        """The replicas of each shard; most have none."""
        self._two_phase = TwoPhase(self.nodes, config, clock=self._clock, observer=observer)
        self._keeper = MapKeeper(
            {shard.name: self.nodes[shard.name] for shard in config.shards if holds_slots(shard)},
            self.shard_map,
            look_s=config.map_look_s,
            adopt=self._adopt,
            clock=self._clock,
            observer=observer,
        )
        self._spread = Spread(self.nodes, config, self._holding())
        self._stranger: str | None = None
        self._point_reads: PointReads | None = None
        if any(table.batch_by is not None for table in config.tables.values()):
            self._point_reads = PointReads(config.tables, declared(config.tables), waiting_max=config.waiting_max)
        self._queries: QueryCache | None = None
        if cache is not None:
            shards = {shard.name: shard for shard in config.shards}
            self._queries = QueryCache(
                cache, config.query_cache, shards=shards, nodes=self.nodes, clock=self._clock, observer=observer
            )
        self._seen = StatementHistogram(
            every=config.indexes.sample_every, statements_max=config.indexes.statements_max, clock=self._clock
        )
        self.indexes = Indexes(
            lambda: [self._at(name) for name in self._holding()],
            seen=self._seen,
            config=config,
            clock=self._clock,
            observer=observer,
        )
        """What to index, and what not; made and measured."""
        self._watches: set[asyncio.Task[None]] = set()
        self._open = False

    async def __aenter__(self) -> Self:
        """Connect to every shard and compare the shard map with the one that each keeps.

        A shard that is down does not keep the others from serving: it is asked again every second, and compared before
        it serves. Raises `ConfigError` if a shard keeps another map than the configuration makes.
        """
        try:
            for node in self._all_nodes():
                await node.open()
            await asyncio.gather(*(node.probe() for node in self.nodes.values()))
            await self._keeper.agree()
            await self.prepare(verify_hash)
            await self._keeper.decide_first()
            await self.prepare(self._keeper.keep)
            await self.prepare(lambda node: verify_columns(node, self.config.tables))
        except BaseException:
            await self._close()
            raise
        loop = asyncio.get_running_loop()
        self._watches = {loop.create_task(self._watch(node)) for node in self._all_nodes()}
        self._watches |= {loop.create_task(each.watch()) for each in self.replicas.values() if each.nodes}
        self._watches |= {loop.create_task(self._keeper.watch()), loop.create_task(self._two_phase.watch())}
        self._watches.add(loop.create_task(self.indexes.tend()))
        self._open = True
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Close every connection."""
        await self._close()

    async def _close(self) -> None:
        self._open = False
        if self._queries is not None:
            await self._queries.close()
        for watch in self._watches:
            watch.cancel()
        await asyncio.gather(*self._watches, return_exceptions=True)
        await self._keeper.close()
        await asyncio.gather(*(each.close() for each in self.replicas.values()))
        await asyncio.gather(*(node.close() for node in self._all_nodes()))
        if self._point_reads is not None:
            await self._point_reads.close()

    async def _watch(self, node: Node) -> None:
        while True:
            await self._clock.sleep(_WATCH_S)
            if node.is_silent(_WATCH_S):
                await node.probe()
            await node.tend()

    def _all_nodes(self) -> list[Node]:
        return [*self.nodes.values(), *(node for each in self.replicas.values() for node in each.nodes.values())]

    def _adopt(self, shard_map: ShardMap) -> None:
        before, self.shard_map = self._holding(), shard_map
        self._stranger = next((name for name in shard_map.names if name not in self.nodes), None)
        if self._queries is not None:
            self._queries.flush()
        if self._holding() != before:
            self._spread = Spread(self.nodes, self.config, self._holding())

    def _holding(self) -> tuple[str, ...]:
        """The shards that a statement over all of them asks: those that may hold rows."""
        holding = set(self.shard_map.names)
        shards = (shard for shard in self.config.shards if holds_slots(shard))
        return tuple(shard.name for shard in shards if shard.active or shard.name in holding)

    def _check_known(self) -> None:
        """Refuse to answer for all shards when the map in force has one that is not configured here."""
        if self._stranger is not None:
            raise _unknown_shard(self._stranger, self.shard_map.epoch)

    async def _overtaken(self, error: StatementFailed, epoch: int) -> bool:
        """Whether a shard's fence refused a write, before any effect, and a newer map says where it belongs."""
        if error.sqlstate != FENCED:
            return False
        return await self._keeper.overtaken(epoch, timeout_s=self.config.fence_wait_s)

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

    async def assign(self, key: Key, shard: str) -> Placement:
        """List a key in the directory, on every node, before it holds rows (strategy `directory`).

        Raises `CallerError` for a key whose rows may be elsewhere, `ShardMapOutdated` if another process changed the
        map at the same moment.
        """
        if shard not in self.nodes:
            raise CallerError(f"There is no shard {shard!r}.", fix=f"Name one of: {', '.join(self.nodes)}.")
        await self._keeper.publish(self.shard_map.with_key(key, shard))
        return self.locate(key)

    async def fetch(
        self,
        sql: str,
        *params: Any,
        key: Key | msgspec.UnsetType = msgspec.UNSET,
        read_only: bool = False,
        everywhere: bool = False,
        cache: QueryPolicy | None = None,
        replica: str | None = None,
    ) -> list[Row]:
        """The rows of a statement; parameters are `$1`, `$2` ...

        With `key` it runs on that key's shard. Without, its own words say where it goes (see `explain`); a SELECT over
        several shards is answered as a single Postgres would. `everywhere` allows it to write on several of them, each
        in a transaction of its own. A `read_only` statement is repeated once if its connection died; say so only of
        statements that change nothing. With `cache` the rows may come from the cache, and are never older than the
        policy promises; what must not be cached runs as it would without (`explain_cache` says why). With `replica` a
        `read_only` statement of one shard may be answered by `any` of its replicas, or the one of that name, as
        `database.replicas` allows; never by one that does not show what the caller wrote (see `sessions`). Raises
        `StatementRefused` for what cannot be done right.
        """
        if self._seen.is_due(skipping=cache is not None):
            with self._seen.timing(sql, params):
                return await self.fetch(
                    sql, *params, key=key, read_only=read_only, everywhere=everywhere, replica=replica
                )
        if replica is not None:
            is_plain = read_only and cache is None
            return await self._fetch_replica(sql, params, key, replica, is_plain=is_plain)
        epoch = self.shard_map.epoch  # of before the plan is made
        node = self._alone(key)
        if node is None:
            plan = await self._planned(sql, params, everywhere=everywhere)
            node = self._home(plan, is_cached=cache is not None)
            if node is None:
                return await self._fetch_spread(plan, sql, params, epoch, cache, everywhere=everywhere)
        if cache is not None and (cached := await self._cached().fetch(node.name, sql, params, cache)) is not None:
            return cached
        if self._point_reads is not None:
            together = self._point_reads.of(node, sql, params)
            if together is not None:
                return await together(params)
        try:
            return await node.fetch(sql, params, read_only=read_only)
        except StatementFailed as error:
            if not await self._overtaken(error, epoch):
                raise
        finally:
            self._wrote(node.name, sql)
        return await self.fetch(sql, *params, key=key, read_only=read_only, everywhere=everywhere)

    async def _fetch_replica(
        self, sql: str, params: Sequence[Any], key: Key | msgspec.UnsetType, replica: str, *, is_plain: bool
    ) -> list[Row]:
        if not is_plain:
            raise CallerError("replica= is for reads that are not cached.", fix="Pass read_only=True, no cache.")
        return await self.replicas[await self._place(sql, params, key)].fetch(sql, params, replica=replica)

    async def _fetch_spread(
        self, plan: Plan, sql: str, params: Sequence[Any], epoch: int, cache: QueryPolicy | None, *, everywhere: bool
    ) -> list[Row]:
        if cache is not None:
            self._cached().pass_over(sql)
        try:
            return await self._spread.fetch(plan, sql, params)
        except StatementFailed as error:
            if not await self._overtaken(error, epoch):
                raise
        finally:
            self._wrote(None, sql)
        return await self.fetch(sql, *params, everywhere=everywhere)

    async def fetch_one(
        self,
        sql: str,
        *params: Any,
        key: Key | msgspec.UnsetType = msgspec.UNSET,
        read_only: bool = False,
        cache: QueryPolicy | None = None,
        replica: str | None = None,
    ) -> Row | None:
        """The first row of a statement, or None."""
        rows = await self.fetch(sql, *params, key=key, read_only=read_only, cache=cache, replica=replica)
        return rows[0] if rows else None

    async def fetch_value(
        self,
        sql: str,
        *params: Any,
        key: Key | msgspec.UnsetType = msgspec.UNSET,
        read_only: bool = False,
        cache: QueryPolicy | None = None,
        replica: str | None = None,
    ) -> Any:
        """The first column of the first row, or None."""
        row = await self.fetch_one(sql, *params, key=key, read_only=read_only, cache=cache, replica=replica)
        return row[0] if row else None

    async def execute(
        self,
        sql: str,
        *params: Any,
        key: Key | msgspec.UnsetType = msgspec.UNSET,
        everywhere: bool = False,
        grouped: bool = False,
    ) -> int:
        """Run a statement; the number of rows that it touched, of a reference table those of one shard.

        `grouped` is for many writes of single rows: those that come at the same time share one commit on their shard,
        and each returns after it. A row that is refused fails its own call alone.
        """
        if self._seen.is_due():
            with self._seen.timing(sql, params):
                return await self.execute(sql, *params, key=key, everywhere=everywhere, grouped=grouped)
        epoch = self.shard_map.epoch  # of before the plan is made
        node = self._alone(key)
        if node is None:
            plan = await self._planned(sql, params, everywhere=everywhere)
            node = self._home(plan, is_cached=False)
        try:
            if node is None:
                return await self._spread.execute(plan, sql, params)
            return await node.execute(sql, params, grouped=grouped)
        except StatementFailed as error:
            if not await self._overtaken(error, epoch):
                raise
        finally:
            self._wrote(None if node is None else node.name, sql)
        return await self.execute(sql, *params, key=key, everywhere=everywhere, grouped=grouped)

    async def execute_many(
        self,
        sql: str,
        rows: Sequence[Sequence[Any]],
        *,
        key: Key | msgspec.UnsetType = msgspec.UNSET,
        everywhere: bool = False,
    ) -> None:
        """Run a statement for each row of parameters, all in one transaction; with `everywhere` one on each shard.

        Those commit when all rows are written: an error before leaves nothing anywhere.
        """
        epoch = self.shard_map.epoch
        try:
            await self._execute_many(sql, rows, key, everywhere=everywhere)
        except StatementFailed as error:
            if not await self._overtaken(error, epoch):
                raise
            await self._execute_many(sql, rows, key, everywhere=everywhere)

    async def _execute_many(
        self, sql: str, rows: Sequence[Sequence[Any]], key: Key | msgspec.UnsetType, *, everywhere: bool
    ) -> None:
        node = self._alone(key)
        if node is not None:
            try:
                await node.execute_many(sql, rows)
            finally:
                self._wrote(node.name, sql)
            return
        homes: dict[str, list[Sequence[Any]]] = {}
        for row in rows:
            plan = await self._planned(sql, row, everywhere=False)
            homes.setdefault(one_shard(plan), []).append(row)
        if len(homes) > 1 and not everywhere:
            raise StatementRefused(
                f"The {len(rows)} rows belong to {len(homes)} shards, which have no transaction in common.",
                fix="Pass everywhere=True for one transaction on each shard, or key=... and the rows of one shard.",
            )
        try:
            await write_many({shard: self._at(shard) for shard in homes}, sql, homes)
        finally:
            self._wrote(None, sql)

    @overload
    async def fetch_everywhere(self, sql: str, *params: Any, partial: Literal[False] = False) -> list[Row]: ...

    @overload
    async def fetch_everywhere(self, sql: str, *params: Any, partial: Literal[True]) -> Partial: ...

    async def fetch_everywhere(self, sql: str, *params: Any, partial: bool = False) -> list[Row] | Partial:
        """The rows of a SELECT over all shards. A shard that does not answer fails the whole call.

        Declared tables are read as `fetch` does. Of others nothing is known: every shard runs the statement, and the
        rows come shard after shard. With `partial` the answer is a `Partial`, which names the shards that it lacks.
        """
        self._check_open()
        self._check_known()
        return await self._spread.fetch_everywhere(sql, params, self.shard_map, partial=partial)

    @asynccontextmanager
    async def stream(
        self, sql: str, *params: Any, key: Key | msgspec.UnsetType = msgspec.UNSET
    ) -> AsyncIterator[AsyncIterator[Row]]:
        """The rows of a SELECT as they are read, without a bound on their number; leaving early cancels it."""
        node = self._alone(key)
        if node is None:
            plan = await self._planned(sql, params, everywhere=False)
            if not isinstance(plan, OneShard):
                async with self._spread.stream(plan, sql, params) as rows:
                    yield rows
                return
            node = self._at(plan.shard)
        async with node.stream(sql, params, block_rows=self.config.block_rows) as blocks:
            yield each_row(blocks)

    async def explain(
        self, sql: str, *params: Any, key: Key | msgspec.UnsetType = msgspec.UNSET, everywhere: bool = False
    ) -> Plan:
        """Where a statement would go, without running it."""
        node = self._alone(key)
        if node is not None:
            return OneShard(node.name)
        return await self._planned(sql, params, everywhere=everywhere)

    async def explain_cache(
        self,
        sql: str,
        *params: Any,
        cache: QueryPolicy = QueryPolicy(),  # noqa: B008 - frozen
        key: Key | msgspec.UnsetType = msgspec.UNSET,
    ) -> CacheVerdict:
        """Whether the rows of a statement would be cached; if not, why; and how they are kept fresh."""
        queries = self._cached()
        node = self._home(await self.explain(sql, *params, key=key), is_cached=True)
        if node is None:
            return queries.pass_over(sql)
        return await queries.explain(node.name, sql, params, cache)

    def _home(self, plan: Plan, *, is_cached: bool) -> Node | None:
        """The node that answers a planned statement alone; None: several do, or a different one each time."""
        if isinstance(plan, OneShard):
            return self._at(plan.shard)
        if is_cached and isinstance(plan, AnyShard):
            name = next((name for name in plan.shards if self.nodes[name].available), plan.shards[0])
            return self._at(name)
        return None

    def _cached(self) -> QueryCache:
        if self._queries is None:
            raise CallerError("This Database has no cache.", fix="Make it with Database(config, cache=Cache(...)).")
        return self._queries

    def _wrote(self, shard: str | None, *sqls: str) -> None:
        """They are committed, or may be: results from before them are not this process's any more."""
        if self._queries is not None:
            self._queries.wrote(shard, sqls)

    @overload
    def transaction(
        self, *, key: Key | msgspec.UnsetType = msgspec.UNSET
    ) -> AbstractAsyncContextManager[Transaction]: ...

    @overload
    def transaction(
        self, *, keys: Sequence[Key], two_phase: bool = False
    ) -> AbstractAsyncContextManager[SpanningTransaction]: ...

    def transaction(
        self,
        *,
        key: Key | msgspec.UnsetType = msgspec.UNSET,
        keys: Sequence[Key] | None = None,
        two_phase: bool = False,
    ) -> AbstractAsyncContextManager[Any]:
        """A transaction on the shard of the key; commits when the block ends, rolls back when it raises.

        With `keys` it spans their shards, and is refused if they are several, unless it is `two_phase`: then it
        commits on all of them or on none, also if this process dies meanwhile (see `two_phase`). A statement on
        declared tables whose rows are elsewhere is refused: it would find nothing, or write astray.
        """
        if keys is None:
            return self._transaction(key)
        shards = sorted({self._holder(each).name for each in keys})
        if len(shards) > 1 and not two_phase:
            raise StatementRefused(
                f"The keys live on {len(shards)} shards ({', '.join(shards)}), which have no transaction in common.",
                fix="Pass two_phase=True, for a transaction that commits on all of them or on none.",
            )
        return self._spanning(shards)

    @asynccontextmanager
    async def _spanning(self, shards: Sequence[str]) -> AsyncIterator[SpanningTransaction]:
        self._check_open()

        wrote: Mapping[str, set[str]] = {}
        try:
            async with self._two_phase.transaction(shards, self._place) as transaction:
                try:
                    yield transaction
                finally:
                    wrote = transaction.texts
        finally:
            for shard, texts in wrote.items():
                self._wrote(shard, *texts)

    @asynccontextmanager
    async def _transaction(self, key: Key | msgspec.UnsetType) -> AsyncIterator[Transaction]:
        epoch = self.shard_map.epoch
        try:
            node, texts = self._node(key), set[str]()
            try:
                async with node.transaction() as transaction:
                    texts = transaction.texts
                    if self._spread.only is None and self.config.tables:
                        transaction.guard = partial(self._spread.check, node.name, self.shard_map)
                    with inside(transaction):
                        yield transaction
            finally:
                self._wrote(node.name, *texts)
        except StatementFailed as error:
            await self._overtaken(error, epoch)  # so that the caller's next attempt goes to the new home
            raise

    def session(self, bookmark: Mapping[str, int] | None = None) -> AbstractContextManager[None]:
        """What tasks write inside, all of them read back inside, from replicas too; and all up to a bookmark."""
        return session(bookmark)

    async def bookmark(self) -> dict[str, int]:
        """Where the logs of the shards are that this context wrote to; for `session`, in another process perhaps."""
        written = [node for name, node in self.nodes.items() if wrote_at(name) is not None]
        rows = await asyncio.gather(*(node.fetch(LSN, read_only=True) for node in written))
        return {node.name: found[0][0] for node, found in zip(written, rows, strict=True)}

    def statistics(self) -> DatabaseStatistics:
        """The pools, now."""
        queries = None if self._queries is None else self._queries.statistics()
        return DatabaseStatistics({node.name: node.statistics() for node in self._all_nodes()}, queries)

    def _holder(self, key: Key) -> Node:
        return self._at(self.shard_map.locate(key).shard)

    def _check_open(self) -> None:
        if not self._open:
            raise NotOpen("The Database is not open.", fix="Use it inside `async with Database(config) as db`.")

    def _alone(self, key: Key | msgspec.UnsetType) -> Node | None:
        """The node that a key, or the lack of other shards, decides; None: the statement has to say."""
        self._check_open()
        if key is not msgspec.UNSET:
            return self._holder(key)
        self._check_known()
        return self._spread.only

    def _at(self, shard: str) -> Node:
        node = self.nodes.get(shard)
        if node is None:
            raise _unknown_shard(shard, self.shard_map.epoch)
        return node

    async def _planned(self, sql: str, params: Sequence[Any], *, everywhere: bool) -> Plan:
        return await self._spread.plan(sql, params, self.shard_map, everywhere=everywhere)

    async def _place(self, sql: str, params: Sequence[Any], key: Key | msgspec.UnsetType) -> str:
        """The one shard of a statement; raises of one that concerns several."""
        node = self._alone(key)
        return node.name if node is not None else one_shard(await self._planned(sql, params, everywhere=False))

    def _node(self, key: Key | msgspec.UnsetType) -> Node:
        node = self._alone(key)
        if node is not None:
            return node
        raise CallerError(
            f"The statement names no key, and there are {len(self.nodes)} shards.",
            fix="Pass key=..., or use fetch_everywhere for a query over all shards.",
        )


def _unknown_shard(shard: str, epoch: int) -> ConfigError:
    return ConfigError(
        f"The shard map of epoch {epoch} has slots on {shard}, which database.shards does not have.",
        fix="A node with a newer configuration added it: give this one the same shards.",
    )
