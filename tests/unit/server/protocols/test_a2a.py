"""The door of A2A in one process: cards, waiting, versions, what a message becomes."""

import asyncio

import msgspec
import pytest

from headrace.agents import Emitted, Execution
from headrace.config import ProtocolsConfig, ServerConfig
from headrace.errors import DatabaseUnavailable
from headrace.server.protocols import _WAIT
from headrace.server.protocols.a2a_objects import Message, TaskWords, context_of, input_of, task
from headrace.server.protocols.executions import Executions
from headrace.server.protocols.json_rpc import Refused
from tests.unit.server.protocols.profiles import profile

PARKED = "import asyncio\nasync def Agent(input, context): await asyncio.Event().wait()"


def message(*parts, **more):
    """A message as it comes over the wire."""
    sent = {"messageId": "m", "role": "ROLE_USER", "parts": parts or [{"text": "hi"}], **more}
    return msgspec.convert(sent, Message)


def execution(status="completed", output=None, **more):
    """An execution as it is answered."""
    output_json = None if output is None else msgspec.json.encode(output)
    return Execution(id="ctx.d", agent_id="a", version="1.0.0", status=status, output_json=output_json, **more)


@pytest.mark.parametrize(
    ("parts", "value"),
    [
        ([{"text": "one"}, {"text": "two"}], "one\ntwo"),
        ([{"data": {"n": 1}}], {"n": 1}),
        ([{"data": None}], None),
        (
            [{"text": "see"}, {"data": [1]}],
            {"parts": [{"text": "see"}, {"data": [1]}]},
        ),
    ],
)
def test_parts_become_the_input(parts, value):
    """Text is text, one value is itself, a mixture stays as it came."""
    assert input_of(message(*parts), profile()) == value


@pytest.mark.parametrize(
    ("parts", "code"),
    [
        ([{}], -32602),
        ([{"text": "a", "data": 1}], -32602),
        ([{"raw": "iVBO", "mediaType": "image/png"}], -32005),
        ([{"url": "https://x.example/a"}], -32005),
        ([{"text": "<p>", "mediaType": "text/html"}], -32005),
    ],
)
def test_parts_that_the_agent_does_not_read_are_refused(parts, code):
    """By the number of the specification, and not left out."""
    with pytest.raises(Refused) as caught:
        input_of(message(*parts), profile())
    assert caught.value.code == code


def test_an_agent_may_read_more():
    """It says so in its capabilities."""
    parts = [{"raw": "iVBO", "mediaType": "image/PNG", "filename": "a.png"}]
    assert input_of(message(*parts), profile(input_modes=["image/*"])) == {"parts": parts}


def test_a_task_is_known_by_agent_context_and_message():
    """Each of the three makes another task; the context stands before the last dot, whatever dots it has."""
    context, task_id = context_of(message(contextId="a.b"), "agent")

    assert (context, task_id.rpartition(".")[0]) == ("a.b", "a.b")
    assert context_of(message(contextId="a.b"), "agent")[1] == task_id
    others = [
        context_of(message(contextId="a.b"), "other")[1],
        context_of(message(contextId="a.c"), "agent")[1],
        context_of(message(contextId="a.b", messageId="n"), "agent")[1],
        context_of(message(), "agent")[1],
    ]
    assert len({task_id, *others}) == 5


@pytest.mark.parametrize("context", ["a b", "a/b", ".a", "x" * 96, "a\n"])
def test_a_context_that_no_instance_can_be_called_by_is_refused(context):
    """Rather than replaced by another."""
    with pytest.raises(Refused) as caught:
        context_of(message(contextId=context), "agent")
    assert caught.value.code == -32602


@pytest.mark.parametrize(
    ("status", "state"),
    [
        ("queued", "TASK_STATE_SUBMITTED"),
        ("running", "TASK_STATE_WORKING"),
        ("cancelling", "TASK_STATE_WORKING"),
        ("completed", "TASK_STATE_COMPLETED"),
        ("failed", "TASK_STATE_FAILED"),
        ("timeout", "TASK_STATE_FAILED"),
        ("interrupted", "TASK_STATE_FAILED"),
        ("cancelled", "TASK_STATE_CANCELED"),
    ],
)
def test_a_status_is_a_state(status, state):
    """Cancelled is only said of what has stopped; the status itself is in the metadata."""
    told = task(execution(status))
    assert (told["status"]["state"], told["metadata"]["executionStatus"]) == (state, status)


