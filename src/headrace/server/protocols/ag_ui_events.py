"""Executions in the events of AG-UI 1.0 [1]: a run from RUN_STARTED to RUN_FINISHED or RUN_ERROR.

What agents emit has no prescribed shape; these have one that pages understand, those of hosted frameworks among them:

    {"type": "text", "text": ...}                        TEXT_MESSAGE_START, _CONTENT, and _END before what is no text
    {"type": "tool_call", "id", "name", "args"?}         TOOL_CALL_START, _ARGS, _END
    {"type": "tool_result", "id", "result"?}             TOOL_CALL_RESULT
    {"type": "state", "state": ...}                      STATE_SNAPSHOT
    {"type": "state_delta", "delta": [RFC 6902]}         STATE_DELTA

Anything else is a CUSTOM event with the name `headrace.event`, and so is what only looks like one of these, because a
page ends a run whose events break the rules.

[1] https://ag-ui.com/spec/1.0/schema.json
"""

import hashlib
import re
from collections.abc import Mapping
from typing import Annotated, Any, Final

import msgspec
from msgspec import Meta

from headrace.agents import Emitted, Execution
from headrace.errors import HeadraceError, InvalidRequest
from headrace.server.agent_paths import is_id
from headrace.server.protocols.content import Content, attempt_of, content_of
from headrace.server.protocols.executions import Words
from headrace.server.protocols.profile import AgUiInput

VERSION: Final = "1.0"

_is_pointer = re.compile(r"(?:/(?:[^/~]|~[01])*)*").fullmatch
"""A JSON Pointer (RFC 6901)."""
_Name = Annotated[str, Meta(min_length=1, max_length=512)]


class RunAgentInput(msgspec.Struct, frozen=True, kw_only=True, rename="camel"):
    """What a page sends to have a run."""

    thread_id: _Name
    run_id: _Name
    messages: list[dict[str, Any]]
    parent_run_id: str | None = None
    state: Any = None
    tools: list[dict[str, Any]] | None = None
    context: list[dict[str, Any]] | None = None
    forwarded_props: Any = None
    resume: list[Any] | None = None

    @property
    def instance(self) -> str:
        """Whose state the run gets: the thread's, under its own name if that is one for an instance."""
        return self.thread_id if is_id(self.thread_id) else f"thread-{_digest(self.thread_id)}"

    def execution_id(self, agent_id: str) -> str:
        """The same for a run that is asked for twice."""
        return f"run-{_digest(agent_id, self.thread_id, self.run_id)}"


def input_of(run: RunAgentInput, kind: AgUiInput) -> Any:
    """The agent's input: its user's last words, to be answered as a stream, or all that the page sent.

    Raises `InvalidRequest` for what would be lost.
    """
    if run.resume:
        raise InvalidRequest(
            "The run resumes an interrupt, and agents here make none.", fix="Begin a run without resume."
        )
    if kind == "run":
        return {
            "threadId": run.thread_id,
            "runId": run.run_id,
            "messages": run.messages,
            "state": run.state,
            "tools": run.tools or [],
            "context": run.context or [],
            "forwardedProps": run.forwarded_props,
        }
    last = run.messages[-1] if run.messages else {}
    text = _text_of(last.get("content")) if last.get("role") == "user" else None
    if text is None:
        raise InvalidRequest(
            "The last message of the run is not a text of the user's, which is all that this agent reads.",
            fix='Send one, or let get_capabilities() of the agent say {"ag_ui": "run"} and read the whole run.',
        )
    return {"prompt": text, "stream": True}


