"""Results of queries, kept in the cache and never older than promised.

A hit is a name, a lookup and a comparison. What may be kept is decided once a text (`query_text`, `query_catalog`),
how old a result is by `query_shard`, from what it saw and what the change stream has told (`ledger`, `changes`).

Results live in a `Cache` like any other value: in memory and in Redis, under names that no other query has. They have
no tags there. A tag that is invalidated turns away every load that is under way in that cache, of whatever key, and a
table may be written a hundred times a second. What a result saw lies beside it instead, and every reader judges for
himself; nothing has to reach Redis for a result to be refused. A flushed Redis costs loads, nothing else.

Reads that fill the cache go to the primary: a standby's snapshot does not say which transactions it saw.
"""

import asyncio
import contextvars
import secrets
from collections import OrderedDict
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, Final, NamedTuple, Protocol, TypeVar, cast

from headrace.cache import Cache
from headrace.clock import Clock
from headrace.database.config import ShardConfig
from headrace.database.postgres.nodes import Node
from headrace.database.postgres.rows import Row
from headrace.database.query_cache.catalog import Analysis, analyse
from headrace.database.query_cache.changes import ChangeStream
from headrace.database.query_cache.key import Context, Namer
from headrace.database.query_cache.shard import ShardView
from headrace.database.query_cache.stored import Stored, read
from headrace.database.query_cache.text import READ_MAX, QueryText, is_momentary, read_text, written_tables
from headrace.database.query_cache.worth import Worth, lifetime_s
from headrace.database.query_policy import TTL_MAX_S, QueryCacheConfig, QueryPolicy
from headrace.errors import NotOpen
from headrace.events import Observer, QueryNotCached

K = TypeVar("K")
T = TypeVar("T")

ATTEMPTS: Final = 3
"""How often a call waits for another's load before it reads for itself."""
TOO_LARGE_S: Final = 60.0
"""How long a text whose result was too large is not tried again."""
_SPREAD: Final = "it is not answered by one shard alone"
NOTHING: Final[frozenset[str]] = frozenset()
ANALYSIS_MAX_S: Final = 60.0
"""How long an analysis holds where no stream tells that a structure changed."""


class Writer(Protocol):
    """A transaction that is open."""

    @property
    def texts(self) -> Collection[str]:
        """The statements that it ran."""
        ...


_INSIDE: Final[contextvars.ContextVar[Writer | None]] = contextvars.ContextVar("headrace_transaction", default=None)


@contextmanager
def inside(transaction: Writer) -> Iterator[None]:
    """The block is inside this transaction: what its task reads must not come from before the writes in it."""
    outer = _INSIDE.get()
    _INSIDE.set(transaction)
    try:
        yield
    finally:
        _INSIDE.set(outer)


class QueryShardStatistics(NamedTuple):
    """How one shard's results are kept fresh."""

    invalidation: str
    """`not in use`, `change stream`, or `own writes and TTL only`."""
    reason: str | None
    """Why there is no change stream."""
    lag_s: float | None
    """Age of the last heartbeat that came back; None: there is none."""
    warning: str | None


class QueryCacheStatistics(NamedTuple):
    """What the query cache of this process has done."""

    hits: int
    misses: int
    """Calls that a load was made for, or waited for."""
    outdated: int
    """Results that were there but too old, or written over; they are among the misses."""
    refused: int
    """Calls whose result must not be cached."""
    loads: int
    too_large: int
    memory_bytes: int
    shards: dict[str, QueryShardStatistics]


class CacheVerdict(NamedTuple):
    """What the cache makes of a query."""

    cacheable: bool
    reason: str | None
    """Why not."""
    tables: tuple[str, ...]
    """The tables and views that it depends on."""
    invalidation: str
    """As in `QueryShardStatistics`."""
    unfollowed: str | None
    """Why the change stream cannot tell of its tables, so that `staleness_max` is also its longest life."""


@dataclass(slots=True)
class _Known:
    """A text on a shard."""

    text: QueryText
    analysis: Analysis
    context: Context
    namer: Namer
    learnt_at: float
    is_simple: bool
    """Nothing but its parameters can forbid it."""
    is_private: bool = False
    """Other processes cannot read its results, so their names are this process's own."""
    too_large_until: float = float("-inf")


