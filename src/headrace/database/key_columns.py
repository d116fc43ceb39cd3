"""Compares our hash with a shard's own before it serves; a key must never have two homes."""

import datetime
import uuid
from collections.abc import Mapping
from decimal import Decimal
from typing import Final

from headrace.database.config import Reference, Sharded
from headrace.database.placement.keys import KINDS, Key, kind_of
from headrace.database.placement.postgres_hash import hash_key
from headrace.database.postgres.nodes import Node
from headrace.errors import BugError, ConfigError

SAMPLES: Final[tuple[Key, ...]] = (
    "",
    "a",
    "headrace",
    "a key of more than twelve bytes",
    "Mühlgraben 水車",
    0,
    1,
    -1,
    2**40,
    -(2**63),
    True,
    uuid.UUID(int=2**100 + 7),
    b"\x00\xff",
    Decimal(0),
    Decimal("-12345678.900"),
    Decimal("0.00001"),
    Decimal("1e20"),
    datetime.date(1969, 12, 31),
    datetime.date(2026, 2, 28),
    datetime.datetime(1999, 12, 31, 23, 59, 59, 999999),  # noqa: DTZ001 - the type timestamp has no time zone
    datetime.datetime(2026, 7, 1, 12, tzinfo=datetime.timezone(datetime.timedelta(hours=2))),
)
"""Of every supported type, the ones where it could differ: empty, negative, long, beyond ASCII, before 2000."""

_COLUMN_KINDS: Final = frozenset(
    {
        "smallint", "integer", "bigint", "numeric", "text", "character varying", "uuid", "bytea", "boolean", "date",
        "timestamp without time zone", "timestamp with time zone",
    }
)  # fmt: skip
_COLUMNS: Final = """
SELECT t.name, t.key, format_type(a.atttypid, NULL), coalesce(c.collisdeterministic, true)
FROM unnest($1::text[], $2::text[]) AS t(name, key)
LEFT JOIN pg_attribute a ON a.attrelid = to_regclass(t.name) AND a.attname = t.key AND a.attnum > 0
    AND NOT a.attisdropped
LEFT JOIN pg_collation c ON c.oid = a.attcollation
WHERE to_regclass(t.name) IS NOT NULL"""


async def verify_hash(node: Node) -> None:
    """Ask the shard for the hash of samples of every supported type, in one statement."""
    encoding = (await node.fetch("SELECT current_setting('server_encoding')", read_only=True))[0][0]
    if encoding != "UTF8":
        raise ConfigError(
            f"Shard {node.name} stores text as {encoding}; text keys are hashed as UTF-8.",
            fix="Use a database that was created with ENCODING 'UTF8'.",
        )
    functions = (
        f"hash_record_extended(ROW(${number}::{KINDS[kind_of(key)]}), 0)" for number, key in enumerate(SAMPLES, 1)
    )
    # No value of a caller is part of the text: the types are ours.
    rows = await node.fetch(f"SELECT {', '.join(functions)}", SAMPLES, read_only=True)
    for key, theirs in zip(SAMPLES, rows[0], strict=True):
        if theirs % 2**64 != hash_key(key):
            raise BugError(f"Shard {node.name} hashes the {kind_of(key)} {key!r} differently than headrace does.")


async def verify_columns(node: Node, tables: Mapping[str, Sharded | Reference]) -> None:
    """Refuse a declared key column whose values have another hash than ours; tables that do not exist yet pass."""
    keys = {name: table.key for name, table in tables.items() if isinstance(table, Sharded)}
    if not keys:
        return
    for table, key, type_name, is_deterministic in await node.fetch(
        _COLUMNS, (list(keys), list(keys.values())), read_only=True
    ):
        if problem := column_problem(type_name, is_deterministic=is_deterministic):
            raise ConfigError(
                f"database.tables: {table} is sharded by {key}, {problem} (on {node.name}).",
                fix=f"Shard by a column of one of the types {', '.join(sorted(_COLUMN_KINDS))}.",
            )


def column_problem(type_name: str | None, *, is_deterministic: bool) -> str | None:
    """Why a column cannot be a shard key; None: it can."""
    if type_name is None:
        return "which it does not have"
    if type_name not in _COLUMN_KINDS:
        return f"a {type_name}, whose hash headrace does not know"
    if not is_deterministic:
        return "whose collation is not deterministic: texts that it holds equal would have different homes"
    return None
