import subprocess
import sys
from pathlib import Path

import pytest

from headrace.embedded import started, wait_until_ready
from headrace.embedded.log import ServerLog
from headrace.errors import DirectoryInUse, DirectoryUnusable, EmbeddedServerFailed


class Script:
    """A server that is a Python script; it is ready when it has made the file `ready`."""

    def __init__(self, directory: Path, script: str) -> None:
        self.name = "script"
        self.directory = directory
        self.prepared = self.stopped = 0
        self._script = script
        self._log = ServerLog(directory / "log")

    @property
    def url(self) -> str:
        return "script://"

    def prepare(self) -> None:
        self.prepared += 1

    def spawn(self) -> subprocess.Popen[bytes]:
        with self._log.writing() as file:
            return subprocess.Popen([sys.executable, "-c", self._script], cwd=self.directory, stdout=file, stderr=file)

    def is_ready(self) -> bool:
        return (self.directory / "ready").exists()

    def stop(self, process: subprocess.Popen[bytes], *, timeout_s: float = 10.0) -> None:
        process.kill()
        process.wait(timeout_s)
        self.stopped += 1

    def log_tail(self, lines: int = 20) -> str:
        return self._log.tail(lines)


class Jumping:
    """A clock on which every look costs ten seconds."""

    def __init__(self) -> None:
        self._now = 0.0

    def monotonic(self) -> float:
        self._now += 10
        return self._now

    def wall(self) -> float:
        return self._now

    async def sleep(self, seconds: float) -> None:
        raise AssertionError("nothing here is asynchronous")


def test_a_started_server_is_ready_and_stopped_afterwards(tmp_path: Path) -> None:
    """Within the block it answers; after it, it has been stopped once."""
    server = Script(tmp_path, "open('ready', 'w').close(); import signal; signal.pause()")
    with started(server) as running:
        assert running is server
        assert server.is_ready()
    assert (server.prepared, server.stopped) == (1, 1)


def test_a_server_that_ends_at_once_is_quoted(tmp_path: Path) -> None:
    """The error has the status and the end of the log, and what the log says decides its kind."""
    with (
        pytest.raises(EmbeddedServerFailed, match=r"script in .* ended with status 3\. It said:\n  out of luck"),
        started(Script(tmp_path, "print('out of luck'); raise SystemExit(3)")),
    ):
        pytest.fail("it is not ready")
    with (
        pytest.raises(DirectoryUnusable, match="No space left"),
        started(Script(tmp_path, "raise SystemExit('No space left on device')")),
    ):
        pytest.fail("it is not ready")


def test_a_server_that_never_answers_is_given_up_and_stopped(tmp_path: Path) -> None:
    """The wait ends by the clock, and the process does not outlive it."""
    server = Script(tmp_path, "import signal; signal.pause()")
    process = server.spawn()
    with pytest.raises(EmbeddedServerFailed, match="not ready after 25 s"):
        wait_until_ready(server, process, timeout_s=25, clock=Jumping())
    server.stop(process)
    with pytest.raises(EmbeddedServerFailed), started(server, timeout_s=25, clock=Jumping()):
        pytest.fail("it is not ready")
    assert server.stopped == 2


def test_a_server_is_stopped_when_the_body_fails(tmp_path: Path) -> None:
    """A failing test leaves no process behind."""
    server = Script(tmp_path, "open('ready', 'w').close(); import signal; signal.pause()")
    with pytest.raises(ZeroDivisionError), started(server):
        _ = 1 / 0
    assert server.stopped == 1


def test_one_directory_runs_one_server(tmp_path: Path) -> None:
    """A second start in the same directory is refused before it touches anything."""
    script = "open('ready', 'w').close(); import signal; signal.pause()"
    second = Script(tmp_path, script)
    with started(Script(tmp_path, script)), pytest.raises(DirectoryInUse), started(second):
        pytest.fail("two servers in one directory")
    assert second.prepared == 0


def test_importing_the_room_loads_no_driver() -> None:
    """Who only wants the url of a server does not pay for psycopg and redis-py."""
    script = "import sys, headrace.embedded; print({'psycopg', 'redis'} & set(sys.modules))"
    outcome = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert outcome.stdout == "set()\n"
