"""The whole service under load while its parts are killed: it repairs itself, and what it acknowledged is kept."""

import asyncio
import os
import re
import resource
import signal
import subprocess
import sys
import time
from contextlib import contextmanager

import pytest

from headrace.monitor import SnapshotFile
from tests.running import Connection, Load, Service, execute_steadily, running, wait_until, workers_of

pytestmark = pytest.mark.timeout(170)  # each waits for parts of a service to start, which a busy machine does slowly

ECHO = "async def Agent(input, context): return input"

ANSWERED_MIN = 0.9
"""Of what the rate asks for: what waits while a part is away is made up for, the rest is told."""

WHOLE_WITHIN_S = 60.0
"""A part is back within a second or two, but not on a machine that has other things to do."""


@contextmanager
def no_more_files(pid: int):
    """Let a process open nothing for the length of the block, as when the limit is reached."""
    limits = resource.prlimit(pid, resource.RLIMIT_NOFILE)
    resource.prlimit(pid, resource.RLIMIT_NOFILE, (0, limits[1]))
    try:
        yield
    finally:
        resource.prlimit(pid, resource.RLIMIT_NOFILE, limits)


def wait_for_news(service: Service) -> None:
    """Return when a snapshot of a later second than this one is published."""
    file = SnapshotFile(service.log.parent / "data" / "headrace-run" / "snapshot")
    now = time.time()
    wait_until(lambda: (known := file.read()) is not None and known[0].at > now + 1)


def is_healthy(service: Service) -> bool:
    """Whether the worker that answers sees everything up: of a shard that it does not ask, it hears by its probes."""
    status, health = service.call("GET", "/api/v1/system/health")
    return (status, health["status"]) == (200, "ok")


@pytest.fixture(scope="module")
def service(tmp_path_factory):
    """One service for all tests here: each must leave it whole."""
    with running(tmp_path_factory.mktemp("service"), "--workers", "2") as service:
        service.deploy("echo", ECHO)
        yield service


async def whole_again(port: int, *, since: float, within_s: float) -> float:
    """Seconds until 200 executions in a row succeed."""
    in_a_row = 0
    while in_a_row < 200:
        assert time.monotonic() - since < within_s, "the service did not recover in time"
        connection = await Connection.open(port)
        try:
            while in_a_row < 200:
                status, _ = await connection.call("POST", "/api/v1/agents/echo/execute", {"input": 1})
                in_a_row = in_a_row + 1 if status == 200 else 0
                assert time.monotonic() - since < within_s, "the service did not recover in time"
        except ConnectionError:
            in_a_row = 0
        finally:
            await connection.close()
    return time.monotonic() - since


async def under_load(service: Service, kill):
    """Execute 500 times a second, kill something, wait until the service is whole; the load and what was killed."""
    stop = asyncio.Event()
    async with asyncio.TaskGroup() as tasks:
        load = tasks.create_task(execute_steadily(service.port, "echo", rate=500, stop=stop))
        await asyncio.sleep(1)
        killed_at = time.monotonic()
        killed = await asyncio.to_thread(kill)
        await whole_again(service.port, since=killed_at, within_s=WHOLE_WITHIN_S)
        await asyncio.sleep(0.5)
        stop.set()
    return load.result(), killed


async def all_there(service: Service, load: Load) -> None:
    """Nearly all that the rate asked for was acknowledged, and all of that is on record as completed."""
    ids = load.acknowledged
    assert len(ids) >= ANSWERED_MIN * load.due >= ANSWERED_MIN * 500
    assert len(set(ids)) == len(ids)
    connection = await Connection.open(service.port)
    for execution_id in ids:
        status, answer = await connection.call("GET", f"/api/v1/agents/echo/executions/{execution_id}")
        assert (status, answer.get("status")) == (200, "completed"), answer
    await connection.close()


