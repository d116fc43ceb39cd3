"""What holds for every door: it is closed until it is opened, and behind it are the same limits as elsewhere."""

import asyncio

import httpx
import pytest

from headrace.agents import AgentsConfig, TenantConfig, TierConfig
from headrace.config import Config, ProtocolsConfig, ServerConfig
from headrace.errors import ConfigError
from headrace.server import Headrace
from headrace.server.caller import PERMISSIONS
from headrace.server.protocols import protocol_operations

MESSAGE = {"messageId": "m1", "role": "ROLE_USER", "parts": [{"text": "hi"}]}
CALL = {"name": "echo", "arguments": {"input": "hi"}}
ONE = AgentsConfig(
    tiers=(TierConfig(name="one", executions_max=10, rate_per_s=0.001, burst=1),),
    tenants=(TenantConfig(name="default", tier="one"),),
)


async def send(doors, number=1):
    """The same work by each protocol."""
    return [
        await doors.a2a("SendMessage", {"message": MESSAGE | {"messageId": f"m{number}"}}),
        await doors.mcp("tools/call", CALL),
        await doors.ag_ui("hi", runId=f"r{number}"),
    ]


def paths(protocols):
    """The paths that a configuration opens."""
    headrace = Headrace(Config(protocols=protocols))
    return {operation.path for operation in headrace.operations()} - {
        operation.path for operation in Headrace(Config()).operations()
    }


def test_doors_are_closed_until_they_are_opened_one_by_one():
    """An application behind the service may have these paths itself."""
    assert paths(ProtocolsConfig()) == set()
    assert paths(ProtocolsConfig(mcp=True)) == {"/mcp"}
    assert paths(ProtocolsConfig(ag_ui=True)) == {"/ag-ui/{agent_id}"}
    a2a = {"/a2a", "/a2a/{agent_id}", "/a2a/{agent_id}/.well-known/agent-card.json"}
    assert paths(ProtocolsConfig(a2a=True)) == a2a
    assert paths(ProtocolsConfig(a2a=True, a2a_root_agent="x")) == a2a | {"/.well-known/agent-card.json"}


async def test_every_operation_of_a_door_is_behind_a_permission():
    """None is public, and each is for those who may execute."""
    headrace = Headrace(Config(protocols=ProtocolsConfig(a2a=True, mcp=True, ag_ui=True, a2a_root_agent="x")))
    rooms = headrace.rooms
    operations = protocol_operations(rooms.agents, headrace._streams, headrace.config)

    assert len(operations) == 6
    assert {operation.permission for operation in operations} == {"agent:execute"}
    assert "agent:execute" in PERMISSIONS


async def test_doors_are_described_with_the_rest(opened):
    """The document has each open door, with names of its own."""
    async with opened() as doors:
        document = (await doors.client.get("/openapi.json")).json()

    names = [operation["operationId"] for path in document["paths"].values() for operation in path.values()]
    assert len(names) == len(set(names))
    assert {"a2aCall", "a2aCard", "a2aAgents", "mcpCall", "agUiRun"} <= set(names)


async def test_too_much_is_refused_with_when_to_come_back(opened):
    """A tenant's rate holds at each door: 429 and Retry-After, in the protocol's own form."""
    async with opened(agents=ONE) as doors:
        await doors.deploy()
        assert (await doors.a2a("SendMessage", {"message": MESSAGE})).json()["result"]["task"]
        a2a, mcp, ag_ui = await send(doors, 2)

    assert {answer.status_code for answer in (a2a, mcp, ag_ui)} == {429}
    assert all(int(answer.headers["retry-after"]) > 0 for answer in (a2a, mcp, ag_ui))
    told = a2a.json()["error"]
    assert (told["code"], told["data"][0]["reason"]) == (-32603, "RATE_LIMITED")
    assert told["data"][1]["retryDelay"] == f"{a2a.headers['retry-after']}s"
    told = mcp.json()["error"]
    assert (told["code"], told["data"]["code"]) == (-32603, "rate-limited")
    assert ag_ui.json()["code"] == "rate-limited"


async def test_streams_are_bounded(doors):
    """Every door takes its streams from the same number; a server that ends takes none."""
    await doors.headrace.drain()

    _, mcp, ag_ui = await send(doors)
    a2a = await doors.a2a("SendStreamingMessage", {"message": MESSAGE | {"messageId": "streamed"}})

    assert {answer.status_code for answer in (a2a, mcp, ag_ui)} == {503}
    assert {answer.headers["retry-after"] for answer in (a2a, mcp, ag_ui)} == {"1"}
    assert doors.headrace.rooms.agents.started == 1, "only the call without a stream began"


