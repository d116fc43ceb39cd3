"""The forms of input and output that the frameworks differ in, and what cannot be hosted."""

import pytest

from headrace.agents import AgentHost, AgentsConfig
from headrace.errors import AgentInvalid

# The first import of a framework, uncompiled, is slow; some of it comes with the first execution.
PATIENT = AgentsConfig(load_timeout_s=100.0, timeout_s=100.0)

AGNO_MODEL = """
from agno.agent import Agent as AgnoAgent
from agno.models.base import Model
from agno.models.response import ModelResponse
from pydantic import BaseModel

class Place(BaseModel):
    city: str
    stars: int = 3

class Scripted(Model):
    def reply(self, messages):
        return ModelResponse(role="assistant", content=str(messages[-1].content))

    async def ainvoke(self, messages, assistant_message, **_):
        return self.reply(messages)

    def invoke(self, *args, **kwargs):
        raise AssertionError("the loop would be blocked")

    invoke_stream = ainvoke_stream = invoke

    def _parse_provider_response(self, response, **_):
        return response

    _parse_provider_response_delta = _parse_provider_response
"""

AGNO_STRUCTURED = (
    AGNO_MODEL
    + """
Scripted.reply = lambda self, messages: ModelResponse(role="assistant", content='{"city": "Ulm"}')
agent = AgnoAgent(model=Scripted(id="scripted"), output_schema=Place, telemetry=False)
"""
)
PYDANTIC_STRUCTURED = """
from pydantic import BaseModel
from pydantic_ai import Agent as PydanticAgent
from pydantic_ai.models.test import TestModel

class Place(BaseModel):
    city: str
    stars: int = 3

agent = PydanticAgent(TestModel(custom_output_args={"city": "Ulm"}), output_type=Place)
"""
LANGGRAPH_STRUCTURED = """
from typing import TypedDict
from pydantic import BaseModel
from langgraph.graph import START, StateGraph

class Place(BaseModel):
    city: str
    stars: int = 3

class State(TypedDict):
    structured_response: Place

def find(state):
    return {"structured_response": Place(city="Ulm")}

agent = StateGraph(State).add_node("find", find).add_edge(START, "find").compile()
"""
STRUCTURED = {"agno": AGNO_STRUCTURED, "pydantic-ai": PYDANTIC_STRUCTURED, "langgraph": LANGGRAPH_STRUCTURED}

PYDANTIC_DEPS = """
from dataclasses import dataclass
from pydantic_ai import Agent as PydanticAgent, RunContext
from pydantic_ai.models.test import TestModel

@dataclass
class Deps:
    city: str

agent = PydanticAgent(TestModel(), deps_type=Deps)

@agent.tool
def where(run: RunContext[Deps]) -> str:
    '''Where?'''
    return f"{type(run.deps).__name__} {run.deps.city} {run.deadline is not None}"
"""
LANGGRAPH_STATE = """
import operator
from dataclasses import dataclass
from typing import Annotated, TypedDict
from langgraph.graph import START, StateGraph
from langgraph.runtime import Runtime

@dataclass
class Deps:
    city: str

class State(TypedDict):
    words: Annotated[list[str], operator.add]

def add(state, runtime: Runtime[Deps]):
    return {"words": [runtime.context.city if runtime.context else "nowhere"]}

agent = StateGraph(State, context_schema=Deps).add_node("add", add).add_edge(START, "add").compile()
"""


async def executed(source, value):
    """The finished execution of an agent object called `agent`."""
    async with AgentHost(PATIENT) as host:
        await host.deploy("a", source, version="1.0.0", entrypoint="agent")
        return await host.execute("a", value)


@pytest.mark.parametrize("framework", STRUCTURED)
async def test_structured_output_is_data(framework):
    """A pydantic model comes out as a dict, with its defaults."""
    execution = await executed(STRUCTURED[framework], {"prompt": {} if framework == "langgraph" else "where?"})

    assert execution.status == "completed", execution.error
    assert execution.output["data"] == {"city": "Ulm", "stars": 3}


async def test_an_agno_agent_takes_a_dict_of_its_input_schema():
    """Agno validates it, and shows it to the model as JSON."""
    source = AGNO_MODEL + "agent = AgnoAgent(model=Scripted(id='scripted'), input_schema=Place, telemetry=False)"

    execution = await executed(source, {"city": "Ulm"})

    assert '"city": "Ulm"' in execution.output["text"], execution.error


async def test_agno_injects_deps():
    """They are its `dependencies`, filled into the instructions."""
    source = AGNO_MODEL + (
        "Scripted.reply = lambda self, messages: ModelResponse(role='assistant', content=messages[0].content)\n"
        "agent = AgnoAgent(model=Scripted(id='s'), instructions='Live in {city}.', telemetry=False)"
    )

    execution = await executed(source, {"prompt": "hi", "deps": {"city": "Ulm"}})

    assert "Live in Ulm." in execution.output["text"], execution.error


