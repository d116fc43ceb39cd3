"""A2A as its own SDK speaks it, with a service of two workers."""

import asyncio
import uuid
from contextlib import asynccontextmanager

import httpx
import pytest
from a2a.client import (
    A2ACardResolver,
    A2AClientError,
    AuthInterceptor,
    ClientCallContext,
    ClientConfig,
    ClientFactory,
    InMemoryContextCredentialStore,
)
from a2a.types import (
    CancelTaskRequest,
    GetTaskRequest,
    ListTasksRequest,
    Message,
    Part,
    Role,
    SendMessageConfiguration,
    SendMessageRequest,
    SubscribeToTaskRequest,
    TaskState,
)
from a2a.utils.errors import (
    A2AError,
    ContentTypeNotSupportedError,
    InvalidParamsError,
    TaskNotCancelableError,
    TaskNotFoundError,
    UnsupportedOperationError,
    VersionNotSupportedError,
)
from google.protobuf.json_format import MessageToDict, ParseDict

STATES = {
    state: getattr(TaskState, f"TASK_STATE_{state.upper()}")
    for state in ("submitted", "working", "completed", "failed", "canceled")
}


def request(*parts, message_id=None, at_once=False, **more):
    """A message to send."""
    message = Message(message_id=message_id or uuid.uuid4().hex, role=Role.ROLE_USER, parts=parts, **more)
    return SendMessageRequest(message=message, configuration=SendMessageConfiguration(return_immediately=at_once))


def text(words):
    """A part of text."""
    return Part(text=words)


def data(value):
    """A part of data."""
    return ParseDict({"data": value}, Part())


@asynccontextmanager
async def client_of(doors, agent_id, *, streaming=True, key=None):
    """The SDK's client of an agent, made from the agent's card."""
    headers = {"authorization": f"Bearer {key or doors.key}"}
    async with httpx.AsyncClient(headers=headers, timeout=60) as http:
        card = await A2ACardResolver(http, f"{doors.url}/a2a/{agent_id}").get_agent_card()
        factory = ClientFactory(ClientConfig(streaming=streaming, httpx_client=http))
        yield factory.create(card)


async def all_of(stream):
    """Everything that a stream brings."""
    return [each async for each in stream]


async def answered(client, sent):
    """The task that a message that is waited for became."""
    (only,) = await all_of(client.send_message(sent))
    return only.task


async def test_the_card_says_how_to_come_in(doors):
    """The SDK reads it below the agent's URL; the root holds the one that the configuration names."""
    async with httpx.AsyncClient(headers=doors.headers, timeout=60) as http:
        card = await A2ACardResolver(http, f"{doors.url}/a2a/adder").get_agent_card()
        root = await A2ACardResolver(http, doors.url).get_agent_card()
        listed = (await http.get(f"{doors.url}/a2a")).json()

    assert (card.name, card.version, card.description) == ("adder", "1.0.0", "Adds two numbers.")
    assert card.supported_interfaces[0].url == f"{doors.url}/a2a/adder"
    assert card.security_schemes["headrace"].http_auth_security_scheme.scheme == "Bearer"
    assert card.capabilities.streaming
    assert not card.capabilities.push_notifications
    assert [skill.id for skill in card.skills] == ["add"]
    assert root.name == "talker"
    assert [entry["agentId"] for entry in listed["agents"]] == [
        "adder",
        "failing",
        "page",
        "parked",
        "talker",
        "witness",
    ]
    assert listed["agents"][0]["card"] == f"{doors.url}/a2a/adder/.well-known/agent-card.json"


