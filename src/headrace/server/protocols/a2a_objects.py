"""Executions in the objects of A2A v1.0 [1]: what a message asks of an agent, and what an execution is as a task.

A task's id is `<context>.<digest>`: the context that the message named, or one of its own, and a digest of the agent,
the context and the message's id. So a message that is sent twice is one task, and a task knows its context, although
neither is kept anywhere but in the id. A context is an `instance` of the agent: its executions take turns and share
`context.state`.

[1] a2a.proto, package lf.a2a.v1, in the JSON of Protocol Buffers: fields in camelCase, what is unset left out.
"""

import hashlib
from datetime import UTC, datetime
from typing import Annotated, Any, Final, Literal

import msgspec
from msgspec import UNSET, Meta, UnsetType

from headrace.agents import Emitted, Execution
from headrace.errors import BackendError, ExecutionConflict, ExecutionNotFound, HeadraceError, InvalidRequest
from headrace.server.agent_paths import is_id, shown
from headrace.server.problems import status_of
from headrace.server.protocols.content import attempt_of, content_of
from headrace.server.protocols.executions import Words
from headrace.server.protocols.json_rpc import (
    INTERNAL_ERROR,
    INVALID_PARAMS,
    Id,
    Refused,
    failure,
    frame,
    retry_after,
    success,
)
from headrace.server.protocols.profile import Profile

VERSION = "1.0"
SCHEME = "headrace"
"""What the card calls the way to log in."""
TASK_NOT_FOUND = -32001
TASK_NOT_CANCELABLE = -32002
PUSH_NOTIFICATION_NOT_SUPPORTED = -32003
UNSUPPORTED_OPERATION = -32004
CONTENT_TYPE_NOT_SUPPORTED = -32005
VERSION_NOT_SUPPORTED = -32009

_REASONS: Final = {
    TASK_NOT_FOUND: "TASK_NOT_FOUND",
    TASK_NOT_CANCELABLE: "TASK_NOT_CANCELABLE",
    PUSH_NOTIFICATION_NOT_SUPPORTED: "PUSH_NOTIFICATION_NOT_SUPPORTED",
    UNSUPPORTED_OPERATION: "UNSUPPORTED_OPERATION",
    CONTENT_TYPE_NOT_SUPPORTED: "CONTENT_TYPE_NOT_SUPPORTED",
    VERSION_NOT_SUPPORTED: "VERSION_NOT_SUPPORTED",
    INVALID_PARAMS: "INVALID_PARAMS",
    INTERNAL_ERROR: "INTERNAL_ERROR",
}
_STATES: Final = {
    "queued": "TASK_STATE_SUBMITTED",
    "running": "TASK_STATE_WORKING",
    "cancelling": "TASK_STATE_WORKING",
    "completed": "TASK_STATE_COMPLETED",
    "cancelled": "TASK_STATE_CANCELED",
}
"""By status; whatever else there is has failed."""
_CONTEXT_MAX = 95
"""With the digest, a task's id is as long as an execution's may be."""
_DIGEST = 32
_OUTPUT = "output"
"""The id of the artifact that an execution's output is, and its text while it comes."""


class Part(msgspec.Struct, frozen=True, kw_only=True, rename="camel"):
    """One of `text`, `raw`, `url` and `data`."""

    text: str | None = None
    raw: str | None = None
    url: str | None = None
    data: Any | UnsetType = UNSET
    media_type: str | None = None
    filename: str | None = None
    metadata: dict[str, Any] | None = None

    @property
    def kind(self) -> str:
        """Its media type, said or by its kind."""
        if self.text is not None:
            return self.media_type or "text/plain"
        if self.data is not UNSET:
            return self.media_type or "application/json"
        return self.media_type or "application/octet-stream"


class Message(msgspec.Struct, frozen=True, kw_only=True, rename="camel"):
    """What a client says to an agent."""

    message_id: Annotated[str, Meta(min_length=1, max_length=512)]
    role: Literal["ROLE_USER"]
    parts: Annotated[list[Part], Meta(min_length=1, max_length=1_000)]
    context_id: str | None = None
    task_id: str | None = None


class Configuration(msgspec.Struct, frozen=True, kw_only=True, rename="camel"):
    """How the client wants its answer."""

    history_length: Annotated[int, Meta(ge=0)] | None = None
    return_immediately: bool | None = None
    task_push_notification_config: Any = None


