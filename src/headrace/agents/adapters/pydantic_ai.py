"""Pydantic AI agents.

An agent is made to be shared: a run keeps its state in objects of its own, overrides are context variables, and what
the agent itself counts is how often its MCP servers were entered. So all executions use the one object.
"""

import asyncio
from collections.abc import AsyncIterable
from importlib import import_module
from types import NoneType
from typing import Any

from headrace.agents.adapters.exchange import (
    Answer,
    Request,
    Usage,
    answer,
    conversation,
    emit_text,
    emit_tool_call,
    emit_tool_result,
)
from headrace.agents.execution import Context
from headrace.errors import AgentFailed, InvalidRequest

_TIMEOUT_MIN_S = 0.001
_VERDICT_S = 1.0


class PydanticAIAdapter:
    """Runs any `pydantic_ai.agent.AbstractAgent`."""

    __slots__ = ("_agent", "_deps", "_history", "_paused", "_timed_out")

    def __init__(self, agent: Any) -> None:
        pydantic_ai = import_module("pydantic_ai")  # loaded long ago, or there would be no agent
        self._agent = agent
        self._deps = _deps(agent.deps_type)
        self._history: Any = pydantic_ai.ModelMessagesTypeAdapter
        self._timed_out: type[BaseException] = pydantic_ai.exceptions.RunTimedOut
        self._paused: type = pydantic_ai.DeferredToolRequests

    async def run(self, request: Request, context: Context) -> Answer:
        """Run the agent; its tools see the deadline as `ctx.deadline`. An instance remembers the messages."""
        kept = conversation(context)
        messages = kept and kept.get("messages")
        try:
            result = await self._agent.run(
                _prompt(request.prompt),
                message_history=self._history.validate_python(messages) if messages else None,
                deps=self._injected(request.deps),
                timeout=max(context.remaining_s(), _TIMEOUT_MIN_S),
                infer_name=False,
                event_stream_handler=_emitter(context) if request.stream else None,
            )
        except self._timed_out:
            if context.remaining_s() <= _TIMEOUT_MIN_S:
                # The host's deadline is due in the same moment, and it is the host that calls this a timeout.
                await asyncio.sleep(_VERDICT_S)
            raise
        if isinstance(result.output, self._paused):
            raise AgentFailed(
                "The agent paused to ask for tool calls or approvals.", fix="Host agents that run all their tools."
            )
        if kept is not None:
            kept["messages"] = self._history.dump_python(result.all_messages(), mode="json")
        usage = result.usage
        return answer(result.output, Usage(input_tokens=usage.input_tokens, output_tokens=usage.output_tokens))

    def _injected(self, deps: Any) -> Any:
        if deps is None:
            return None
        if self._deps is None:
            raise InvalidRequest(
                f"The agent's deps_type is {self._agent.deps_type.__name__}, which takes no JSON.",
                fix="Leave `deps` out, or give the agent a dataclass or pydantic model as its `deps_type`.",
            )
        return self._deps.validate_python(deps)


def _deps(kind: Any) -> Any:
    """What makes deps of JSON; None where there are none or only code could make them, a client say."""
    pydantic = import_module("pydantic")
    if kind in {object, NoneType}:
        return None
    try:
        return pydantic.TypeAdapter(kind)
    except pydantic.PydanticSchemaGenerationError:
        return None


def _prompt(prompt: Any) -> str | list[str]:
    if isinstance(prompt, str) or (isinstance(prompt, list) and all(isinstance(part, str) for part in prompt)):
        return prompt
    raise InvalidRequest(
        f"The prompt is a {type(prompt).__name__}; a Pydantic AI agent takes text or a list of texts.",
        fix='Send text, or {"prompt": "...", "deps": {...}}.',
    )


def _emitter(context: Context) -> Any:
    async def emit(_run: Any, events: AsyncIterable[Any]) -> None:
        async for event in events:
            match event.event_kind:
                case "part_start" if event.part.part_kind == "text":
                    emit_text(context, event.part.content)
                case "part_delta" if event.delta.part_delta_kind == "text":
                    emit_text(context, event.delta.content_delta)
                case "function_tool_call":
                    emit_tool_call(context, event.part.tool_call_id, event.part.tool_name)
                case "function_tool_result":
                    emit_tool_result(context, event.part.tool_call_id, event.part.tool_name)

    return emit
