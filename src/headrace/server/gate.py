"""Who may come in at one of our own routes: decided after routing, so no prefix and no spelling leads around it.

Deploying an agent runs its source, so the danger is not only a stranger on the network but any page in a browser on
this machine. Three rules, of which the media type's (`exchange`) is another:

- A change is refused when a browser says that a page of another origin asked for it [1].
- With a token, whoever knows it may come in.
- Without one the service is this machine's alone, and answers to this machine's names only: a page can point a name of
  its own at 127.0.0.1, and to the browser the service is then that page's origin (DNS rebinding, [2]).

[1] F. Valsorda, "Cross-Site Request Forgery", 2025: Sec-Fetch-Site first, then Origin against Host, and neither means
    that it is no browser. Go's net/http.CrossOriginProtection does the same.
[2] Jackson, Barth, Bortz, Shao, Boneh, "Protecting Browsers from DNS Rebinding Attacks", CCS 2007.
"""

import hmac
from collections.abc import Iterable

from starlette.types import ASGIApp, Receive, Scope, Send

from headrace.config import LOOPBACK
from headrace.errors import ForeignHost, ForeignOrigin, HeadraceError, Unauthorized
from headrace.server.exchange import Header, problem_answer, reply_with

_OWN_NAMES = frozenset((f"[{name}]" if ":" in name else name).encode() for name in LOOPBACK)
_OWN_SITES = (b"same-origin", b"none")


class Gate:
    """Stands before one route; `changes` says whether the route does more than answer."""

    def __init__(self, app: ASGIApp, *, token: str | None, changes: bool = False) -> None:
        self._app = app
        self._expected = b"Bearer " + token.encode() if token else None
        self._changes = changes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Let it through or answer in its place."""
        refusal = self._refusal(scope)
        if refusal is None:
            return await self._app(scope, receive, send)
        return await reply_with(send, problem_answer(refusal))

    def _refusal(self, scope: Scope) -> HeadraceError | None:
        headers = scope["headers"]
        if self._changes and not is_same_origin(headers):
            return ForeignOrigin(f"{scope['path']} was asked for by a page of another origin.")
        if self._expected is not None:
            offered = next((value for name, value in headers if name == b"authorization"), b"")
            if not hmac.compare_digest(offered, self._expected):
                return Unauthorized(f"{scope['path']} needs the server's token.")
            return None
        host = next((value for name, value in headers if name == b"host"), None)
        if host is not None and not is_own_name(host):
            return ForeignHost(f"This service is not {host.decode('latin-1')!r}; without a token it is local.")
        return None


def is_same_origin(headers: Iterable[Header]) -> bool:
    """Whether a request came from a page of this server, or from no page at all."""
    found = dict(headers)
    site = found.get(b"sec-fetch-site")
    if site is not None:
        return site in _OWN_SITES
    origin = found.get(b"origin")
    return origin is None or origin.partition(b"://")[2] == found.get(b"host")


def is_own_name(host: bytes) -> bool:
    """Whether a Host header, with or without a port, names this machine to itself."""
    host = host.lower()
    name, _, port = host.rpartition(b":")
    return host in _OWN_NAMES or (port.isdigit() and name in _OWN_NAMES)
