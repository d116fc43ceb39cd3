"""Observes an ASGI application from outside: what was asked, how it ended, how long that took.

The clock stops when the application hands over the last part of its answer, so background tasks that it runs
afterwards are not mistaken for latency. A stream of server-sent events is counted when its first event leaves: how
long a client cares to listen says nothing about the server. Lifespan and WebSocket traffic passes through untouched.

The label `route` must be one of few. It is, in this order: `scope["headrace.route"]`, which an application may set;
the template of the route that Starlette, FastAPI or Litestar matched; the path with its parameters replaced by their
names; else "(other)". Past `endpoints_max` pairs of method and route, new ones share "(other)".
"""

import asyncio
from collections.abc import Awaitable, Callable, Mapping, MutableMapping
from typing import Any, Final

from headrace.clock import Clock
from headrace.monitor.catalogue import HTTP_DURATION, HTTP_REQUESTS, OTHER
from headrace.monitor.counters import Counters

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
ASGIApp = Callable[[Scope, Receive, Send], Awaitable[None]]

METHODS: Final = frozenset(("GET", "HEAD", "POST", "PUT", "DELETE", "CONNECT", "OPTIONS", "TRACE", "PATCH", "QUERY"))
STATUSES: Final = ("1xx", "2xx", "3xx", "4xx", "5xx")
FAILED: Final = 500
ABANDONED: Final = 499
"""The application was cancelled before it answered: the client left, or the server stops. nginx's number for that."""

# The server sends a whole file for these (ASGI extensions), so they end an answer like a last body.
_FILE_BODIES: Final = frozenset(("http.response.pathsend", "http.response.zerocopysend"))


class Endpoint:
    """The series of one method and route, bound once."""

    __slots__ = ("count", "record")

    def __init__(self, counters: Counters, method: str, route: str) -> None:
        self.record = counters.histogram(HTTP_DURATION, method=method, route=route).record
        self.count = tuple(
            counters.counter(HTTP_REQUESTS, method=method, route=route, status=status).add for status in STATUSES
        )


class Requests:
    """Counts the answers of one process, by endpoint."""

    def __init__(self, counters: Counters, clock: Clock, *, endpoints_max: int) -> None:
        self.now = clock.monotonic
        self.in_flight = 0
        self._counters = counters
        self._endpoints_max = endpoints_max
        self._endpoints: dict[tuple[str, str], Endpoint] = {}

    def answered(self, scope: Scope, status: int, seconds: float) -> None:
        """Count one answer."""
        key = (scope["method"], scope.get("headrace.route") or route_of(scope))
        endpoint = self._endpoints.get(key)
        if endpoint is None:
            endpoint = self._bind(*key)
        endpoint.record(seconds)
        endpoint.count[status // 100 - 1 if 100 <= status < 600 else -1]()

    def _bind(self, method: str, route: str) -> Endpoint:
        if method not in METHODS:
            method = OTHER
        # "(other)" is not subject to the limit: it is where the limit sends the rest, once a method.
        if len(self._endpoints) >= self._endpoints_max:
            route = OTHER
        endpoint = self._endpoints.get((method, route))
        if endpoint is None:
            endpoint = self._endpoints[method, route] = Endpoint(self._counters, method, route)
        return endpoint


class Exchange:
    """One request and its answer."""

    __slots__ = ("_begun", "_headers", "_requests", "_scope", "_send", "_status", "ended")

    def __init__(self, scope: Scope, send: Send, requests: Requests) -> None:
        self.ended = False
        self._scope = scope
        self._send = send
        self._requests = requests
        self._status = FAILED
        self._headers: Any = None
        self._begun = requests.now()

    # Not a coroutine function: it returns the server's own awaitable, which saves a coroutine for each message.
    def send(self, message: Message) -> Awaitable[None]:
        """Note what goes by, and pass it on."""
        kind = message["type"]
        if kind == "http.response.body" or kind in _FILE_BODIES:
            if not message.get("more_body", False) or self._is_first_of_events():
                self.end(self._status)
        elif kind == "http.response.start":
            self._status = message["status"]
            self._headers = message.get("headers")
        return self._send(message)

    def end(self, status: int) -> None:
        """Count it, unless it was counted."""
        if not self.ended:
            self.ended = True
            self._requests.answered(self._scope, status, self._requests.now() - self._begun)

    def _is_first_of_events(self) -> bool:
        """Whether a part that others follow begins a stream of events; asked of the first part alone."""
        headers, self._headers = self._headers, None
        return headers is not None and any(
            name.lower() == b"content-type" and value.startswith(b"text/event-stream") for name, value in headers
        )


class Observed:
    """The middleware: an ASGI application around another one."""

    __slots__ = ("_app", "_requests")

    def __init__(self, app: ASGIApp, requests: Requests) -> None:
        self._app = app
        self._requests = requests

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass the request on, and count how it ends."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        requests = self._requests
        exchange = Exchange(scope, send, requests)
        requests.in_flight += 1
        try:
            await self._app(scope, receive, exchange.send)
        except asyncio.CancelledError:
            exchange.end(ABANDONED)
            raise
        finally:
            requests.in_flight -= 1
            # Raised, or returned without finishing the answer, which the server then cuts off.
            if not exchange.ended:
                exchange.end(FAILED)


def route_of(scope: Scope) -> str:
    """The template that the request's path matched, as far as the framework left a trace of it."""
    root = scope.get("root_path", "")
    prefix = root[len(scope.get("app_root_path", root)) :]
    params: Mapping[str, Any] = scope.get("path_params") or {}
    route = scope.get("route")
    path = getattr(route, "path", None)
    if isinstance(path, str):
        if not prefix:
            return path
        # A Mount has no endpoint: nothing below it matched, or it holds files. What follows its prefix is unbounded.
        below = path if hasattr(route, "endpoint") else ""
        outer = {
            name: value for name, value in params.items() if f"{{{name}}}" not in below and f"{{{name}:" not in below
        }
        mounted = _templated(prefix, outer)
        return OTHER if mounted is None else mounted + (below or "/*")
    template = scope.get("path_template")
    if isinstance(template, str):
        return template
    if prefix or not (params or "endpoint" in scope):
        return OTHER
    return _templated(scope["path"], params) or OTHER


def _templated(path: str, params: Mapping[str, Any]) -> str | None:
    """The path with values replaced by names; None when one is not in it, because its template is unknown then."""
    path += "/"
    for name, value in params.items():
        segment = f"/{value}/"
        if segment not in path:
            return None
        path = path.replace(segment, f"/{{{name}}}/", 1)
    return path[:-1]