async def test_the_key_goes_where_the_card_says(doors):
    """A client that knows nothing but the card and a credential for its scheme gets in."""
    async with httpx.AsyncClient(timeout=60) as http:
        resolver = A2ACardResolver(http, f"{doors.url}/a2a/adder")
        card = await resolver.get_agent_card(http_kwargs={"headers": doors.headers})
        credentials = InMemoryContextCredentialStore()
        await credentials.set_credentials("session", "headrace", doors.key)
        factory = ClientFactory(ClientConfig(streaming=False, httpx_client=http))
        client = factory.create(card, interceptors=[AuthInterceptor(credentials)])
        context = ClientCallContext(state={"sessionId": "session"})
        (told,) = await all_of(client.send_message(request(data({"a": 1, "b": 1})), context=context))
        with pytest.raises(A2AClientError, match="401"):
            await answered(client, request(data({"a": 1, "b": 1})))

    assert told.task.status.state == STATES["completed"]


async def test_a_message_becomes_a_task_with_its_output(doors):
    """Data in, data out; the client that waits gets the end."""
    async with client_of(doors, "adder", streaming=False) as client:
        task = await answered(client, request(data({"a": 1, "b": 2.5})))

    assert task.status.state == STATES["completed"]
    assert MessageToDict(task.artifacts[0].parts[0].data) == {"sum": 3.5}
    assert task.id.startswith(task.context_id)


async def test_the_same_message_twice_is_one_task(doors):
    """By its messageId; with other words it is refused, and the agent has run once."""
    message_id = uuid.uuid4().hex
    async with client_of(doors, "talker", streaming=False) as client:
        first, second = await asyncio.gather(
            *(answered(client, request(text("hello"), message_id=message_id)) for _ in range(2))
        )
        with pytest.raises(InvalidParamsError):
            await answered(client, request(text("something else"), message_id=message_id))

    assert first.id == second.id
    assert first.artifacts == second.artifacts
    assert first.artifacts[0].parts[0].text == "heard 1"


async def test_a_context_is_a_conversation(doors):
    """Messages that name the context of a task before them share the agent's state with it."""
    async with client_of(doors, "talker", streaming=False) as client:
        first = await answered(client, request(text("one")))
        second = await answered(client, request(text("two"), context_id=first.context_id))
        other = await answered(client, request(text("three")))

    assert second.context_id == first.context_id
    assert second.id != first.id
    assert [task.artifacts[0].parts[0].text for task in (first, second, other)] == ["heard 1", "heard 2", "heard 1"]


async def test_a_stream_tells_the_task_its_words_and_its_end(doors, tmp_path):
    """The task first, then text as it is written, then the whole output in its place and the final state."""
    told, end = [], tmp_path / "end"
    async with client_of(doors, "talker") as client:
        async for each in client.send_message(request(text(f"to be or until:{end}"))):
            told.append(each)
            if each.HasField("status_update") and each.status_update.status.message.parts:
                end.touch()

    assert told[0].task.status.state == STATES["submitted"]
    artifacts = [each.artifact_update for each in told if each.HasField("artifact_update")]
    assert [update.artifact.parts[0].text for update in artifacts[:-1]] == ["to ", "be ", "or "]
    assert [update.append for update in artifacts] == [False, True, True, False]
    assert artifacts[-1].last_chunk
    assert artifacts[-1].artifact.parts[0].text == "heard 1"
    assert {update.artifact.artifact_id for update in artifacts} == {"output"}
    states = [each.status_update.status.state for each in told if each.HasField("status_update")]
    assert states[-1] == STATES["completed"]
    assert STATES["working"] in states
    notes = [
        each.status_update.status.message.parts[0].text
        for each in told[:-1]
        if each.HasField("status_update") and each.status_update.status.message.parts
    ]
    assert notes, "progress is told"


async def test_a_task_that_was_left_goes_on_and_is_told_again(doors, tmp_path):
    """Closing a stream closes nothing else: whoever subscribes gets the task, and its end."""
    told, end = [], tmp_path / "end"
    async with client_of(doors, "talker") as client:
        stream = client.send_message(request(text(f"a b c d e until:{end}")))
        task = (await anext(stream)).task
        await stream.aclose()
        async for each in client.subscribe(SubscribeToTaskRequest(id=task.id)):
            told.append(each)
            end.touch()
        ended = await client.get_task(GetTaskRequest(id=task.id))
        with pytest.raises(UnsupportedOperationError):
            await all_of(client.subscribe(SubscribeToTaskRequest(id=task.id)))

    assert told[0].task.id == task.id
    assert told[-1].status_update.status.state == STATES["completed"]
    assert ended.status.state == STATES["completed"]
    assert [part.text for each in told[:-2] for part in each.artifact_update.artifact.parts] == [
        "a ",
        "b ",
        "c ",
        "d ",
        "e ",
    ]


