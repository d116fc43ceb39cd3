"""Agents over HTTP with two workers and two shards: switching under load, cancelling, streaming, figures."""

import asyncio
import http.client
import json
import statistics
import time

import pytest

from headrace.agents.isolation import probe
from headrace.cli.client import Client
from tests.running import Connection, deploy_body, execute_steadily, one_call, wait_until

VERSIONED = "async def Agent(input, context): return context.version  # {}"
PARKED = """
import asyncio
async def Agent(input, context):
    context.emit("parked")
    await asyncio.sleep(input)
    return context.version
"""
GATED = """
import asyncio, os
async def Agent(input, context):
    while not os.path.exists(input):
        await asyncio.sleep(0.02)
    return context.version
"""
COUNTING = """
import asyncio
async def Agent(input, context):
    for n in range(input):
        context.emit(n)
        context.progress(n + 1, input)
        await asyncio.sleep(0.02)
    return input
"""
BLOCKING = """
import os, time
class Agent:
    def execute(self, input, context):
        context.emit("begun")
        # The worker that runs it hears of its cancellation by another only with its next beat.
        while not (os.path.exists(input) and context._execution.status == "cancelling"):
            time.sleep(0.02)
        return "done"
"""
UNHEALTHY = (
    VERSIONED
    + """
class Agent:
    async def execute(self, input, context): return 1
    def check(self): return False
"""
)


def stream_of(service, execution, headers=None):
    """An open stream of an execution's events."""
    connection = http.client.HTTPConnection("127.0.0.1", service.port, timeout=20)
    connection.request("GET", f"{execution['status_url']}/events", headers=headers or {})
    return connection, connection.getresponse()


def submitted(service, agent_id, value, **more):
    """An execution that was queued."""
    body = {"input": value, "async": True, **more}
    status, execution = service.call("POST", f"/api/v1/agents/{agent_id}/execute", body)
    assert status == 202, execution
    return execution


def ended(service, execution):
    """Wait for its end."""
    wait_until(lambda: service.call("GET", execution["status_url"])[1]["finished_at"] is not None)
    return service.call("GET", execution["status_url"])[1]


def test_a_cold_agent_answers_within_a_second_and_a_warm_one_within_50_ms(service):
    """From the deployment to the first answer, and from then on; the row of the largest tier."""
    cold_s = []
    for number in range(5):
        began = time.perf_counter()
        service.deploy(f"temperature-{number}", VERSIONED.format(number))
        assert service.call("POST", f"/api/v1/agents/temperature-{number}/execute", {})[0] == 200
        cold_s.append(time.perf_counter() - began)

    async def warm():
        connection = await Connection.open(service.port)
        took = []
        for _ in range(100):
            began = time.perf_counter()
            status, _ = await connection.call("POST", "/api/v1/agents/temperature-0/execute", {})
            took.append(time.perf_counter() - began)
            assert status == 200
        await connection.close()
        return took

    took = asyncio.run(warm())
    assert statistics.median(cold_s) < 1.0
    assert statistics.median(took) < 0.05


