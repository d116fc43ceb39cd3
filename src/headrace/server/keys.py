"""API keys: 256 random bits that are shown once and kept as a hash.

A key reads `hr_<id>_<secret>`. The id is no secret: it finds the row, and stands in lists and logs. What is kept is
the SHA-256 of the whole text; a slow password hash would add nothing, because 256 random bits cannot be guessed [1].
Hashes are compared in constant time.

A key is looked up through the cache. That it was revoked is known at once where the invalidation arrives, and after
`STALE_S_MAX` everywhere: `POLICY` never lets an older copy answer, not even while the database is away.

Whoever makes ids up misses every copy. So looks that find nothing are bounded in each process, by GCRA; beyond that an
id that was never seen there is told to come back, and those that were seen are served as ever.

[1] OWASP, Password Storage Cheat Sheet: work factors make up for the low entropy of what people choose.
"""

import base64
import hashlib
import hmac
import os
import re
from collections.abc import Callable, Sequence
from functools import partial

from headrace.agents.admission import gcra
from headrace.cache import Cache, CachePolicy, Strategy
from headrace.clock import Clock
from headrace.database import Database
from headrace.errors import InvalidRequest, KeyNotFound, Overloaded, Unauthorized
from headrace.server.caller import Caller
from headrace.server.key_store import ApiKey, KeyStore, MemoryKeyStore, PostgresKeyStore

STALE_S_MAX = 10.0
"""How long after its revocation a key may still open a door, at worst."""

POLICY = CachePolicy(
    match="api-key:*", strategy=Strategy.TTL, ttl=STALE_S_MAX, memory_ttl=STALE_S_MAX / 2, negative_ttl=1.0
)
"""Stands before all other policies, so that no glob of a configuration loosens it."""

PREFIX = "hr_"
_ID_BYTES = 8
_SECRET_BYTES = 32
_TENANTS_MAX = 100_000
"""Tenants whose tiers a process remembers."""
_IDS_MAX = 100_000
"""Ids of keys that a process remembers to exist."""
LOOKS_PER_S, LOOKS_BURST = 100.0, 1_000
"""Looks for ids that lead to no key, in each process; those for keys that exist are not counted."""

_parts = re.compile(r"hr_([0-9a-f]{16})_[A-Za-z0-9_-]{43}").fullmatch


class Keys:
    """The API keys of a service; with a database they are shared by all its processes and outlive them."""

    def __init__(
        self,
        *,
        cache: Cache,
        database: Database | None,
        clock: Clock,
        tiers: Sequence[str] = (),
        random: Callable[[int], bytes] = os.urandom,
    ) -> None:
        self._cache = cache
        self._clock = clock
        self._tiers = tiers
        self._random = random
        self._store: KeyStore = MemoryKeyStore() if database is None else PostgresKeyStore(database)
        self._tier_of: dict[str, str] = {}
        self._ids: set[str] = set()
        """Of keys that were found."""
        self._full_at = 0.0
        """When the looks that find nothing have their whole burst again."""

    async def create(
        self,
        tenant: str,
        permissions: Sequence[str],
        *,
        tier: str | None = None,
        name: str = "",
        expires_in_s: float | None = None,
    ) -> tuple[ApiKey, str]:
        """A new key, and its text, which is not kept anywhere."""
        if tier is not None and tier not in self._tiers:
            raise InvalidRequest(
                f"There is no tier {tier!r}; there are {', '.join(self._tiers)}.", fix="Name one of agents.tiers."
            )
        key_id = self._random(_ID_BYTES).hex()
        secret = base64.urlsafe_b64encode(self._random(_SECRET_BYTES)).rstrip(b"=").decode()
        text = f"{PREFIX}{key_id}_{secret}"
        now = self._clock.wall()
        key = ApiKey(
            key_id=key_id,
            sha256=_sha256(text),
            tenant=tenant,
            tier=tier,
            permissions=tuple(sorted(set(permissions))),
            name=name,
            created_at=now,
            expires_at=None if expires_in_s is None else now + expires_in_s,
        )
        await self._store.add(key)
        await self._cache.delete(_cached(key_id))
        return key, text

    async def list(self, *, tenant: str | None, after: str, limit: int) -> Sequence[ApiKey]:
        """Keys by id, revoked and expired ones too, of one tenant or of all."""
        return await self._store.list(tenant=tenant, after=after, limit=limit)

    async def revoke(self, key_id: str) -> ApiKey:
        """End a key; one that was revoked before stays as it is. Raises `KeyNotFound`."""
        key = await self._store.revoke(key_id, at=self._clock.wall())
        if key is None:
            raise KeyNotFound(f"There is no API key {key_id[:80]!r}.")
        await self._cache.delete(_cached(key_id))
        return key

    async def caller(self, text: str) -> Caller:
        """Whom a key lets in. Raises `Unauthorized`, in the same words for an unknown, wrong, old or revoked key."""
        parts = _parts(text)
        key: ApiKey | None = None
        if parts is not None:
            key = await self._found(parts[1])
        if key is None or not hmac.compare_digest(key.sha256, _sha256(text)) or not key.is_valid(self._clock.wall()):
            raise Unauthorized("The API key is not valid (any more).")
        self._learn(key)
        return Caller(key.tenant, frozenset(key.permissions), key.key_id)

    async def _found(self, key_id: str) -> ApiKey | None:
        name, load = _cached(key_id), partial(self._store.find, key_id)
        is_free = key_id in self._ids or name in self._cache.held((name,))
        if not is_free:
            self._pay()
        key: ApiKey | None = await self._cache.get_or_load(name, load, type=ApiKey | None)
        if key is not None and key_id not in self._ids:
            if len(self._ids) >= _IDS_MAX:
                self._ids.clear()
            self._ids.add(key_id)
            if not is_free:
                self._full_at -= 1 / LOOKS_PER_S
        return key

    def _pay(self) -> None:
        """Count a look that may find nothing."""
        now = self._clock.monotonic()
        full_at, wait_s = gcra(self._full_at, now, rate_per_s=LOOKS_PER_S, burst=LOOKS_BURST)
        if wait_s > 0:
            raise Overloaded(
                "Too many API keys that do not exist were offered; this one was not looked for.",
                retry_after_s=wait_s,
                fix="Try again.",
            )
        self._full_at = full_at

    def tier_of(self, tenant: str) -> str | None:
        """The tier of the tenant's key that was seen in this process last."""
        return self._tier_of.get(tenant)

    def _learn(self, key: ApiKey) -> None:
        if self._tier_of.get(key.tenant) != key.tier:
            if len(self._tier_of) >= _TENANTS_MAX:
                self._tier_of.clear()
            if key.tier is None:
                self._tier_of.pop(key.tenant, None)
            else:
                self._tier_of[key.tenant] = key.tier


def _cached(key_id: str) -> str:
    return f"api-key:{key_id}"


def _sha256(text: str) -> bytes:
    return hashlib.sha256(text.encode()).digest()
