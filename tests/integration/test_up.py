"""`headrace up`: comes up, refuses politely, scales, wraps an application, and leaves nothing behind."""

import asyncio
import os
import re
import signal
import socket
import subprocess
import sys
import urllib.request

import psutil
import pytest

from headrace.actions import ScaleWorkers
from headrace.app import Rooms
from headrace.config import Config
from tests.running import one_call, running, wait_until

pytestmark = pytest.mark.timeout(170)  # some start a service twice, and a busy machine does that slowly

APP = """
from contextlib import asynccontextmanager

from starlette.applications import Starlette
from starlette.responses import PlainTextResponse
from starlette.routing import Route

state = {}

@asynccontextmanager
async def lifespan(app):
    state["opened"] = "yes"
    yield

async def hello(request):
    return PlainTextResponse(f"hello {state['opened']}", headers={"content-type": "application/json"})

app = Starlette(routes=[Route("/hello", hello)], lifespan=lifespan)
not_an_app = 5
"""

SLOW = """
import asyncio
from pathlib import Path

async def Agent(input, context):
    Path(input).touch()
    await asyncio.sleep(1)
    return 7
"""


def attempt(tmp_path, *arguments, environment=None):
    """`headrace up` that is expected to refuse: its exit code and what it said."""
    done = subprocess.run(
        [sys.executable, "-m", "headrace", "up", "--directory", str(tmp_path / "data"), *arguments],
        capture_output=True,
        text=True,
        timeout=100,
        cwd=tmp_path,
        env={**os.environ, **(environment or {})},
        check=False,
    )
    return done.returncode, done.stdout + done.stderr


def test_a_taken_port_is_named(tmp_path):
    """Nothing is started, not even a directory is made."""
    with socket.socket() as holder:
        holder.bind(("127.0.0.1", 0))
        holder.listen()
        port = holder.getsockname()[1]
        code, said = attempt(tmp_path, "--port", str(port))
    assert code == 1
    assert f"Port {port} of 127.0.0.1 is taken" in said
    assert "--port" in said
    assert not (tmp_path / "data").exists()


@pytest.mark.parametrize(
    ("arguments", "environment", "said"),
    [
        (["--host", "0.0.0.0"], {}, "no server.token"),
        ([], {"HEADRACE_SERVER_PROT": "1"}, "Did you mean 'HEADRACE_SERVER_PORT'"),
        (["--config", "absent.toml"], {}, "cannot be read"),
        (["--port", "0", "nowhere:app"], {}, "'nowhere:app' cannot be imported"),
        (["--port", "0", "module"], {}, "Write it as module:app"),
    ],
)
def test_a_mistake_is_told_and_nothing_stays_up(tmp_path, arguments, environment, said):
    """Exit code 1, the reason, the fix."""
    code, output = attempt(tmp_path, *arguments, environment=environment)
    assert code == 1
    assert said in output
    assert "Fix:" in output


def test_a_directory_of_another_postgres_is_refused(tmp_path):
    """Both versions are named, and the data is left alone."""
    data = tmp_path / "data" / "shard-0" / "data"
    data.mkdir(parents=True)
    (data / "PG_VERSION").write_text("13\n")
    code, said = attempt(tmp_path, "--port", "0")
    assert code == 1
    assert "13" in said
    assert (data / "PG_VERSION").read_text() == "13\n"


def test_a_second_service_in_one_directory_is_refused(tmp_path):
    """It names the first, which is not disturbed."""
    with running(tmp_path, "--workers", "1") as service:
        code, said = attempt(tmp_path, "--port", "0")
        assert code == 1
        assert str(service.process.pid) in said
        assert service.call("GET", "/api/v1/system/health")[0] == 200


def test_workers_are_added_and_removed_by_signals(tmp_path):
    """SIGTTIN adds one, SIGTTOU drains one, and the last one stays."""
    with running(tmp_path, "--workers", "1") as service:
        wait_until(lambda: len(service.workers()) == 1)
        service.process.send_signal(signal.SIGTTIN)
        wait_until(lambda: len(service.workers()) == 2)
        service.process.send_signal(signal.SIGTTOU)
        wait_until(lambda: len(service.workers()) == 1)
        service.process.send_signal(signal.SIGTTOU)
        service.deploy("echo", "async def Agent(input, context): return input")
        assert len(service.workers()) == 1
        wait_until(lambda: len(service.call("GET", "/api/v1/system/health")[1]["workers"]) == 1)


