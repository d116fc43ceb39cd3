"""MCP as its own SDK speaks it, in its newest revision and the one before, with a service of two workers."""

import asyncio
from contextlib import asynccontextmanager

import httpx
import httpx2
import mcp_types
import pytest
from mcp.client.client import Client
from mcp.client.streamable_http import streamable_http_client
from mcp.shared.exceptions import MCPError

MODERN, LEGACY = "2026-07-28", "2025-11-25"


@asynccontextmanager
async def client_of(doors, *, mode="auto", key=None):
    """The SDK's client of the service."""
    headers = {"authorization": f"Bearer {key or doors.key}"}
    async with httpx2.AsyncClient(headers=headers, timeout=60) as http:
        transport = streamable_http_client(f"{doors.url}/mcp", http_client=http)
        async with Client(transport, mode=mode) as client:
            yield client


both = pytest.mark.parametrize("mode", ["auto", "legacy"])


def post(doors, body, headers=None, *, key=None):
    """A request that no SDK would send."""
    accept = {"accept": "application/json, text/event-stream", "authorization": f"Bearer {key or doors.key}"}
    return httpx.post(f"{doors.url}/mcp", json=body, headers=accept | (headers or {}), timeout=60)


def modern(method, name=None, **params):
    """A whole request of the modern revision, and its headers."""
    prefix = "io.modelcontextprotocol/"
    params["_meta"] = {f"{prefix}protocolVersion": MODERN, f"{prefix}clientCapabilities": {}}
    headers = {"mcp-protocol-version": MODERN, "mcp-method": method}
    if name is not None:
        headers["mcp-name"] = params["name"] = name
    return {"jsonrpc": "2.0", "id": 1, "method": method, "params": params}, headers


@pytest.mark.parametrize(("mode", "version"), [("auto", MODERN), ("legacy", LEGACY)])
async def test_a_client_of_each_era_gets_in(doors, mode, version):
    """One asks what there is, the other begins with `initialize`; both learn who answers."""
    async with client_of(doors, mode=mode) as client:
        assert client.protocol_version == version
        assert client.server_info.name == "headrace"
        assert client.server_capabilities.tools is not None


@both
async def test_agents_are_tools(doors, mode):
    """With the schemas that they declare; those that declare none take any input."""
    async with client_of(doors, mode=mode) as client:
        tools = {tool.name: tool for tool in (await client.list_tools()).tools}

        assert list(tools) == ["adder", "failing", "page", "parked", "talker", "witness"]
        assert tools["adder"].description == "Adds two numbers."
        assert tools["adder"].input_schema["required"] == ["a", "b"]
        assert tools["adder"].output_schema["required"] == ["sum"]
        assert tools["talker"].input_schema["required"] == ["input"]
        assert tools["talker"].output_schema is None


@both
async def test_a_call_is_an_execution(doors, mode):
    """Its output is what the client's own validation of the schema expects."""
    async with client_of(doors, mode=mode) as client:
        await client.list_tools()
        result = await client.call_tool("adder", {"a": 2, "b": 3})

        assert not result.is_error
        assert result.structured_content == {"sum": 5}
        assert result.content[0].text == '{"sum":5}'


@both
async def test_progress_is_told_where_it_is_asked_for(doors, mode, tmp_path):
    """Each number is above the one before it; the agent goes on only when the one before it was told."""
    async with client_of(doors, mode=mode) as client:
        told = []

        async def progress(done, total, message):
            told.append((done, total, message))
            (tmp_path / str(int(done))).touch()

        await client.call_tool("adder", {"a": 1, "b": 1, "signs": str(tmp_path)}, progress_callback=progress)

        assert told == [(1, 3, "step 1"), (2, 3, "step 2"), (3, 3, "step 3")]


@both
async def test_a_failure_is_a_result_that_the_model_sees(doors, mode):
    """Not an error of the protocol."""
    async with client_of(doors, mode=mode) as client:
        result = await client.call_tool("failing", {"input": None})

        assert result.is_error
        assert "no such thing" in result.content[0].text