def test_outputs_become_artifacts():
    """A framework's answer is taken apart; nothing is no artifact."""
    answer = {"text": "done", "data": {"n": 1}, "usage": {"input_tokens": 1, "output_tokens": 2}}
    assert task(execution(output=answer))["artifacts"][0]["parts"] == [{"text": "done"}, {"data": {"n": 1}}]
    assert task(execution(output=[1]))["artifacts"][0]["parts"] == [{"data": [1]}]
    assert "artifacts" not in task(execution())


def test_an_attempt_begins_its_text_anew():
    """What a failed attempt wrote is replaced, not gone on with; what was missed is counted."""
    words = TaskWords(1, execution("running"))

    def told(event_id, dropped=0):
        data = msgspec.Raw(b'{"type":"text","text":"x"}')
        frame = words.said(Emitted(id=event_id, data=data, dropped=dropped))
        return msgspec.json.decode(frame.removeprefix(b"data: "))["result"]["artifactUpdate"]

    assert [told(1)["append"], told(2)["append"], told((1 << 32) + 1)["append"]] == [False, True, False]
    assert told((1 << 32) + 9, dropped=7)["metadata"] == {"droppedEvents": 7}


def test_a_stream_that_cannot_go_on_says_why():
    """As an error of the call; the task itself goes on."""
    frame = TaskWords("call", execution("running")).problem(DatabaseUnavailable("shard-0 is away."))
    told = msgspec.json.decode(frame.removeprefix(b"data: "))
    assert (told["id"], told["error"]["code"]) == ("call", -32603)


async def test_a_card_is_kept_until_it_changes(doors):
    """By its ETag; a new version is another card."""
    path = "/a2a/echo/.well-known/agent-card.json"
    first = await doors.client.get(path)
    again = await doors.client.get(path, headers={"if-none-match": first.headers["etag"]})
    await doors.deploy(source="async def Agent(input, context): return 2", version="2.0.0")
    changed = await doors.client.get(path, headers={"if-none-match": first.headers["etag"]})

    assert (first.status_code, again.status_code, changed.status_code) == (200, 304, 200)
    assert again.content == b""
    assert first.headers["cache-control"] == "private, max-age=60"
    assert (first.json()["version"], changed.json()["version"]) == ("1.0.0", "2.0.0")
    assert "securitySchemes" not in first.json(), "without a token nobody needs a key"


@pytest.mark.parametrize(
    ("url", "root_path", "expected"),
    [
        (None, "", "http://localhost/a2a/echo"),
        (None, "/agents", "http://localhost/agents/a2a/echo"),
        ("https://agents.example/", "", "https://agents.example/a2a/echo"),
    ],
)
async def test_a_card_says_where_its_agent_is(opened, url, root_path, expected):
    """As the request came in, or as the configuration says for a service behind a proxy."""
    protocols = ProtocolsConfig(a2a=True, url=url, a2a_root_agent="echo")
    async with opened(protocols=protocols, root_path=root_path) as doors:
        await doors.client.post(
            f"{root_path}/api/v1/agents/deploy",
            json={
                "agent_metadata": {"agent_id": "echo", "version": "1.0.0"},
                "agent_code": {"source_code": "YXN5bmMgZGVmIEFnZW50KGlucHV0LCBjb250ZXh0KTogcmV0dXJuIDE="},
            },
        )
        card = (await doors.client.get(f"{root_path}/.well-known/agent-card.json")).json()

    assert card["supportedInterfaces"] == [{"url": expected, "protocolBinding": "JSONRPC", "protocolVersion": "1.0"}]


