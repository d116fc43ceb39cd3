"""A service in one process, without a database, whose doors are open."""

import json
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from typing import Any

import httpx
import pytest

from headrace.agents import AgentsConfig
from headrace.config import Config, ProtocolsConfig, ServerConfig
from headrace.server import Headrace
from tests.running import deploy_body

ECHO = "async def Agent(input, context): return input"


class Doors:
    """The service and its client."""

    def __init__(self, headrace: Headrace, client: httpx.AsyncClient) -> None:
        self.headrace = headrace
        self.client = client

    async def deploy(self, agent_id: str = "echo", source: str = ECHO, version: str = "1.0.0") -> None:
        """Put an agent into service."""
        answer = await self.client.post("/api/v1/agents/deploy", json=deploy_body(agent_id, source, version))
        assert answer.status_code == 201, answer.text

    async def a2a(self, method: str, params: Any, *, agent_id: str = "echo", **headers: str) -> httpx.Response:
        """A call of A2A."""
        body = {"jsonrpc": "2.0", "id": 7, "method": method, "params": params}
        return await self.client.post(f"/a2a/{agent_id}", json=body, headers={"A2A-Version": "1.0", **headers})

    async def mcp(self, method: str, params: Any, **headers: str) -> httpx.Response:
        """A call of MCP as the revision before the newest has it."""
        body = {"jsonrpc": "2.0", "id": 7, "method": method, "params": params}
        return await self.client.post("/mcp", json=body, headers=headers)

    async def ag_ui(self, prompt: str, *, agent_id: str = "echo", **more: Any) -> httpx.Response:
        """A run of AG-UI."""
        messages = [{"id": "m", "role": "user", "content": prompt}]
        run = {"threadId": "t", "runId": "r", "messages": messages, **more}
        return await self.client.post(f"/ag-ui/{agent_id}", json=run)


Opened = Callable[..., AbstractAsyncContextManager[Doors]]


@pytest.fixture
def opened() -> Opened:
    """Opens a service with the given parts of its configuration."""

    @asynccontextmanager
    async def open_with(
        *,
        agents: AgentsConfig | None = None,
        protocols: ProtocolsConfig | None = None,
        server: ServerConfig | None = None,
        base_url: str = "http://localhost",
        root_path: str = "",
    ) -> AsyncIterator[Doors]:
        config = Config(
            agents=agents or AgentsConfig(),
            protocols=protocols or ProtocolsConfig(a2a=True, mcp=True, ag_ui=True),
            server=server or ServerConfig(),
        )
        headrace = Headrace(config)
        transport = httpx.ASGITransport(headrace.asgi(), root_path=root_path)
        async with headrace.rooms, httpx.AsyncClient(transport=transport, base_url=base_url) as client:
            yield Doors(headrace, client)

    return open_with


@pytest.fixture
async def doors(opened: Opened) -> AsyncIterator[Doors]:
    """A service as it is by default, with the agent `echo`."""
    async with opened() as doors:
        await doors.deploy()
        yield doors


@pytest.fixture
def frames() -> Callable[[httpx.Response], list[Any]]:
    """Reads the messages of a stream that has ended."""

    def read(answer: httpx.Response) -> list[Any]:
        assert answer.headers["content-type"].startswith("text/event-stream"), answer.text
        lines = answer.text.splitlines()
        return [json.loads(line.removeprefix("data: ")) for line in lines if line.startswith("data: ")]

    return read
