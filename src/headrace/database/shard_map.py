"""Where every key lives: key -> slot -> shard, frozen, with an epoch."""

from dataclasses import dataclass

from headrace.database.placement.hash import place
from headrace.database.placement.postgres_hash import Key, hash_key
from headrace.errors import ConfigError


@dataclass(frozen=True, slots=True)
class Placement:
    """Where one key lives, as of one epoch."""

    shard: str
    slot: int
    epoch: int


@dataclass(frozen=True, slots=True)
class ShardMap:
    """The shard of every slot. A change is a new map with a higher epoch."""

    epoch: int
    shards: tuple[str, ...]
    """The shard's name by slot number; the length is a power of two."""

    @classmethod
    def plan(cls, slots: int, weights: dict[str, float], *, epoch: int = 1) -> "ShardMap":
        """A map that gives every shard its weight's share of the slots."""
        if not weights:
            raise ConfigError("There is no active shard to place slots on.", fix="Add one to [[database.shards]].")
        return cls(epoch, place(slots, weights))

    def slot(self, key: Key) -> int:
        """The slot of a key: the low bits of Postgres' own extended hash."""
        return hash_key(key) & (len(self.shards) - 1)

    def locate(self, key: Key) -> Placement:
        """The shard of a key."""
        slot = self.slot(key)
        return Placement(self.shards[slot], slot, self.epoch)
