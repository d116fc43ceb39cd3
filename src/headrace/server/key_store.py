"""Where API keys are kept: as hashes in Postgres, on the shard of their id; or in memory."""

from collections.abc import Sequence
from typing import Any, Protocol

import msgspec

from headrace.database import Database


class ApiKey(msgspec.Struct, frozen=True, kw_only=True):
    """A key as it is kept. Times are wall seconds."""

    key_id: str
    sha256: bytes
    """Of the whole text."""
    tenant: str
    tier: str | None
    permissions: tuple[str, ...]
    name: str
    created_at: float
    expires_at: float | None = None
    revoked_at: float | None = None

    def is_valid(self, now: float) -> bool:
        """Whether it still opens anything."""
        return self.revoked_at is None and (self.expires_at is None or now < self.expires_at)


class KeyStore(Protocol):
    """What is needed of a store of keys."""

    async def add(self, key: ApiKey) -> None:
        """Keep a key."""

    async def find(self, key_id: str) -> ApiKey | None:
        """A key, valid or not."""

    async def list(self, *, tenant: str | None, after: str, limit: int) -> Sequence[ApiKey]:
        """Keys by id, those with higher ids than `after`."""

    async def revoke(self, key_id: str, *, at: float) -> ApiKey | None:
        """End a key, unless it has ended; None if there is none."""


class MemoryKeyStore:
    """Keys of one process, gone with it."""

    def __init__(self) -> None:
        self._keys: dict[str, ApiKey] = {}

    async def add(self, key: ApiKey) -> None:
        """Keep a key."""
        self._keys[key.key_id] = key

    async def find(self, key_id: str) -> ApiKey | None:
        """A key, valid or not."""
        return self._keys.get(key_id)

    async def list(self, *, tenant: str | None, after: str, limit: int) -> Sequence[ApiKey]:
        """Keys by id."""
        found = [key for key in self._keys.values() if tenant in {None, key.tenant} and key.key_id > after]
        return sorted(found, key=lambda key: key.key_id)[:limit]

    async def revoke(self, key_id: str, *, at: float) -> ApiKey | None:
        """End a key."""
        key = self._keys.get(key_id)
        if key is not None and key.revoked_at is None:
            key = self._keys[key_id] = msgspec.structs.replace(key, revoked_at=at)
        return key


_COLUMNS = """key_id, sha256, tenant, tier, permissions, name, extract(epoch FROM created_at)::float8,
    extract(epoch FROM expires_at)::float8, extract(epoch FROM revoked_at)::float8"""


class PostgresKeyStore:
    """Keys on the shard of their id: who asks knows the id and not yet the tenant."""

    def __init__(self, database: Database) -> None:
        self._database = database

    async def add(self, key: ApiKey) -> None:
        """Keep a key."""
        await self._database.execute(
            "INSERT INTO headrace_api_keys"
            " (key_id, sha256, tenant, tier, permissions, name, created_at, expires_at)"
            " VALUES ($1, $2, $3, $4, $5, $6, to_timestamp($7::float8), to_timestamp($8::float8))"
            " ON CONFLICT (key_id) DO NOTHING",
            *(key.key_id, key.sha256, key.tenant, key.tier, list(key.permissions), key.name),
            *(key.created_at, key.expires_at),
            key=key.key_id,
        )

    async def find(self, key_id: str) -> ApiKey | None:
        """A key, valid or not."""
        row = await self._database.fetch_one(
            f"SELECT {_COLUMNS} FROM headrace_api_keys WHERE key_id = $1",  # noqa: S608 - columns of ours
            key_id,
            key=key_id,  # and not read_only: a replica may not know yet that it was revoked
        )
        return None if row is None else _key(row)

    async def list(self, *, tenant: str | None, after: str, limit: int) -> Sequence[ApiKey]:
        """Keys by id."""
        rows = await self._database.fetch_everywhere(
            f"SELECT {_COLUMNS} FROM headrace_api_keys WHERE key_id > $1 AND ($2::text IS NULL OR tenant = $2)"  # noqa: S608 - columns of ours
            ' ORDER BY key_id COLLATE "C" LIMIT $3',
            *(after, tenant, limit),
        )
        return sorted(map(_key, rows), key=lambda key: key.key_id)[:limit]

    async def revoke(self, key_id: str, *, at: float) -> ApiKey | None:
        """End a key."""
        rows = await self._database.fetch(
            "UPDATE headrace_api_keys SET revoked_at = coalesce(revoked_at, to_timestamp($2::float8))"  # noqa: S608 - columns of ours
            f" WHERE key_id = $1 RETURNING {_COLUMNS}",
            *(key_id, at),
            key=key_id,
        )
        return _key(rows[0]) if rows else None


def _key(row: Any) -> ApiKey:
    return ApiKey(
        key_id=row[0],
        sha256=bytes(row[1]),
        tenant=row[2],
        tier=row[3],
        permissions=tuple(row[4]),
        name=row[5],
        created_at=row[6],
        expires_at=row[7],
        revoked_at=row[8],
    )
