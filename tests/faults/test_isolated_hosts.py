"""The processes of isolated agents under a real `headrace up`: they end with their host, however it ends."""

import os
import signal
from pathlib import Path
from typing import Any

import psutil
import pytest

from headrace.agents.isolation import probe
from tests.running import Service, deploy_body, running, wait_until

achievable = probe()
pytestmark = pytest.mark.skipif(achievable.level != "process", reason=f"this kernel lacks {achievable.missing}")

AGENT = """
import asyncio
class Agent:
    async def execute(self, input, context):
        context.emit("running")
        await asyncio.sleep(input)
        return "done"
"""
API = "/api/v1/agents"


def deploy(service: Service, agent_id: str, **configuration: Any) -> tuple[int, Any]:
    body = deploy_body(agent_id, AGENT)
    body["agent_code"]["configuration"] = configuration
    return service.call("POST", f"{API}/deploy", body)


def isolated(worker: int) -> list[psutil.Process]:
    """The zygote of a worker of the service, and its isolated workers."""
    return psutil.Process(worker).children(recursive=True)


def runs(process: psutil.Process) -> bool:
    """Whether it has not ended."""
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


@pytest.mark.slow
def test_kill_9_of_a_worker_leaves_no_isolated_process(tmp_path: Path) -> None:
    """They are gone with it; the next worker takes what it had, isolates again, and finds its code on disk."""
    with running(tmp_path, "--workers", "1") as service:
        status, answer = deploy(service, "a", isolation="process", memory_limit=64)
        assert status == 201, answer
        deploy(service, "trusted")
        code = tmp_path / "data" / "code"
        wait_until(lambda: list(code.glob("*.code")))  # compiled once, and written behind the answer
        status, queued = service.call("POST", f"{API}/a/execute", {"input": 60, "async": True})
        assert status == 202, queued
        path = f"{API}/a/executions/{queued['execution_id']}"
        wait_until(lambda: service.call("GET", path)[1]["status"] == "running")
        worker = service.children()["worker-0"]
        before = isolated(worker)
        assert len(before) >= 2, "a zygote and a worker at least"

        os.kill(worker, signal.SIGKILL)
        wait_until(lambda: not any(map(runs, before)))
        service.wait_for_restart("worker-0", worker)
        wait_until(lambda: service.call("GET", path)[1]["status"] == "interrupted", timeout_s=90)
        status, done = service.call("POST", f"{API}/a/execute", {"input": 0})

        assert (status, done["output"], done["memory_bytes"] > 0) == (200, "done", True)
        assert list(code.glob("*.code")), "it outlives the process that compiled it"
        after = isolated(service.children()["worker-0"])
        assert after
    assert not any(map(runs, after))


@pytest.mark.slow
def test_an_operator_can_demand_isolation(tmp_path: Path) -> None:
    """No deployment over HTTP runs in the service's own processes then, whatever it asks for."""
    demanded = {"HEADRACE_AGENTS_ISOLATION_DEFAULT": "process", "HEADRACE_AGENTS_TRUSTED_ALLOWED": "false"}
    with running(tmp_path, "--workers", "1", environment=demanded) as service:
        refused, problem = deploy(service, "a", isolation="trusted")
        status, answer = deploy(service, "a")
        assert status == 201, answer
        _, done = service.call("POST", f"{API}/a/execute", {"input": 0})

    assert (refused, problem["code"]) == (403, "isolation-required")
    assert done["memory_bytes"] > 0
