"""Tenants never see each other's agents and executions, over every operation that there is.

The operations are enumerated: one that is added is asked as a stranger too, and one that this page does not know how
to ask fails the test.
"""

import json
import re

import httpx
import pytest

from headrace.config import Config, ServerConfig
from headrace.server import Headrace
from headrace.server.caller import GRANTABLE, PERMISSIONS
from tests.running import deploy_body

TOKEN = "a token of more than sixteen characters"
SOURCE = "async def Agent(input, context):\n    context.emit('said in private')\n    return 'secret of a'"
EXECUTION_ID = "run-1"

# What is sent where a body is needed; a stranger's request must be refused for whom it is about, not for its shape.
BODIES = {
    "executeAgent": {"input": 1},
    "updateAgent": {},
    "rollbackAgent": {"version": "1.0.0"},
    "setAlias": {"version": "1.0.0"},
    "cancelExecution": {},
}
OF_NOBODY = {"deployAgent", "listAgents", "createKey", "listKeys", "revokeKey", "health", "history", "metrics"}
"""Operations that name no agent in their path; the tests below say of each what it shows."""


@pytest.fixture
async def service():
    """A service with two tenants, of which `a` has an agent with an execution."""
    headrace = Headrace(Config(server=ServerConfig(token=TOKEN)))
    application = headrace.asgi()
    async with headrace.rooms:
        _, of_a = await headrace.keys.create("a", GRANTABLE)
        _, of_b = await headrace.keys.create("b", GRANTABLE)
        clients = [client_of(application, key) for key in (of_a, of_b)]
        async with clients[0] as a, clients[1] as b:
            deployed = await a.post("/api/v1/agents/deploy", json=deploy_body("private", SOURCE))
            assert deployed.status_code == 201
            run = {"input": 1, "execution_id": EXECUTION_ID}
            assert (await a.post("/api/v1/agents/private/execute", json=run)).json()["output"] == "secret of a"
            yield headrace, a, b, deployed.json()["deployment_id"]


def client_of(application, key):
    """A client with a key."""
    return httpx.AsyncClient(
        transport=httpx.ASGITransport(application),
        base_url="http://service.example",
        headers={"authorization": f"Bearer {key}"},
    )


def operations():
    """All operations of a service."""
    return Headrace(Config()).operations()


def path_of(operation, deployment_id):
    """The operation's path, filled in with what belongs to `a`."""
    known = {
        "agent_id": "private",
        "execution_id": EXECUTION_ID,
        "deployment_id": deployment_id,
        "version": "1.0.0",
        "alias": "stable",
    }
    return re.sub(r"{(\w+)}", lambda match: known[match[1]], operation.path)


@pytest.mark.parametrize("operation", operations(), ids=lambda each: each.name)
async def test_a_stranger_is_told_that_it_is_not_there(service, operation):
    """404 wherever an agent is named, whether it exists or not: the answer is the same."""
    _, _, b, deployment_id = service
    if "{agent_id}" not in operation.path:
        assert operation.name in OF_NOBODY
        return
    path = path_of(operation, deployment_id)
    body = BODIES.get(operation.name)
    answers = [
        await b.request(operation.method, each, json=body) for each in (path, path.replace("private", "missing"))
    ]
    for answer in answers:
        assert (answer.status_code, answer.headers["content-type"]) == (404, "application/problem+json")
        assert "secret" not in answer.text
    told = [answer.text.replace("missing", "private") for answer in answers]
    assert told[0] == told[1]


@pytest.mark.parametrize("operation", operations(), ids=lambda each: each.name)
async def test_without_a_key_nobody_comes_in(service, operation):
    """But to what is public, and that shows no agent."""
    headrace, _, _, deployment_id = service
    transport = httpx.ASGITransport(headrace.asgi())
    async with httpx.AsyncClient(transport=transport, base_url="http://service.example") as nobody:
        path = re.sub(r"{key_id}", "0" * 16, operation.path)
        path = path_of(operation, deployment_id) if "{agent_id}" in path else path
        answer = await nobody.request(operation.method, path, json={} if operation.request else None)
    if operation.is_public:
        assert operation.name == "health"
        assert "private" not in answer.text
    else:
        assert (answer.status_code, answer.json()["code"]) == (401, "unauthorized")