class QueryCache:
    """The cached reads of one `Database`."""

    def __init__(
        self,
        cache: Cache,
        config: QueryCacheConfig,
        *,
        shards: Mapping[str, ShardConfig],
        nodes: Mapping[str, Node],
        clock: Clock,
        observer: Observer,
    ) -> None:
        self._cache = cache
        self._config = config
        self._shards = shards
        self._nodes = nodes
        self._clock = clock
        self._now: Callable[[], float] = clock.monotonic
        self._observer = observer
        self._views = {name: ShardView(name) for name in shards}
        self._known: OrderedDict[tuple[str, str], _Known] = OrderedDict()
        self._analyses: dict[tuple[str, str], asyncio.Task[_Known]] = {}
        self._renewals: dict[str, asyncio.Task[Stored]] = {}
        self._told: OrderedDict[tuple[str, str], None] = OrderedDict()
        self._written: OrderedDict[str, frozenset[str] | None] = OrderedDict()
        self._own = secrets.token_bytes(16)
        self._worth = Worth(config.memory_bytes_max)
        self._is_closed = False
        self._hits = self._misses = self._outdated = self._refused = self._loads = self._too_large = 0

    async def close(self) -> None:
        """End what is under way, and the change streams."""
        self._is_closed = True
        tasks = [*self._analyses.values(), *self._renewals.values()]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await asyncio.gather(*(view.stream.close() for view in self._views.values() if view.stream is not None))

    # -- reading ------------------------------------------------------------------------------------------------------

    async def fetch(self, shard: str, sql: str, params: Sequence[Any], policy: QueryPolicy) -> list[Row] | None:
        """The rows, from the cache or for it; None: this call must not be cached, and was not run."""
        known = self._known.get((shard, sql))
        if known is not None and known.is_simple and _INSIDE.get() is None:
            name = known.namer.name(params)
            if name is not None:
                # Nine of ten calls end here: what `cache.get` does first, without a coroutine for it.
                entry, now = self._cache.entry_lookup(name), self._now()
                if entry is not None and entry.attention_at > now:
                    stored = entry.value
                    if self._views[shard].is_usable(stored, policy, now) and (rows := stored.answer()) is not None:
                        self._hits += 1
                        self._worth.use(name)
                        return cast("list[Row]", rows)
        return await self._miss(shard, sql, params, policy)

    async def _held(self, name: str, shard: str, policy: QueryPolicy) -> list[Row] | None:
        stored: Stored | None = await self._cache.get(name, type=Stored)
        if stored is None or not self._views[shard].is_usable(stored, policy, self._now()):
            return None
        rows = stored.answer()
        if rows is None:
            return None
        self._hits += 1
        if name not in self._worth:
            self._weigh(name, stored)  # it came from the shared tier
        self._worth.use(name)
        return rows

    async def _miss(self, shard: str, sql: str, params: Sequence[Any], policy: QueryPolicy) -> list[Row] | None:
        known = await self._learnt(shard, sql, params)
        reason = self._refusal(known, params, policy)
        if reason is not None or isinstance(known, str):
            self._refuse(sql, reason or "")
            return None
        name = known.namer.name(params)
        if name is None:
            self._refuse(sql, "a parameter is of a type that has no place in a key")
            return None
        self._follow(shard, known.analysis, policy)
        if (held := await self._held(name, shard, policy)) is not None:
            return held  # what only now is known to be allowed
        self._misses += 1
        for _ in range(ATTEMPTS):
            renewal = self._renewals.get(name)
            is_own = renewal is None
            if renewal is None:
                renewal = self._renew(name, shard, sql, params, policy, known)
            stored = await self._shared(renewal)
            # What another call began to load may lack what was written before this one.
            if is_own or self._views[shard].is_usable(stored, policy, self._now()):
                rows = stored.answer()
                if rows is not None:
                    return rows
        stored = await self._read(shard, sql, params, known)
        return stored.answer() or []

    async def _shared(self, task: asyncio.Task[T]) -> T:
        """What comes of it; a caller that is cancelled leaves it to the others."""
        try:
            return await asyncio.shield(task)
        except asyncio.CancelledError:
            if self._is_closed and task.cancelled():
                raise NotOpen("The Database was closed while the query ran.") from None
            raise

    def _renew(
        self, name: str, shard: str, sql: str, params: Sequence[Any], policy: QueryPolicy, known: _Known
    ) -> asyncio.Task[Stored]:
        task = asyncio.get_running_loop().create_task(self._load(name, shard, sql, params, policy, known))
        self._renewals[name] = task
        task.add_done_callback(partial(_settle, self._renewals, name))
        return task

    async def _load(
        self, name: str, shard: str, sql: str, params: Sequence[Any], policy: QueryPolicy, known: _Known
    ) -> Stored:
        """A result that is usable, or was read since this began."""
        view = self._views[shard]
        there: Stored | None = await self._cache.get(name, type=Stored)
        if there is not None:
            if view.is_usable(there, policy, self._now()) and there.rows is not None:
                return there  # another text with the same name, or another process, was faster
            self._outdated += 1
            await self._cache.delete(name)
        own: Stored | None = None

        async def load() -> Stored:
            nonlocal own
            own = await self._read(shard, sql, params, known)
            return own

        # One process of all that share Redis loads; whoever waits for it gets what it read.
        stored: Stored = await self._cache.get_or_load(name, load, ttl=policy.longest_s or None, type=Stored)
        if own is None and not (view.is_usable(stored, policy, self._now()) and stored.rows is not None):
            return await self._read(shard, sql, params, known)
        if stored.kept:
            self._weigh(name, stored)
        else:
            await self._cache.delete(name)
        return stored

    def _weigh(self, name: str, stored: Stored) -> None:
        memory = self._cache.memory
        if memory is not None:
            for each in self._worth.add(name, cost_s=stored.cost_s, size=stored.size):
                memory.delete(each)

    async def _read(self, shard: str, sql: str, params: Sequence[Any], known: _Known) -> Stored:
        """Run the query and note what it saw."""
        view, analysis = self._views[shard], known.analysis
        self._loads += 1
        async with self._nodes[shard].reading() as connection:
            sent = self._now()
            reading = await read(connection, sql, params)
            cost_s = self._now() - sent
        state = reading.state
        view.learn(state, sent)
        stored = Stored(
            shard=shard,
            lineage=state.lineage,
            snapshot=state.snapshot,
            read_at=state.read_at,
            cost_s=cost_s,
            life_s=lifetime_s(cost_s, known.text.complexity, longest_s=TTL_MAX_S),
            tables=analysis.tables,
            names=analysis.writers,
            columns=reading.columns,
            types=reading.types,
            cells=reading.cells if reading.is_portable else None,
            size=reading.size,
        )
        stored.__dict__["rows"] = reading.rows
        is_large = len(reading.rows) > self._config.result_rows_max or stored.size > self._config.result_bytes_max
        if is_large:
            self._too_large += 1
            known.too_large_until = self._now() + TOO_LARGE_S
        if state.context != known.context:
            self._forget(shard, sql, known)  # a session was told another search_path since
        if not reading.is_portable and not known.is_private:
            # Processes that cannot read each other's results would delete them from the shared tier in turn.
            known.is_private = True
            known.namer = Namer(shard, known.context, known.text.text, known.analysis.structure + self._own)
            stored.kept = False
        # The name stands for the session that was analysed.
        if is_large or not state.lineage or state.has_temporary or state.context != known.context:
            stored.kept, stored.cells = False, None
        return stored

    # -- refusing -----------------------------------------------------------------------------------------------------

    def _refusal(self, known: "_Known | str", params: Sequence[Any], policy: QueryPolicy) -> str | None:
        if isinstance(known, str):
            return known
        transaction = _INSIDE.get()
        if transaction is not None and any(self._targets(text) != NOTHING for text in transaction.texts):
            return "the call stands inside a transaction that has written"
        if policy.staleness_max == 0 or policy.longest_s == 0:
            return "its policy allows no age"
        analysis = known.analysis
        if analysis.reason is not None:
            return analysis.reason
        if analysis.has_row_security and not policy.row_security_by_role:
            return "a table has row security, which may look at settings that no key knows"
        if known.too_large_until > self._now():
            return "its result was too large"
        if is_momentary(params):
            return "a parameter may be read as a moment that moves"
        return None

    def _refuse(self, sql: str, reason: str) -> None:
        self._refused += 1
        sql = sql[:READ_MAX]
        if (sql, reason) not in self._told:
            self._told[sql, reason] = None
            if len(self._told) > self._config.statements_max:
                self._told.popitem(last=False)
            self._observer.on(QueryNotCached(sql, reason))

    # -- learning -----------------------------------------------------------------------------------------------------

    async def _learnt(self, shard: str, sql: str, params: Sequence[Any]) -> "_Known | str":
        """What is known of a text on a shard; the reason if the text alone forbids it."""
        key = (shard, sql)
        known = self._known.get(key)
        stream = self._views[shard].stream
        if known is not None:
            # Of what is refused nobody follows the structure.
            is_told = stream is not None and stream.state().is_live and known.analysis.reason is None
            if is_told or self._now() - known.learnt_at <= ANALYSIS_MAX_S:
                return known
        text = known.text if known is not None else read_text(sql)
        if text.reason is not None:
            return text.reason
        task = self._analyses.get(key)
        if task is None:
            task = asyncio.get_running_loop().create_task(self._analyse(shard, sql, params, text))
            self._analyses[key] = task
            task.add_done_callback(partial(_settle, self._analyses, key))
        return await self._shared(task)

    async def _analyse(self, shard: str, sql: str, params: Sequence[Any], text: QueryText) -> _Known:
        view = self._views[shard]
        async with self._nodes[shard].reading() as connection:
            sent = self._now()
            state, analysis = await analyse(connection, sql, params, text)
        if analysis.reason is None and state.context.settings[1] == "off":
            analysis = Analysis("standard_conforming_strings is off")
        view.learn(state, sent)
        is_simple = analysis.reason is None and not analysis.has_row_security
        namer = Namer(shard, state.context, text.text, analysis.structure)
        known = _Known(text, analysis, state.context, namer, self._now(), is_simple)
        self._known[shard, sql] = known
        if len(self._known) > self._config.statements_max * len(self._shards):
            self._known.popitem(last=False)
        return known

    def _follow(self, shard: str, analysis: Analysis, policy: QueryPolicy) -> None:
        """See to it that changes of its tables are told, if the policy has a use for that."""
        if not self._config.follow_changes or analysis.unfollowed or policy.longest_s <= policy.staleness_max:
            return
        view = self._views[shard]
        if view.stream is None:
            view.stream = ChangeStream(
                shard,
                self._shards[shard].dsn,
                view.ledger,
                publication=self._config.publication,
                may_publish=self._config.publish,
                heartbeat_s=self._config.heartbeat_s,
                on_probe=view.beat,
                on_structure=lambda names: self._restructured(shard, names),
                clock=self._clock,
                observer=self._observer,
            )
        view.stream.heartbeat_s = min(view.stream.heartbeat_s, max(0.01, policy.staleness_max / 3))
        view.stream.follow(analysis.publish, analysis.digests)

    def _restructured(self, shard: str, names: set[str]) -> None:
        """What has these names was altered: what is known of queries over it is not true any more."""
        for key, known in list(self._known.items()):
            if key[0] == shard and not names.isdisjoint(known.analysis.digests):
                del self._known[key]

    def _forget(self, shard: str, sql: str, known: _Known) -> None:
        if self._known.get((shard, sql)) is known:
            del self._known[shard, sql]

    # -- writing ------------------------------------------------------------------------------------------------------

    def wrote(self, shard: str | None, sqls: Iterable[str]) -> None:
        """This process ran these statements, and they are committed, or may be; None: on several shards."""
        for sql in sqls:
            tables = self._targets(sql)
            if tables == NOTHING:
                continue
            now = self._now()
            for name in self._views if shard is None else (shard,):
                self._views[name].wrote(tables, now)
            if tables is None:
                self._known.clear()  # it may have been DDL

    def flush(self) -> None:
        """Keys may have another home: no result from before now answers any more."""
        for view in self._views.values():
            view.flush(self._now())

    def _targets(self, sql: str) -> frozenset[str] | None:
        if len(sql) > READ_MAX:
            return written_tables(sql)
        if sql not in self._written:
            self._written[sql] = written_tables(sql)
            if len(self._written) > self._config.statements_max:
                self._written.popitem(last=False)
        return self._written[sql]

    # -- looking ------------------------------------------------------------------------------------------------------

    async def explain(self, shard: str, sql: str, params: Sequence[Any], policy: QueryPolicy) -> CacheVerdict:
        """Whether a query would be cached, on what it depends, and if not, why."""
        known = await self._learnt(shard, sql, params)
        reason = self._refusal(known, params, policy)
        invalidation = self._shard_statistics(self._views[shard]).invalidation
        if isinstance(known, str):
            return CacheVerdict(cacheable=False, reason=known, tables=(), invalidation=invalidation, unfollowed=None)
        analysis = known.analysis
        return CacheVerdict(reason is None, reason, analysis.names, invalidation, analysis.unfollowed)

    def pass_over(self, sql: str) -> CacheVerdict:
        """The verdict on a query that is not answered by one shard alone."""
        self._refuse(sql, _SPREAD)
        return CacheVerdict(cacheable=False, reason=_SPREAD, tables=(), invalidation="not in use", unfollowed=None)

    def statistics(self) -> QueryCacheStatistics:
        """The counts so far, and the change streams now."""
        return QueryCacheStatistics(
            self._hits,
            self._misses,
            self._outdated,
            self._refused,
            self._loads,
            self._too_large,
            self._worth.bytes,
            {name: self._shard_statistics(view) for name, view in self._views.items()},
        )

    def _shard_statistics(self, view: ShardView) -> QueryShardStatistics:
        if not self._config.follow_changes:
            return QueryShardStatistics("own writes and TTL only", "follow_changes is off", None, None)
        if view.stream is None:
            return QueryShardStatistics("not in use", None, None, None)
        state = view.stream.state()
        if not state.is_live:
            return QueryShardStatistics("own writes and TTL only", state.reason, None, state.warning)
        return QueryShardStatistics("change stream", None, self._now() - state.fresh_at, state.warning)


def _settle(tasks: dict[K, asyncio.Task[T]], key: K, task: asyncio.Task[T]) -> None:
    """It is over. Its error is told to those who wait for it; there may be none left."""
    tasks.pop(key, None)
    if not task.cancelled():
        task.exception()
