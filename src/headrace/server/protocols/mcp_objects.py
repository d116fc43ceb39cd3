"""Agents as tools, and executions as their results, in the objects of MCP; and which revision a request is of.

Modern requests (2026-07-28) carry their revision, and repeat in headers what gateways route by; each is checked
against the other [1]. Legacy ones (2025) begin with `initialize`; without sessions there is nothing to remember of it.

[1] MCP 2026-07-28, "Streamable HTTP", Server Validation; "Overview", Per-request protocol fields and Error Codes.
"""

import base64
import binascii
from collections.abc import Mapping
from typing import Any, Final

import msgspec
from msgspec import UNSET

from headrace import __version__
from headrace.agents import Emitted, Execution
from headrace.errors import BackendError, HeadraceError
from headrace.server.agent_paths import shown
from headrace.server.problems import status_of
from headrace.server.protocols.content import content_of
from headrace.server.protocols.executions import Words
from headrace.server.protocols.json_rpc import (
    INTERNAL_ERROR,
    INVALID_PARAMS,
    INVALID_REQUEST,
    METHOD_NOT_FOUND,
    PARSE_ERROR,
    Call,
    Id,
    Refused,
    failure,
    frame,
    retry_after,
    success,
)
from headrace.server.protocols.profile import Profile

MODERN: Final = "2026-07-28"
LEGACY: Final = ("2025-11-25", "2025-06-18", "2025-03-26")
"""Newest first; the last one is that of requests that do not say theirs."""
HEADER_MISMATCH = -32020
UNSUPPORTED_PROTOCOL_VERSION = -32022
STATUS_OF: Final = {
    PARSE_ERROR: 400,
    INVALID_REQUEST: 400,
    METHOD_NOT_FOUND: 404,
    INVALID_PARAMS: 400,
    HEADER_MISMATCH: 400,
    UNSUPPORTED_PROTOCOL_VERSION: 400,
}
"""The HTTP status that the modern revision gives its errors; legacy clients read them from a 200."""

_PREFIX = "io.modelcontextprotocol/"
_VERSION_KEY = f"{_PREFIX}protocolVersion"
_REQUIRED = (_VERSION_KEY, f"{_PREFIX}clientCapabilities")
_SERVER: Final = {"name": "headrace", "version": __version__}
_LIST_TTL_MS = 5_000
"""How long a client may keep the list of tools: a deployment is seen after that."""
_INPUT = "input"
"""The argument that is the whole input of an agent without a schema of an object."""
_ANYTHING: Final = {
    "type": "object",
    "properties": {_INPUT: {"description": "The agent's input: text or any JSON."}},
    "required": [_INPUT],
}
_ENCODED = ("=?base64?", "?=")


class Meta(msgspec.Struct, frozen=True, kw_only=True, rename={"progress_token": "progressToken"}):
    """What of a call's `_meta` is ours to read."""

    progress_token: str | int | None = None


class CallToolParams(msgspec.Struct, frozen=True, kw_only=True, rename={"meta": "_meta"}):
    """The params of `tools/call`."""

    name: str
    arguments: dict[str, Any] | None = None
    meta: Meta | None = None

    @property
    def progress_token(self) -> str | int | None:
        """What its progress is to be told under; None: it is not asked for."""
        return None if self.meta is None else self.meta.progress_token


class ListParams(msgspec.Struct, frozen=True, kw_only=True):
    """The params of `tools/list`."""

    cursor: str | None = None


class InitializeParams(msgspec.Struct, frozen=True, kw_only=True, rename="camel"):
    """The params of `initialize`."""

    protocol_version: str


def is_modern(call: Call, headers: Mapping[str, str]) -> bool:
    """Whether a call is of the revision without sessions. Raises `Refused` when it is, but is not put together so."""
    if call.id is None:
        raise Refused(INVALID_REQUEST, "The id of a request of MCP is a string or a number.")
    meta = _meta_of(call)
    said = headers.get("mcp-protocol-version")
    if _VERSION_KEY not in meta and (said is None or said in LEGACY):
        return False
    if missing := [key for key in _REQUIRED if key not in meta]:
        raise Refused(INVALID_PARAMS, f"_meta lacks {' and '.join(missing)}.")
    version = meta[_VERSION_KEY]
    if not isinstance(version, str):
        raise Refused(INVALID_PARAMS, f"{_VERSION_KEY} is no string.")
    _check_header("MCP-Protocol-Version", said, version)
    _check_header("Mcp-Method", headers.get("mcp-method"), call.method)
    if call.method == "tools/call":
        name = call.arguments(CallToolParams).name
        _check_header("Mcp-Name", _decoded(headers.get("mcp-name")), name)
    check_version(version)
    return True


def check_version(version: str) -> None:
    """Refuse what is neither legacy nor modern."""
    if version not in {MODERN, *LEGACY}:
        data = {"supported": [MODERN, *LEGACY], "requested": version}
        raise Refused(UNSUPPORTED_PROTOCOL_VERSION, "Unsupported protocol version", data=data)


def initialized(params: InitializeParams) -> dict[str, Any]:
    """The answer to `initialize`: the client's revision if it is one of ours, else the newest legacy one."""
    version = params.protocol_version if params.protocol_version in LEGACY else LEGACY[0]
    return {"protocolVersion": version, "capabilities": {"tools": {}}, "serverInfo": _SERVER}