async def test_who_waits_longer_than_a_request_may_gets_the_task_as_it_is(opened, monkeypatch):
    """Its id, to ask again with; and asking again in the same words is the same task."""
    monkeypatch.setattr("headrace.server.protocols._WAIT", 0.02)
    async with opened() as doors:
        await doors.deploy(source=PARKED)
        sent = {"message": {"messageId": "m", "role": "ROLE_USER", "parts": [{"text": "hi"}]}}
        at_once = {**sent, "configuration": {"returnImmediately": True}}
        begun = (await doors.a2a("SendMessage", at_once)).json()["result"]["task"]
        async with asyncio.timeout(60):
            while begun["status"]["state"] != "TASK_STATE_WORKING":
                await asyncio.sleep(0.01)
                begun = (await doors.a2a("GetTask", {"id": begun["id"]})).json()["result"]
        first = (await doors.a2a("SendMessage", sent)).json()["result"]["task"]
        again = (await doors.a2a("SendMessage", sent)).json()["result"]["task"]
        cancelled = (await doors.a2a("CancelTask", {"id": first["id"]})).json()["result"]

    assert first["status"]["state"] == "TASK_STATE_WORKING"
    assert again["id"] == first["id"] == cancelled["id"]


async def test_what_a_task_took_to_begin_is_no_longer_waited_for(doors, monkeypatch):
    """A database that is slow to write it down does not make of its answer a timeout of the request."""
    host, told = doors.headrace.rooms.agents, []
    submit = host.submit

    async def submit_slowly(*values, **more):
        await asyncio.sleep(0.2)
        return await submit(*values, **more)

    async def end_of(_executions, execution, *, within_s):
        told.append(within_s)
        return execution

    monkeypatch.setattr(host, "submit", submit_slowly)
    monkeypatch.setattr(Executions, "end_of", end_of)
    sent = {"message": {"messageId": "m", "role": "ROLE_USER", "parts": [{"text": "hi"}]}}
    await doors.a2a("SendMessage", sent)

    (within_s,) = told
    assert 0 < within_s <= _WAIT * ServerConfig().request_timeout_s - 0.19


async def test_a_message_that_was_answered_is_streamed_as_its_task(doors, frames):
    """Sent again to be streamed, it is not run again: the stream is the finished task and nothing else."""
    sent = {"message": {"messageId": "m", "role": "ROLE_USER", "parts": [{"text": "hi"}]}}
    first = (await doors.a2a("SendMessage", sent)).json()["result"]["task"]
    told = frames(await doors.a2a("SendStreamingMessage", sent))

    assert [each["result"] for each in told] == [{"task": first}]
    assert doors.headrace.rooms.agents.started == 1


@pytest.mark.parametrize(
    ("method", "code"),
    [
        ("message/send", -32601),
        ("ListTasks", -32004),
        ("GetExtendedAgentCard", -32004),
        ("CreateTaskPushNotificationConfig", -32003),
        ("DeleteTaskPushNotificationConfig", -32003),
    ],
)
async def test_what_is_not_done_has_its_number(doors, method, code):
    """Methods of 0.3 are unknown, optional ones unsupported."""
    told = (await doors.a2a(method, {})).json()
    assert (told["id"], told["error"]["code"]) == (7, code)


async def test_a_push_notification_is_refused_with_its_message(doors):
    """Nothing runs for a client that would wait for a call that never comes."""
    sent = {
        "message": {"messageId": "m", "role": "ROLE_USER", "parts": [{"text": "hi"}]},
        "configuration": {"taskPushNotificationConfig": {"url": "https://client.example"}},
    }
    assert (await doors.a2a("SendMessage", sent)).json()["error"]["code"] == -32003
    assert doors.headrace.rooms.agents.started == 0


@pytest.mark.parametrize(
    ("said", "is_spoken"), [("1.0", True), ("1.0.1", True), ("1.1", False), ("", False), ("0.3", False)]
)
async def test_the_version_is_in_the_header_or_in_the_query(doors, said, is_spoken):
    """Patches do not count; nothing said is 0.3."""
    in_header = await doors.a2a("GetTask", {"id": "x"}, **{"A2A-Version": said})
    body = {"jsonrpc": "2.0", "id": 7, "method": "GetTask", "params": {"id": "x"}}
    in_query = await doors.client.post(f"/a2a/echo?A2A-Version={said}", json=body)

    expected = -32001 if is_spoken else -32009
    assert [answer.json()["error"]["code"] for answer in (in_header, in_query)] == [expected, expected]