class RunWords(Words):
    """The stream of one run."""

    def __init__(self, run: RunAgentInput) -> None:
        self._run = run
        self._message: tuple[str, int] | None = None
        """The id of the text message that is open, and the attempt that writes it."""
        self._has_text = False

    def opening(self) -> bytes:
        """The run has begun."""
        more = {} if self._run.parent_run_id is None else {"parentRunId": self._run.parent_run_id}
        return _event("RUN_STARTED", **self._ids(), protocolVersion=VERSION, **more)

    def said(self, event: Emitted) -> bytes:
        """What the agent said."""
        missed = _custom("dropped", {"count": event.dropped}) if event.dropped else b""
        match msgspec.json.decode(event.data):
            case {"type": "text", "text": str(text)}:
                return missed + self._text(text, f"{self._run.run_id}-{event.id}", attempt_of(event))
            case said:
                return missed + self._close() + self._other(said, event.id)

    def seen(self, execution: Execution) -> bytes:
        """How far it says it is."""
        if (progress := execution.progress) is None:
            return b""
        return _custom("progress", {"done": progress.done, "total": progress.total, "note": progress.note})

    def end(self, execution: Execution) -> bytes:
        """What became of the run; text that was not told on the way is told now."""
        closed = self._close()
        if execution.status == "cancelled":
            return closed + _event("RUN_FINISHED", **self._ids(), outcome={"type": "cancelled"})
        if execution.status != "completed":
            message = execution.error or f"The run ended as {execution.status}."
            return closed + _event("RUN_ERROR", message=message, code=execution.status)
        content = content_of(execution)
        if content.text and not self._has_text:
            closed += self._text(content.text, f"{self._run.run_id}-output", execution.attempt) + self._close()
        return closed + _event("RUN_FINISHED", **self._ids(), **_outcome(execution, content))

    def problem(self, error: HeadraceError) -> bytes:
        """Why nothing more comes."""
        return self._close() + _event("RUN_ERROR", message=error.message, code=error.code)

    def _ids(self) -> dict[str, str]:
        return {"threadId": self._run.thread_id, "runId": self._run.run_id}

    def _text(self, text: str, message_id: str, attempt: int) -> bytes:
        begun = b""
        if self._message is None or self._message[1] != attempt:
            begun = self._close() + _event("TEXT_MESSAGE_START", messageId=message_id, role="assistant")
            self._message = (message_id, attempt)
            self._has_text = True
        return begun + _event("TEXT_MESSAGE_CONTENT", messageId=self._message[0], delta=text)

    def _close(self) -> bytes:
        if self._message is None:
            return b""
        message_id, _ = self._message
        self._message = None
        return _event("TEXT_MESSAGE_END", messageId=message_id)

    def _other(self, said: Any, event_id: int) -> bytes:
        match said:
            case {"type": "tool_call", "name": str(name), **more}:
                return _tool_call(_call_id(more, name), name, more.get("args"))
            case {"type": "tool_result", **more}:
                result = more.get("result", "")
                content = result if isinstance(result, str) else _json(result)
                call_id = _call_id(more, str(more.get("name")))
                message_id = f"{self._run.run_id}-{event_id}"
                return _event(
                    "TOOL_CALL_RESULT", messageId=message_id, toolCallId=call_id, content=content, role="tool"
                )
            case {"type": "state", "state": state}:
                return _event("STATE_SNAPSHOT", snapshot=state)
            case {"type": "state_delta", "delta": list(delta)} if all(map(_is_operation, delta)):
                return _event("STATE_DELTA", delta=delta)
            case _:
                return _custom("event", said)


def _tool_call(call_id: str, name: str, arguments: Any) -> bytes:
    told = b""
    if arguments is not None:
        delta = arguments if isinstance(arguments, str) else _json(arguments)
        told = _event("TOOL_CALL_ARGS", toolCallId=call_id, delta=delta)
    begun = _event("TOOL_CALL_START", toolCallId=call_id, toolCallName=name)
    return begun + told + _event("TOOL_CALL_END", toolCallId=call_id)


def _call_id(said: Mapping[Any, Any], name: str) -> str:
    """What ties a result to its call; a framework that names no id calls its tools one after the other."""
    call_id = said.get("id")
    return call_id if isinstance(call_id, str) and call_id else f"call-{name}"


def _outcome(execution: Execution, content: Content) -> dict[str, Any]:
    told: dict[str, Any] = {"outcome": {"type": "success"}}
    if execution.output is not None:
        told["result"] = execution.output
    if content.usage is not None:
        used = content.usage
        told["usage"] = [{"inputTokens": used.input_tokens, "outputTokens": used.output_tokens}]
    return told


def _is_operation(operation: Any) -> bool:
    """Whether it is one of a JSON Patch (RFC 6902, section 4)."""
    match operation:
        case {"op": "add" | "replace" | "test", "path": str(path), "value": _}:
            pointers = [path]
        case {"op": "remove", "path": str(path)}:
            pointers = [path]
        case {"op": "move" | "copy", "path": str(path), "from": str(source)}:
            pointers = [path, source]
        case _:
            return False
    return all(_is_pointer(pointer) is not None for pointer in pointers)


def _text_of(content: Any) -> str | None:
    """A message's text; None when it has more than text, or none."""
    match content:
        case str():
            return content
        case [_, *_] if all(isinstance(part, dict) and part.get("type") == "text" for part in content):
            texts = [part.get("text") for part in content]
            return "\n".join(texts) if all(isinstance(text, str) for text in texts) else None
    return None


def _custom(name: str, value: Any) -> bytes:
    return _event("CUSTOM", name=f"headrace.{name}", value=value)


def _event(kind: str, **fields: Any) -> bytes:
    return b"data: %b\n\n" % msgspec.json.encode({"type": kind, **fields})


def _json(value: Any) -> str:
    return msgspec.json.encode(value).decode()


def _digest(*names: str) -> str:
    return hashlib.sha256(msgspec.json.encode(names)).hexdigest()[:32]
