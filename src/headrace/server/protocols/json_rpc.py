"""JSON-RPC 2.0 over HTTP, as far as A2A and MCP speak it: one call a request, no batches.

What the door of a protocol refuses in that protocol's own words is a `Refused`; what the rooms below refuse stays a
`HeadraceError` until the door gives it a number.
"""

import math
from collections.abc import Mapping
from typing import Any, Literal, TypeVar

import msgspec
from msgspec import UNSET, UnsetType

from headrace.errors import BackendError, HeadraceError, InvalidRequest, Overloaded
from headrace.server.exchange import Answer, Exchange, Header, answer
from headrace.server.problems import RETRY_AFTER_S, status_of

T = TypeVar("T")
Id = str | int | None

PARSE_ERROR = -32700
INVALID_REQUEST = -32600
METHOD_NOT_FOUND = -32601
INVALID_PARAMS = -32602
INTERNAL_ERROR = -32603


class Call(msgspec.Struct, frozen=True, kw_only=True):
    """One call; without an id it is a notification, which nobody answers."""

    jsonrpc: Literal["2.0"]
    method: str
    id: Id | UnsetType = UNSET
    params: msgspec.Raw = msgspec.Raw(b"{}")

    @property
    def is_notification(self) -> bool:
        """Whether nobody waits for an answer."""
        return self.id is UNSET

    @property
    def reply_id(self) -> Id:
        """What its answer is known by."""
        return None if isinstance(self.id, UnsetType) else self.id

    def arguments(self, kind: type[T]) -> T:
        """Its params as a Struct. Raises `Refused`, saying what is wrong where."""
        try:
            return msgspec.json.decode(self.params, type=kind)
        except (msgspec.DecodeError, RecursionError, UnicodeDecodeError) as error:
            raise Refused(INVALID_PARAMS, f"The params of {self.method} are not accepted: {error}.") from error


class Refused(Exception):
    """A call that is answered with an error of its protocol."""

    def __init__(
        self, code: int, message: str, *, data: Any = None, status: int = 200, headers: tuple[Header, ...] = ()
    ) -> None:
        super().__init__(message)
        self.code = code
        self.message = message
        self.data = data
        self.status = status
        """Of HTTP."""
        self.headers = headers


_raw = msgspec.json.Decoder(msgspec.Raw)
_call = msgspec.json.Decoder(Call)


async def read_call(exchange: Exchange) -> Call:
    """The call in a request's body. Raises `Refused`."""
    try:
        body = await exchange.body(_raw)
    except InvalidRequest as error:
        # A body that is too large or says that it is no JSON was not read, so nothing is known of its syntax.
        code = PARSE_ERROR if type(error) is InvalidRequest else INVALID_REQUEST
        raise Refused(code, error.message, status=200 if code == PARSE_ERROR else status_of(error)) from error
    try:
        return _call.decode(body)
    except msgspec.ValidationError as error:
        raise Refused(INVALID_REQUEST, f"The body is no single JSON-RPC 2.0 request: {error}.") from error
    except (msgspec.DecodeError, RecursionError, UnicodeDecodeError) as error:
        raise Refused(PARSE_ERROR, f"The body is no valid JSON: {error}.") from error


def success(call_id: Id, result: Any) -> dict[str, Any]:
    """A response with a result."""
    return {"jsonrpc": "2.0", "id": call_id, "result": result}


def failure(call_id: Id, refused: Refused) -> dict[str, Any]:
    """A response with an error."""
    error: dict[str, Any] = {"code": refused.code, "message": refused.message}
    if refused.data is not None:
        error["data"] = refused.data
    return {"jsonrpc": "2.0", "id": call_id, "error": error}


def refusal(call_id: Id, refused: Refused) -> Answer:
    """A response with an error, as an HTTP answer."""
    return answer(failure(call_id, refused), refused.status, *refused.headers)


def retry_after(error: HeadraceError) -> tuple[int | None, tuple[Header, ...]]:
    """When to come back, in seconds, rounded up, and as a header; None: it would be the same."""
    if not isinstance(error, BackendError):
        return None, ()
    seconds = max(1, math.ceil(error.retry_after_s)) if isinstance(error, Overloaded) else RETRY_AFTER_S
    return seconds, ((b"retry-after", b"%d" % seconds),)


def frame(message: Mapping[str, Any]) -> bytes:
    """A message as a server-sent event."""
    return b"data: %b\n\n" % msgspec.json.encode(message)
