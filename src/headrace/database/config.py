"""What the database room can be told."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from headrace.database.index_config import IndexConfig
from headrace.database.placement.directory import DirectoryRule
from headrace.database.placement.keys import KINDS, Key, kind_of, read
from headrace.database.placement.range import RangeRule
from headrace.database.query_policy import QueryCacheConfig
from headrace.errors import CallerError, ConfigError

STRATEGIES = ("hash", "range", "directory")


@dataclass(frozen=True, slots=True, kw_only=True)
class ShardConfig:
    """One Postgres that holds a part of the slots."""

    name: str
    """How the shard map, the metrics and the errors call it; stable for its life."""
    dsn: str = field(repr=False)
    """A libpq connection string or URI. Several hosts are the servers of this shard, of which one leads at a time."""
    weight: float = 1.0
    """Share of the slots, relative to the other shards."""
    active: bool = True
    """False: holds no slots."""
    read_only: bool = False
    """True: its rows are read, and writes are refused. A standby will do."""
    replica_of: str | None = None
    """The shard that it is a physical replica of; it holds no slots, and answers reads with `replica=`."""

    def __post_init__(self) -> None:
        """Refuse what no shard can be."""
        if not self.name:
            raise ConfigError("database.shards: a shard has an empty name.", fix="Give every shard a name.")
        if not 0 < self.weight < math.inf:
            raise ConfigError(
                f"database.shards: {self.name!r} has weight {self.weight}, which must be above 0 and finite.",
                fix="Use `active = false` for a shard that shall hold nothing.",
            )


def _check_batch_by(column: str | None) -> None:
    if column == "":
        raise ConfigError("database.tables: batch_by is empty.", fix="Name the primary key, or leave it out.")


@dataclass(frozen=True, slots=True, kw_only=True)
class Sharded:
    """A table whose rows are spread over the shards."""

    key: str
    """The column that says where a row lives."""
    batch_by: str | None = None
    """Its primary key: reads that hold this column to a parameter and come at the same time travel as one. None: each
    travels alone."""

    def __post_init__(self) -> None:
        """Refuse a table without a key."""
        if not self.key:
            raise ConfigError("database.tables: a sharded table has an empty key.", fix="Name its key column.")
        _check_batch_by(self.batch_by)


@dataclass(frozen=True, slots=True, kw_only=True)
class Reference:
    """A table that stands whole on every shard."""

    reference: bool = True
    """Always true; so that a TOML file says it: `countries = { reference = true }`."""
    batch_by: str | None = None
    """As in `Sharded`."""

    def __post_init__(self) -> None:
        """Refuse a contradiction."""
        if not self.reference:
            raise ConfigError("database.tables: reference = false.", fix='Write { key = "column" } instead.')
        _check_batch_by(self.batch_by)


@dataclass(frozen=True, slots=True, kw_only=True)
class KeyRange:
    """The keys from the end of the range before to `until`, exclusive."""

    shard: str
    """The shard that holds them."""
    until: Any = None
    """The first key above them; None for the last range, which has no end."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ListedKey:
    """One key, a tenant say, that has a shard of its choice."""

    key: Any
    """The key, as its column holds it."""
    shard: str
    """The shard that holds it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ReplicaConfig:
    """Which replicas may answer `fetch(..., read_only=True, replica=...)`."""

    lag_max_s: float = 10.0
    """Longest that an answer may be behind what was committed on the primary."""
    lag_max_bytes: int = 64 * 1024 * 1024
    """Furthest behind the primary's log, so that one which only just keeps up is left alone."""
    wait_s: float = 0.0
    """How long a read waits for a replica to catch up with what its caller wrote."""
    otherwise: str = "primary"
    """Where there is no replica within the limits: ask the `primary`, or raise an `error`."""
    look_s: float = 0.5
    """How often the positions of primary and replicas are compared. Own writes show on replicas no sooner."""

    def __post_init__(self) -> None:
        """Refuse what cannot work."""
        for name in ("lag_max_s", "lag_max_bytes", "look_s"):
            if not getattr(self, name) > 0:
                raise ConfigError(f"database.replicas.{name} is {getattr(self, name)}; it must be above 0.")
        if not self.wait_s >= 0:
            raise ConfigError(f"database.replicas.wait_s is {self.wait_s}; it must be at least 0.")
        if self.otherwise not in {"primary", "error"}:
            raise ConfigError(f"database.replicas.otherwise is {self.otherwise!r}; it is primary or error.")