async def test_switching_versions_under_load_fails_no_request(service, tmp_path):
    """Deployments, a failed one, a canary, a roll-back: all answers are results, and an old run ends as it began."""

    async def call(method, path, body=None):
        return await one_call(service.port, method, f"/api/v1/agents{path}", body)

    async def deploy(source, version):
        return await call("POST", "/deploy", deploy_body("switched", source, version))

    async def executed():
        return sum(step["executions"] for step in (await call("GET", "/switched/metrics?granularity=1m"))[1]["steps"])

    gate = tmp_path / "gate"
    assert (await deploy(GATED, "1.0.0"))[0] == 201
    _, old = await call("POST", "/switched/execute", {"input": str(gate), "async": True, "timeout": 100})
    while (await call("GET", f"/switched/executions/{old['execution_id']}"))[1]["status"] != "running":
        await asyncio.sleep(0.02)
    assert (await deploy(VERSIONED.format(2), "2.0.0"))[0] == 201
    stop = asyncio.Event()
    load = asyncio.create_task(execute_steadily(service.port, "switched", rate=100, stop=stop))
    assert (await deploy(VERSIONED.format(3), "3.0.0"))[0] == 201
    assert (await deploy(UNHEALTHY, "4.0.0"))[1]["code"] == "agent-unhealthy"
    canary = {
        "strategy": "canary",
        "traffic_percentage": 50,
        "agent_code": deploy_body("switched", VERSIONED.format(5), "5.0.0")["agent_code"],
    }
    assert (await call("PUT", "/switched/versions/5.0.0", canary))[0] == 200
    assert (await call("PUT", "/switched/versions/5.0.0", {}))[1]["status"] == "deployed"
    status, agent = await call("POST", "/switched/rollback", {})
    assert (status, agent["version"]) == (200, "3.0.0")
    while await executed() <= 20:
        await asyncio.sleep(0.05)
    gate.touch()
    while (await call("GET", f"/switched/executions/{old['execution_id']}"))[1]["finished_at"] is None:
        await asyncio.sleep(0.05)
    stop.set()
    done = await load
    assert done.problems == []
    assert len(done.acknowledged) > 20
    _, finished = await call("GET", f"/switched/executions/{old['execution_id']}")
    assert (finished["status"], finished["output"]) == ("completed", "1.0.0")
    async with asyncio.timeout(30):  # the other worker sees the switch within a second
        while (await call("POST", "/switched/execute", {}))[1]["output"] != "3.0.0":
            await asyncio.sleep(0.05)


def test_a_cancelled_execution_has_stopped(service):
    """Asked of any worker; what waits in the queue never begins."""
    service.deploy("parked", PARKED)
    for _ in range(4):
        execution = submitted(service, "parked", 60)
        wait_until(lambda execution=execution: service.call("GET", execution["status_url"])[1]["status"] == "running")
        status, cancelled = service.call("DELETE", execution["status_url"])
        assert (status, cancelled["status"]) in {(200, "cancelled"), (202, "cancelling"), (202, "running")}
        assert ended(service, execution)["status"] == "cancelled"


def test_a_thread_that_cannot_be_stopped_is_cancelling_until_it_returns(service, tmp_path):
    """Nobody is told that it is over while it goes on."""
    service.deploy("blocking", BLOCKING)
    gate = tmp_path / "gate"
    execution = submitted(service, "blocking", str(gate), timeout=100)
    wait_until(lambda: service.call("GET", f"{execution['status_url']}/logs")[1]["lines"])
    status, answered = service.call("POST", f"{execution['status_url']}/cancel", {})
    assert (status, answered["finished_at"]) == (202, None)
    seen = []

    def sees(status):
        seen.append(service.call("GET", execution["status_url"])[1]["status"])
        return seen.count(status) >= 5

    wait_until(lambda: sees("cancelling"))
    assert set(seen) <= {"running", "cancelling"}
    gate.touch()
    assert ended(service, execution)["status"] == "cancelled"


def test_events_are_resumed_on_any_worker_without_a_gap_or_a_repeat(service):
    """Each connection may reach another worker; ids say where to go on."""
    service.deploy("counting", COUNTING)
    execution = submitted(service, "counting", 60)
    numbers, last = [], ""
    for _ in range(20):
        connection, response = stream_of(service, execution, {"Last-Event-ID": last} if last else {})
        frames = iter_frames(response)
        for count, (kind, id, data) in enumerate(frames):
            last = id or last
            if kind == "end":
                break
            numbers.append(data)
            if count == 6:
                break
        connection.close()
        if last.endswith(".end"):
            break
    assert numbers == list(range(60))
    connection, response = stream_of(service, execution, {"Last-Event-ID": last})
    assert response.status == 204
    connection.close()


def iter_frames(response):
    """Kind, id and data of each event."""
    fields = {}
    for line in response:
        text = line.decode().rstrip("\n")
        if text:
            name, _, value = text.partition(": ")
            fields[name] = value
        else:
            if "data" in fields:
                yield fields.get("event", "message"), fields.get("id", ""), json.loads(fields["data"])
            fields = {}


def test_the_command_lines_client_reads_a_whole_stream(service):
    """From the beginning, and after an id."""
    service.deploy("counting", COUNTING)
    execution = submitted(service, "counting", 10)
    client = Client(service.url)
    path = f"{execution['status_url']}/events"
    frames = list(client.events(path))
    assert [frame.data for frame in frames[:-1]] == list(range(10))
    assert (frames[-1].event, frames[-1].data["status"]) == ("end", "completed")
    assert [frame.data for frame in client.events(path, after=frames[7].id)][:-1] == [8, 9]