async def test_a_task_is_cancelled_once(doors):
    """It has stopped, or is about to; a second time it cannot be."""
    async with client_of(doors, "parked", streaming=False) as client:
        task = await answered(client, request(text("stay"), at_once=True))
        assert task.status.state in {STATES["submitted"], STATES["working"]}
        await doors.status_becomes("parked", task.id, "running")
        await client.cancel_task(CancelTaskRequest(id=task.id))
        await doors.status_becomes("parked", task.id, "cancelled")
        with pytest.raises(TaskNotCancelableError):
            await client.cancel_task(CancelTaskRequest(id=task.id))
        assert (await client.get_task(GetTaskRequest(id=task.id))).status.state == STATES["canceled"]


async def test_a_failure_says_why(doors):
    """The task has failed, with the agent's words."""
    async with client_of(doors, "failing", streaming=False) as client:
        task = await answered(client, request(text("go")))

    assert task.status.state == STATES["failed"]
    assert "no such thing" in task.status.message.parts[0].text


async def test_errors_have_the_numbers_of_the_specification(doors):
    """The SDK raises what each of them stands for."""
    async with client_of(doors, "talker", streaming=False) as client:
        task = await answered(client, request(text("hi")))
        for wrong, sent in (
            (TaskNotFoundError, request(text("x"), task_id="nobody")),
            (UnsupportedOperationError, request(text("x"), task_id=task.id)),
            (InvalidParamsError, request(text("x"), task_id=task.id, context_id="another")),
            (InvalidParamsError, request(text("x"), context_id="no instance/can be called so")),
            (InvalidParamsError, request()),
            (ContentTypeNotSupportedError, request(Part(raw=b"\x89PNG", media_type="image/png"))),
        ):
            with pytest.raises(wrong):
                await answered(client, sent)
        with pytest.raises(TaskNotFoundError):
            await client.get_task(GetTaskRequest(id="../../etc/passwd"))
        with pytest.raises(UnsupportedOperationError):
            await client.list_tasks(ListTasksRequest())


async def test_another_version_is_refused(doors):
    """No header means 0.3, which is another protocol."""
    async with client_of(doors, "talker", streaming=False) as client:
        client._transport.httpx_client.headers["A2A-Version"] = "0.3"
        with pytest.raises(VersionNotSupportedError):
            await client.get_task(GetTaskRequest(id="any"))


async def test_a_task_of_another_tenant_is_not_there(doors):
    """Nor is the agent; and a key that may not execute does not get past the gate."""
    stranger = await asyncio.to_thread(doors.made_key, "other", "agent:execute")
    watcher = await asyncio.to_thread(doors.made_key, "acme", "agent:monitor")
    async with client_of(doors, "adder", streaming=False) as client:
        task = await answered(client, request(data({"a": 1, "b": 2})))
        for key, status in ((stranger, 404), (watcher, 403), ("hr_none", 401)):
            client._transport.httpx_client.headers["authorization"] = f"Bearer {key}"
            with pytest.raises((A2AClientError, A2AError)) as caught:
                await client.get_task(GetTaskRequest(id=task.id))
            if status == 404:
                assert isinstance(caught.value, TaskNotFoundError)
            else:
                assert str(status) in str(caught.value)
    answer = await asyncio.to_thread(
        httpx.get,
        f"{doors.url}/a2a/adder/.well-known/agent-card.json",
        headers={"authorization": f"Bearer {stranger}"},
        timeout=60,
    )
    assert answer.status_code == 404