class SendMessageRequest(msgspec.Struct, frozen=True, kw_only=True, rename="camel"):
    """The params of `SendMessage` and `SendStreamingMessage`."""

    message: Message
    configuration: Configuration | None = None


class TaskRequest(msgspec.Struct, frozen=True, kw_only=True, rename="camel"):
    """The params of `GetTask`, `CancelTask` and `SubscribeToTask`."""

    id: str
    history_length: Annotated[int, Meta(ge=0)] | None = None


def refused(code: int, message: str, **metadata: str) -> Refused:
    """An error of the specification, with its `google.rpc.ErrorInfo`."""
    return Refused(code, message, data=[_error_info(_REASONS[code], "a2a-protocol.org", **metadata)])


def problem_of(error: HeadraceError) -> Refused:
    """An error of ours in A2A's words; one that may be repeated keeps its HTTP status, which proxies understand."""
    if isinstance(error, ExecutionNotFound):
        return refused(TASK_NOT_FOUND, error.message)
    code = INVALID_PARAMS if isinstance(error, InvalidRequest | ExecutionConflict) else INTERNAL_ERROR
    data: list[dict[str, Any]] = [_error_info(error.code.upper().replace("-", "_"), "headrace", fix=error.fix)]
    seconds, headers = retry_after(error)
    if seconds is not None:
        data.append({"@type": "type.googleapis.com/google.rpc.RetryInfo", "retryDelay": f"{seconds}s"})
    status = status_of(error) if isinstance(error, BackendError) else 200
    return Refused(code, error.message, data=data, status=status, headers=headers)


def context_of(message: Message, agent_id: str) -> tuple[str, str]:
    """The context of a message and the id of its task. Raises `Refused` for a context that no instance can be."""
    named = message.context_id or ""
    if named and (not is_id(named) or len(named) > _CONTEXT_MAX):
        raise refused(
            INVALID_PARAMS,
            f"contextId is {shown(named)}; it must be up to {_CONTEXT_MAX} letters, digits, `.`, `_` and `-`.",
        )
    digest = hashlib.sha256(msgspec.json.encode([agent_id, named, message.message_id])).hexdigest()[:_DIGEST]
    context = named or digest
    return context, f"{context}.{digest}"


def input_of(message: Message, profile: Profile) -> Any:
    """The agent's input: text as text, one part of data as its value, else the parts as they came."""
    for part in message.parts:
        if (part.text is not None) + (part.raw is not None) + (part.url is not None) + (part.data is not UNSET) != 1:
            raise refused(INVALID_PARAMS, "A part of the message has not exactly one of text, raw, url and data.")
        if not profile.takes(part.kind):
            raise refused(
                CONTENT_TYPE_NOT_SUPPORTED,
                f"The agent {profile.agent_id!r} reads {', '.join(profile.input_modes)}, not {shown(part.kind)}.",
            )
    if all(part.text is not None for part in message.parts):
        return "\n".join(part.text for part in message.parts if part.text is not None)
    if len(message.parts) == 1 and message.parts[0].data is not UNSET:
        return message.parts[0].data
    return {"parts": [_plain(part) for part in message.parts]}


def task(execution: Execution) -> dict[str, Any]:
    """An execution as a `Task`; its messages are not kept, so it has no history."""
    found: dict[str, Any] = {"id": execution.id, "contextId": _context(execution), "status": _status(execution)}
    if parts := _output(execution):
        found["artifacts"] = [{"artifactId": _OUTPUT, "parts": parts}]
    found["metadata"] = {
        "agentVersion": execution.version,
        "executionStatus": execution.status,
        "attempt": execution.attempt,
    }
    return found