@pytest.mark.parametrize("operation", operations(), ids=lambda each: each.name)
async def test_a_key_without_the_permission_does_not_get_by(service, operation):
    """Each operation names one, and no other will do."""
    headrace, _, _, deployment_id = service
    if operation.is_public:
        return
    assert operation.permission in PERMISSIONS
    others = [each for each in GRANTABLE if each != operation.permission]
    _, key = await headrace.keys.create("a", others)
    path = re.sub(r"{key_id}", "0" * 16, operation.path)
    path = path_of(operation, deployment_id) if "{agent_id}" in path else path
    async with client_of(headrace.asgi(), key) as lacking:
        answer = await lacking.request(operation.method, path, json={} if operation.request else None)
    assert (answer.status_code, answer.json()["code"]) == (403, "forbidden")
    assert operation.permission in answer.json()["detail"]


async def test_lists_show_ones_own(service):
    """The same agent id is another agent for another tenant."""
    _, a, b, _ = service
    assert (await b.get("/api/v1/agents")).json()["total"] == 0
    assert (await b.get("/api/v1/agents?tag=x")).json()["total"] == 0
    other = deploy_body("private", "async def Agent(input, context): return 'of b'")
    assert (await b.post("/api/v1/agents/deploy", json=other)).status_code == 201
    run = {"input": 1, "execution_id": EXECUTION_ID}
    outputs = [(await each.post("/api/v1/agents/private/execute", json=run)).json()["output"] for each in (a, b)]
    assert outputs == ["secret of a", "of b"]
    assert (await b.delete("/api/v1/agents/private")).status_code == 200
    assert (await a.get("/api/v1/agents/private")).status_code == 200


async def test_no_key_manages_keys(service):
    """Not even one with everything that can be granted; it could grant itself more."""
    headrace, a, _, _ = service
    body = {"tenant": "a", "permissions": ["agent:execute"]}
    assert (await a.post("/api/v1/keys", json=body)).status_code == 403
    assert "key:manage" not in GRANTABLE
    async with client_of(headrace.asgi(), TOKEN) as operator:
        made = await operator.post("/api/v1/keys", json=body)
        assert made.status_code == 201
        refused = await operator.post("/api/v1/keys", json={**body, "permissions": ["key:manage"]})
        assert refused.status_code == 422
        listed = (await operator.get("/api/v1/keys")).json()["keys"]
        assert {key["tenant"] for key in listed} == {"a", "b"}
        assert made.json()["key"] not in json.dumps(listed)
        assert "sha256" not in json.dumps(listed)
        revoked = await operator.delete(f"/api/v1/keys/{made.json()['key_id']}")
        assert revoked.json()["revoked_at"] is not None
    async with client_of(headrace.asgi(), made.json()["key"]) as late:
        assert (await late.get("/api/v1/agents")).status_code == 401


async def test_on_this_machine_without_a_token_a_key_is_still_held_to_its_tenant():
    """So that tenants can be tried out before a service is opened to anybody."""
    headrace = Headrace(Config())
    application = headrace.asgi()
    async with headrace.rooms:
        _, key = await headrace.keys.create("a", ["agent:monitor"])
        transport = httpx.ASGITransport(application)
        async with httpx.AsyncClient(transport=transport, base_url="http://localhost") as client:
            as_a = {"authorization": f"Bearer {key}"}
            await client.post("/api/v1/agents/deploy", json=deploy_body("operators", SOURCE))
            assert (await client.get("/api/v1/agents")).json()["total"] == 1
            assert (await client.get("/api/v1/agents", headers=as_a)).json()["total"] == 0
            refused = await client.post("/api/v1/agents/deploy", json=deploy_body("x", SOURCE), headers=as_a)
            assert refused.status_code == 403
            wrong = {"authorization": f"Bearer {key[:-1]}"}
            assert (await client.get("/api/v1/agents", headers=wrong)).status_code == 401
