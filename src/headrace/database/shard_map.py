"""Where every key lives: key -> slot -> shard, frozen, with an epoch.

Hash, range and directory are three rules for a key's slot; which shard has a slot is one table for all of them. So
whatever moves, moves by slots, and every strategy moves alike.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

from headrace.database.config import DatabaseConfig
from headrace.database.placement import keys, quotas
from headrace.database.placement.directory import DirectoryRule
from headrace.database.placement.hash import HashRule
from headrace.database.placement.postgres_hash import Key
from headrace.database.placement.quotas import Move
from headrace.database.placement.range import RangeRule
from headrace.errors import CallerError, ConfigError

Rule = HashRule | RangeRule | DirectoryRule


class Placement(NamedTuple):
    """Where one key lives, as of one epoch."""

    shard: str
    slot: int
    epoch: int


@dataclass(frozen=True, slots=True)
class ShardMap:
    """The shard of every slot. A change is a new map with the next epoch."""

    epoch: int
    shards: tuple[str, ...]
    """The shard's name by slot number."""
    rule: Rule
    """What says which slot a key has."""
    home: str
    """The shard that keeps what there may be one of in the whole cluster: the word on the next map, the id leases."""

    @classmethod
    def plan(cls, slots: int, weights: Mapping[str, float], *, epoch: int = 1) -> "ShardMap":
        """A map by hash that gives every shard its weight's share of the slots."""
        return cls(epoch, _shared_out(slots, weights), HashRule(slots), min(weights))

    @classmethod
    def of(cls, config: DatabaseConfig) -> "ShardMap":
        """The first map of a configuration."""
        weights = {shard.name: shard.weight for shard in config.shards if shard.active and holds_slots(shard)}
        if not weights:
            raise ConfigError("There is no active shard to place slots on.", fix="Add one to [[database.shards]].")
        rule: Rule
        if config.strategy == "range":
            rule, shards = config.range_rule(), tuple(each.shard for each in config.ranges)
        elif config.strategy == "directory":
            rule = config.directory_rule()
            hashed = _shared_out(rule.hashed, weights) if rule.hashed else ()
            shards = (*hashed, *(each.shard for each in config.directory))
        else:
            rule, shards = HashRule(config.slots), _shared_out(config.slots, weights)
        return cls(1, shards, rule, min(weights))

    def slot(self, key: Key) -> int:
        """The slot of a key."""
        return self.rule.slot(key)

    def locate(self, key: Key) -> Placement:
        """The shard of a key."""
        slot = self.rule.slot(key)
        return Placement(self.shards[slot], slot, self.epoch)

    @property
    def names(self) -> tuple[str, ...]:
        """The shards that hold slots, sorted."""
        return tuple(sorted(set(self.shards)))

    def rebalanced(self, weights: Mapping[str, float]) -> "ShardMap":
        """The next map, with every shard at its quota after the least number of moves.

        Only hashed slots are shared out: where a range or a listed key lives was somebody's decision.
        """
        hashed = self.hashed
        if not hashed:
            raise CallerError(
                f"The shard map is one of {self.rule.described()}; weights say nothing about them.",
                fix="Move the slots that you choose.",
            )
        shards = quotas.replace_slots(self.shards[:hashed], weights) + self.shards[hashed:]
        return replace(self, epoch=self.epoch + 1, shards=shards)

    def moves_to(self, other: "ShardMap") -> tuple[Move, ...]:
        """The slots that another map of the same rule has elsewhere."""
        if self.rule != other.rule:
            raise CallerError("The two shard maps have different rules, so their slots are not the same.")
        return quotas.moves(self.shards, other.shards)

    @property
    def hashed(self) -> int:
        """How many of the slots are shared out by hash."""
        if isinstance(self.rule, HashRule):
            return self.rule.slots
        return self.rule.hashed if isinstance(self.rule, DirectoryRule) else 0

    def with_key(self, key: Key, shard: str) -> "ShardMap":
        """The next map, which lists the key. Refuses to list one elsewhere than where its rows may be already."""
        if not isinstance(self.rule, DirectoryRule):
            raise CallerError(
                f"The shard map is one of {self.rule.described()}: it lists no keys.",
                fix='Use strategy = "directory".',
            )
        if self.rule.lists(key) or self.rule.hashed:
            now = self.locate(key)
            if now.shard != shard or self.rule.lists(key):
                raise CallerError(
                    f"The key {key!r} lives on {now.shard}, and its rows do not move by being listed.",
                    fix=f"List it on {now.shard}, or move its slot.",
                )
        rule = DirectoryRule.listing(self.rule.hashed, (*self.rule.keys, key))
        return replace(self, epoch=self.epoch + 1, shards=(*self.shards, shard), rule=rule)

    def described(self) -> str:
        """In a few words, for errors and tables."""
        counts = ", ".join(f"{name}: {self.shards.count(name)}" for name in self.names)
        return f"{self.rule.described()} ({counts})"


def holds_slots(shard: object) -> bool:
    """Whether a shard can hold slots at all: a replica holds those of its primary."""
    return getattr(shard, "replica_of", None) is None


def _shared_out(slots: int, weights: Mapping[str, float]) -> tuple[str, ...]:
    placed = quotas.place(slots, weights)
    if empty := sorted(weights.keys() - set(placed)):
        raise ConfigError(
            f"database.shards: with its weight, {', '.join(empty)} gets none of the {slots} slots.",
            fix="Give the shards weights of one order of magnitude, or more slots.",
        )
    return placed


def rule_to_json(rule: Rule) -> dict[str, Any]:
    """A rule as plain data that JSON can hold."""
    if isinstance(rule, HashRule):
        return {"strategy": "hash", "slots": rule.slots}
    if isinstance(rule, RangeRule):
        return {"strategy": "range", "kind": rule.kind, "bounds": [keys.written(each).text for each in rule.bounds]}
    return {"strategy": "directory", "hashed": rule.hashed, "keys": [list(keys.written(each)) for each in rule.keys]}


def rule_from_json(data: Mapping[str, Any]) -> Rule:
    """The rule that `rule_to_json` wrote."""
    match data["strategy"]:
        case "hash":
            return HashRule(data["slots"])
        case "range":
            return RangeRule.between(data["kind"], [keys.read(data["kind"], text) for text in data["bounds"]])
        case "directory":
            return DirectoryRule.listing(data["hashed"], [keys.read(kind, text) for kind, text in data["keys"]])
        case unknown:
            raise ConfigError(
                f"The kept shard map has the strategy {unknown!r}, which this headrace does not know.",
                fix="Upgrade headrace on this node: a newer one has put the map into force.",
            )
