"""The server under test: it starts when asked, and whatever happens it is gone in the end."""

import asyncio
import sys
from pathlib import Path

import psutil
import pytest

from headrace.cli.bench.client import Client
from headrace.cli.bench.server import ServerUnderTest, up_command
from headrace.clock import SystemClock
from headrace.errors import BenchFailed
from tests.unit.cli.bench import stand_in

DEAF = """
import signal, subprocess, sys
signal.signal(signal.SIGTERM, signal.SIG_IGN)
child = subprocess.Popen([sys.executable, "-c", "import signal; signal.pause()"])
print("headrace is up: http://127.0.0.1:1", flush=True)
signal.pause()
"""


def stand_in_command(directory: Path) -> list[str]:
    """`headrace up` with its name replaced: everything else is as the benchmark passes it."""
    python, _, _, *arguments = up_command(directory, workers=2)
    return [python, stand_in.__file__, *arguments]


def script(text: str):
    """A command that runs this Python text instead of a server."""
    return lambda directory: [sys.executable, "-c", text]


async def ask_until_it_fails(server: ServerUnderTest) -> None:
    """Ask for the URL again and again, for at most a minute."""
    async with asyncio.timeout(60):
        while await server.url():
            await asyncio.sleep(0)


def under_test(command, directory: Path, **options) -> ServerUnderTest:
    return ServerUnderTest(command, directory=directory, clock=SystemClock(), **options)


async def test_a_server_starts_when_first_asked_for_and_stops_in_the_end(tmp_path, children):
    """Asking twice starts once; leaving the block ends the process."""
    clock = SystemClock()
    async with under_test(stand_in_command, tmp_path) as server:
        assert children() == []
        url = await server.url()
        assert await server.url() == url
        (process,) = children()
        async with Client(url, clock=clock) as client:
            health = await client.request("GET", "/api/v1/system/health")

    assert health.json()["workers"] == [{"pid": process.pid}]
    assert 0 < health.seconds < 30
    assert not process.is_running()


async def test_a_server_is_stopped_when_the_work_fails(tmp_path, children):
    """An error on the way out takes the server along."""

    async def fail_while_it_runs() -> None:
        async with under_test(stand_in_command, tmp_path) as server:
            await server.url()
            raise RuntimeError("the scenario is wrong")

    with pytest.raises(RuntimeError, match="the scenario is wrong"):
        await fail_while_it_runs()

    assert children() == []


async def test_a_server_that_does_not_start_is_an_error_with_its_last_words(tmp_path):
    """The end of what it said is in the message; asking again does not try again."""
    command = script("import sys; print('the port is taken', file=sys.stderr); sys.exit(3)")

    async with under_test(command, tmp_path) as server:
        with pytest.raises(BenchFailed, match=r"(?s)code 3.*the port is taken"):
            await server.url()
        with pytest.raises(BenchFailed, match="code 3"):
            await server.url()


async def test_a_server_that_is_never_ready_is_given_up(tmp_path, children):
    """Waiting has a limit, and what hangs is stopped."""
    command = script("import signal; print('warming up', flush=True); signal.pause()")

    async with under_test(command, tmp_path, ready_s_max=0.5) as server:
        with pytest.raises(BenchFailed, match="not up after"):
            await server.url()

    assert children() == []


async def test_a_server_that_died_meanwhile_is_not_handed_out(tmp_path, children):
    """The next scenario is told at once, instead of measuring nothing."""
    async with under_test(stand_in_command, tmp_path) as server:
        await server.url()
        (process,) = children()
        process.kill()
        with pytest.raises(BenchFailed, match="code -9"):
            await ask_until_it_fails(server)


async def test_a_server_that_ignores_the_signal_is_killed_with_its_children(tmp_path, children):
    """Nothing outlives the benchmark, and that it had to be killed is said."""

    async def use() -> None:
        async with under_test(script(DEAF), tmp_path, stop_s_max=0.3) as server:
            await server.url()
            family.extend(children())

    family: list[psutil.Process] = []
    with pytest.raises(BenchFailed, match="did not stop within"):
        await use()

    assert len(family) == 2
    _, alive = psutil.wait_procs(family, timeout=30)
    assert alive == []