def test_workers_are_scaled_to_a_number(tmp_path):
    """One action reaches any number, up or down, however many signals the kernel makes into one."""
    with running(tmp_path, "--workers", "1") as service:
        rooms = Rooms(Config(), directory=tmp_path / "data" / "headrace-run", supervisor_pid=service.process.pid)
        for workers in (4, 2):
            asyncio.run(rooms.apply(ScaleWorkers(workers=workers)))
            wait_until(lambda workers=workers: len(service.workers()) == workers)
        rooms.monitor.counters.close()


def test_a_worker_that_is_added_and_cannot_start_takes_nothing_down(tmp_path):
    """What would keep the service from coming up is, later, only tried again until it is mended."""
    module = tmp_path / "mine.py"
    module.write_text(APP)
    environment = {"PYTHONPATH": str(tmp_path), "PYTHONDONTWRITEBYTECODE": "1"}
    with running(tmp_path, "--workers", "1", "mine:app", environment=environment) as service:
        module.write_text("import nothing_of_this_name")
        service.process.send_signal(signal.SIGTTIN)
        wait_until(lambda: len(service.told("ProcessFailed", "worker-1")) >= 2)
        assert service.told("ProcessExited", "worker-1")[0]["exit_code"] == 78
        assert service.call("GET", "/api/v1/system/health")[0] == 200
        module.write_text(APP)
        wait_until(lambda: len(service.call("GET", "/api/v1/system/health")[1]["workers"]) == 2)


def test_a_folder_of_the_user_is_left_alone(tmp_path):
    """In a project's own directory what the service did not make stays as it is, even beside what it did."""
    mine = tmp_path / "data" / "run" / "notes.txt"
    mine.parent.mkdir(parents=True)
    mine.write_text("mine")
    other = tmp_path / "data" / "headrace-run" / "notes.txt"
    other.parent.mkdir(mode=0o700)
    other.write_text("mine too")
    with running(tmp_path, "--workers", "1"):
        assert (tmp_path / "data" / "headrace-run" / "counters").exists()
    assert (mine.read_text(), other.read_text()) == ("mine", "mine too")


@pytest.mark.parametrize("make", [lambda path: path.write_text("mine"), lambda path: path.symlink_to(path.parent)])
def test_what_stands_in_the_place_of_the_run_directory_is_named(tmp_path, make):
    """A file or a link of that name is refused and left, not followed and not removed."""
    in_the_way = tmp_path / "data" / "headrace-run"
    in_the_way.parent.mkdir()
    make(in_the_way)
    code, said = attempt(tmp_path, "--port", "0")
    assert code == 1
    assert str(in_the_way) in said
    assert "Fix:" in said
    assert "Traceback" not in said
    assert in_the_way.is_file() or in_the_way.is_symlink()


def test_killing_the_supervisor_leaves_no_process(tmp_path):
    """The kernel ends its children, and the next one starts in the same directory with the same data."""
    with running(tmp_path, "--workers", "1") as service:
        service.deploy("echo", "async def Agent(input, context): return input")
        children = psutil.Process(service.process.pid).children(recursive=True)
        service.process.kill()
        service.process.wait()
        _, alive = psutil.wait_procs(children, timeout=60)
        assert alive == []
    with running(tmp_path, "--workers", "1") as service:
        assert service.call("GET", "/api/v1/agents/echo")[0] == 200


def test_a_worker_that_spins_dies_with_the_supervisor(tmp_path):
    """An agent in a C function without an end, which nothing interrupts, cannot keep the worker, and with it the port,
    alive."""
    with running(tmp_path, "--workers", "1") as service:
        service.deploy("spin", "import itertools\nasync def Agent(input, context):\n    sum(itertools.repeat(1))")
        worker = psutil.Process(*service.workers())
        body = b'{"input": 1}'
        with socket.create_connection(("127.0.0.1", service.port)) as client:
            client.sendall(
                b"POST /api/v1/agents/spin/execute HTTP/1.1\r\nhost: localhost\r\n"
                b"content-type: application/json\r\ncontent-length: %d\r\n\r\n%b" % (len(body), body)
            )
            before = worker.cpu_times().user
            wait_until(lambda: worker.cpu_times().user > before + 0.5)
            children = psutil.Process(service.process.pid).children(recursive=True)
            service.process.kill()
            service.process.wait()
            _, alive = psutil.wait_procs(children, timeout=60)
        for child in alive:
            child.kill()
        assert alive == []


