"""What goes into a framework's agent and what comes out, the same for all frameworks."""

from typing import Any, Protocol

import msgspec

from headrace.agents.execution import Context
from headrace.errors import AgentFailed, InvalidRequest

_FIELDS = frozenset({"prompt", "deps", "stream"})
_TEXT_CHARACTERS_MAX = 8_000  # of one event: well below `event_bytes_max` in any script


class Request(msgspec.Struct, frozen=True, kw_only=True):
    """What one execution asks of the agent."""

    prompt: Any
    """Text, or what the framework itself takes as its input: messages, a dict, a graph's state."""
    deps: Any = None
    """What the framework injects into tools: `dependencies` of Agno, `deps` of Pydantic AI, `context` of LangGraph."""
    stream: bool = False
    """Emit text and tool calls as events while the agent runs; its model must be able to stream."""

    @classmethod
    def of(cls, value: Any) -> "Request":
        """An execution's input: a dict with `prompt` and only fields of the above, or else the prompt itself."""
        if isinstance(value, dict) and "prompt" in value and value.keys() <= _FIELDS:
            return cls(prompt=value["prompt"], deps=value.get("deps"), stream=bool(value.get("stream")))
        return cls(prompt=value)


class Usage(msgspec.Struct, frozen=True, kw_only=True):
    """Tokens that the models of one execution say they used."""

    input_tokens: int = 0
    output_tokens: int = 0


class Answer(msgspec.Struct, frozen=True, kw_only=True):
    """What an execution of a framework's agent puts out."""

    text: str | None
    """What the model wrote last, if that is text."""
    data: Any
    """Structured output, or a graph's state without its messages; None when there is only text."""
    usage: Usage


class Adapter(Protocol):
    """One framework's agent behind the contract of this room. Holds no state of any execution."""

    async def run(self, request: Request, context: Context) -> Answer:
        """Run it once; raises what the agent raises, and `AgentFailed` where a framework only returns its failure."""
        ...


def answer(output: Any, usage: Usage) -> Answer:
    """Text as text, anything else as data. Raises `AgentFailed` for what is no data."""
    if isinstance(output, str):
        return Answer(text=output, data=None, usage=usage)
    return Answer(text=None, data=plain(output), usage=usage)


def plain(value: Any) -> Any:
    """Plain containers and values; pydantic models and messages become dicts. Raises `AgentFailed` for the rest."""
    return msgspec.to_builtins(value, enc_hook=_dumped, str_keys=True)


def _dumped(thing: Any) -> Any:
    dump = getattr(thing, "model_dump", None)
    if dump is None or isinstance(thing, type):
        raise AgentFailed(
            f"The output holds a {type(thing).__name__}, which cannot be written as JSON.",
            fix="Let the agent put out text, pydantic models, dataclasses, dicts, lists and plain values.",
        )
    return dump(mode="json")


def run_name(context: Context) -> str:
    """This execution's name among all of the process or of a shared database: frameworks know no tenants."""
    parts = (context.tenant, context.agent_id, context.execution_id)
    return "/".join(part.replace("%", "%25").replace("/", "%2F") for part in parts)


def conversation(context: Context) -> dict[str, Any] | None:
    """What is remembered of the conversation with the execution's instance; None for an execution without one.

    It has `thread`, the name under which a framework with a memory of its own keeps it. The name is never the
    caller's, so that no caller can name another's conversation.
    """
    try:
        state = context.state
    except InvalidRequest:
        return None
    kept: dict[str, Any] = state.setdefault("conversation", {"thread": run_name(context)})
    return kept


def emit_text(context: Context, text: Any) -> None:
    """Tell what the model wrote, in pieces that are surely small enough."""
    if isinstance(text, str):
        for start in range(0, len(text), _TEXT_CHARACTERS_MAX):
            context.emit({"type": "text", "text": text[start : start + _TEXT_CHARACTERS_MAX]})


def emit_tool_call(context: Context, call_id: str | None, name: str | None) -> None:
    """Tell that the model calls a tool."""
    context.emit({"type": "tool_call", "id": call_id, "name": name})


def emit_tool_result(context: Context, call_id: str | None, name: str | None) -> None:
    """Tell that a tool has answered."""
    context.emit({"type": "tool_result", "id": call_id, "name": name})