async def test_pydantic_ai_injects_deps_of_its_type():
    """They are validated into it; tools see the deadline, too."""
    execution = await executed(PYDANTIC_DEPS, {"prompt": "hi", "deps": {"city": "Ulm"}})

    assert execution.output["text"] == '{"where":"Deps Ulm True"}', execution.error


async def test_langgraph_takes_a_state_and_a_context():
    """Its input is a state, its output what became of it, without the messages."""
    execution = await executed(LANGGRAPH_STATE, {"prompt": {"words": ["from"]}, "deps": {"city": "Ulm"}})

    assert execution.output["data"] == {"words": ["from", "Ulm"]}, execution.error


async def test_a_dict_that_is_no_request_is_the_input_itself():
    """A graph's state needs no envelope."""
    execution = await executed(LANGGRAPH_STATE, {"words": ["from"]})

    assert execution.output["data"] == {"words": ["from", "nowhere"]}, execution.error


@pytest.mark.parametrize(
    ("source", "value", "named"),
    [
        (PYDANTIC_STRUCTURED, {"city": "Ulm"}, "the prompt is a dict"),
        (PYDANTIC_STRUCTURED, {"prompt": "hi", "deps": {"city": "Ulm"}}, "deps_type is object"),
        (
            PYDANTIC_DEPS.replace("deps_type=Deps", "deps_type=Socket").replace(
                "@dataclass", "from socket import socket as Socket\n@dataclass"
            ),
            {"prompt": "hi", "deps": {"city": "Ulm"}},
            "deps_type is socket",
        ),
        (PYDANTIC_DEPS, {"prompt": "hi", "deps": {"town": "Ulm"}}, "validation error"),
        (AGNO_STRUCTURED, {"prompt": "hi", "deps": ["Ulm"]}, "deps are a list"),
        (LANGGRAPH_STATE.replace("runtime.context.city if runtime.context else 'nowhere'", "x"), "hi", "update"),
        (
            "from langgraph.func import entrypoint\n@entrypoint()\ndef agent(input): return {'thing': object()}",
            "hi",
            "holds a object",
        ),
        (
            "from langgraph.func import entrypoint\nfrom langgraph.types import interrupt\n"
            "from langgraph.checkpoint.memory import InMemorySaver\n"
            "@entrypoint(checkpointer=InMemorySaver())\ndef agent(input): return interrupt('sure?')",
            "hi",
            "interrupted itself",
        ),
        (
            "from langgraph.func import entrypoint\nfrom langgraph.types import interrupt\n"
            "from langgraph.checkpoint.memory import InMemorySaver\n"
            "@entrypoint(checkpointer=InMemorySaver())\ndef agent(input): return interrupt('sure?')",
            {"prompt": "hi", "stream": True},
            "interrupted itself",
        ),
        (
            "from pydantic_ai import Agent as A, DeferredToolRequests\nfrom pydantic_ai.models.test import TestModel\n"
            "agent = A(TestModel(), output_type=[str, DeferredToolRequests])\n"
            "@agent.tool_plain(requires_approval=True)\ndef delete() -> str: return 'gone'",
            "hi",
            "paused to ask",
        ),
    ],
)
async def test_what_cannot_be_run_fails_with_the_reason(source, value, named):
    """The execution fails; the error says which rule was broken."""
    execution = await executed(source, value)

    assert execution.status == "failed"
    assert named.lower() in execution.error.lower()


async def test_a_graph_may_put_out_text():
    """A function of the functional interface is a graph like any other."""
    source = "from langgraph.func import entrypoint\n@entrypoint()\ndef agent(input): return input.upper()"

    execution = await executed(source, "hi")

    assert execution.output == {"text": "HI", "data": None, "usage": {"input_tokens": 0, "output_tokens": 0}}


@pytest.mark.parametrize(
    ("source", "named"),
    [
        (LANGGRAPH_STATE.replace(".compile()", ""), "not compiled"),
        (
            "from agno.agent import Agent as AgnoAgent\nclass Mine(AgnoAgent):\n"
            "    def __init__(self, mood): super().__init__(name=mood)\nagent = Mine('good')",
            "cannot be copied",
        ),
    ],
)
async def test_what_cannot_be_hosted_is_refused_when_it_is_deployed(source, named):
    """Not at its first execution."""
    async with AgentHost(PATIENT) as host:
        with pytest.raises(AgentInvalid, match=named):
            await host.deploy("a", source, version="1.0.0", entrypoint="agent")
