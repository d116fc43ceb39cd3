"""The shard map for those who reach the shards with a driver of their own: an ORM, a script without an event loop.

A `Database` looks whether its map is still in force, and a shard's answer to its own statements tells it. Whoever goes
past it has neither, but has a connection to the very shard that he is about to read or write, and that shard keeps the
map. So he asks it, at the beginning of each transaction, and it answers only if there is news.
"""

import threading

from headrace.database.config import DatabaseConfig
from headrace.database.kept_map import READ, KeptMap, check_fits, check_map, check_shard, kept_from_json
from headrace.database.placement.postgres_hash import Key
from headrace.database.shard_map import Placement, ShardMap, holds_slots
from headrace.errors import ConfigError, ShardMapOutdated


class AgreedMap:
    """Where keys live, agreed on with each shard before it is used; for any number of threads and any driver.

        shard = shards.locate(key).shard
        with engines[shard].begin() as connection:
            shards.confirm(key, shard, connection.scalar(text(shards.question(shard))))

    It begins with the map that the configuration makes, and takes over every newer one that a shard tells of. It never
    writes: the shards keep a map since a `Database` was opened on them.
    """

    def __init__(self, config: DatabaseConfig) -> None:
        """Raises `ConfigError` of a configuration that makes no map."""
        self.shard_map = ShardMap.of(config)
        """The newest map that was heard of: frozen, with its epoch."""
        self._plan = self.shard_map
        self._names = frozenset(shard.name for shard in config.shards if holds_slots(shard))
        self._heard: frozenset[str] = frozenset()
        self._lock = threading.Lock()

    def locate(self, key: Key) -> Placement:
        """The shard of a key, which has yet to `confirm` it."""
        return self.shard_map.locate(key)

    def question(self, shard: str) -> str:
        """The SELECT of one value to be run on the shard, without parameters; no row is an answer, too.

        It tells what the shard keeps the first time, and then only if that is of another epoch.
        """
        return f"{READ} WHERE epoch <> {self.shard_map.epoch}" if shard in self._heard else READ

    def hear(self, shard: str, answer: str | None) -> None:
        """Take in a shard's answer to the question: the value, or None for no row.

        Raises `ConfigError` if this is another shard than its name says, if it keeps another map than the
        configuration makes, or none.
        """
        if answer is not None:
            self._take(shard, kept_from_json(answer))
        elif shard not in self._heard:
            raise ConfigError(
                f"The shard {shard!r} keeps no shard map, so nobody has agreed on where its rows belong.",
                fix="Open a headrace.database.Database on all shards once.",
            )

    def confirm(self, key: Key, shard: str, answer: str | None) -> None:
        """Take in the answer, and refuse to go on if the key lives elsewhere.

        For the beginning of a transaction on the shard, before anything else is read or written in it. Raises
        `ShardMapOutdated` if the shard knows a map under which it is not the key's, and what `hear` raises.
        """
        self.hear(shard, answer)
        now = self.locate(key)
        if now.shard != shard:
            raise ShardMapOutdated(
                f"The key {key!r} lives on {now.shard} since the shard map of epoch {now.epoch}, not on {shard}.",
                fix="Roll back and begin again: the key is located on its new shard.",
            )

    def _take(self, shard: str, kept: KeptMap) -> None:
        check_shard(kept, shard)
        with self._lock:
            if kept.shard_map.epoch > self.shard_map.epoch:
                check_fits(kept.shard_map, self._plan, self._names)
                self.shard_map = kept.shard_map
            elif kept.shard_map.epoch == self.shard_map.epoch:
                check_map(kept, KeptMap(shard, self.shard_map))
            # An older one is of a shard that has not been told yet; the next look of any `Database` tells it.
            self._heard |= {shard}
