"""What tests/conftest.py promises of every session, proven on sessions that break the promise."""

import os
import re
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

ROOT = Path(__file__).parents[2]

# A session of its own is up to four processes that import everything.
SESSION_S_MAX = 150.0
pytestmark = pytest.mark.timeout(165)

LEAKS = """
import asyncio, subprocess, sys, threading, time
from headrace import build
from tests import leftovers

leftovers.GRACE_S = 1.0
TASKS = set()
BLOCKING = {}
# Code counts as headrace's by the file that it was compiled from.
exec(compile("import time\\ndef block(): time.sleep(0)", build.__file__.replace("build", "planted"), "exec"), BLOCKING)

async def test_task_left():
    TASKS.add(asyncio.create_task(asyncio.sleep(60), name="planted-task"))

async def test_blocked_loop():
    BLOCKING["block"]()

async def test_test_that_blocks_itself():
    time.sleep(0)

async def test_task_that_was_awaited():
    await asyncio.create_task(asyncio.sleep(0))

def test_thread_left():
    threading.Thread(target=time.sleep, args=(60,), name="planted-thread", daemon=True).start()

def test_process_left():
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    child.returncode = 0  # hushes its ResourceWarning

def test_daemon_left():
    double_fork = "import os, time\\nif os.fork() == 0:\\n    os.setsid()\\n    time.sleep(60)"
    subprocess.run([sys.executable, "-c", double_fork], check=True)
"""

SKIPS = """
import pytest

def test_that_runs():
    assert True

@pytest.mark.skip(reason="planted")
def test_that_is_skipped():
    raise AssertionError

@pytest.mark.xfail(reason="planted", strict=True)
def test_that_fails_as_expected():
    raise AssertionError
"""

HANG = """
import asyncio, contextlib

async def stay():
    while True:
        with contextlib.suppress(BaseException):
            await asyncio.sleep(0)

async def test_that_fails_and_leaves_a_task_that_cannot_be_cancelled():
    task = asyncio.create_task(stay())
    raise AssertionError
"""

SERVER_OF_A_FIXTURE = """
import subprocess, sys, pytest
from tests import leftovers

leftovers.GRACE_S = 1.0

@pytest.fixture(scope="session")
def server():
    return subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])

def test_that_uses_it(server):
    assert server.poll() is None
    server.returncode = 0  # hushes its ResourceWarning
"""


Session = subprocess.CompletedProcess[str]
ALONE_AND_PARALLEL = pytest.mark.parametrize("workers", ["0", "1"])


def run_session(directory: Path, source: str, *options: str, **environment: str) -> Session:
    planted = directory / "test_planted.py"
    planted.write_text(source)
    ours = ["-c", str(ROOT / "pyproject.toml"), f"--rootdir={directory}", "-p", "tests.conftest", "-rA"]
    return subprocess.run(
        [sys.executable, "-m", "pytest", *ours, *options, planted.name],
        cwd=directory,
        env={**os.environ, "PYTHONPATH": str(ROOT), "COLUMNS": "200", "CI": "", **environment},
        capture_output=True,
        text=True,
        timeout=SESSION_S_MAX,
        check=False,
    )


def started_pids(session: Session) -> set[int]:
    return {int(pid) for pid in re.findall(r"left running: pid (\d+)", session.stdout)}


def is_running(pid: int) -> bool:
    """A zombie has ended; whether it is collected is up to the init process."""
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


@pytest.fixture(scope="module")
def leaks(tmp_path_factory: pytest.TempPathFactory) -> Session:
    return run_session(tmp_path_factory.mktemp("leaks"), LEAKS)


@pytest.mark.parametrize(
    ("test", "reason"),
    [
        ("test_task_left", "planted-task"),
        ("test_thread_left", "thread planted-thread"),
        ("test_process_left", "time.sleep(60) (started in test_planted.py::test_process_left (call))"),
        ("test_daemon_left", "(started in test_planted.py::test_daemon_left (call))"),
    ],
)
def test_what_a_test_leaves_running_is_its_error(leaks: Session, test: str, reason: str) -> None:
    """A task, thread, child or daemon that outlives a test is an error of that test, which names what was left."""
    assert f"ERROR test_planted.py::{test} " in leaks.stdout
    assert reason in leaks.stdout


def test_headrace_may_not_block_the_loop(leaks: Session) -> None:
    """A blocking call from code of headrace on a running loop fails the test."""
    assert "FAILED test_planted.py::test_blocked_loop - blockbuster.blockbuster.BlockingError" in leaks.stdout


@pytest.mark.parametrize("test", ["test_test_that_blocks_itself", "test_task_that_was_awaited"])
def test_tests_may_block_and_await(leaks: Session, test: str) -> None:
    """A test's own blocking call and a task that it awaited are no one's error."""
    assert f"PASSED test_planted.py::{test}" in leaks.stdout
    assert f"ERROR test_planted.py::{test}" not in leaks.stdout


def test_nothing_of_a_session_survives_it(leaks: Session) -> None:
    """What a test left running has been ended by the time the session is over."""
    assert leaks.returncode == 1
    assert len(started_pids(leaks)) == 2
    assert not any(is_running(pid) for pid in started_pids(leaks))


@ALONE_AND_PARALLEL
def test_a_process_of_a_wider_fixture_is_found_at_the_end(tmp_path: Path, workers: str) -> None:
    """A session's fixture that forgets its server fails the session, which names the test that it was started for."""
    session = run_session(tmp_path, SERVER_OF_A_FIXTURE, "-n", workers)

    assert session.returncode == 1
    assert "1 passed" in session.stdout
    assert "(started in test_planted.py::test_that_uses_it (setup))" in session.stdout


@ALONE_AND_PARALLEL
def test_a_hang_ends_the_session(tmp_path: Path, workers: str) -> None:
    """What cannot be torn down ends the session with a dump of all stacks, instead of holding it for ever."""
    session = run_session(tmp_path, HANG, "-n", workers, "-o", "faulthandler_timeout=2")

    assert session.returncode == 1
    assert "Timeout (0:00:02)!" in session.stderr
    assert "most recent call first" in session.stderr


def test_a_hang_ends_the_session_only_after_the_time_that_the_test_has(pytestconfig: pytest.Config) -> None:
    """What is slow and allowed to be is not taken for a hang: the longest timeout of any test comes first."""
    marks = (re.findall(r"mark\.timeout\((\d+)\)", path.read_text()) for path in (ROOT / "tests").rglob("*.py"))
    timeouts = [float(seconds) for found in marks for seconds in found]

    assert timeouts, "some tests have one of their own"
    longest = max(*timeouts, float(pytestconfig.getini("timeout")))
    assert longest < float(pytestconfig.getini("faulthandler_timeout"))


@ALONE_AND_PARALLEL
def test_a_skip_fails_the_session_in_ci(tmp_path: Path, workers: str) -> None:
    """With CI=true a skipped test is named and fails the session; an expected failure is not a skip."""
    session = run_session(tmp_path, SKIPS, "-n", workers, CI="true")

    assert session.returncode == 1
    assert "in CI a skip is a failure: test_planted.py::test_that_is_skipped" in session.stdout
    assert session.stdout.count("in CI a skip is a failure") == 1


def test_a_skip_is_allowed_elsewhere(tmp_path: Path) -> None:
    """On a developer's machine a skipped test does not fail the session."""
    session = run_session(tmp_path, SKIPS)

    assert session.returncode == 0