@pytest.mark.parametrize(("policy", "status"), [("cancel", "cancelled"), ("detach", "running")])
def test_a_reader_that_leaves_a_real_connection_cancels_only_if_it_said_so(service, policy, status):
    """The socket is closed in the middle of a stream."""
    service.deploy("parked", PARKED)
    execution = submitted(service, "parked", 60)
    connection = http.client.HTTPConnection("127.0.0.1", service.port, timeout=20)
    connection.request("GET", f"{execution['status_url']}/events?on_disconnect={policy}")
    response = connection.getresponse()
    assert next(iter_frames(response))[2] == "parked"
    response.close()
    connection.close()
    if policy == "cancel":
        assert ended(service, execution)["status"] == status
    else:
        assert service.call("GET", execution["status_url"])[1]["status"] == status
        service.call("DELETE", execution["status_url"])
        ended(service, execution)


def test_figures_are_those_of_the_executions(service):
    """Counts, failures and percentiles of what ended in the window, and since a deployment."""
    failing = "async def Agent(input, context):\n    if input: raise ValueError\n    return 1"
    _, deployed = service.call("POST", "/api/v1/agents/deploy", deploy_body("figured", failing))
    for value in [0] * 6 + [1] * 2:
        service.call("POST", "/api/v1/agents/figured/execute", {"input": value})
    for granularity in ("1m", "1d"):
        _, metrics = service.call("GET", f"/api/v1/agents/figured/metrics?granularity={granularity}")
        steps = metrics["steps"]
        assert sum(step["executions"] for step in steps) == 8
        assert sum(step["failed"] for step in steps) == 2
        assert all(0 <= step["run_ms_p50"] <= step["run_ms_p95"] <= step["run_ms_p99"] for step in steps)
    _, deployment = service.call("GET", deployed["deployment_url"])
    assert (deployment["executions"], deployment["error_rate"], deployment["health"]) == (8, 0.25, "healthy")
    assert deployment["response_time_p95"] > 0
    assert service.call("GET", "/api/v1/agents/figured/metrics?version=9.0.0")[1]["steps"] == []


def test_deployments_are_on_record_for_all_workers(service):
    """Whichever worker answers."""
    for version in ("1.0.0", "1.0.1", "1.0.2"):
        service.deploy("recorded", VERSIONED.format(version), version)
    for _ in range(6):
        _, page = service.call("GET", "/api/v1/agents/recorded/deployments")
        assert [each["version"] for each in page["deployments"]] == ["1.0.2", "1.0.1", "1.0.0"]
        assert [each["status"] for each in page["deployments"]] == ["deployed", "superseded", "superseded"]
    assert page["total"] == 3


def test_an_isolated_agent_is_deployed_executed_and_switched_over_http(service):
    """Within its memory; what it took is in the answer, and the version says how it runs."""
    needs_isolation()
    body = deploy_body("isolated", "async def Agent(input, context): return 'x' * (input << 20) and input")
    body["agent_code"]["configuration"] = {"isolation": "process", "memory_limit": 64}
    status, answer = service.call("POST", "/api/v1/agents/deploy", body)
    assert status == 201, answer
    status, execution = service.call("POST", "/api/v1/agents/isolated/execute", {"input": 1})
    assert (status, execution["status"], execution["output"]) == (200, "completed", 1)
    _, execution = service.call("POST", "/api/v1/agents/isolated/execute", {"input": 512})
    assert execution["status"] == "failed"
    assert "MemoryError" in execution["error"]
    _, version = service.call("GET", "/api/v1/agents/isolated/versions/1.0.0")
    assert (version["isolation"], version["memory_limit"]) == ("process", 64)
    assert service.call("PUT", "/api/v1/agents/isolated/versions/1.0.0", {})[0] == 200


def needs_isolation():
    """Skip where the kernel lacks a part of it."""
    found = probe()
    if found.level != "process":
        pytest.skip(f"this machine cannot isolate: {'; '.join(map(str, found.missing))}")
