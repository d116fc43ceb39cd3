"""The configuration of an embedded Postgres: durable, ready to be a shard, modest in memory."""

import re
from collections.abc import Mapping
from types import MappingProxyType

from headrace.errors import ConfigError

Value = str | int | float | bool
"""A configuration parameter; units, where it has one, as Postgres writes them: "128MB", "30s"."""

FILE = "headrace.conf"
"""Included by postgresql.conf; rewritten at every start. `ALTER SYSTEM` wins over it."""

DEFAULTS: Mapping[str, Value] = MappingProxyType(
    {
        "fsync": True,
        "synchronous_commit": True,
        "wal_level": "logical",  # slots of a shard move by logical replication
        "max_wal_senders": 16,
        "max_replication_slots": 16,
        "max_slot_wal_keep_size": "1GB",  # a reader that is gone for good must not fill the disk
        "max_logical_replication_workers": 8,
        "max_worker_processes": 16,
        "max_prepared_transactions": 64,
        "max_connections": 100,
        "shared_buffers": "128MB",
        "timezone": "UTC",
        "log_timezone": "UTC",
        "log_checkpoints": False,
        "lc_messages": "C",  # its words are read when it fails
    }
)


def text(wanted: Mapping[str, Value], door: Mapping[str, Value]) -> str:
    """The content of FILE: the defaults, over them what is `wanted`, and `door`, which may not be changed."""
    for name in wanted:
        if re.fullmatch(r"[A-Za-z_][A-Za-z0-9_.]*", name) is None:
            raise ConfigError(f"{name!r} is not the name of a Postgres parameter.")
        if name.lower() in door:
            raise ConfigError(f"{name!r} is how headrace reaches this server and cannot be set.", fix="Leave it out.")
    merged = {**DEFAULTS, **{name.lower(): value for name, value in wanted.items()}, **door}
    lines = [f"{name} = {_quoted(value)}" for name, value in merged.items()]
    return "\n".join(["# Written by headrace at every start; use ALTER SYSTEM for changes that stay.", *lines, ""])


def _quoted(value: Value) -> str:
    r"""A value as postgresql.conf reads it: `'…'` with `''` and `\\`; a line break cannot be written."""
    if isinstance(value, bool):
        return "on" if value else "off"
    written = str(value)
    if not written.isprintable():
        raise ConfigError(f"The value {written!r} of a Postgres parameter holds a control character.")
    return "'" + written.replace("\\", "\\\\").replace("'", "''") + "'"
