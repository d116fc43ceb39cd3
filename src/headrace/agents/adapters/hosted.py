"""From a framework's agent object to an `execute` of this room's contract."""

import sys
from collections.abc import Callable
from contextvars import ContextVar
from typing import Any

import msgspec

from headrace.agents.adapters.agno import AgnoAdapter
from headrace.agents.adapters.exchange import Adapter, Request
from headrace.agents.adapters.langgraph import LangGraphAdapter
from headrace.agents.adapters.pydantic_ai import PydanticAIAdapter
from headrace.agents.execution import Context
from headrace.errors import AgentInvalid, NotOpen

# Looked up among the modules that are loaded: an object of a framework cannot exist before its module does, so nothing
# is ever imported to find out that an agent is not of it.
_FRAMEWORKS: tuple[tuple[str, str, Callable[[Any], Adapter]], ...] = (
    ("agno.agent", "Agent", AgnoAdapter),
    ("pydantic_ai.agent", "AbstractAgent", PydanticAIAdapter),
    ("langgraph.pregel", "Pregel", LangGraphAdapter),
)

_current: ContextVar[Context] = ContextVar("headrace_execution")


def current_context() -> Context:
    """The context of the execution that this code runs in: for the tools and nodes of a hosted agent.

    Known in its tasks and in the threads that its framework runs synchronous tools in. Raises `NotOpen` outside.
    """
    try:
        return _current.get()
    except LookupError:
        raise NotOpen(
            "No hosted agent runs here.", fix="Call current_context() from a tool or a node while the agent executes."
        ) from None


class Hosted:
    """A framework's agent as an agent of this room."""

    __slots__ = ("_adapter",)

    def __init__(self, adapter: Adapter) -> None:
        self._adapter = adapter

    async def execute(self, input: Any, context: Context) -> Any:
        """Run it once. The output has `text`, `data` and `usage`, see `Answer`."""
        token = _current.set(context)
        try:
            return msgspec.to_builtins(await self._adapter.run(Request.of(input), context))
        finally:
            _current.reset(token)


def hosted(entry: Any) -> Any:
    """The `execute` of a framework's agent object, or whatever else was given as it is.

    Raises `AgentInvalid` for an object of a framework that cannot be run or not be kept apart between executions.
    """
    if _is_of(entry, "langgraph.graph", "StateGraph"):
        raise AgentInvalid(
            "The entrypoint is a StateGraph that was not compiled.", fix="Name the result of its `.compile()`."
        )
    adapter = _adapter(entry)
    return entry if adapter is None else Hosted(adapter(entry)).execute


def is_hosted(entry: Any) -> bool:
    """Whether it is an agent object of a framework."""
    return _adapter(entry) is not None


def _adapter(entry: Any) -> Callable[[Any], Adapter] | None:
    return next((adapter for module, name, adapter in _FRAMEWORKS if _is_of(entry, module, name)), None)


def _is_of(entry: Any, module: str, name: str) -> bool:
    kind = getattr(sys.modules.get(module), name, None)
    return isinstance(kind, type) and isinstance(entry, kind)
