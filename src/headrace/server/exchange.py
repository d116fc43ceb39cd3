"""One request and its answer, typed: what the API's operations are written in.

An operation is an ASGI endpoint of its own. The framework only finds it: no request or response object is made on the
way, which halves what a small request costs.
"""

import asyncio
import math
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar
from urllib.parse import parse_qs

import msgspec
from starlette.types import ASGIApp, Receive, Scope, Send

from headrace.errors import (
    BackendError,
    BodyTooLarge,
    BugError,
    HeadraceError,
    InvalidRequest,
    MethodNotAllowed,
    NotJson,
    NotOpen,
    Overloaded,
    RequestTimeout,
)
from headrace.events import Observer, RequestFailed
from headrace.server.caller import OPERATOR, Caller, Permission
from headrace.server.patience import Patience
from headrace.server.problems import MEDIA_TYPE, RETRY_AFTER_S, problem

T = TypeVar("T")
Header = tuple[bytes, bytes]

_encode = msgspec.json.Encoder().encode
_JSON: Header = (b"content-type", b"application/json")
_NO_SNIFF: Header = (b"x-content-type-options", b"nosniff")


class ClientGone(Exception):
    """The client left before its request was complete; there is nobody to answer."""


class Answer(msgspec.Struct, frozen=True):
    """What goes back."""

    body: bytes
    status: int = 200
    headers: tuple[Header, ...] = (_JSON,)


Streamed = Callable[[Receive, Send], Awaitable[None]]
"""An answer that takes its time: it sends its messages itself, and no request timeout ends it."""


def answer(value: Any, status: int = 200, *headers: Header) -> Answer:
    """A value as a JSON answer."""
    return Answer(_encode(value), status, (_JSON, *headers))


def problem_answer(error: HeadraceError, *more: Header, retry_after_s: int | None = None) -> Answer:
    """An error as a problem+json answer: the only place that makes one."""
    details = problem(error)
    headers: list[Header] = [(b"content-type", MEDIA_TYPE), (b"cache-control", b"no-store"), *more]
    if isinstance(error, BackendError | NotOpen):
        if retry_after_s is None:
            # Rounded up: who comes back a moment too early has only made it worse.
            retry_after_s = math.ceil(error.retry_after_s) if isinstance(error, Overloaded) else RETRY_AFTER_S
        headers.append((b"retry-after", b"%d" % max(1, retry_after_s)))
    if details.status == 401:
        headers.append((b"www-authenticate", b"Bearer"))
    return Answer(_encode(details), details.status, tuple(headers))


class Exchange:
    """The request side of one operation."""

    __slots__ = ("bytes_max", "receive", "scope")

    def __init__(self, scope: Scope, receive: Receive, bytes_max: int) -> None:
        self.scope = scope
        self.bytes_max = bytes_max
        self.receive = receive

    @property
    def caller(self) -> Caller:
        """On whose behalf it comes."""
        caller: Caller = self.scope.get("headrace.caller", OPERATOR)
        return caller

    @property
    def tenant(self) -> str:
        """Whose agents it is about."""
        return self.caller.tenant

    def header(self, name: bytes) -> str | None:
        """The value of a header, by its name in lower case."""
        for known, value in self.scope["headers"]:
            if known == name:
                text: str = value.decode("latin-1")
                return text
        return None

    async def wait_until_gone(self) -> None:
        """Return when the client has left. Only once the body was read."""
        while (await self.receive())["type"] != "http.disconnect":
            continue

    @property
    def mounted_at(self) -> str:
        """The path below which the application that was mounted finds itself; every URL that it gives begins so."""
        root: str = self.scope.get("root_path", "")
        return root

    def path(self, name: str) -> str:
        """A parameter of the path."""
        value: str = self.scope["path_params"][name]
        return value

    def query(self, kind: type[T]) -> T:
        """The query string as a Struct; values are read as the types of its fields."""
        found = parse_qs(self.scope["query_string"].decode("latin-1"), keep_blank_values=True)
        try:
            return msgspec.convert({name: values[-1] for name, values in found.items()}, kind, strict=False)
        except msgspec.ValidationError as error:
            raise InvalidRequest(f"The query string is not accepted: {error}.") from error

    async def body(self, decoder: msgspec.json.Decoder[T]) -> T:
        """The body as the decoder's type."""
        data = await self._read()
        try:
            return decoder.decode(data)
        except msgspec.ValidationError as error:
            raise InvalidRequest(f"The body is not accepted: {error}.") from error
        except (msgspec.DecodeError, RecursionError) as error:
            raise InvalidRequest(
                f"The body is no valid JSON: {error}.", fix="Send a JSON object with content-type application/json."
            ) from error

    async def _read(self) -> bytes:
        self._check_headers()
        message = await self.receive()
        data: bytes = message.get("body", b"")
        if message.get("more_body"):
            parts, size = [data], len(data)
            while message.get("more_body"):
                message = await self.receive()
                if message["type"] == "http.disconnect":
                    raise ClientGone
                parts.append(message.get("body", b""))
                size += len(parts[-1])
                if size > self.bytes_max:
                    raise self._too_large(f"more than {self.bytes_max:,}")
            data = b"".join(parts)
        elif message["type"] == "http.disconnect":
            raise ClientGone
        elif len(data) > self.bytes_max:
            raise self._too_large(f"{len(data):,}")
        return data

    def _check_headers(self) -> None:
        # A page can make a browser send text/plain or a form, or no type at all, to any address without being asked;
        # for application/json the browser asks the server first, and nothing here says yes (Fetch Standard, 3.3).
        media_type = b""
        for name, value in self.scope["headers"]:
            if name == b"content-type":
                media_type = value
            elif name == b"content-length" and int(value) > self.bytes_max:
                raise self._too_large(f"{int(value):,}")
        if media_type != b"application/json" and media_type.partition(b";")[0].strip().lower() != b"application/json":
            said = f"is {media_type.decode('latin-1')!r}" if media_type else "does not say what it is"
            raise NotJson(f"The body {said}; only application/json is read.")

    def _too_large(self, size: str) -> BodyTooLarge:
        return BodyTooLarge(f"The body has {size} bytes; at most {self.bytes_max:,} are accepted.")


