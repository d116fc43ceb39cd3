"""Who may come in at one of our own routes: decided after routing, so no prefix and no spelling leads around it.

Deploying an agent runs its source, so the danger is not only a stranger on the network but any page in a browser on
this machine. Three rules, of which the media type's (`exchange`) is another:

- A change is refused when a browser says that a page of another origin asked for it [1].
- With a token, whoever knows it may come in and do everything; whoever has an API key may do what it permits, for its
  tenant.
- Without one the service is this machine's alone, and answers to this machine's names only: a page can point a name of
  its own at 127.0.0.1, and to the browser the service is then that page's origin (DNS rebinding, [2]). Who offers no
  key is the operator then; who offers one is held to it.

[1] F. Valsorda, "Cross-Site Request Forgery", 2025: Sec-Fetch-Site first, then Origin against Host, and neither means
    that it is no browser. Go's net/http.CrossOriginProtection does the same.
[2] Jackson, Barth, Bortz, Shao, Boneh, "Protecting Browsers from DNS Rebinding Attacks", CCS 2007.
"""

import hmac
from collections.abc import Mapping
from functools import lru_cache

from starlette.types import ASGIApp, Receive, Scope, Send

from headrace.config import LOOPBACK
from headrace.errors import Forbidden, ForeignHost, ForeignOrigin, HeadraceError, Unauthorized
from headrace.server.caller import OPERATOR, Caller, Permission
from headrace.server.exchange import problem_answer, reply_with
from headrace.server.keys import PREFIX, Keys

_OWN_NAMES = frozenset((f"[{name}]" if ":" in name else name).encode() for name in LOOPBACK)
_OWN_SITES = (b"same-origin", b"none")
_BEARER = b"Bearer "
_KEY = _BEARER + PREFIX.encode()


class Gate:
    """Stands before one operation; `changes` says whether it does more than answer."""

    def __init__(
        self,
        app: ASGIApp,
        *,
        token: str | None,
        permission: Permission | None = None,
        keys: Keys | None = None,
        changes: bool = False,
    ) -> None:
        self._app = app
        self._expected = b"Bearer " + token.encode() if token else None
        self._permission = permission
        self._keys = keys
        self._changes = changes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Let it through or answer in its place."""
        try:
            caller = await self._admitted(scope)
            if self._permission is not None and self._permission not in caller.permissions:
                raise Forbidden(f"{scope['method']} {scope['path']} needs the permission {self._permission!r}.")
        except HeadraceError as error:
            return await reply_with(send, problem_answer(error))
        scope["headrace.caller"] = caller
        return await self._app(scope, receive, send)

    async def _admitted(self, scope: Scope) -> Caller:
        headers: Mapping[bytes, bytes] = dict(scope["headers"])
        offered, host = headers.get(b"authorization"), headers.get(b"host")
        if self._changes and not is_same_origin(headers):
            raise ForeignOrigin(f"{scope['path']} was asked for by a page of another origin.")
        if self._expected is None and host is not None and not is_own_name(host):
            raise ForeignHost(f"This service is not {host.decode('latin-1')!r}; without a token it is local.")
        if self._expected is not None and hmac.compare_digest(offered or b"", self._expected):
            return OPERATOR
        if offered is not None and self._keys is not None and offered.startswith(_KEY):
            return await self._keys.caller(offered[len(_BEARER) :].decode("latin-1"))
        if self._expected is not None:
            raise Unauthorized(f"{scope['path']} needs an API key or the server's token.")
        return OPERATOR


def is_same_origin(headers: Mapping[bytes, bytes]) -> bool:
    """Whether a request came from a page of this server, or from no page at all."""
    site = headers.get(b"sec-fetch-site")
    if site is not None:
        return site in _OWN_SITES
    origin = headers.get(b"origin")
    return origin is None or origin.partition(b"://")[2] == headers.get(b"host")


@lru_cache(maxsize=64)
def is_own_name(host: bytes) -> bool:
    """Whether a Host header, with or without a port, names this machine to itself."""
    host = host.lower()
    name, _, port = host.rpartition(b":")
    return host in _OWN_NAMES or (port.isdigit() and name in _OWN_NAMES)
