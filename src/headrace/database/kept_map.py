"""The shard map as every shard keeps it, so that no configuration can silently look for rows where they are not.

Where a key lives follows from names, weights and the number of slots. Change one of them and the rows stay where they
were while the look-ups go elsewhere: nothing fails, the data is merely gone. So each shard keeps, in its own
`headrace_shard_map`, its name and the whole map as of the first open, and whoever opens it later compares.
"""

from dataclasses import dataclass
from typing import Any

from headrace.database.nodes import Node, Transaction
from headrace.database.shard_map import ShardMap
from headrace.errors import ConfigError, StatementFailed

_LOCK = 0x6D617073  # "maps": any number, as long as it is always the same
_EXISTS = "SELECT to_regclass('headrace_shard_map') IS NOT NULL"
_TABLE = """
CREATE TABLE IF NOT EXISTS headrace_shard_map (
    only_row boolean PRIMARY KEY DEFAULT true CHECK (only_row),
    shard text NOT NULL,
    epoch bigint NOT NULL,
    names text[] NOT NULL,
    slots int[] NOT NULL,
    kept_at timestamptz NOT NULL DEFAULT now()
)"""
_KEEP = """
INSERT INTO headrace_shard_map (shard, epoch, names, slots) VALUES ($1, $2, $3::text[], $4::int[])
ON CONFLICT DO NOTHING"""
_READ = "SELECT shard, epoch, names, slots FROM headrace_shard_map"
_MAY_NOT_WRITE = {"42501": "insufficient privilege", "25006": "read-only"}


@dataclass(frozen=True, slots=True)
class KeptMap:
    """What one shard knows: who it is, and where all keys live."""

    shard: str
    shard_map: ShardMap


async def read_map(node: Node) -> KeptMap | None:
    """What the shard keeps; None: it was never opened before."""
    if not (await node.fetch(_EXISTS, read_only=True))[0][0]:
        return None
    return _kept(await node.fetch(_READ, read_only=True))


async def keep_map(node: Node, shard_map: ShardMap) -> None:
    """Let the shard keep the map, if it keeps none yet; refuse one that differs from what it keeps."""
    kept = await read_map(node)
    if kept is None:
        try:
            async with node.transaction() as transaction:
                kept = await _keep(transaction, KeptMap(node.name, shard_map))
        except StatementFailed as error:
            if error.sqlstate in _MAY_NOT_WRITE:
                error.fix = "Let the role create tables once; headrace_shard_map must stand on every shard."
            raise
    check_map(kept, KeptMap(node.name, shard_map))


async def _keep(transaction: Transaction, given: KeptMap) -> KeptMap:
    # CREATE TABLE IF NOT EXISTS alone is no protection from another process that creates it at the same moment.
    await transaction.fetch("SELECT pg_advisory_xact_lock($1)", _LOCK)
    await transaction.execute(_TABLE)
    names = sorted(set(given.shard_map.shards))
    numbers = {name: number for number, name in enumerate(names)}
    slots = [numbers[name] for name in given.shard_map.shards]
    await transaction.execute(_KEEP, given.shard, given.shard_map.epoch, names, slots)
    return _kept(await transaction.fetch(_READ)) or given


def _kept(rows: list[Any]) -> KeptMap | None:
    if not rows:
        return None
    shard, epoch, names, slots = rows[0]
    return KeptMap(shard, ShardMap(epoch, tuple(names[number] for number in slots)))


def check_map(kept: KeptMap, given: KeptMap) -> None:
    """Refuse a configuration under which keys would be looked for on other shards than they were written to."""
    if kept.shard != given.shard:
        raise ConfigError(
            f"database.shards: the dsn of {given.shard!r} leads to the Postgres that holds shard {kept.shard!r}.",
            fix="Give every shard the name and the dsn that it had; an empty database is a new shard.",
        )
    if kept.shard_map.shards == given.shard_map.shards:
        return
    moved = _moved(kept.shard_map, given.shard_map)
    raise ConfigError(
        f"Shard {given.shard!r} keeps a map of {_described(kept.shard_map)}; the configuration makes one of"
        f" {_described(given.shard_map)}, under which {moved} would be looked for on another shard.",
        fix="Configure the names, weights and number of slots that the data was written with"
        " (embedded.shards for the Postgres that `headrace up` starts).",
    )


def _moved(kept: ShardMap, given: ShardMap) -> str:
    if len(kept.shards) != len(given.shards):
        return "most keys"
    count = sum(before != now for before, now in zip(kept.shards, given.shards, strict=True))
    return f"the keys of {count} slots"


def _described(shard_map: ShardMap) -> str:
    counts = ", ".join(f"{name}: {shard_map.shards.count(name)}" for name in sorted(set(shard_map.shards)))
    return f"{len(shard_map.shards)} slots ({counts})"
