"""A whole service of two workers whose doors are open, behind a token; and what its clients need."""

import asyncio
from collections.abc import Iterator
from dataclasses import dataclass

import httpx
import pytest

from tests.running import Service, deploy_body, running

TOKEN = "a token of more than sixteen characters"

TALKER = """
import asyncio
from pathlib import Path

class Agent:
    async def execute(self, input, context):
        text = input if isinstance(input, str) else input["prompt"]
        words, _, until = text.partition(" until:")
        words = words.split()
        for number, word in enumerate(words):
            context.progress(number + 1, len(words), word)
            context.emit({"type": "text", "text": word + " "})
            await asyncio.sleep(0.4)
        while until and not Path(until).exists():
            await asyncio.sleep(0.05)
        context.state["heard"] = [*context.state.get("heard", []), text]
        return {"text": f"heard {len(context.state['heard'])}", "data": {"words": len(words)}, "usage": {}}
"""
PARKED = """
import asyncio

async def Agent(input, context):
    context.emit("parked")
    await asyncio.Event().wait()
"""
WITNESS = """
import asyncio
from pathlib import Path

async def Agent(input, context):
    Path(input, "begun").touch()
    try:
        await asyncio.Event().wait()
    except asyncio.CancelledError:
        Path(input, "cancelled").touch()
        raise
"""
FAILING = "async def Agent(input, context): raise ValueError('no such thing')"
ADDER = """
import asyncio
from pathlib import Path

class Agent:
    async def execute(self, input, context):
        for done in range(3):
            context.progress(done + 1, 3, f"step {done + 1}")
            while "signs" in input and not Path(input["signs"], str(done + 1)).exists():
                await asyncio.sleep(0.05)
        return {"sum": input["a"] + input["b"]}

    def get_capabilities(self):
        number = {"type": "number"}
        return {
            "description": "Adds two numbers.",
            "input_schema": {"type": "object", "properties": {"a": number, "b": number}, "required": ["a", "b"]},
            "output_schema": {"type": "object", "properties": {"sum": number}, "required": ["sum"]},
            "skills": [{"id": "add", "name": "Add", "description": "Adds.", "tags": ["arithmetic"]}],
        }
"""
PAGE = """
class Agent:
    async def execute(self, input, context):
        context.emit({"type": "state", "state": input["state"]})
        context.emit({"type": "state_delta", "delta": [{"op": "replace", "path": "/seen", "value": True}]})
        context.emit({"type": "text", "text": "looking "})
        context.emit({"type": "text", "text": "it up"})
        context.emit({"type": "tool_call", "id": "c1", "name": "search", "args": {"for": "it"}})
        context.emit({"type": "tool_result", "id": "c1", "name": "search", "result": [1, 2]})
        context.emit({"anything": "else"})
        return {"tools": [tool["name"] for tool in input["tools"]]}

    def get_capabilities(self):
        return {"ag_ui": "run"}
"""
AGENTS = {"talker": TALKER, "parked": PARKED, "failing": FAILING, "adder": ADDER, "witness": WITNESS, "page": PAGE}


@dataclass
class Doors:
    """The service and the key of its only tenant that has agents."""

    service: Service
    key: str

    @property
    def url(self) -> str:
        """Where it is."""
        return self.service.url

    @property
    def headers(self) -> dict[str, str]:
        """What lets a client in."""
        return {"authorization": f"Bearer {self.key}"}

    def call(self, method: str, path: str, body: object = None) -> httpx.Response:
        """A plain request with the key."""
        return httpx.request(method, self.url + path, json=body, headers=self.headers, timeout=60)

    def made_key(self, tenant: str, *permissions: str) -> str:
        """A new key."""
        body = {"tenant": tenant, "permissions": permissions}
        headers = {"authorization": f"Bearer {TOKEN}"}
        made = httpx.post(f"{self.url}/api/v1/keys", json=body, headers=headers, timeout=60)
        assert made.status_code == 201, made.text
        return str(made.json()["key"])

    async def status_becomes(self, agent_id: str, execution_id: str, status: str) -> None:
        """Return when the execution has the status."""
        async with asyncio.timeout(60):
            while True:
                path = f"/api/v1/agents/{agent_id}/executions/{execution_id}"
                found = await asyncio.to_thread(self.call, "GET", path)
                if found.json().get("status") == status:
                    return
                await asyncio.sleep(0.05)


@pytest.fixture(scope="session")
def doors(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Doors]:
    """The service with its agents."""
    environment = {
        "HEADRACE_SERVER_TOKEN": TOKEN,
        "HEADRACE_AGENTS_LOAD_TIMEOUT_S": "60",  # a framework is imported by one of them,
        "HEADRACE_AGENTS_STEP_MAX_S": "60",  # and some more of it in the first step of its first execution
        "HEADRACE_PROTOCOLS_A2A": "true",
        "HEADRACE_PROTOCOLS_MCP": "true",
        "HEADRACE_PROTOCOLS_AG_UI": "true",
        "HEADRACE_PROTOCOLS_A2A_ROOT_AGENT": "talker",
    }
    with running(tmp_path_factory.mktemp("doors"), "--workers", "2", environment=environment) as service:
        found = Doors(service, "")
        found.key = found.made_key("acme", "agent:deploy", "agent:delete", "agent:execute", "agent:monitor")
        for agent_id, source in AGENTS.items():
            deployed = found.call("POST", "/api/v1/agents/deploy", deploy_body(agent_id, source))
            assert deployed.status_code == 201, deployed.text
        yield found
