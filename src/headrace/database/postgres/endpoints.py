"""What a shard's connection string says: its servers, and how an operator may see them."""

import uuid
from typing import Any, Final

from headrace.database.config import ShardConfig
from headrace.database.postgres.pipeline import DriverError, make_dsn, read_dsn
from headrace.database.postgres.pool_usage import APPLICATION
from headrace.errors import ConfigError

_LIVELY: Final = {
    "keepalives_idle": "10",
    "keepalives_interval": "5",
    "keepalives_count": "3",
    "tcp_user_timeout": "30000",
}
"""Has the kernel find out within half a minute that a peer, or the way to it, is gone; its own default is hours."""


def application_name(shard: ShardConfig) -> str:
    """How a server tells the pools of ours apart: a name for each of them."""
    return f"{APPLICATION} {uuid.uuid4().hex[:8]} {shard.name}"[:63]


def hosts_of(shard: ShardConfig) -> dict[str, str]:
    """A connection string for each server that the shard's names, by its address."""
    parts = {**_LIVELY, **_parts(shard), "client_encoding": "UTF8"}  # text of any kind goes both ways
    names = str(parts.get("host") or "").split(",")
    addresses = str(parts.get("hostaddr") or "").split(",")
    ports = str(parts.get("port") or "").split(",")
    count = max(len(names), len(addresses))
    if count == 1:
        return {address_of(shard): make_dsn(**parts)}
    hosts = {}
    for number in range(count):
        own = {
            "host": names[number] if number < len(names) else "",
            "hostaddr": addresses[number] if number < len(addresses) else "",
            "port": ports[number] if len(ports) > 1 else ports[0],
        }
        named = f"{own['host'] or own['hostaddr']}:{own['port'] or 5432}"
        hosts[named] = make_dsn(**{**parts, **{k: v or None for k, v in own.items()}})
    return hosts


def address_of(shard: ShardConfig) -> str:
    """Where a connection string leads, as an operator may see it: nothing else of it, so no secret either."""
    parts = _parts(shard)
    host = parts.get("host") or parts.get("hostaddr") or "local socket"
    return f"{host}:{parts.get('port', 5432)}/{parts.get('dbname', '')}"


def _parts(shard: ShardConfig) -> dict[str, Any]:
    try:
        return read_dsn(shard.dsn)
    except DriverError:
        # Neither libpq's words nor its error as a cause: both quote what it stumbled over, which may be the password.
        raise ConfigError(
            f"database.shards: the dsn of {shard.name!r} cannot be read.",
            fix="Write postgresql://user@host:port/database (%XX for special characters) or key=value pairs.",
        ) from None