def test_an_agent_that_spins_is_interrupted_and_its_worker_serves_on(tmp_path):
    """Its execution fails and says why, in the same worker; what the collector costs is among the metrics."""
    with running(tmp_path, "--workers", "1") as service:
        service.deploy("spin", "async def Agent(input, context):\n    while True: pass")
        workers = service.workers()

        status, execution = service.call("POST", "/api/v1/agents/spin/execute", {"input": 1})

        assert (status, execution["status"]) == (200, "failed")
        said = re.match(
            r"StepTooLong: It held the event loop for (\d+\.\d\d) s; a step may take 1 s", execution["error"]
        )
        assert said is not None, execution["error"]
        assert float(said[1]) >= 1
        assert service.workers() == workers
        metrics = f"http://127.0.0.1:{service.port}/metrics"
        wait_until(lambda: b"headrace_gc_pauses_total" in urllib.request.urlopen(metrics).read())


def answers(process):
    """Whether the service, on whatever port it listens, says that it is well."""
    connections = psutil.Process(process.pid).net_connections("tcp")
    ports = [each.laddr.port for each in connections if each.status == psutil.CONN_LISTEN]
    return bool(ports) and asyncio.run(one_call(ports[0], "GET", "/api/v1/system/health"))[0] == 200


def test_it_serves_on_when_nobody_reads_what_it_prints(tmp_path):
    """Standard output whose reader has gone and no standard error at all: as after a terminal was closed."""
    read_end, write_end = os.pipe()
    command = f"exec {sys.executable} -m headrace up --workers 1 --port 0 --directory {tmp_path / 'data'} 2>&-"
    process = subprocess.Popen(["sh", "-c", command], stdout=write_end)
    os.close(write_end)
    os.close(read_end)
    try:
        wait_until(lambda: process.poll() is not None or answers(process), timeout_s=100)
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 0
    finally:
        process.kill()
        process.wait()


def test_it_wraps_an_application(tmp_path):
    """What is not ours is answered by the application, whose own lifespan has run."""
    (tmp_path / "mine.py").write_text(APP)
    os_path = {"PYTHONPATH": str(tmp_path)}
    with running(tmp_path, "--workers", "1", "mine:app", environment=os_path) as service:
        connection = socket.create_connection(("127.0.0.1", service.port))
        connection.sendall(b"GET /hello HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n")
        answer = b""
        while chunk := connection.recv(4096):
            answer += chunk
        connection.close()
        assert answer.startswith(b"HTTP/1.1 200")
        assert answer.endswith(b"hello yes")
        assert service.call("GET", "/api/v1/system/health")[0] == 200
    code, said = attempt(tmp_path, "--port", "0", "mine:not_an_app", environment=os_path)
    assert code == 1
    assert "is a int, not an ASGI application" in said


def test_a_stopping_service_answers_what_it_accepted(tmp_path):
    """SIGTERM while an execution runs: the client gets its result."""
    with running(tmp_path, "--workers", "1") as service:
        service.deploy("slow", SLOW)
        begun = tmp_path / "begun"

        async def stop_meanwhile():
            body = {"input": str(begun)}
            call = asyncio.create_task(one_call(service.port, "POST", "/api/v1/agents/slow/execute", body))
            await asyncio.to_thread(wait_until, begun.exists)
            service.stop()
            return await call

        status, execution = asyncio.run(stop_meanwhile())
    assert (status, execution["output"]) == (200, 7)


def test_a_token_guards_everything_but_health_and_page(tmp_path):
    """Without it 401 and a fix; with it the service; the token itself is in no log."""
    token = "a token of more than sixteen characters"
    with running(tmp_path, "--workers", "1", environment={"HEADRACE_SERVER_TOKEN": token}) as service:
        assert service.call("GET", "/api/v1/system/health")[0] == 200
        for path in ("/api/v1/agents", "/metrics", "/openapi.json", "/docs", "/api/v1/system/history"):
            status, problem = service.call("GET", path)
            assert (status, problem["code"]) == (401, "unauthorized")
        client = [sys.executable, "-m", "headrace", "agents", "--url", service.url, "list"]
        for offered, code in ((token, 0), ("another token of sixteen", 1)):
            done = subprocess.run(
                client, env={**os.environ, "HEADRACE_SERVER_TOKEN": offered}, capture_output=True, check=False
            )
            assert done.returncode == code
        assert token not in service.log.read_text()
