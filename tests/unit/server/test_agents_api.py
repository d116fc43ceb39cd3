"""The API of a service in one process, without a database: what it takes, what it refuses, what it answers."""

import asyncio
import json

import httpx
import msgspec
import pytest

from headrace.agents import AgentsConfig, TenantConfig, TierConfig
from headrace.config import Config
from headrace.server import Headrace
from headrace.server.deploy_request import Rollout
from tests.running import deploy_body

ECHO = "async def Agent(input, context): return input"
TALKER = """
import asyncio

class Agent:
    async def execute(self, input, context):
        for n in range(input):
            context.emit({"n": n})
            await asyncio.sleep(0)
        return input

    def get_capabilities(self):
        return ["talks"]
"""
PARKED = """
import asyncio
async def Agent(input, context):
    context.emit("parked")
    await asyncio.Event().wait()
"""
ONE = AgentsConfig(
    tiers=(TierConfig(name="one", executions_max=1, rate_per_s=0.001, burst=2),),
    tenants=(TenantConfig(name="default", tier="one"),),
)


class Service:
    """A service and its client."""

    def __init__(self, headrace, client):
        self.headrace = headrace
        self.client = client

    async def call(self, method, path, body=None, **headers):
        answer = await self.client.request(method, f"/api/v1{path}", json=body, headers=headers)
        return answer.status_code, answer.json()

    async def deploy(self, agent_id, source=ECHO, version="1.0.0", *, metadata=None, code=None, **rollout):
        body = deploy_body(agent_id, source, version)
        body["agent_metadata"] |= metadata or {}
        body["agent_code"] |= code or {}
        body["deployment_config"] = rollout
        return await self.call("POST", "/agents/deploy", body)


@pytest.fixture
def config():
    """The default limits."""
    return AgentsConfig()


@pytest.fixture
async def service(config):
    """A service whose rooms are open."""
    headrace = Headrace(Config(agents=config))
    transport = httpx.ASGITransport(headrace.asgi())
    async with headrace.rooms, httpx.AsyncClient(transport=transport, base_url="http://localhost") as client:
        yield Service(headrace, client)


# -- deployments ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("code", "rollout", "said"),
    [
        ({"dependencies": {"system": ["ffmpeg"]}}, {}, "dependencies.system"),
        ({"configuration": {"concurrent_executions": 10}}, {}, "concurrent_executions"),
        ({}, {"strategy": "rolling"}, "rolling"),
        ({}, {"auto_scaling": {"min_instances": 1}}, "auto_scaling"),
        ({}, {"success_criteria": {"error_rate": 0.1}}, "success_criteria"),
        ({}, {"traffic_percentage": 50}, "traffic_percentage"),
        ({}, {"strategy": "canary", "traffic_percentage": 100}, "no trial"),
        ({}, {"auto_rollback": {"enabled": True}}, "nothing to compare"),
        ({}, {"strategy": "canary", "auto_rollback": {"enabled": False}}, "every canary is watched"),
        ({}, {"strategy": "canary", "auto_rollback": {"error_rate": 0.5}}, "0.02"),
        ({}, {"strategy": "canary", "auto_rollback": {"slowdown": 9}}, "canary_slowdown_max"),
    ],
)
async def test_what_is_not_done_is_refused_by_name(service, code, rollout, said):
    """Rather than accepted and ignored; nothing is deployed."""
    status, problem = await service.deploy("a", code=code, **rollout)
    assert (status, problem["code"]) == (422, "deployment-unsupported")
    assert said in problem["detail"] + problem["fix"]
    assert (await service.call("GET", "/agents/a"))[0] == 404


async def test_memory_is_limited_for_isolated_agents_only(service):
    """Those that share a process cannot be told apart in it."""
    status, problem = await service.deploy("a", code={"configuration": {"memory_limit": 128}})
    assert (status, problem["code"]) == (422, "request-invalid")
    assert "isolation `process`" in problem["fix"]


