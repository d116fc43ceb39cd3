"""Agents of other frameworks behave like any agent: one contract, three frameworks, models that answer from memory."""

import asyncio
import subprocess
import sys

import msgspec
import pytest

from headrace.agents import AgentHost, AgentsConfig, Context, Execution
from headrace.agents.adapters import Answer, Usage, current_context
from headrace.agents.adapters.hosted import Hosted
from headrace.clock import SystemClock
from headrace.errors import AgentInvalid, NotOpen

# What each model does with a prompt: `fail` raises, `wait` never ends, `meet` waits until two executions are there,
# `tool` calls the tool `note` and answers with its result, anything else is `hello`.
MODEL = """
import asyncio
from headrace.agents.adapters import current_context

meeting = asyncio.Barrier(2)

async def think(prompt):
    match prompt.split()[0]:
        case "fail":
            raise RuntimeError("the model is down")
        case "wait":
            await asyncio.Event().wait()
        case "meet":
            await meeting.wait()
    return "hello"

def whereabouts():
    context = current_context()
    return f"{context.execution_id} {context.remaining_s() > 1}"
"""

AGNO = (
    MODEL
    + """
from agno.agent import Agent as AgnoAgent
from agno.metrics import MessageMetrics
from agno.models.base import Model
from agno.models.response import ModelResponse
from agno.tools import Toolkit

class Notes(Toolkit):
    def __init__(self):
        super().__init__(name="notes", tools=[self.note])
        self.words = []

    async def note(self, word: str) -> str:
        '''Note a word.'''
        self.words.append(word)
        await think("meet" if word != "alone" else "go on")
        return f"{whereabouts()} {','.join(self.words)}"

class Memorized(Model):
    async def ainvoke(self, messages, assistant_message, **_):
        last = messages[-1]
        used = MessageMetrics(input_tokens=3, output_tokens=2)
        if last.role == "tool":
            return ModelResponse(role="assistant", content=last.content, response_usage=used)
        text = last.content
        if text.startswith("tool"):
            function = {"name": "note", "arguments": '{"word": "%s"}' % text.split()[1]}
            call = {"id": "call-1", "type": "function", "function": function}
            return ModelResponse(role="assistant", tool_calls=[call], response_usage=used)
        return ModelResponse(role="assistant", content=await think(text), response_usage=used)

    async def ainvoke_stream(self, messages, assistant_message, **_):
        whole = await self.ainvoke(messages, assistant_message)
        yield ModelResponse(tool_calls=whole.tool_calls, response_usage=whole.response_usage)
        for piece in [whole.content[:3], whole.content[3:]] if whole.content else []:
            yield ModelResponse(content=piece)

    def invoke(self, *args, **kwargs):
        raise AssertionError("the loop would be blocked")

    invoke_stream = invoke

    def _parse_provider_response(self, response, **_):
        return response

    def _parse_provider_response_delta(self, response):
        return response

agent = AgnoAgent(model=Memorized(id="memorized"), tools=[Notes()], telemetry=False)
"""
)

PYDANTIC_AI = (
    MODEL
    + """
from dataclasses import dataclass, field
from pydantic_ai import Agent as PydanticAgent, RunContext
from pydantic_ai.messages import ModelResponse, TextPart, ToolCallPart, ToolReturnPart
from pydantic_ai.models.function import AgentInfo, DeltaToolCall, FunctionModel
from pydantic_ai.usage import RequestUsage

@dataclass
class Notes:
    words: list[str] = field(default_factory=list)

async def reply(messages, info: AgentInfo):
    last = messages[-1].parts[-1]
    used = RequestUsage(input_tokens=3, output_tokens=2)
    if isinstance(last, ToolReturnPart):
        return ModelResponse(parts=[TextPart(last.content)], usage=used)
    if last.content.startswith("tool"):
        call = ToolCallPart("note", {"word": last.content.split()[1]}, tool_call_id="call-1")
        return ModelResponse(parts=[call], usage=used)
    return ModelResponse(parts=[TextPart(await think(last.content))], usage=used)

async def reply_in_pieces(messages, info: AgentInfo):
    part = (await reply(messages, info)).parts[0]
    if isinstance(part, TextPart):
        yield part.content[:3]
        yield part.content[3:]
    else:
        yield {0: DeltaToolCall(part.tool_name, part.args_as_json_str(), tool_call_id="call-1")}

agent = PydanticAgent(FunctionModel(reply, stream_function=reply_in_pieces), deps_type=Notes)

@agent.tool
async def note(run: RunContext[Notes], word: str) -> str:
    '''Note a word.'''
    words = run.deps.words if run.deps else []
    words.append(word)
    await think("meet" if word != "alone" else "go on")
    return f"{whereabouts()} {','.join(words)}"
"""
)