async def test_a_killed_worker_fails_only_what_it_was_answering(service):
    """Its connections break, everybody else is served by the others, and a new worker takes its place."""
    load, killed = await under_load(service, lambda: service.kill("worker-0"))
    await asyncio.to_thread(service.wait_for_restart, "worker-0", killed)
    assert set(load.problems) <= {"ConnectionResetError", "BrokenPipeError"}
    assert len(load.problems) <= 16
    await all_there(service, load)


async def test_a_killed_redis_fails_no_request(service):
    """The cache degrades to the database and comes back by itself."""
    load, killed = await under_load(service, lambda: service.kill("redis"))
    await asyncio.to_thread(service.wait_for_restart, "redis", killed)
    assert load.problems == []
    await all_there(service, load)


@pytest.mark.parametrize("shard", ["shard-0", "shard-1"])
async def test_a_killed_postgres_loses_nothing_that_was_acknowledged(service, shard):
    """Requests wait or are told that the database is away; every answered execution is still there afterwards."""
    load, killed = await under_load(service, lambda: service.kill(shard))
    await asyncio.to_thread(service.wait_for_restart, shard, killed)
    assert set(load.problems) <= {"database-unavailable", "outcome-unknown"}
    await all_there(service, load)
    await asyncio.to_thread(wait_until, lambda: is_healthy(service))


async def test_a_killed_controller_is_restarted(service):
    """Requests go on meanwhile, and the snapshot moves again."""
    load, killed = await under_load(service, lambda: service.kill("controller"))
    await asyncio.to_thread(service.wait_for_restart, "controller", killed)
    assert load.problems == []
    await all_there(service, load)
    await asyncio.to_thread(wait_for_news, service)


def test_a_worker_that_hangs_is_replaced(tmp_path):
    """A stopped process gives no sign of life: it is killed, and its replacement serves."""
    with running(tmp_path, "--workers", "1", environment={"HEADRACE_SERVER_SILENCE_MAX_S": "10"}) as service:
        hanging = service.children()["worker-0"]
        os.kill(hanging, signal.SIGSTOP)
        service.wait_for_restart("worker-0", hanging)
        assert service.call("GET", "/api/v1/agents")[0] == 200


def test_a_supervisor_without_file_descriptors_repairs_when_it_has_some(tmp_path):
    """What dies meanwhile is tried again until it can be started, and the service still stops in order."""
    with running(tmp_path, "--workers", "1") as service:
        with no_more_files(service.process.pid):
            killed = service.kill("worker-0")
            wait_until(lambda: len(service.told("ProcessFailed", "worker-0")) >= 2)
        service.wait_for_restart("worker-0", killed)
        wait_until(lambda: service.call("GET", "/api/v1/agents")[0] == 200)


def test_a_controller_without_file_descriptors_watches_when_it_has_some(tmp_path):
    """It says so, and the same process goes on."""
    with running(tmp_path, "--workers", "1") as service:
        controller = service.children()["controller"]
        wait_for_news(service)
        with no_more_files(controller):
            wait_until(lambda: service.told("MonitorFailed"))
        wait_for_news(service)
        assert service.children()["controller"] == controller


def test_a_service_whose_reader_went_away_lives_on(tmp_path):
    """`headrace up 2>&1 | head`: a line that nobody reads keeps nothing from being repaired or stopped."""
    command = [sys.executable, "-m", "headrace", "up", "--port", "0", "--workers", "1", "--directory", "data"]
    service = subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        while not re.search("headrace is up", service.stdout.readline()):
            assert service.poll() is None
        service.stderr.close()
        (killed,) = workers_of(service.pid)
        os.kill(killed, signal.SIGKILL)
        wait_until(lambda: workers_of(service.pid) - {killed})
        service.send_signal(signal.SIGTERM)
        assert service.wait(60) == 0
    finally:
        if service.poll() is None:
            service.kill()
            service.wait()
        service.stdout.close()
        service.stderr.close()