def test_triggers_that_are_in_force_may_be_said():
    """Whoever says what the service does anyway is right."""
    config = AgentsConfig()
    rollout = {"strategy": "canary", "traffic_percentage": 5, "auto_rollback": {"error_rate": 0.02, "slowdown": 1.5}}
    found = msgspec.convert(rollout, Rollout)
    found.check(config)
    assert found.share == 0.05


async def test_a_deployment_tells_its_phases(service):
    """And what it replaced; the newest comes first."""
    await service.deploy("a")
    status, deployed = await service.deploy("a", ECHO + "  # 2", "1.1.0")
    assert (status, deployed["status"]) == (201, "deployed")
    _, found = await service.call("GET", deployed["deployment_url"].removeprefix("/api/v1"))
    assert [(phase["name"], phase["status"]) for phase in found["phases"]] == [
        ("load", "completed"),
        ("switch", "completed"),
    ]
    assert (found["status"], found["progress"], found["replaced"], found["strategy"]) == (
        "deployed",
        100,
        "1.0.0",
        "blue_green",
    )
    _, page = await service.call("GET", "/agents/a/deployments")
    assert [(each["version"], each["status"]) for each in page["deployments"]] == [
        ("1.1.0", "deployed"),
        ("1.0.0", "superseded"),
    ]


async def test_a_deployment_that_fails_leaves_the_version_in_service_and_a_line(service):
    """With its reason."""
    await service.deploy("a")
    status, _ = await service.deploy("a", "class Agent: pass", "2.0.0")
    assert status == 422
    _, page = await service.call("GET", "/agents/a/deployments")
    newest = page["deployments"][0]
    assert (newest["version"], newest["status"], newest["phases"][0]["status"]) == ("2.0.0", "failed", "failed")
    assert "cannot be executed" in newest["error"]
    assert (await service.call("GET", "/agents/a"))[1]["version"] == "1.0.0"


async def test_a_canary_is_on_trial_until_it_is_promoted(service):
    """Beside the version in service, with its share."""
    await service.deploy("a", "async def Agent(input, context): return 1")
    second = "async def Agent(input, context): return 2"
    _, trial = await service.deploy("a", second, "2.0.0", strategy="canary", traffic_percentage=50)
    assert trial["status"] == "deploying"
    _, agent = await service.call("GET", "/agents/a")
    assert (agent["version"], agent["status"], agent["canary"]["traffic_percentage"]) == ("1.0.0", "testing", 50)
    answers = [await service.call("POST", "/agents/a/execute", {}) for _ in range(40)]
    assert {answer["output"] for _, answer in answers} == {1, 2}
    path = f"/agents/a/deployments/{trial['deployment_id']}"
    _, found = await service.call("GET", path)
    assert (found["status"], found["progress"], found["phases"][-1]) == (
        "deploying",
        66,
        {"name": "trial", "status": "running", "took_ms": None},
    )
    status, _ = await service.call("PUT", "/agents/a/versions/2.0.0", {})
    assert status == 200
    assert (await service.call("GET", "/agents/a"))[1]["version"] == "2.0.0"
    assert (await service.call("GET", path))[1]["status"] == "deployed"


async def test_rolling_back_ends_a_trial_first_and_then_goes_back_step_by_step(service):
    """One call each; two of them do not cancel out."""
    for version in ("1.0.0", "2.0.0", "3.0.0"):
        await service.deploy("a", f"{ECHO}  # {version}", version)
    _, trial = await service.deploy("a", ECHO + "  # 4", "4.0.0", strategy="canary")
    seen = []
    for _ in range(3):
        status, agent = await service.call("POST", "/agents/a/rollback", {})
        seen.append((status, agent["version"], agent["canary"]))
    assert seen == [(200, "3.0.0", None), (200, "2.0.0", None), (200, "1.0.0", None)]
    _, aborted = await service.call("GET", f"/agents/a/deployments/{trial['deployment_id']}")
    assert (aborted["status"], aborted["health"]) == ("rolled_back", "unhealthy")
    status, problem = await service.call("POST", "/agents/a/rollback", {})
    assert (status, problem["code"]) == (404, "version-not-found")
    status, agent = await service.call("POST", "/agents/a/rollback", {"version": "3.0.0"})
    assert (status, agent["version"]) == (200, "3.0.0")