LANGGRAPH = (
    MODEL
    + """
from langchain_core.language_models import BaseChatModel
from langchain_core.messages import AIMessage, AIMessageChunk
from langchain_core.outputs import ChatGeneration, ChatGenerationChunk, ChatResult
from langgraph.graph import START, MessagesState, StateGraph
from langgraph.prebuilt import ToolNode, tools_condition

USED = {"input_tokens": 3, "output_tokens": 2, "total_tokens": 5}

async def note(word: str) -> str:
    '''Note a word.'''
    words = [word]
    await think("meet" if word != "alone" else "go on")
    return f"{whereabouts()} {','.join(words)}"

class Memorized(BaseChatModel):
    @property
    def _llm_type(self):
        return "memorized"

    async def answer(self, messages):
        last = messages[-1]
        if last.type == "tool":
            return AIMessage(last.content, usage_metadata=USED)
        if last.text.startswith("tool"):
            call = {"name": "note", "args": {"word": last.text.split()[1]}, "id": "call-1"}
            return AIMessage("", tool_calls=[call], usage_metadata=USED)
        return AIMessage(await think(last.text), usage_metadata=USED)

    async def _agenerate(self, messages, stop=None, run_manager=None, **_):
        return ChatResult(generations=[ChatGeneration(message=await self.answer(messages))])

    async def _astream(self, messages, stop=None, run_manager=None, **_):
        whole = await self.answer(messages)
        chunks = [{"name": c["name"], "args": '{"word": "%s"}' % c["args"]["word"], "id": c["id"], "index": 0}
                  for c in whole.tool_calls]
        yield ChatGenerationChunk(message=AIMessageChunk(whole.text[:3], tool_call_chunks=chunks, usage_metadata=USED))
        if whole.text[3:]:
            yield ChatGenerationChunk(message=AIMessageChunk(whole.text[3:]))

    def _generate(self, *args, **kwargs):
        raise AssertionError("the loop would be blocked")

model = Memorized()

async def talk(state):
    return {"messages": [await model.ainvoke(state["messages"])]}

builder = StateGraph(MessagesState)
builder.add_node("talk", talk)
builder.add_node("tools", ToolNode([note]))
builder.add_edge(START, "talk")
builder.add_conditional_edges("talk", tools_condition)
builder.add_edge("tools", "talk")
agent = builder.compile()
"""
)

SOURCES = {"agno": AGNO, "pydantic-ai": PYDANTIC_AI, "langgraph": LANGGRAPH}


@pytest.fixture(params=SOURCES)
async def host(request):
    """A host with an agent `a` of one of the frameworks."""
    async with AgentHost(AgentsConfig(cancel_grace_s=60, load_timeout_s=100, timeout_s=100)) as host:
        await host.deploy("a", SOURCES[request.param], version="1.0.0", entrypoint="agent")
        yield host


async def test_an_answer_has_text_and_usage(host):
    """What the model wrote, and the tokens that it says it used."""
    execution = await host.execute("a", "hi")

    assert execution.status == "completed", execution.error
    assert execution.output == {"text": "hello", "data": None, "usage": {"input_tokens": 3, "output_tokens": 2}}


async def test_a_tool_knows_the_execution_that_it_works_for(host):
    """Its id and its deadline; and the usage is the sum over the model's turns."""
    execution = await host.execute("a", "tool alone", execution_id="x1", timeout=60)

    assert execution.status == "completed", execution.error
    assert execution.output["text"] == "x1 True alone"
    assert execution.output["usage"] == {"input_tokens": 6, "output_tokens": 4}


async def test_a_failing_model_is_a_failed_execution(host):
    """With the model's words, also where the framework returns failures as if they were answers."""
    execution = await host.execute("a", "fail")

    assert execution.status == "failed"
    assert "the model is down" in execution.error


