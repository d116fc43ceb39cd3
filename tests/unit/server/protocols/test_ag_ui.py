"""The door of AG-UI in one process: what a run's words become, validated by the protocol's own package."""

import msgspec
import pytest
from ag_ui.core import Event, EventType
from pydantic import TypeAdapter

from headrace.agents import Emitted, Execution, Progress
from headrace.errors import DatabaseUnavailable, InvalidRequest
from headrace.server.protocols.ag_ui_events import RunAgentInput, RunWords, input_of

EVENTS = TypeAdapter(Event)


def run(**more):
    """What a page sends."""
    user = {"id": "m", "role": "user", "content": "hi"}
    return msgspec.convert({"threadId": "t", "runId": "r", "messages": [user], **more}, RunAgentInput)


def execution(status="completed", output=None, **more):
    """An execution as it is answered."""
    output_json = None if output is None else msgspec.json.encode(output)
    return Execution(id="e", agent_id="a", version="1.0.0", status=status, output_json=output_json, **more)


def read(frames):
    """The events of some frames, each validated."""
    return [EVENTS.validate_json(each.removeprefix(b"data: ")) for each in frames.split(b"\n\n") if each]


def said(words, *values, first=1, dropped=0):
    """The events that emitted values become."""
    found = b""
    for number, value in enumerate(values, first):
        found += words.said(Emitted(id=number, data=msgspec.Raw(msgspec.json.encode(value)), dropped=dropped))
    return read(found)


def kinds(events):
    """Their types."""
    return [str(event.type.value) for event in events]


@pytest.mark.parametrize(
    ("value", "kind"),
    [
        ({"type": "text", "text": 1}, "CUSTOM"),
        ({"type": "tool_call", "id": "c"}, "CUSTOM"),
        ({"type": "state", "state": None}, "STATE_SNAPSHOT"),
        ({"type": "state"}, "CUSTOM"),
        ({"type": "state_delta", "delta": []}, "STATE_DELTA"),
        ({"type": "state_delta", "delta": [{"op": "move", "from": "/a~0b", "path": ""}]}, "STATE_DELTA"),
        ({"type": "state_delta", "delta": [{"op": "add", "path": "/a"}]}, "CUSTOM"),
        ({"type": "state_delta", "delta": [{"op": "add", "path": "a", "value": 1}]}, "CUSTOM"),
        ({"type": "state_delta", "delta": [{"op": "add", "path": "/a~2", "value": 1}]}, "CUSTOM"),
        ({"type": "state_delta", "delta": [{"op": "copy", "path": "/a", "from": 1}]}, "CUSTOM"),
        ({"type": "state_delta", "delta": [{"op": ["add"], "path": "/a"}]}, "CUSTOM"),
        ({"type": "state_delta", "delta": [1]}, "CUSTOM"),
        ({"type": "RUN_FINISHED"}, "CUSTOM"),
        ("words", "CUSTOM"),
        (None, "CUSTOM"),
    ],
    ids=str,
)
def test_what_would_break_a_page_is_custom(value, kind):
    """Only what has the whole shape of an event becomes one; an agent cannot end its run by a word."""
    assert kinds(said(RunWords(run()), value)) == [kind]


def test_a_text_ends_before_anything_else():
    """And another begins after it."""
    call = {"type": "tool_call", "id": None, "name": "search"}
    result = {"type": "tool_result", "id": None, "name": "search"}
    events = said(RunWords(run()), {"type": "text", "text": "a"}, call, result, {"type": "text", "text": "b"})

    assert kinds(events) == [
        "TEXT_MESSAGE_START",
        "TEXT_MESSAGE_CONTENT",
        "TEXT_MESSAGE_END",
        "TOOL_CALL_START",
        "TOOL_CALL_END",
        "TOOL_CALL_RESULT",
        "TEXT_MESSAGE_START",
        "TEXT_MESSAGE_CONTENT",
    ]
    assert events[3].tool_call_id == events[5].tool_call_id
    assert events[0].message_id != events[6].message_id


def test_another_attempt_is_another_message():
    """What a failed attempt wrote stays as it is; what was missed is told."""
    words = RunWords(run())
    said(words, {"type": "text", "text": "a"})
    events = said(words, {"type": "text", "text": "a"}, first=(1 << 32) + 3, dropped=2)

    assert kinds(events) == ["CUSTOM", "TEXT_MESSAGE_END", "TEXT_MESSAGE_START", "TEXT_MESSAGE_CONTENT"]
    assert (events[0].name, events[0].value) == ("headrace.dropped", {"count": 2})