async def at_each_door(doors, content, media_type="application/json"):
    """The answers to the same body."""
    headers = {"content-type": media_type, "A2A-Version": "1.0"}
    paths = ("/a2a/echo", "/mcp", "/ag-ui/echo")
    return [await doors.client.post(path, content=content, headers=headers) for path in paths]


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"null",
        b"{}",
        b"[{}]",
        b"{" * 100_000,
        b"[" * 100_000 + b"]" * 100_000,
        b'{"jsonrpc":"2.0","id":1,"method":"x","params":' + b"[" * 50_000 + b"]" * 50_000 + b"}",
        b'{"jsonrpc":"2.0","id":1,"method":"\xff"}',
        b'{"jsonrpc":"2.0","id":1,"method":"\\ud800"}',
        b'{"jsonrpc":"2.0","id":true,"method":"x"}',
    ],
    ids=["nothing", "null", "empty", "batch", "unclosed", "deep", "deep params", "not utf-8", "surrogate", "true id"],
)
async def test_no_body_is_too_strange_to_be_refused(doors, content):
    """As the caller's mistake: A2A says so in a 200, as its clients read it, MCP in a 400, AG-UI in a problem."""
    a2a, mcp, ag_ui = await at_each_door(doors, content)

    assert [answer.status_code for answer in (a2a, mcp, ag_ui)] == [200, 400, 422]
    assert a2a.json()["error"]["code"] in {-32700, -32600}
    assert mcp.json()["error"]["code"] == a2a.json()["error"]["code"]
    assert ag_ui.json()["code"] == "request-invalid"


async def test_a_body_is_bounded_and_says_that_it_is_json(doors):
    """Before anything of it is decoded."""
    large = await at_each_door(doors, b'{"x": "' + b"y" * 3_000_000 + b'"}')
    plain = await at_each_door(doors, b"{}", "text/plain")

    assert [answer.status_code for answer in large] == [413, 413, 413]
    assert [answer.status_code for answer in plain] == [415, 415, 415]
    assert [answer.json()["error"]["code"] for answer in (*large[:2], *plain[:2])] == [-32600] * 4


async def test_a_name_that_was_pointed_at_this_machine_is_refused(opened):
    """Without a token the service is local, and no page of another name reaches its doors (DNS rebinding)."""
    async with opened(base_url="http://rebound.example") as doors:
        headers = {"origin": "http://rebound.example"}
        for path in ("/a2a/echo", "/mcp", "/ag-ui/echo"):
            answer = await doors.client.post(path, json={}, headers=headers)
            assert answer.status_code in {403, 421}
            answer = await doors.client.post(path, json={}, headers={"origin": "http://evil.example"})
            assert answer.status_code == 403


async def test_tenants_do_not_meet_at_a_door(opened):
    """The same ids at the same agent's name, with another's key: nothing is found, nothing is listed."""
    token = "a token of more than sixteen characters"
    async with opened(server=ServerConfig(token=token), base_url="http://service.example") as doors:
        keys = [(await doors.headrace.keys.create(tenant, sorted(PERMISSIONS - {"key:manage"})))[1] for tenant in "ab"]
        mine, theirs = ({"authorization": f"Bearer {key}"} for key in keys)
        doors.client.headers = httpx.Headers(mine)
        await doors.deploy()
        task = (await doors.a2a("SendMessage", {"message": MESSAGE})).json()["result"]["task"]
        doors.client.headers = httpx.Headers(theirs)
        a2a, mcp, ag_ui = await send(doors)
        got = await doors.a2a("GetTask", {"id": task["id"]})
        listed = (await doors.client.get("/a2a")).json(), (await doors.mcp("tools/list", {})).json()

    assert (a2a.status_code, ag_ui.status_code) == (404, 404)
    assert mcp.json()["error"]["code"] == -32602
    assert got.json()["error"]["code"] == -32001
    assert listed[0]["total"] == 0
    assert listed[1]["result"]["tools"] == []


def test_an_address_that_nobody_could_follow_is_refused():
    """Cards would carry it to every client."""
    with pytest.raises(ConfigError, match=r"protocols\.url"):
        ProtocolsConfig(url="agents.example")


async def test_streams_end_when_their_executions_do_and_leave_nothing(doors):
    """Ten at once at each door, all ended, none still counted."""
    answers = await asyncio.gather(*(send(doors, number) for number in range(10)))

    assert {answer.status_code for three in answers for answer in three} == {200}
    assert len(doors.headrace._streams) == 0
