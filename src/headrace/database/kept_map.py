"""The shard map as every shard keeps it, so that no two processes can look for the same row in different places.

Where a key lives follows from the configuration, until somebody changes it: then the rows stay where they were while
the look-ups go elsewhere. Nothing fails, the data is merely gone. So each shard keeps, in its own
`headrace_shard_map`, its name and the whole map, and whoever opens it compares. The map of epoch 1 is what the
configuration makes; a later one was put into force by `publish` and wins over every configuration that still has its
shards.

A new map is decided by one row: that of the home shard, which only takes epoch n + 1 over epoch n. The other shards
are told afterwards. Whoever meets an older epoch than it knows tells that shard, whoever meets a newer one takes it
over, so a publisher that dies half-way leaves a map that is in force, and not yet known everywhere. Epochs only rise.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import msgspec

from headrace.database.postgres.nodes import Node
from headrace.database.postgres.transaction import Transaction
from headrace.database.shard_map import Rule, ShardMap, rule_from_json, rule_to_json
from headrace.errors import ConfigError, ShardMapOutdated, StatementFailed

FENCED = "SH001"
"""SQLSTATE with which a shard refuses a write to a slot that it does not hold, before any effect."""

_LOCK = 0x6D617073  # "maps": any number, as long as it is always the same
_TABLES = (
    """
CREATE TABLE IF NOT EXISTS headrace_shard_map (
    only_row boolean PRIMARY KEY DEFAULT true CHECK (only_row),
    shard text NOT NULL,
    epoch bigint NOT NULL,
    names text[] NOT NULL,
    slots int[] NOT NULL,
    rule jsonb,
    home text,
    kept_at timestamptz NOT NULL DEFAULT now()
)""",
    "ALTER TABLE headrace_shard_map ADD COLUMN IF NOT EXISTS rule jsonb, ADD COLUMN IF NOT EXISTS home text",
)
_KEEP = """
INSERT INTO headrace_shard_map (shard, epoch, names, slots, rule, home)
VALUES ($1, $2, $3::text[], $4::int[], $5::text::jsonb, $6)
ON CONFLICT (only_row) DO UPDATE
SET epoch = excluded.epoch, names = excluded.names, slots = excluded.slots, rule = excluded.rule, home = excluded.home,
    kept_at = now()
WHERE headrace_shard_map.epoch < excluded.epoch AND headrace_shard_map.shard = excluded.shard"""
READ = "SELECT to_jsonb(kept)::text FROM headrace_shard_map kept"
"""One row of one value, for `kept_from_json`."""
_EPOCH = "SELECT epoch FROM headrace_shard_map"
_NO_TABLE = "42P01"
_MAY_NOT_WRITE = {"42501": "insufficient privilege", "25006": "read-only"}


@dataclass(frozen=True, slots=True)
class KeptMap:
    """What one shard knows: who it is, and where all keys live."""

    shard: str
    shard_map: ShardMap


class _Row(msgspec.Struct):
    shard: str
    epoch: int
    names: list[str]
    slots: list[int]
    rule: dict[str, Any] | None = None
    home: str | None = None


async def read_map(node: Node) -> KeptMap | None:
    """What the shard keeps; None: it was never opened before."""
    try:
        return _kept(await node.fetch(READ, read_only=True))
    except StatementFailed as error:
        if error.sqlstate != _NO_TABLE:
            raise
        return None


async def read_epoch(node: Node) -> int | None:
    """The epoch of what the shard keeps; None: nothing."""
    try:
        rows = await node.fetch(_EPOCH, read_only=True)
    except StatementFailed as error:
        if error.sqlstate != _NO_TABLE:
            raise
        return None
    return rows[0][0] if rows else None


async def keep_map(node: Node, shard_map: ShardMap) -> KeptMap:
    """Let the shard keep the map, unless it keeps one of the same or a newer epoch; what it keeps then.

    Refuses a shard that is not who the configuration says, and one that keeps another map of the same epoch.
    """
    given = KeptMap(node.name, shard_map)
    kept = await read_map(node)
    if kept is None or (kept.shard == node.name and kept.shard_map.epoch < shard_map.epoch):
        try:
            async with node.transaction() as transaction:
                kept = await _keep(transaction, given)
        except StatementFailed as error:
            if error.sqlstate in _MAY_NOT_WRITE:
                error.fix = "Let the role create tables once; headrace_shard_map must stand on every shard."
            raise
    check_map(kept, given)
    return kept


async def decide_map(home: Node, following: ShardMap) -> None:
    """Put the next map into force, by its home's row; raises `ShardMapOutdated` if another process was first."""
    given = KeptMap(home.name, following)
    async with home.transaction() as transaction:
        await _lock(transaction)
        before = _kept(await transaction.fetch(READ))
        if before is None or before.shard_map.epoch != following.epoch - 1 or before.shard != home.name:
            found = f"epoch {before.shard_map.epoch} of {before.shard}" if before else "no map"
            raise ShardMapOutdated(f"The map of epoch {following.epoch} comes too late: {home.name} keeps {found}.")
        await _keep(transaction, given)