async def test_a_version_that_was_deployed_before_needs_no_source(service):
    """It is loaded and checked again, then it serves; one that never was is not there."""
    await service.deploy("a", metadata={"tags": ["kept"]}, code={"configuration": {"timeout": 3}})
    await service.deploy("a", ECHO + "  # 2", "2.0.0", metadata={"tags": ["kept"]})
    status, answer = await service.call("PUT", "/agents/a/versions/1.0.0", {"strategy": "blue_green"})
    assert (status, answer["version"]) == (200, "1.0.0")
    _, agent = await service.call("GET", "/agents/a")
    assert (agent["version"], agent["tags"]) == ("1.0.0", ["kept"])
    _, version = await service.call("GET", "/agents/a/versions/1.0.0")
    assert (version["timeout"], version["is_in_service"]) == (3.0, True)
    assert (await service.call("PUT", "/agents/a/versions/9.9.9", {}))[1]["code"] == "version-not-found"
    assert (await service.call("PUT", "/agents/a/versions/new", {}))[1]["code"] == "version-not-found"


async def test_an_alias_stands_for_a_version_in_execute(service):
    """Until it is deleted."""
    await service.deploy("a", "async def Agent(input, context): return context.version")
    await service.deploy("a", "async def Agent(input, context): return context.version  # 2", "2.0.0")
    _, agent = await service.call("PUT", "/agents/a/aliases/stable", {"version": "1.0.0"})
    assert agent["aliases"] == {"stable": "1.0.0"}
    assert (await service.call("POST", "/agents/a/execute", {"version": "stable"}))[1]["output"] == "1.0.0"
    assert (await service.call("DELETE", "/agents/a/aliases/stable"))[1]["aliases"] == {}
    assert (await service.call("POST", "/agents/a/execute", {"version": "stable"}))[0] == 404


async def test_an_agent_that_is_undeployed_is_gone_until_it_is_deployed_again(service):
    """Its versions stay on record."""
    await service.deploy("a")
    assert await service.call("DELETE", "/agents/a") == (200, {"agent_id": "a", "cancelled": 0})
    assert (await service.call("POST", "/agents/a/execute", {}))[1]["code"] == "agent-not-found"
    assert (await service.deploy("a", ECHO + " ", "1.0.0"))[0] == 409
    assert (await service.deploy("a"))[0] == 201


async def test_agents_are_found_by_tag_environment_and_status(service):
    """Pages are cut from what was found."""
    for index in range(6):
        metadata = {"tags": ["even" if index % 2 == 0 else "odd"]}
        await service.deploy(f"a{index}", metadata=metadata, environment="staging" if index < 3 else "production")
    await service.deploy("a5", ECHO + "  # 2", "2.0.0", strategy="canary")

    async def found(query):
        _, page = await service.call("GET", f"/agents?{query}")
        return [agent["agent_id"] for agent in page["agents"]], page["total"]

    assert await found("tag=even") == (["a0", "a2", "a4"], 3)
    assert await found("environment=production&tag=odd") == (["a3", "a5"], 2)
    assert await found("environment=production&limit=2&page=2") == (["a5"], 3)
    assert await found("status=testing") == (["a5"], 1)
    assert (await service.call("GET", "/agents?status=broken"))[0] == 422


async def test_an_agent_says_what_it_can_do(service):
    """What its get_capabilities returned when it was deployed."""
    await service.deploy("a", TALKER)
    assert (await service.call("GET", "/agents/a"))[1]["capabilities"] == ["talks"]


async def test_figures_over_time_need_a_record(service):
    """Said in plain words where there is none."""
    await service.deploy("a")
    status, problem = await service.call("GET", "/agents/a/metrics?granularity=5m")
    assert (status, problem["code"]) == (409, "needs-database")
    assert (await service.call("GET", "/agents/a/metrics?granularity=2m"))[0] == 422
    assert (await service.call("GET", "/agents/a/metrics?since=5&until=4"))[0] == 422
    assert (await service.call("GET", "/agents/a/metrics?since=0&until=1e9"))[0] == 422


