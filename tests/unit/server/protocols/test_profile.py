"""What an agent says of itself: taken where it has the right shape, passed over where not."""

import msgspec
import pytest

from headrace.server.protocols.profile import DEFAULT_MODES, Profiles, Skill, profile_of
from tests.unit.server.protocols.profiles import agent, profile

SCHEMA = {"type": "object", "properties": {"a": {}}}


@pytest.mark.parametrize("said", [None, [], ["talks"], "words", 1, {}])
def test_an_agent_that_says_nothing_known_is_presented_all_the_same(said):
    """With its name, its tags and what every agent reads."""
    found = profile(said)

    assert found.description == "The agent 'An agent'."
    assert (found.input_schema, found.output_schema, found.ag_ui) == (None, None, "prompt")
    assert found.input_modes == found.output_modes == DEFAULT_MODES
    assert found.skills == (Skill(id="a", name="An agent", description=found.description, tags=("tagged",)),)


def test_what_it_says_is_taken():
    """Each by its name."""
    skill = {"id": "s", "name": "S", "description": "Does.", "tags": ["t"], "examples": ["do"]}
    found = profile(
        description="Adds.",
        input_schema=SCHEMA,
        output_schema={"type": "number"},
        input_modes=["text/*"],
        skills=[skill],
        ag_ui="run",
    )

    assert (found.description, found.ag_ui) == ("Adds.", "run")
    assert (found.input_schema, found.output_schema) == (SCHEMA, {"type": "number"})
    assert found.takes("text/html")
    assert not found.takes("image/png")
    assert found.skills[0].examples == ("do",)


@pytest.mark.parametrize(
    "wrong",
    [
        {"description": 1},
        {"input_schema": {"type": "string"}},
        {"input_schema": "object"},
        {"input_schema": {"type": "object", "description": "x" * 70_000}},
        {"input_modes": "text/plain"},
        {"input_modes": [1]},
        {"skills": [{"id": "s"}]},
        {"skills": {}},
        {"ag_ui": "everything"},
    ],
    ids=str,
)
def test_what_has_another_shape_is_passed_over_alone(wrong):
    """The rest holds."""
    found = profile(output_schema=SCHEMA, **wrong)

    plain = profile({})
    assert found.output_schema == SCHEMA
    for name in wrong:
        assert getattr(found, name) == getattr(plain, name)


@pytest.mark.parametrize("said", [b"{", b'{"description": "\xff"}', b"[" * 100_000, b'"\\ud800"'], ids=repr)
def test_what_an_isolated_agent_says_may_be_no_json(said):
    """It is told by a worker that nobody trusts, and must not hide the other agents of its tenant."""
    assert profile_of(agent(), msgspec.Raw(said)).skills == profile().skills


def test_a_schema_may_be_deeper_than_anybody_can_read():
    """Then it is none."""
    deep = {"type": "object"}
    for _ in range(400):
        deep = {"type": "object", "properties": {"a": deep}}
    assert profile(output_schema=SCHEMA, input_schema=deep).output_schema == SCHEMA


def test_a_description_has_an_end():
    """Everybody who lists the agents gets it."""
    assert len(profile(description="x" * 10_000).description) == 4_000


async def test_a_profile_is_read_once_a_version(doors, monkeypatch):
    """And again for another one."""
    host = doors.headrace.rooms.agents
    profiles, asked = Profiles(host), []
    version = host.version
    monkeypatch.setattr(host, "version", lambda *names, **more: asked.append(names) or version(*names, **more))

    for _ in range(3):
        assert (await profiles.find("echo", tenant="default")).version == "1.0.0"
    await doors.deploy(source="async def Agent(input, context): return 2", version="2.0.0")
    assert (await profiles.find("echo", tenant="default")).version == "2.0.0"

    assert asked == [("echo", "1.0.0"), ("echo", "2.0.0")]