def discovered() -> dict[str, Any]:
    """The answer to `server/discover`."""
    return complete(
        {
            "supportedVersions": [MODERN, *LEGACY],
            "capabilities": {"tools": {}},
            "ttlMs": 3_600_000,
            "cacheScope": "public",
        }
    )


def complete(result: dict[str, Any]) -> dict[str, Any]:
    """A result as the modern revision has it."""
    return {"resultType": "complete", **result, "_meta": {f"{_PREFIX}serverInfo": _SERVER}}


def tool_list(profiles: list[Profile], *, next_cursor: str | None, modern: bool) -> dict[str, Any]:
    """The answer to `tools/list`."""
    found: dict[str, Any] = {"tools": [tool(profile, modern=modern) for profile in profiles]}
    if next_cursor is not None:
        found["nextCursor"] = next_cursor
    # Private: a tenant sees its own agents.
    return complete({**found, "ttlMs": _LIST_TTL_MS, "cacheScope": "private"}) if modern else found


def tool(profile: Profile, *, modern: bool) -> dict[str, Any]:
    """An agent as a tool."""
    found: dict[str, Any] = {
        "name": profile.agent_id,
        "title": profile.name,
        "description": profile.description,
        "inputSchema": profile.input_schema or _ANYTHING,
    }
    if _has_output_schema(profile, modern=modern):
        found["outputSchema"] = profile.output_schema
    return found


def input_of(profile: Profile, params: CallToolParams) -> Any:
    """The agent's input: the arguments, or for an agent without a schema its only one. Raises `Refused`."""
    arguments = params.arguments or {}
    if profile.input_schema is not None:
        return arguments
    if arguments.keys() != {_INPUT}:
        raise Refused(
            INVALID_PARAMS,
            f"The agent {profile.agent_id!r} names no fields of its input; its one argument is {_INPUT!r}.",
        )
    return arguments[_INPUT]


def result_of(execution: Execution, profile: Profile, *, modern: bool) -> dict[str, Any]:
    """What became of a call: a failure is a result, too, so that the model sees it."""
    if execution.status != "completed":
        text = f"{execution.status}: {execution.error or 'it gave no reason'}"
        found: dict[str, Any] = {"content": [{"type": "text", "text": text}], "isError": True}
        return complete(found) if modern else found
    content = content_of(execution)
    texts = [] if content.text is None else [content.text]
    if content.data is not UNSET:
        texts.append(msgspec.json.encode(content.data).decode())
    found = {"content": [{"type": "text", "text": text} for text in texts], "isError": False}
    output = execution.output
    if isinstance(output, dict) or _has_output_schema(profile, modern=modern):
        found["structuredContent"] = output
    return complete(found) if modern else found


def problem_of(error: HeadraceError) -> Refused:
    """An error of ours in MCP's words."""
    seconds, headers = retry_after(error)
    data: dict[str, Any] = {"code": error.code, "fix": error.fix}
    if seconds is not None:
        data["retryAfterS"] = seconds
    status = status_of(error) if isinstance(error, BackendError) else 200
    return Refused(INTERNAL_ERROR, error.message, data=data, status=status, headers=headers)


class ToolWords(Words):
    """The stream of one call: its progress where that is asked for, then its result."""

    def __init__(self, call_id: Id, profile: Profile, token: str | int | None, *, modern: bool) -> None:
        self._call_id = call_id
        self._profile = profile
        self._token = token
        self._modern = modern
        self._done: int | None = None

    def said(self, event: Emitted) -> bytes:
        """What an agent says while it works is not for its caller."""
        return b""

    def seen(self, execution: Execution) -> bytes:
        """How far it is; the number has to grow with each notification."""
        progress = execution.progress
        if self._token is None or progress is None or (self._done is not None and progress.done <= self._done):
            return b""
        self._done = progress.done
        params = {"progressToken": self._token, "progress": progress.done, "total": progress.total}
        if progress.note:
            params["message"] = progress.note
        return frame({"jsonrpc": "2.0", "method": "notifications/progress", "params": params})

    def end(self, execution: Execution) -> bytes:
        """The result."""
        return frame(success(self._call_id, result_of(execution, self._profile, modern=self._modern)))

    def problem(self, error: HeadraceError) -> bytes:
        """Why there is none."""
        return frame(failure(self._call_id, problem_of(error)))


def _has_output_schema(profile: Profile, *, modern: bool) -> bool:
    """Legacy revisions know outputs that are objects only."""
    return profile.output_schema is not None and (modern or profile.output_schema.get("type") == "object")


def _meta_of(call: Call) -> dict[str, Any]:
    params = call.arguments(Any)
    meta = params.get("_meta") if isinstance(params, dict) else None
    return meta if isinstance(meta, dict) else {}


def _check_header(name: str, said: str | None, value: str) -> None:
    if said != value:
        found = "is missing" if said is None else f"is {shown(said)}"
        raise Refused(HEADER_MISMATCH, f"The header {name} {found}; the body says {shown(value)}.")


def _decoded(value: str | None) -> str | None:
    """A header's text, out of Base64 if it is marked so; what is broken equals nothing that a body could say."""
    begin, end = _ENCODED
    if value is None or not (value.startswith(begin) and value.endswith(end)):
        return value
    try:
        return base64.b64decode(value[len(begin) : -len(end)], validate=True).decode()
    except (binascii.Error, UnicodeDecodeError):
        return None