@both
async def test_an_unknown_tool_and_a_wrong_argument_are_errors(doors, mode):
    """Of the caller, with the number of invalid params."""
    async with client_of(doors, mode=mode) as client:
        for name, arguments in (("nobody", {}), ("../adder", {}), ("talker", {"words": "x"})):
            with pytest.raises(MCPError) as caught:
                await client.call_tool(name, arguments)
            assert caught.value.error.code == mcp_types.INVALID_PARAMS


async def test_who_leaves_a_modern_call_cancels_it(doors, tmp_path):
    """Closing the stream is how a modern client says so; the work has stopped."""
    body, headers = modern("tools/call", "witness", arguments={"input": str(tmp_path)})
    async with (
        httpx.AsyncClient(headers=headers | doors.headers, timeout=60) as http,
        http.stream("POST", f"{doors.url}/mcp", json=body) as answer,
    ):
        assert answer.headers["content-type"].startswith("text/event-stream")
        await until_there(tmp_path / "begun")
        assert not (tmp_path / "cancelled").exists()
    await until_there(tmp_path / "cancelled")


async def until_there(path):
    """Return when an agent has left its sign."""
    async with asyncio.timeout(60):
        while not path.exists():
            await asyncio.sleep(0.05)


def test_a_header_must_say_what_the_body_says(doors):
    """Or a gateway would route by one and the service act by the other."""
    body, headers = modern("tools/call", "adder", arguments={"a": 1, "b": 1})
    for wrong in (
        {"mcp-name": "talker"},
        {"mcp-method": "tools/list"},
        {"mcp-protocol-version": LEGACY},
        {"mcp-name": "=?base64?!!?="},
    ):
        answer = post(doors, body, headers | wrong)
        assert (answer.status_code, answer.json()["error"]["code"]) == (400, -32020), wrong
    encoded = post(doors, body, headers | {"mcp-name": "=?base64?YWRkZXI=?="})
    assert encoded.status_code == 200
    for missing in headers:
        answer = post(doors, body, {name: value for name, value in headers.items() if name != missing})
        assert (answer.status_code, answer.json()["error"]["code"]) == (400, -32020), missing


def test_what_is_no_request_of_this_protocol_has_its_number(doors):
    """Versions, methods, notifications, envelopes."""
    body, headers = modern("tools/list")
    body["params"]["_meta"]["io.modelcontextprotocol/protocolVersion"] = "1900-01-01"
    answer = post(doors, body, headers | {"mcp-protocol-version": "1900-01-01"})
    assert (answer.status_code, answer.json()["error"]["code"]) == (400, -32022)
    assert MODERN in answer.json()["error"]["data"]["supported"]

    body, headers = modern("subscriptions/listen")
    answer = post(doors, body, headers)
    assert (answer.status_code, answer.json()["error"]["code"]) == (404, -32601)

    answer = post(doors, {"jsonrpc": "2.0", "method": "notifications/initialized"})
    assert (answer.status_code, answer.content) == (202, b"")

    for wrong in ([body], {"jsonrpc": "1.0", "id": 1, "method": "ping"}, {"jsonrpc": "2.0", "id": 1, "result": {}}):
        answer = post(doors, wrong)
        assert (answer.status_code, answer.json()["error"]["code"]) == (400, -32600)

    got = httpx.get(f"{doors.url}/mcp", headers=doors.headers, timeout=60)
    assert (got.status_code, got.headers["allow"]) == (405, "POST")


def test_a_page_of_another_origin_is_refused(doors):
    """As the specification wants it against DNS rebinding."""
    body, headers = modern("tools/list")

    answer = post(doors, body, headers | {"origin": "http://evil.example"})

    assert answer.status_code == 403


async def test_a_tenant_sees_its_own_tools(doors):
    """Those of another are not listed, and not called."""
    stranger = await asyncio.to_thread(doors.made_key, "other", "agent:execute")
    async with client_of(doors, key=stranger) as client:
        assert (await client.list_tools()).tools == []
        with pytest.raises(MCPError):
            await client.call_tool("adder", {"a": 1, "b": 1})
    body, headers = modern("tools/list")
    watcher = await asyncio.to_thread(doors.made_key, "acme", "agent:monitor")
    assert (await asyncio.to_thread(post, doors, body, headers, key=watcher)).status_code == 403