@dataclass(frozen=True, slots=True, kw_only=True)
class DatabaseConfig:
    """The shards and how to talk to them."""

    shards: tuple[ShardConfig, ...] = ()
    """At least one to open a `Database`."""
    strategy: str = "hash"
    """What a key's shard follows from: `hash` of the key, `range` that it lies in, or `directory` that lists it."""
    slots: int = 4096
    """Fixed slots between hashed keys and shards, a power of two; never changes in the life of the data."""
    ranges: tuple[KeyRange, ...] = ()
    """Of strategy `range`: rising, the last without `until`, so that every key has exactly one."""
    directory: tuple[ListedKey, ...] = ()
    """Of strategy `directory`, at the first open; later keys are added with `Database.assign`."""
    directory_others: str = "hash"
    """Keys that the directory does not list: spread by `hash`, or `refuse`."""
    key_type: str | None = None
    """Type of the keys in `ranges` and `directory` that are written as text and are none: `uuid`, `numeric` ..."""
    map_look_s: float = 5.0
    """How often a process looks whether another one has put a newer shard map into force."""
    fence_wait_s: float = 5.0
    """How long a write to a slot that is just being moved waits for its new home."""
    tables: Mapping[str, Sharded | Reference] = field(default_factory=dict)
    """How each table is spread. Only a statement whose tables all stand here is routed by its text."""
    statements_max: int = 1000
    """Statements whose routing is remembered by their text."""
    block_rows: int = 1000
    """Rows that a shard sends at a time where the answers of several are put together."""
    result_rows_max: int = 1_000_000
    """Rows that one answer over several shards may hold in this process; one more fails it. `stream` is not bound."""
    result_bytes_max: int = 256 * 1024 * 1024
    """Bytes of values that one such answer may hold in this process."""
    gather_rows_max: int = 2_000_000
    """Rows that one statement may bring to a single shard, because no shard can answer it alone."""
    gather_bytes_max: int = 1024 * 1024 * 1024
    """Bytes that one statement may bring to a single shard."""
    query_cache: QueryCacheConfig = field(default_factory=QueryCacheConfig)
    """How results of `fetch(..., cache=QueryPolicy(...))` are kept fresh, and how many of them."""
    indexes: IndexConfig = field(default_factory=IndexConfig)
    """What index advice goes by where there is no pg_stat_statements, and how it is tried."""
    connections_max: int = 10
    """Connections of one process to one shard; fewer where those of all processes would not fit into the server."""
    wait_p99_max_s: float = 0.1
    """Waiting for a connection above which a pool counts as starved: its work is not efficient then."""
    acquire_timeout_s: float = 2.0
    """Longest wait for a free or fresh connection before `DatabaseUnavailable`."""
    waiting_max: int = 2000
    """Calls of one process that may wait for a connection to one shard; one more is refused at once."""
    statement_timeout_s: float = 30.0
    """Longest run of one statement, enforced by the server."""
    lock_timeout_s: float = 5.0
    """Longest wait for a lock, enforced by the server."""
    resolve_unknown: bool = False
    """Find out whether a write was committed whose connection broke at the commit, instead of `OutcomeUnknown`. Costs
    each transaction a small row, and a write outside of one a second round trip, unless it is grouped."""
    resolve_wait_s: float = 10.0
    """How long that, and the commit of a two-phase transaction, waits for a server that can tell."""
    replicas: ReplicaConfig = field(default_factory=ReplicaConfig)
    """Which replicas may answer reads."""
    two_phase_abandoned_s: float = 30.0
    """Age at which a two-phase transaction without a decision is undone, because its process must be gone."""
    two_phase_alert_s: float = 60.0
    """Age at which one that still holds its locks is told of, as `TransactionsInDoubt`."""

    def __post_init__(self) -> None:
        """Refuse what cannot work, before anything is opened."""
        if self.slots < 1 or self.slots & (self.slots - 1):
            raise ConfigError(
                f"database.slots is {self.slots}; it must be a power of two.", fix="Use 4096 unless you know better."
            )
        names = [shard.name for shard in self.shards]
        for name in names:
            if names.count(name) > 1:
                raise ConfigError(f"database.shards names {name!r} twice.", fix="Give every shard its own name.")
        positive = ("map_look_s", "fence_wait_s", "connections_max", "acquire_timeout_s", "waiting_max")
        waits = ("resolve_wait_s", "wait_p99_max_s", "two_phase_abandoned_s", "two_phase_alert_s")
        for name in (*positive, *waits, "statement_timeout_s", "lock_timeout_s"):
            if not getattr(self, name) > 0:
                raise ConfigError(f"database.{name} is {getattr(self, name)}; it must be above 0.")
        self._check_replicas()
        for shard, where in self._homes():
            self._check_home(shard, where)
        self._check_strategy()

    def bounds(self) -> tuple[Key, ...]:
        """The bounds between the ranges."""
        return tuple(self._key(each.until) for each in self.ranges[:-1])

    def listed(self) -> tuple[Key, ...]:
        """The keys of the directory."""
        return tuple(self._key(each.key) for each in self.directory)

    def range_rule(self) -> RangeRule:
        """The ranges as a rule."""
        bounds = self.bounds()
        return RangeRule.between(kind_of(bounds[0]) if bounds else self.key_type or "text", bounds)

    def directory_rule(self) -> DirectoryRule:
        """The directory as a rule."""
        return DirectoryRule.listing(self.slots if self.directory_others == "hash" else 0, self.listed())

    def _key(self, value: Any) -> Key:
        try:
            if self.key_type is not None and isinstance(value, str):
                return read(self.key_type, value)
            kind_of(value)
        except CallerError as error:
            raise ConfigError(f"database: {error.message}", fix=error.fix) from error
        key: Key = value
        return key

    def _check_strategy(self) -> None:
        if self.strategy not in STRATEGIES:
            raise ConfigError(f"database.strategy is {self.strategy!r}; it is one of {', '.join(STRATEGIES)}.")
        if self.key_type is not None and self.key_type not in KINDS:
            raise ConfigError(f"database.key_type is {self.key_type!r}; it is one of {', '.join(KINDS)}.")
        if self.directory_others not in {"hash", "refuse"}:
            raise ConfigError(f"database.directory_others is {self.directory_others!r}; it is hash or refuse.")
        for name, strategy in (("ranges", "range"), ("directory", "directory")):
            if getattr(self, name) and self.strategy != strategy:
                raise ConfigError(
                    f"database.{name} is given, and database.strategy is {self.strategy!r}.",
                    fix=f'Set strategy = "{strategy}", or leave {name} out.',
                )
        if self.strategy == "range":
            self._check_ranges()
            self.range_rule()
        if self.strategy == "directory":
            self.directory_rule()

    def _check_ranges(self) -> None:
        if not self.ranges:
            raise ConfigError("database.ranges is empty.", fix="Give every shard one; the last has no `until`.")
        for number, each in enumerate(self.ranges, 1):
            if (each.until is None) != (number == len(self.ranges)):
                raise ConfigError(
                    f"database.ranges: range {number} of {len(self.ranges)} has until = {each.until!r}.",
                    fix="Give every range but the last an `until`; the last takes all keys above.",
                )
        idle = {shard.name for shard in self.shards if shard.active} - {each.shard for each in self.ranges}
        if idle:
            raise ConfigError(
                f"database.ranges gives nothing to {', '.join(sorted(idle))}.",
                fix="Give each shard a range, or set active = false for one that shall hold nothing.",
            )

    def _check_replicas(self) -> None:
        primaries = {shard.name for shard in self.shards if shard.replica_of is None}
        for shard in self.shards:
            if shard.replica_of is not None and shard.replica_of not in primaries:
                raise ConfigError(
                    f"database.shards: {shard.name!r} is a replica of {shard.replica_of!r}, which is no shard itself.",
                    fix=f"Name one of: {', '.join(sorted(primaries))}.",
                )

    def _homes(self) -> list[tuple[str, str]]:
        named = [(each.shard, "ranges") for each in self.ranges]
        return named + [(each.shard, "directory") for each in self.directory]

    def _check_home(self, name: str, where: str) -> None:
        if not self.shards:
            return  # those of the embedded servers are filled in later, and then checked
        shard = next((each for each in self.shards if each.name == name), None)
        if shard is None or not shard.active:
            known = ", ".join(each.name for each in self.shards if each.active)
            raise ConfigError(
                f"database.{where} names the shard {name!r}, which {'is not active' if shard else 'does not exist'}.",
                fix=f"Name one of: {known}.",
            )