async def test_a_run_over_its_deadline_is_stopped(host):
    """The framework lets the cancellation through to the model."""
    await host.execute("a", "hi")  # what a framework imports at its first run counts, too
    execution = await host.execute("a", "wait", timeout=1.0)

    assert execution.status == "timeout"
    assert "was stopped" in execution.error


async def test_a_cancelled_run_stops(host):
    """The status tells so after the work has stopped, and the agent serves on."""
    execution = await host.submit("a", "wait")
    while (await host.execution("a", execution.id)).status == "queued":
        await asyncio.sleep(0.01)

    await host.cancel(execution.id, agent_id="a")

    while not (ended := await host.execution("a", execution.id)).is_finished:
        await asyncio.sleep(0.01)
    assert ended.status == "cancelled"
    assert (await host.execute("a", "hi")).status == "completed"


async def test_executions_share_no_state(host):
    """Two are inside their tool at the same time; each sees its own note, of its own execution."""
    first, second = await asyncio.gather(
        host.execute("a", "tool one", execution_id="x1"), host.execute("a", "tool two", execution_id="x2")
    )

    assert first.output["text"] == "x1 True one", first.error
    assert second.output["text"] == "x2 True two", second.error


async def test_a_later_execution_finds_nothing_of_an_earlier_one(host):
    """Notes of one execution are gone with it."""
    await host.execute("a", "tool alone", execution_id="x1")

    later = await host.execute("a", "tool alone", execution_id="x2")

    assert later.output["text"] == "x2 True alone"


async def test_a_streamed_run_emits_its_tool_calls_and_text(host):
    """The pieces make up the answer, and the answer is the same as without streaming."""
    execution = await host.submit("a", {"prompt": "tool alone", "stream": True}, execution_id="x1")

    events = [event.data async for event in host.events(execution.id)]

    told = [msgspec.json.decode(data) for data in events]
    assert told[:2] == [
        {"type": "tool_call", "id": "call-1", "name": "note"},
        {"type": "tool_result", "id": "call-1", "name": "note"},
    ]
    assert [event["text"] for event in told[2:]] == ["x1 ", "True alone"]
    assert (await host.execution("a", "x1")).output["text"] == "x1 True alone"


async def test_a_run_emits_nothing_unasked(host):
    """Streaming changes how a model is called, so it is asked for."""
    execution = await host.submit("a", "hi")

    assert [event async for event in host.events(execution.id)] == []


async def test_naming_something_else_lists_what_could_be_named():
    """The source imports a class `Agent`, which is not the agent; or it has no `Agent`."""
    source = "from pydantic_ai import Agent\nweather = Agent('test')"
    async with AgentHost(AgentsConfig(load_timeout_s=100)) as host:
        for name in ("Agent", "Other"):
            with pytest.raises(AgentInvalid, match="It has weather"):
                await host.deploy("b", source, version="1.0.0", entrypoint=name)


def test_outside_of_an_execution_there_is_no_context():
    """A tool that is called by hand is told so."""
    with pytest.raises(NotOpen, match="No hosted agent"):
        current_context()


async def test_the_context_ends_with_the_execution():
    """Also where an agent is called without a task of its own."""

    class Echo:
        async def run(self, request, context):
            return Answer(text=current_context().execution_id, data=request.prompt, usage=Usage())

    execution = Execution(id="x1", agent_id="a", version="1.0.0", status="running")

    output = await Hosted(Echo()).execute("hi", Context(execution, SystemClock(), deadline=0.0))

    assert output == {"text": "x1", "data": "hi", "usage": {"input_tokens": 0, "output_tokens": 0}}
    with pytest.raises(NotOpen):
        current_context()


def test_recognising_imports_no_framework():
    """A host of plain agents pays nothing for the adapters."""
    script = """
import sys
from headrace.agents.definition import Source, load
text = "class Agent:\\n    def execute(self, input, context): return 1"
load(Source(agent_id="a", version="1", text=text), bytes_max=1000)
print({"agno", "pydantic_ai", "langgraph", "langchain_core", "pydantic"} & set(sys.modules))
"""
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)

    assert result.stdout.strip() == "set()"
