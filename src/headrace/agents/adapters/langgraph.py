"""LangGraph graphs, and all that compiles to one.

A compiled graph is immutable; a run's channels live in the run. What outlives runs is the checkpointer's, by thread,
and the store's, which a graph shares between threads on purpose. So all executions use the one graph, and each has a
thread of its own unless it belongs to an instance.
"""

from contextlib import aclosing
from importlib import import_module
from typing import Any

from headrace.agents.adapters.exchange import (
    Answer,
    Request,
    Usage,
    conversation,
    emit_text,
    emit_tool_call,
    emit_tool_result,
    plain,
    run_name,
)
from headrace.agents.execution import Context
from headrace.errors import AgentFailed

_INTERRUPT = "__interrupt__"
_STRUCTURED = "structured_response"


class LangGraphAdapter:
    """Runs any `langgraph.pregel.Pregel`."""

    __slots__ = ("_counter", "_forgets", "_graph")

    def __init__(self, graph: Any) -> None:
        callbacks, memory = import_module("langchain_core.callbacks"), import_module("langgraph.checkpoint.memory")
        self._graph = graph
        self._counter: Any = type("TokenCounter", (TokenCounting, callbacks.BaseCallbackHandler), {})
        self._forgets = isinstance(graph.checkpointer, memory.InMemorySaver)

    async def run(self, request: Request, context: Context) -> Answer:
        """Run the graph; what its models used is counted in all nodes and subgraphs.

        With an instance, in that instance's thread of the graph's checkpointer.
        """
        kept, counter = conversation(context), self._counter()
        thread = run_name(context) if kept is None else kept["thread"]
        config = {"configurable": {"thread_id": thread}, "callbacks": [counter]}
        try:
            arguments = (self._state(request.prompt), config)
            if request.stream:
                state = await self._streamed(context, *arguments, injected=request.deps)
            else:
                state = await self._graph.ainvoke(*arguments, context=request.deps)
        finally:
            if self._forgets and kept is None:
                # Nobody can name this thread again, and this saver keeps all threads for as long as it lives.
                self._graph.checkpointer.delete_thread(thread)
        return _answer(state, counter.usage)

    async def _streamed(self, context: Context, state: Any, config: Any, *, injected: Any) -> Any:
        """What `ainvoke` gives, emitting what is told on the way."""
        latest: Any = None
        modes = ["messages", "updates", "values"]
        async with aclosing(self._graph.astream(state, config, context=injected, stream_mode=modes)) as chunks:
            async for mode, chunk in chunks:
                if mode == "messages":
                    _emit(context, chunk[0])
                elif mode == "values" or _INTERRUPT in chunk:
                    latest = chunk
        return latest

    def _state(self, prompt: Any) -> Any:
        if isinstance(prompt, str) and "messages" in self._graph.channels:
            return {"messages": [{"role": "user", "content": prompt}]}
        return prompt


class TokenCounting:
    """Adds up what models report; called from the threads of synchronous nodes, too."""

    # Of all that a run tells its handlers these are the ends of model calls, at once: LangChain would otherwise hand
    # each event of each node to a thread, which costs as much as the run of a small graph.
    run_inline = True
    ignore_agent = ignore_chain = ignore_chat_model = ignore_custom_event = ignore_retriever = ignore_retry = True

    def __init__(self) -> None:
        self._reports: list[Any] = []

    def on_llm_end(self, response: Any, **_about: Any) -> None:
        """Note the tokens of one call of a model."""
        for generations in response.generations:
            for generation in generations:
                if used := getattr(getattr(generation, "message", None), "usage_metadata", None):
                    self._reports.append(used)

    @property
    def usage(self) -> Usage:
        """The sum so far."""
        return Usage(
            input_tokens=sum(used["input_tokens"] for used in self._reports),
            output_tokens=sum(used["output_tokens"] for used in self._reports),
        )


def _emit(context: Context, message: Any) -> None:
    if message.type == "tool":
        emit_tool_result(context, message.tool_call_id, message.name)
    elif message.type in {"ai", "AIMessageChunk"}:
        emit_text(context, str(message.text))
        # A chunk that begins a call names it; the ones after it carry pieces of its arguments.
        for call in getattr(message, "tool_call_chunks", None) or message.tool_calls:
            if call["name"]:
                emit_tool_call(context, call["id"], call["name"])


def _answer(state: Any, usage: Usage) -> Answer:
    if isinstance(state, str):
        return Answer(text=state, data=None, usage=usage)
    if not isinstance(state, dict):
        return Answer(text=None, data=plain(state), usage=usage)
    if state.get(_INTERRUPT):
        raise AgentFailed(
            "The graph interrupted itself to ask a person.", fix="Host graphs that run to their end without one."
        )
    messages = state.get("messages")
    text = str(getattr(messages[-1], "text", "")) if isinstance(messages, list) and messages else None
    rest = {name: value for name, value in state.items() if name != "messages"}
    return Answer(text=text, data=plain(rest.get(_STRUCTURED, rest or None)), usage=usage)