@pytest.mark.parametrize(
    ("output", "expected"),
    [
        ("done", ["TEXT_MESSAGE_START", "TEXT_MESSAGE_CONTENT", "TEXT_MESSAGE_END", "RUN_FINISHED"]),
        ({"n": 1}, ["RUN_FINISHED"]),
        (None, ["RUN_FINISHED"]),
        ("", ["RUN_FINISHED"]),
    ],
    ids=str,
)
def test_text_that_was_not_told_is_told_at_the_end(output, expected):
    """A page shows messages; the result is for programs."""
    events = read(RunWords(run()).end(execution(output=output)))

    assert kinds(events) == expected
    assert events[-1].result == output


def test_text_that_was_told_is_not_told_again():
    """The message ends, and the run."""
    words = RunWords(run())
    said(words, {"type": "text", "text": "done"})
    events = read(words.end(execution(output={"text": "done", "data": None, "usage": {"input_tokens": 3}})))

    assert kinds(events) == ["TEXT_MESSAGE_END", "RUN_FINISHED"]
    assert (events[-1].usage[0].input_tokens, events[-1].usage[0].output_tokens) == (3, 0)


@pytest.mark.parametrize("status", ["failed", "timeout", "interrupted"])
def test_what_failed_is_an_error(status):
    """Its code is the status; an open message ends before it."""
    words = RunWords(run())
    said(words, {"type": "text", "text": "a"})
    events = read(words.end(execution(status, error="because")))

    assert kinds(events) == ["TEXT_MESSAGE_END", "RUN_ERROR"]
    assert (events[-1].message, events[-1].code) == ("because", status)


def test_a_cancelled_run_did_not_fail():
    """Nor did it succeed."""
    (event,) = read(RunWords(run()).end(execution("cancelled", error="It was cancelled.")))
    assert (event.type, event.outcome.type) == (EventType.RUN_FINISHED, "cancelled")


def test_a_stream_that_cannot_go_on_is_an_error():
    """With the code that programs know."""
    (event,) = read(RunWords(run()).problem(DatabaseUnavailable("shard-0 is away.")))
    assert (event.message, event.code) == ("shard-0 is away.", "database-unavailable")


def test_the_opening_names_the_run():
    """And the one that began it; progress is told as it is."""
    (event,) = read(RunWords(run(parentRunId="p")).opening())
    (progress,) = read(RunWords(run()).seen(execution("running", progress=Progress(1, 2, "half"))))

    assert (event.thread_id, event.run_id, event.parent_run_id, event.protocol_version) == ("t", "r", "p", "1.0")
    assert progress.value == {"done": 1, "total": 2, "note": "half"}


def test_an_agent_reads_the_prompt_or_the_whole_run():
    """As it says in its capabilities."""
    tool = {"name": "confirm", "description": "", "parameters": {}}
    page = run(state={"a": 1}, tools=[tool], forwardedProps={"x": 1})

    assert input_of(page, "prompt") == {"prompt": "hi", "stream": True}
    whole = input_of(page, "run")
    assert (whole["state"], whole["tools"], whole["context"]) == ({"a": 1}, [tool], [])
    parts = [{"type": "text", "text": "one"}, {"type": "text", "text": "two"}]
    assert input_of(run(messages=[{"role": "user", "content": parts}]), "prompt")["prompt"] == "one\ntwo"


@pytest.mark.parametrize(
    "messages",
    [
        [],
        [{"role": "assistant", "content": "hi"}],
        [{"role": "user"}],
        [{"role": "user", "content": []}],
        [{"role": "user", "content": [{"type": "text", "text": "see"}, {"type": "image"}]}],
        [{"role": "user", "content": [{"type": "text"}]}],
    ],
    ids=str,
)
def test_what_a_prompt_would_lose_is_refused(messages):
    """Rather than left out."""
    with pytest.raises(InvalidRequest):
        input_of(run(messages=messages), "prompt")


def test_a_run_is_one_execution_and_a_thread_one_instance():
    """Whatever they are called: names that are no ids become some."""
    ids = {
        run().execution_id("a"),
        run(threadId="u").execution_id("a"),
        run(runId="s").execution_id("a"),
        run().execution_id("b"),
    }
    assert len(ids) == 4
    assert run().execution_id("a") == run(messages=[]).execution_id("a")
    assert run().instance == "t"
    assert run(threadId="a thread").instance != run(threadId="a  thread").instance
