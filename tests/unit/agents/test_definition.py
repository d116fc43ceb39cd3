"""Loading source: what can be executed is found, what cannot be is refused with the reason."""

import sys

import pytest

from headrace.agents import CodeCache
from headrace.agents.definition import Source, load
from headrace.errors import AgentInvalid

GOOD = """
class Agent:
    async def execute(self, input, context):
        return input
    def get_capabilities(self):
        return {"name": "echo"}
"""


def source(text, entrypoint="Agent"):
    return Source(agent_id="a", version="1.0.0", text=text, entrypoint=entrypoint)


def test_a_class_with_execute_is_an_agent():
    """Its other methods are its own business."""
    definition = load(source(GOOD), bytes_max=10_000)
    assert definition.is_async


def test_a_plain_async_function_is_an_agent():
    """No class is needed for one function."""
    definition = load(source("async def go(input, context): return 1", "go"), bytes_max=10_000)
    assert definition.is_async


def test_a_synchronous_execute_is_known_as_such():
    """It will run in a thread."""
    definition = load(source("class Agent:\n    def execute(self, input, context): return 1"), bytes_max=10_000)
    assert not definition.is_async


def test_each_execution_gets_its_own_instance():
    """State of one execution cannot reach another."""
    text = """
class Agent:
    def execute(self, input, context):
        self.x = getattr(self, 'x', 0) + 1
        return self.x
"""
    definition = load(source(text), bytes_max=10_000)
    assert [definition.make()(None, None), definition.make()(None, None)] == [1, 1]


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("class Agent\n    pass", "at line 1"),
        ("x = 1", "no 'Agent'"),
        ("class Other:\n    def execute(self, input, context): ...", "It has Other"),
        ("Agent = 5", "cannot be executed"),
        ("def Agent(input, context): ...", "cannot be executed"),
        ("raise RuntimeError('at import')", "RuntimeError: at import"),
        ("import sys; sys.exit(3)", "SystemExit: 3"),
        ("x = '\x00'", "does not compile"),
        ("#" * 20_000, "20,000 bytes"),
    ],
)
def test_what_cannot_be_an_agent_is_refused(text, named):
    """The error names what is wrong, and no module is left behind."""
    before = set(sys.modules)
    with pytest.raises(AgentInvalid, match=named):
        load(source(text), bytes_max=10_000)
    assert {name for name in set(sys.modules) - before if name.startswith("headrace_agent")} == set()


def test_dataclasses_with_postponed_annotations_work():
    """The module is where the standard library looks annotations up."""
    text = (
        "from __future__ import annotations\nfrom dataclasses import dataclass\n"
        "@dataclass\nclass P:\n    x: int\nclass Agent:\n    def execute(self, input, context): return P(1).x"
    )
    definition = load(source(text), bytes_max=10_000)
    assert definition.make()(None, None) == 1
    definition.unload()
    assert definition.module not in sys.modules


def test_code_comes_from_the_code_cache():
    """With what the source declares; and what it refuses is refused."""
    code_cache = CodeCache()
    text = Source(agent_id="a", version="1.0.0", text=GOOD, dependencies=("some-dist>=1",))

    for _ in range(2):
        load(text, bytes_max=10_000, code_cache=code_cache).unload()

    assert code_cache.statistics().compiles == 1
    assert code_cache.get("b", GOOD, ["some-dist"]).dependencies == {"some-dist": ""}
    with pytest.raises(AgentInvalid, match="at line 1"):
        load(source("class Agent\n    pass"), bytes_max=10_000, code_cache=code_cache)
    with pytest.raises(AgentInvalid, match="at most 10 are accepted"):
        load(source(GOOD), bytes_max=10, code_cache=code_cache)


def test_an_agent_that_fails_when_it_is_loaded_fails_every_time():
    """Its code is cached, not what became of it; each definition runs its own module."""
    code_cache = CodeCache()

    for _ in range(2):
        with pytest.raises(AgentInvalid, match="ZeroDivisionError"):
            load(source("1 / 0"), bytes_max=10_000, code_cache=code_cache)

    assert code_cache.statistics().compiles == 1


def test_a_source_that_is_no_text_is_refused():
    """Half of a surrogate pair, as JSON can carry it, is an error of the source like any other."""
    with pytest.raises(AgentInvalid, match="surrogate"):
        load(source("x = '\ud800'"), bytes_max=10_000)
