"""Agno agents.

An Agno agent is not made for two runs at once: a run writes its tools' instructions, hooks, connections and, when none
is given, its session id into the object. Agno's own server makes a `deep_copy` for each request, and so do we. It
copies the fields, tools among them, and shares what holds connections: the model, databases, knowledge, and tools that
cannot be copied.
"""

import asyncio
from collections.abc import AsyncGenerator
from contextlib import aclosing
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
    run_name,
)
from headrace.agents.execution import Context
from headrace.errors import AgentFailed, AgentInvalid, InvalidRequest


class AgnoAdapter:
    """Runs an `agno.agent.Agent`."""

    __slots__ = ("_agent",)

    def __init__(self, agent: Any) -> None:
        try:
            agent.deep_copy()
        except Exception as error:
            raise AgentInvalid(
                f"The Agno agent cannot be copied, so executions would share its state: {error}.",
                fix="Let its class take every field that it sets in the constructor, as agno.agent.Agent does.",
            ) from error
        self._agent = agent

    async def run(self, request: Request, context: Context) -> Answer:
        """Run a copy of the agent; with an instance, in the session of that instance in the agent's `db`."""
        if request.deps is not None and not isinstance(request.deps, dict):
            raise InvalidRequest(f"The deps are a {type(request.deps).__name__}.", fix="Send `deps` as an object.")
        kept = conversation(context) or {}
        name = run_name(context)
        run = self._agent.deep_copy().arun(
            request.prompt,
            stream=request.stream,
            stream_events=request.stream,
            yield_run_output=request.stream,
            run_id=name,
            session_id=kept.get("thread", name),
            user_id=self._agent.user_id or context.tenant,
            dependencies=request.deps,
        )
        return _answer(await (_last(run, context) if request.stream else run))


async def _last(events: AsyncGenerator[Any, None], context: Context) -> Any:
    """Emit what is told on the way; the run itself comes last."""
    run = None
    async with aclosing(events):
        async for event in events:
            match getattr(event, "event", None):
                case None:
                    run = event
                case "RunContent":
                    emit_text(context, event.content)
                case "ToolCallStarted":
                    emit_tool_call(context, event.tool.tool_call_id, event.tool.tool_name)
                case "ToolCallCompleted" | "ToolCallError":
                    emit_tool_result(context, event.tool.tool_call_id, event.tool.tool_name)
    return run


def _answer(run: Any) -> Answer:
    """A run's output; Agno returns failures, too."""
    match run.status.value:
        case "COMPLETED":
            used = run.metrics
            usage = Usage(input_tokens=used.input_tokens, output_tokens=used.output_tokens) if used else Usage()
            return answer(run.content, usage)
        case "CANCELLED":
            raise asyncio.CancelledError
        case "PAUSED":
            raise AgentFailed(
                "The agent paused to ask a person.", fix="Host agents whose tools need no confirmation or user input."
            )
        case _:
            raise AgentFailed(f"Agno reports: {run.content}")
