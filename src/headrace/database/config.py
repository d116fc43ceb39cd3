"""What the database room can be told."""

from dataclasses import dataclass, field

from headrace.errors import ConfigError


@dataclass(frozen=True, slots=True, kw_only=True)
class ShardConfig:
    """One Postgres that holds a part of the slots."""

    name: str
    """How the shard map, the metrics and the errors call it; stable for its life."""
    dsn: str = field(repr=False)
    """A libpq connection string or URI."""
    weight: float = 1.0
    """Share of the slots, relative to the other shards."""
    active: bool = True
    """False: holds no slots."""

    def __post_init__(self) -> None:
        """Refuse what no shard can be."""
        if not self.name:
            raise ConfigError("database.shards: a shard has an empty name.", fix="Give every shard a name.")
        if not self.weight > 0:
            raise ConfigError(
                f"database.shards: {self.name!r} has weight {self.weight}, which must be above 0.",
                fix="Use `active = false` for a shard that shall hold nothing.",
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class DatabaseConfig:
    """The shards and how to talk to them."""

    shards: tuple[ShardConfig, ...] = ()
    """At least one to open a `Database`."""
    slots: int = 4096
    """Fixed slots between keys and shards, a power of two; never changes in the life of the data."""
    connections_max: int = 10
    """Connections of one process to one shard."""
    acquire_timeout_s: float = 2.0
    """Longest wait for a free or fresh connection before `DatabaseUnavailable`."""
    waiting_max: int = 2000
    """Calls of one process that may wait for a connection to one shard; one more is refused at once."""
    statement_timeout_s: float = 30.0
    """Longest run of one statement, enforced by the server."""
    lock_timeout_s: float = 5.0
    """Longest wait for a lock, enforced by the server."""

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
        for name in ("connections_max", "acquire_timeout_s", "waiting_max", "statement_timeout_s", "lock_timeout_s"):
            if not getattr(self, name) > 0:
                raise ConfigError(f"database.{name} is {getattr(self, name)}; it must be above 0.")
