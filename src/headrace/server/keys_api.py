"""The operator's API keys over HTTP: make them, list them, end them."""

from typing import Annotated, Any

import msgspec
from msgspec import Meta

from headrace.server.agent_paths import Id, Line
from headrace.server.caller import GRANTABLE, Grantable
from headrace.server.exchange import Answer, Exchange, Operation, answer
from headrace.server.key_store import ApiKey
from headrace.server.keys import PREFIX as PREFIX_OF_KEYS
from headrace.server.keys import Keys

PREFIX = "/api/v1/keys"


class KeyRequest(msgspec.Struct, forbid_unknown_fields=True, kw_only=True):
    """A key for a tenant."""

    tenant: Id
    tier: Line | None = None
    permissions: Annotated[tuple[Grantable, ...], Meta(min_length=1)] = GRANTABLE
    name: Line = ""
    expires_in: Annotated[float, Meta(gt=0, le=1e9, description="Seconds; without it, never.")] | None = None


class KeyView(msgspec.Struct, kw_only=True):
    """A key without its secret. Times are seconds since 1970."""

    key_id: str
    prefix: str
    """How its text begins."""
    tenant: str
    tier: str | None
    permissions: tuple[str, ...]
    name: str
    created_at: float
    expires_at: float | None
    revoked_at: float | None


class NewKey(KeyView, kw_only=True):
    """A key with its text, which is shown this once and kept nowhere."""

    key: str


class KeysPage(msgspec.Struct, kw_only=True):
    """Keys by id."""

    keys: list[KeyView]
    next_after: str | None
    """What to ask for with `after` to go on; None: this was the last part."""


class KeysQuery(msgspec.Struct, forbid_unknown_fields=True, kw_only=True):
    """Which keys."""

    tenant: Id | None = None
    after: Annotated[str, Meta(max_length=64)] = ""
    limit: Annotated[int, Meta(ge=1, le=200)] = 200


_decoder = msgspec.json.Decoder(KeyRequest)


class KeysApi:
    """The operations on keys; no key may use them."""

    def __init__(self, keys: Keys) -> None:
        self._keys = keys

    def operations(self) -> tuple[Operation, ...]:
        """Everything that this API can do."""
        return (
            Operation(
                method="POST",
                path=PREFIX,
                name="createKey",
                summary="A new API key; its text is shown this once.",
                handler=self.create,
                permission="key:manage",
                request=KeyRequest,
                answers={201: NewKey},
                failures=(403, 413, 415, 422, 503),
            ),
            Operation(
                method="GET",
                path=PREFIX,
                name="listKeys",
                summary="The API keys, without their secrets.",
                handler=self.list,
                permission="key:manage",
                query=KeysQuery,
                answers={200: KeysPage},
                failures=(403, 422, 503),
            ),
            Operation(
                method="DELETE",
                path=f"{PREFIX}/{{key_id}}",
                name="revokeKey",
                summary="End an API key.",
                handler=self.revoke,
                permission="key:manage",
                answers={200: KeyView},
                failures=(403, 404, 503),
            ),
        )

    async def create(self, exchange: Exchange) -> Answer:
        """Make a key."""
        request = await exchange.body(_decoder)
        key, text = await self._keys.create(
            request.tenant,
            request.permissions,
            tier=request.tier,
            name=request.name,
            expires_in_s=request.expires_in,
        )
        return answer(NewKey(key=text, **_shown(key)), 201, (b"cache-control", b"no-store"))

    async def list(self, exchange: Exchange) -> Answer:
        """Some keys."""
        query = exchange.query(KeysQuery)
        found = await self._keys.list(tenant=query.tenant, after=query.after, limit=query.limit)
        next_after = found[-1].key_id if len(found) == query.limit else None
        return answer(KeysPage(keys=[KeyView(**_shown(key)) for key in found], next_after=next_after))

    async def revoke(self, exchange: Exchange) -> Answer:
        """End a key."""
        return answer(KeyView(**_shown(await self._keys.revoke(exchange.path("key_id")))))


def _shown(key: ApiKey) -> dict[str, Any]:
    fields = msgspec.structs.asdict(key)
    del fields["sha256"]
    return {**fields, "prefix": f"{PREFIX_OF_KEYS}{key.key_id}"}