Handler = Callable[[Exchange], Awaitable[Answer | Streamed]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Operation:
    """One method on one path: what routing, validation and the OpenAPI document are made of."""

    method: str
    path: str
    name: str
    """`operationId`."""
    summary: str
    handler: Handler
    request: Any = None
    """Type of the JSON body."""
    query: Any = None
    """Struct of the query string."""
    headers: Mapping[str, str] = field(default_factory=dict)
    """Request headers that mean something to it, each with what."""
    answers: dict[int, Any] = field(default_factory=dict)
    """Type of the JSON body by status."""
    media_type: str = "application/json"
    failures: Sequence[int] = ()
    """Statuses answered with a problem+json."""
    permission: Permission | None = None
    """What an API key needs for it; None only where it is public."""
    is_public: bool = False
    """Answered without a token or key."""

    def __post_init__(self) -> None:
        """Refuse a door without a lock."""
        if (self.permission is None) != self.is_public:
            raise BugError(f"The operation {self.name} must either be public or name a permission.")


class Endpoint:
    """An operation as an ASGI application."""

    def __init__(self, operation: Operation, *, bytes_max: int, timeout_s: float, observer: Observer) -> None:
        self._operation = operation
        self._bytes_max = bytes_max
        self._timeout_s = timeout_s
        self._patience = Patience(timeout_s)
        self._observer = observer

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Decode, call, encode."""
        exchange = Exchange(scope, receive, self._bytes_max)
        try:
            with self._patience.turn():
                reply = await self._operation.handler(exchange)
        except HeadraceError as error:
            reply = self._failed(error)
        except TimeoutError:
            reply = self._failed(RequestTimeout(f"No answer within {self._timeout_s:g} s."))
        except ClientGone:
            return None
        except Exception as error:  # noqa: BLE001 - the border: a bug becomes a 500 that tells the client nothing of it
            reply = self._bug(error)
        if isinstance(reply, Answer):
            return await reply_with(send, reply)
        return await reply(receive, send)

    def _failed(self, error: HeadraceError) -> Answer:
        reply = problem_answer(error)
        if reply.status >= 500:
            self._observer.on(RequestFailed(self._operation.method, self._operation.path, reply.status, error.code))
        return reply

    def _bug(self, error: Exception) -> Answer:
        loop = asyncio.get_running_loop()
        loop.call_exception_handler({"message": f"bug in {self._operation.name}", "exception": error})
        return self._failed(BugError("The server made a mistake; its log has the traceback."))


class Methods:
    """The operations of one path, by method; HEAD is answered as GET."""

    def __init__(self, path: str, apps: Mapping[str, ASGIApp]) -> None:
        self._path = path
        self._apps = {**apps, "HEAD": apps["GET"]} if "GET" in apps else dict(apps)

    # Not a coroutine function: it returns what the operation returns, which saves a coroutine for each request.
    def __call__(self, scope: Scope, receive: Receive, send: Send) -> Awaitable[None]:
        """Hand the request to its operation."""
        scope["headrace.route"] = self._path
        app = self._apps.get(scope["method"])
        if app is not None:
            return app(scope, receive, send)
        error = MethodNotAllowed(f"{self._path} does not take {scope['method']}.")
        return reply_with(send, problem_answer(error, (b"allow", ", ".join(self._apps).encode())))


async def reply_with(send: Send, reply: Answer) -> None:
    """Send a whole answer."""
    headers = [(b"content-length", str(len(reply.body)).encode()), _NO_SNIFF, *reply.headers]
    await send({"type": "http.response.start", "status": reply.status, "headers": headers})
    await send({"type": "http.response.body", "body": reply.body})
