"""AG-UI as its own package validates it, with a service of two workers."""

import asyncio
import uuid

import httpx
import pytest
from ag_ui.core import Event, EventType, RunAgentInput, UserMessage
from pydantic import TypeAdapter

from tests.running import deploy_body

EVENTS = TypeAdapter(Event)
HOSTED = """
from pydantic_ai import Agent
from pydantic_ai.models.test import TestModel

weather = Agent(TestModel())

@weather.tool_plain
def forecast(city: str) -> str:
    return "sun"
"""


def run_of(words, *, thread_id=None, run_id=None, **more):
    """What a page sends, made by the package."""
    run = RunAgentInput(
        thread_id=thread_id or uuid.uuid4().hex,
        run_id=run_id or uuid.uuid4().hex,
        messages=[UserMessage(id="m", role="user", content=words)],
        **more,
    )
    return run.model_dump(mode="json", by_alias=True)


async def events_of(doors, agent_id, run, *, told=lambda event: None):
    """The events of a run, each validated, and told as it comes."""
    found = []
    async with (
        httpx.AsyncClient(headers=doors.headers, timeout=60) as http,
        http.stream("POST", f"{doors.url}/ag-ui/{agent_id}", json=run) as answer,
    ):
        assert answer.status_code == 200, await answer.aread()
        async for line in answer.aiter_lines():
            if line.startswith("data: "):
                event = EVENTS.validate_json(line.removeprefix("data: "), strict=False)
                assert not event.model_extra, f"{event.type} has no {event.model_extra}"
                found.append(event)
                told(event)
    return found


def kinds(events, *, without=(EventType.CUSTOM,)):
    """Their types."""
    return [event.type for event in events if event.type not in without]


async def test_a_run_streams_its_text(doors, tmp_path):
    """From its beginning to its end, in one message whose pieces come as they are written."""
    end = tmp_path / "end"
    run = run_of(f"to be until:{end}")
    events = await events_of(doors, "talker", run, told=lambda event: event.type == EventType.CUSTOM and end.touch())

    assert kinds(events) == [
        EventType.RUN_STARTED,
        EventType.TEXT_MESSAGE_START,
        EventType.TEXT_MESSAGE_CONTENT,
        EventType.TEXT_MESSAGE_CONTENT,
        EventType.TEXT_MESSAGE_END,
        EventType.RUN_FINISHED,
    ]
    assert (events[0].thread_id, events[0].run_id) == (run["threadId"], run["runId"])
    pieces = [event for event in events if event.type == EventType.TEXT_MESSAGE_CONTENT]
    assert [event.delta for event in pieces] == ["to ", "be "]
    assert len({event.message_id for event in pieces}) == 1
    assert events[-1].outcome.type == "success"
    assert events[-1].result["data"] == {"words": 2}
    progress = [event.value for event in events if event.type == EventType.CUSTOM]
    assert progress, "how far it is, is told"


async def test_a_thread_is_a_conversation_and_a_run_runs_once(doors):
    """Runs of a thread share its state; the same run asked for again is the same execution."""
    thread_id, run_id = "a thread/with a name that no instance has", uuid.uuid4().hex
    ends = [
        (await events_of(doors, "talker", run_of("hi", thread_id=thread_id, run_id=run)))[-1].result["text"]
        for run in (run_id, run_id, "another")
    ]

    assert ends == ["heard 1", "heard 1", "heard 2"]


async def test_tools_and_state_have_events_of_their_own(doors):
    """What has no event of its own is CUSTOM; the text ends before it."""
    tool = {"name": "confirm", "description": "Asks.", "parameters": {"type": "object"}}
    events = await events_of(doors, "page", run_of("go", state={"seen": False}, tools=[tool]))

    assert kinds(events, without=()) == [
        EventType.RUN_STARTED,
        EventType.STATE_SNAPSHOT,
        EventType.STATE_DELTA,
        EventType.TEXT_MESSAGE_START,
        EventType.TEXT_MESSAGE_CONTENT,
        EventType.TEXT_MESSAGE_CONTENT,
        EventType.TEXT_MESSAGE_END,
        EventType.TOOL_CALL_START,
        EventType.TOOL_CALL_ARGS,
        EventType.TOOL_CALL_END,
        EventType.TOOL_CALL_RESULT,
        EventType.CUSTOM,
        EventType.RUN_FINISHED,
    ]
    assert events[1].snapshot == {"seen": False}
    assert events[10].content == "[1,2]"
    assert events[-1].result == {"tools": ["confirm"]}