# -- executions ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("header", ["k-1", '"k-1"'])
async def test_an_idempotency_key_is_an_execution_id(service, header):
    """As a token or as the quoted string of the draft standard."""
    await service.deploy("a")
    first = await service.call("POST", "/agents/a/execute", {"input": 1}, **{"idempotency-key": header})
    again = await service.call("POST", "/agents/a/execute", {"input": 1, "execution_id": "k-1"})
    assert first == again
    assert first[1]["execution_id"] == "k-1"
    other = await service.call("POST", "/agents/a/execute", {"input": 2}, **{"idempotency-key": header})
    assert (other[0], other[1]["code"]) == (409, "execution-conflict")


@pytest.mark.parametrize(
    ("body", "headers", "said"),
    [
        ({"execution_id": "x"}, {"idempotency-key": "y"}, "Idempotency-Key is 'y'"),
        ({}, {"idempotency-key": "a b"}, "breaks the rule"),
        ({}, {"idempotency-key": ""}, "breaks the rule"),
        ({"callback_url": "https://example.com"}, {}, "async"),
        ({"async": True, "stream": True}, {}, "no stream"),
        ({"async": True, "on_disconnect": "cancel"}, {}, "nobody to leave it"),
        ({"retry_config": {"max_attempts": 3}}, {}, "was deployed with 1"),
    ],
)
async def test_a_request_that_contradicts_itself_is_refused(service, body, headers, said):
    """Before anything runs."""
    await service.deploy("a")
    status, problem = await service.call("POST", "/agents/a/execute", body, **headers)
    assert (status, problem["code"]) == (422, "request-invalid")
    assert said in problem["detail"] + problem["fix"]


async def test_attempts_are_declared_at_the_deployment(service):
    """A call may say the same."""
    await service.deploy("a", code={"configuration": {"idempotent": True, "attempts_max": 3}})
    body = {"input": 1, "retry_config": {"max_attempts": 3}}
    status, execution = await service.call("POST", "/agents/a/execute", body)
    assert (status, execution["status"], execution["attempt"]) == (200, "completed", 1)


def frames(text):
    """The events of a stream: kind, id, data."""
    found = []
    for block in text.split("\n\n"):
        fields = dict(line.split(": ", 1) for line in block.splitlines() if not line.startswith(":"))
        if "data" in fields:
            found.append((fields.get("event", "message"), fields.get("id"), json.loads(fields["data"])))
    return found


async def test_a_streamed_execution_sends_its_events_and_then_its_result(service):
    """In one answer, which ends with the execution."""
    await service.deploy("a", TALKER)
    answer = await service.client.post("/api/v1/agents/a/execute", json={"input": 3, "stream": True})
    assert answer.headers["content-type"].startswith("text/event-stream")
    *events, (kind, end_id, execution) = frames(answer.text)
    assert [(id, data) for _, id, data in events] == [("1", {"n": 0}), ("2", {"n": 1}), ("3", {"n": 2})]
    assert (kind, end_id, execution["status"], execution["output"]) == ("end", "3.end", "completed", 3)


async def test_a_reader_goes_on_where_it_stopped(service):
    """After any id nothing is missing and nothing comes twice; after the end there is nothing."""
    await service.deploy("a", TALKER)
    _, execution = await service.call("POST", "/agents/a/execute", {"input": 5, "async": True})
    path = f"/api/v1/agents/a/executions/{execution['execution_id']}/events"
    whole = frames((await service.client.get(path)).text)
    assert len(whole) == 6
    for index, (_, last, _) in enumerate(whole[:-1]):
        rest = frames((await service.client.get(path, headers={"last-event-id": last})).text)
        assert rest == whole[index + 1 :]
    by_query = frames((await service.client.get(f"{path}?after={whole[1][1]}")).text)
    assert by_query == whole[2:]
    assert (await service.client.get(path, headers={"last-event-id": whole[-1][1]})).status_code == 204
    assert (await service.client.get(path, headers={"last-event-id": "x"})).status_code == 422
    logs = (await service.client.get(path.replace("/events", "/logs"))).json()
    assert [line["data"] for line in logs["lines"]] == [{"n": n} for n in range(5)]
    assert (await service.client.head(path)).headers["content-type"].startswith("text/event-stream")


