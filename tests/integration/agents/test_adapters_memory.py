"""What a framework keeps between executions is kept for an instance, and for nobody else."""

import pytest

from headrace.agents import AgentHost, AgentsConfig

# The first import of a framework, uncompiled, is slow; some of it comes with the first execution.
PATIENT = AgentsConfig(load_timeout_s=100.0, timeout_s=100.0)

# Each of these agents answers with the number of user messages that its model is shown.
AGNO = """
from agno.agent import Agent as AgnoAgent
from agno.db.in_memory import InMemoryDb
from agno.models.base import Model
from agno.models.response import ModelResponse

class Counting(Model):
    async def ainvoke(self, messages, assistant_message, **_):
        return ModelResponse(role="assistant", content=str(sum(m.role == "user" for m in messages)))

    def invoke(self, *args, **kwargs):
        raise AssertionError("the loop would be blocked")

    invoke_stream = ainvoke_stream = invoke

    def _parse_provider_response(self, response, **_):
        return response

    _parse_provider_response_delta = _parse_provider_response

db = InMemoryDb()
agent = AgnoAgent(model=Counting(id="counting"), db=db, add_history_to_context=True, telemetry=False)
"""

PYDANTIC_AI = """
from pydantic_ai import Agent as PydanticAgent
from pydantic_ai.messages import ModelRequest, ModelResponse, TextPart
from pydantic_ai.models.function import FunctionModel

async def count(messages, info):
    return ModelResponse(parts=[TextPart(str(sum(isinstance(m, ModelRequest) for m in messages)))])

agent = PydanticAgent(FunctionModel(count))
"""

LANGGRAPH = """
from langchain_core.messages import AIMessage
from langgraph.checkpoint.memory import InMemorySaver
from langgraph.graph import START, MessagesState, StateGraph

async def count(state):
    return {"messages": [AIMessage(str(sum(m.type == "human" for m in state["messages"])))]}

saver = InMemorySaver()
agent = StateGraph(MessagesState).add_node("count", count).add_edge(START, "count").compile(checkpointer=saver)
"""

SOURCES = {"agno": AGNO, "pydantic-ai": PYDANTIC_AI, "langgraph": LANGGRAPH}


@pytest.fixture(params=SOURCES)
async def host(request):
    """A host with an agent `a` of one of the frameworks, deployed by two tenants."""
    async with AgentHost(PATIENT) as host:
        for tenant in ("default", "other"):
            await host.deploy("a", SOURCES[request.param], version="1.0.0", entrypoint="agent", tenant=tenant)
        yield host


async def text(host, **options):
    """What the agent answers."""
    execution = await host.execute("a", "hi", **options)
    assert execution.status == "completed", execution.error
    return execution.output["text"]


async def test_the_conversation_with_an_instance_goes_on(host):
    """Its model is shown what was said before."""
    assert [await text(host, instance="ann") for _ in range(3)] == ["1", "2", "3"]


async def test_instances_do_not_hear_each_other(host):
    """Neither within a tenant nor across tenants, whatever they are called."""
    await text(host, instance="ann")

    assert await text(host, instance="bob") == "1"
    assert await text(host, instance="ann", tenant="other") == "1"
    assert await text(host, instance="ann") == "2"


async def test_an_execution_without_an_instance_remembers_nothing(host):
    """It begins a conversation of its own, which ends with it."""
    assert [await text(host) for _ in range(2)] == ["1", "1"]


async def test_a_saver_in_memory_keeps_no_threads_that_nobody_can_name():
    """It would grow by one with each execution for as long as the agent is loaded."""
    told = LANGGRAPH.replace('AIMessage(str(sum(m.type == "human" for m in state["messages"])))', "threads()")
    told = told.replace(
        "async def count", "def threads():\n    return AIMessage(str(len(saver.storage)))\n\nasync def count"
    )
    async with AgentHost(PATIENT) as host:
        await host.deploy("a", told, version="1.0.0", entrypoint="agent")

        seen = [await text(host) for _ in range(3)]

    assert seen == ["1", "1", "1"]