async def _lock(transaction: Transaction) -> None:
    # CREATE TABLE IF NOT EXISTS alone is no protection from another process that creates it at the same moment.
    await transaction.fetch("SELECT pg_advisory_xact_lock($1)", _LOCK)
    for statement in _TABLES:
        await transaction.execute(statement)


async def _keep(transaction: Transaction, given: KeptMap) -> KeptMap:
    await _lock(transaction)
    shard_map = given.shard_map
    names = list(shard_map.names)
    numbers = {name: number for number, name in enumerate(names)}
    slots = [numbers[name] for name in shard_map.shards]
    rule = msgspec.json.encode(rule_to_json(shard_map.rule)).decode()
    await transaction.execute(_KEEP, given.shard, shard_map.epoch, names, slots, rule, shard_map.home)
    return _kept(await transaction.fetch(READ)) or given


def _kept(rows: list[Any]) -> KeptMap | None:
    return kept_from_json(rows[0][0]) if rows else None


def kept_from_json(text: str) -> KeptMap:
    """What a shard answers to `READ`."""
    row = msgspec.json.decode(text, type=_Row)
    rule: Rule = rule_from_json(row.rule or {"strategy": "hash", "slots": len(row.slots)})
    shards = tuple(row.names[number] for number in row.slots)
    return KeptMap(row.shard, ShardMap(row.epoch, shards, rule, row.home or min(row.names)))


def agreed_map(kept: Iterable[KeptMap], given: ShardMap) -> ShardMap:
    """The map in force: the newest that a shard keeps, or what the configuration makes."""
    newest: KeptMap | None = None
    for each in sorted(kept, key=lambda each: (each.shard_map.epoch, each.shard)):
        if newest is not None and newest.shard_map.epoch == each.shard_map.epoch:
            _check_same(newest, each)
        newest = each
    return newest.shard_map if newest is not None and newest.shard_map.epoch > given.epoch else given


def check_shard(kept: KeptMap, name: str) -> None:
    """Refuse a dsn that leads to another shard than its name says."""
    if kept.shard != name:
        raise ConfigError(
            f"database.shards: the dsn of {name!r} leads to the Postgres that holds shard {kept.shard!r}.",
            fix="Give every shard the name and the dsn that it had; an empty database is a new shard.",
        )


def check_fits(shard_map: ShardMap, plan: ShardMap, configured: Iterable[str]) -> None:
    """Refuse a configuration that is not of the cluster whose later map is in force."""
    missing = sorted(set(shard_map.names) - set(configured))
    if missing or type(shard_map.rule) is not type(plan.rule) or shard_map.hashed != plan.hashed:
        lacks = f"database.shards does not have {', '.join(missing)}" if missing else "the configuration makes one of"
        raise ConfigError(
            f"The shard map in force, epoch {shard_map.epoch}, is one of {shard_map.described()};"
            f" {lacks if missing else f'{lacks} {plan.described()}'}.",
            fix="Configure the strategy and slots of the data, and every shard that holds some.",
        )


def check_map(kept: KeptMap, given: KeptMap) -> None:
    """Refuse a configuration under which keys would be looked for on other shards than they were written to."""
    check_shard(kept, given.shard)
    if kept.shard_map.epoch > given.shard_map.epoch or _places_alike(kept.shard_map, given.shard_map):
        return
    raise ConfigError(
        f"Shard {given.shard!r} keeps a map of {kept.shard_map.described()}; the configuration makes one of"
        f" {given.shard_map.described()}, under which {_moved(kept.shard_map, given.shard_map)} would be looked for on"
        " another shard.",
        fix="Configure the names, weights and number of slots, or ranges or directory, that the data was written with"
        " (embedded.shards for the Postgres that `headrace up` starts).",
    )


def _check_same(one: KeptMap, other: KeptMap) -> None:
    if not _places_alike(one.shard_map, other.shard_map):
        raise ConfigError(
            f"The shards {one.shard!r} and {other.shard!r} keep different maps of epoch {one.shard_map.epoch}:"
            f" {one.shard_map.described()}, and {other.shard_map.described()}.",
            fix="One of them belongs to another cluster, or came back from a backup of one. Look at both before"
            " anything is written: the rows are where the map says that was in force when they were written.",
        )


def _places_alike(one: ShardMap, other: ShardMap) -> bool:
    return one.shards == other.shards and one.rule == other.rule


def _moved(kept: ShardMap, given: ShardMap) -> str:
    if kept.rule != given.rule:
        return "most keys"
    return f"the keys of {len(kept.moves_to(given))} slots"