@pytest.mark.parametrize("below", ["", "/events", "/logs"])
async def test_an_execution_that_is_not_there_is_a_problem(service, below):
    """404 and not an empty stream."""
    await service.deploy("a")
    status, problem = await service.call("GET", f"/agents/a/executions/none{below}")
    assert (status, problem["code"]) == (404, "execution-not-found")


@pytest.mark.parametrize(("method", "below"), [("DELETE", ""), ("POST", "/cancel")])
async def test_cancelling_answers_when_the_work_has_stopped(service, method, below):
    """And a finished one stays as it is."""
    await service.deploy("a", PARKED)
    _, execution = await service.call("POST", "/agents/a/execute", {"async": True})
    path = f"/agents/a/executions/{execution['execution_id']}"
    while not (await service.call("GET", f"{path}/logs"))[1]["lines"]:
        await asyncio.sleep(0.01)
    status, cancelled = await service.call(method, path + below)
    assert (status, cancelled["status"]) == (200, "cancelled")
    assert service.headrace.rooms.agents.running == 0
    assert await service.call(method, path + below) == (200, cancelled)


class Leaving:
    """A client that sends a request and leaves when it is told to."""

    def __init__(self, body):
        self._body = json.dumps(body).encode()
        self._sent = False
        self.leave = asyncio.Event()
        self.messages = []

    async def receive(self):
        if not self._sent:
            self._sent = True
            return {"type": "http.request", "body": self._body}
        await self.leave.wait()
        return {"type": "http.disconnect"}

    async def send(self, message):
        self.messages.append(message)


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize(("policy", "status"), [("cancel", "cancelled"), ("detach", "running")])
async def test_what_becomes_of_an_execution_whose_client_leaves_is_the_clients_choice(service, policy, status, stream):
    """Cancelled when that was asked for, else it goes on."""
    await service.deploy("a", PARKED)
    body = {"execution_id": "left", "on_disconnect": policy, "stream": stream}
    client = Leaving(body)
    scope = {
        "type": "http",
        "method": "POST",
        "path": "/api/v1/agents/a/execute",
        "query_string": b"",
        "headers": [(b"content-type", b"application/json"), (b"host", b"localhost")],
    }
    request = asyncio.create_task(service.headrace.asgi()(scope, client.receive, client.send))
    while service.headrace.rooms.agents.running == 0:
        await asyncio.sleep(0.01)
    client.leave.set()
    if stream or policy == "cancel":
        await asyncio.wait_for(request, 30)
    found = await service.call("GET", "/agents/a/executions/left")
    assert found[1]["status"] == status
    await service.call("DELETE", "/agents/a/executions/left")
    await asyncio.wait_for(request, 30)


@pytest.mark.parametrize("config", [ONE])
async def test_who_asks_too_often_or_for_too_much_at_once_is_told_when_to_come_back(service):
    """429 with Retry-After, for the tenant's tier; others are not touched."""
    await service.deploy("a", PARKED)
    waiting = asyncio.create_task(service.call("POST", "/agents/a/execute", {"execution_id": "first"}))
    while service.headrace.rooms.agents.running == 0:
        await asyncio.sleep(0.01)
    for said in ("run on this node", "times a second"):
        answer = await service.client.post("/api/v1/agents/a/execute", json={})
        assert (answer.status_code, answer.json()["code"]) == (429, "rate-limited")
        assert int(answer.headers["retry-after"]) >= 1
        assert said in answer.json()["detail"]
    await service.call("DELETE", "/agents/a/executions/first")
    assert (await waiting)[1]["status"] == "cancelled"