class TaskWords(Words):
    """A stream of `StreamResponse`s: the task, then what happens to it."""

    def __init__(self, call_id: Id, execution: Execution) -> None:
        self._call_id = call_id
        self._begun = execution
        self._writing: int | None = None
        """The attempt whose text the artifact holds."""

    def opening(self) -> bytes:
        """The task as it is."""
        return self._result({"task": task(self._begun)})

    def said(self, event: Emitted) -> bytes:
        """Text goes to the artifact, anything else is a message beside the status."""
        match msgspec.json.decode(event.data):
            case {"type": "text", "text": str(text)}:
                is_first, self._writing = self._writing != attempt_of(event), attempt_of(event)
                return self._artifact([{"text": text}], append=not is_first, dropped=event.dropped)
            case said:
                part = {"text": said} if isinstance(said, str) else {"data": said}
                status = {
                    "state": "TASK_STATE_WORKING",
                    "message": _message(self._begun, f"event-{event.id}", [part]),
                }
                return self._update(status, _missed(event.dropped))

    def seen(self, execution: Execution) -> bytes:
        """Its state, and how far it says it is."""
        status = _status(execution)
        if (progress := execution.progress) is None:
            return self._update(status, {})
        if progress.note:
            status["message"] = _message(execution, f"progress-{progress.done}", [{"text": progress.note}])
        return self._update(status, {"progress": {"done": progress.done, "total": progress.total}})

    def end(self, execution: Execution) -> bytes:
        """The whole output, in place of what came of it before, and the final state."""
        if self._begun.is_finished:
            return b""
        parts = _output(execution)
        output = self._artifact(parts, append=False, is_last=True) if parts else b""
        return output + self._update(_status(execution), {})

    def problem(self, error: HeadraceError) -> bytes:
        """The error; the task itself goes on."""
        return frame(failure(self._call_id, problem_of(error)))

    def _artifact(self, parts: list[Any], *, append: bool, is_last: bool = False, dropped: int = 0) -> bytes:
        update = {
            "taskId": self._begun.id,
            "contextId": _context(self._begun),
            "artifact": {"artifactId": _OUTPUT, "parts": parts},
            "append": append,
            "lastChunk": is_last,
        }
        return self._result({"artifactUpdate": update | ({"metadata": _missed(dropped)} if dropped else {})})

    def _update(self, status: dict[str, Any], metadata: dict[str, Any]) -> bytes:
        update = {"taskId": self._begun.id, "contextId": _context(self._begun), "status": status}
        return self._result({"statusUpdate": update | ({"metadata": metadata} if metadata else {})})

    def _result(self, response: dict[str, Any]) -> bytes:
        return frame(success(self._call_id, response))


def card(profile: Profile, *, url: str, has_keys: bool) -> dict[str, Any]:
    """The agent's card; `url` is where its JSON-RPC is spoken."""
    found: dict[str, Any] = {
        "name": profile.name,
        "description": profile.description,
        "version": profile.version,
        "supportedInterfaces": [{"url": url, "protocolBinding": "JSONRPC", "protocolVersion": VERSION}],
        "capabilities": {"streaming": True, "pushNotifications": False, "extendedAgentCard": False},
        "defaultInputModes": profile.input_modes,
        "defaultOutputModes": profile.output_modes,
        "skills": [
            {key: value for key, value in msgspec.to_builtins(skill).items() if key != "examples" or value}
            for skill in profile.skills
        ],
    }
    if has_keys:
        described = "An API key of this service with the permission agent:execute."
        scheme = {"scheme": "Bearer", "description": described}
        found["securitySchemes"] = {SCHEME: {"httpAuthSecurityScheme": scheme}}
        found["securityRequirements"] = [{"schemes": {SCHEME: {"list": []}}}]
    return found


def _error_info(reason: str, domain: str, **metadata: str) -> dict[str, Any]:
    return {
        "@type": "type.googleapis.com/google.rpc.ErrorInfo",
        "reason": reason,
        "domain": domain,
        "metadata": metadata,
    }


def _plain(part: Part) -> dict[str, Any]:
    found: dict[str, Any] = msgspec.to_builtins(part)
    return {name: value for name, value in found.items() if value is not None or name == "data"}


def _context(execution: Execution) -> str:
    """What stands before the digest; an execution that came in otherwise is a context of its own."""
    return execution.id.rpartition(".")[0] or execution.id


def _status(execution: Execution) -> dict[str, Any]:
    status: dict[str, Any] = {"state": _STATES.get(execution.status, "TASK_STATE_FAILED")}
    at = execution.finished_at or execution.started_at
    if at is not None:
        status["timestamp"] = datetime.fromtimestamp(at, UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")
    if execution.error is not None:
        status["message"] = _message(execution, "error", [{"text": execution.error}])
    return status


def _message(execution: Execution, name: str, parts: list[Any]) -> dict[str, Any]:
    return {
        "messageId": f"{execution.id}-{name}",
        "contextId": _context(execution),
        "taskId": execution.id,
        "role": "ROLE_AGENT",
        "parts": parts,
    }


def _output(execution: Execution) -> list[dict[str, Any]]:
    content = content_of(execution)
    text = [] if content.text is None else [{"text": content.text}]
    return text if content.data is UNSET else [*text, {"data": content.data}]


def _missed(dropped: int) -> dict[str, Any]:
    return {"droppedEvents": dropped} if dropped else {}