async def test_an_agent_of_a_framework_answers_a_page_as_it_is(doors):
    """Its text and its tools' calls come as the framework tells them, and what it used with the end."""
    body = deploy_body("weather", HOSTED)
    body["agent_code"]["entrypoint"] = "weather"
    deployed = await asyncio.to_thread(doors.call, "POST", "/api/v1/agents/deploy", body)
    assert deployed.status_code == 201, deployed.text
    try:
        events = await events_of(doors, "weather", run_of("How is Ulm tomorrow?"))
    finally:
        removed = await asyncio.to_thread(doors.call, "DELETE", "/api/v1/agents/weather")
        assert removed.status_code == 200, removed.text

    told = kinds(events)
    assert told[0] == EventType.RUN_STARTED
    assert told.index(EventType.TOOL_CALL_START) < told.index(EventType.TOOL_CALL_RESULT)
    assert told.index(EventType.TOOL_CALL_RESULT) < told.index(EventType.TEXT_MESSAGE_START)
    text = "".join(event.delta for event in events if event.type == EventType.TEXT_MESSAGE_CONTENT)
    assert text == events[-1].result["text"] == '{"forecast":"sun"}'
    assert events[-1].usage[0].output_tokens > 0


async def test_a_failure_ends_the_run_with_an_error(doors):
    """With the agent's words."""
    events = await events_of(doors, "failing", run_of("go"))

    assert kinds(events) == [EventType.RUN_STARTED, EventType.RUN_ERROR]
    assert "no such thing" in events[-1].message
    assert events[-1].code == "failed"


async def test_who_leaves_cancels_the_run(doors):
    """A page has no other way to stop it."""
    run = run_of("stay")
    async with httpx.AsyncClient(headers=doors.headers, timeout=60) as http:
        async with http.stream("POST", f"{doors.url}/ag-ui/parked", json=run) as answer:
            assert answer.status_code == 200
            await anext(answer.aiter_lines())
        events = await events_of(doors, "parked", run)

    assert kinds(events)[-1] == EventType.RUN_FINISHED
    assert events[-1].outcome.type == "cancelled"


@pytest.mark.parametrize(
    ("agent_id", "changed", "status", "code"),
    [
        ("nobody", {}, 404, "agent-not-found"),
        ("talker", {"messages": []}, 422, "request-invalid"),
        ("talker", {"threadId": ""}, 422, "request-invalid"),
        ("talker", {"resume": [{"interruptId": "i", "status": "resolved"}]}, 422, "request-invalid"),
        (
            "talker",
            {"messages": [{"id": "1", "role": "user", "content": [{"type": "image"}]}]},
            422,
            "request-invalid",
        ),
    ],
)
def test_what_cannot_begin_is_refused_before_the_stream(doors, agent_id, changed, status, code):
    """With a status and a problem, as everywhere."""
    answer = doors.call("POST", f"/ag-ui/{agent_id}", run_of("hi") | changed)

    assert (answer.status_code, answer.json()["code"]) == (status, code)


def test_a_key_must_permit_it(doors):
    """No key, one that may not, and one of another tenant."""
    watcher, stranger = doors.made_key("acme", "agent:monitor"), doors.made_key("other", "agent:execute")
    for key, status in (("hr_none", 401), (watcher, 403), (stranger, 404)):
        headers = {"authorization": f"Bearer {key}"}
        answer = httpx.post(f"{doors.url}/ag-ui/talker", json=run_of("hi"), headers=headers, timeout=60)
        assert answer.status_code == status
