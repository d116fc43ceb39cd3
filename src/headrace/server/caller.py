"""On whose behalf a request comes, and what it may do."""

from typing import Final, Literal, get_args

import msgspec

Permission = Literal[
    "agent:deploy", "agent:update", "agent:delete", "agent:execute", "agent:monitor", "system:health", "key:manage"
]
Grantable = Literal["agent:deploy", "agent:update", "agent:delete", "agent:execute", "agent:monitor", "system:health"]
"""What an API key may be given. Keys themselves are managed by the operator alone, or a key could outgrow itself."""

PERMISSIONS: Final[frozenset[str]] = frozenset(get_args(Permission))
GRANTABLE: Final[tuple[Grantable, ...]] = get_args(Grantable)


class Caller(msgspec.Struct, frozen=True):
    """Whoever was let in."""

    tenant: str
    permissions: frozenset[str]
    key_id: str | None = None
    """None: the operator."""


OPERATOR = Caller("default", PERMISSIONS)
"""Who knows the server's token; without one, everybody on this machine."""
