"""What holds for every test: nothing blocks the loop, nothing is left running, and in CI nothing is skipped.

HEADRACE_PLAIN=1 imports the hot modules as plain Python although they are compiled. The same happens by itself when
the compiled ones are older than their sources: an edit under test must be what is tested.
"""

import asyncio
import faulthandler
import inspect
import os
import re
import sys
import threading
from collections.abc import AsyncIterator, Iterator
from datetime import timedelta
from functools import cache
from pathlib import Path
from typing import Any

import psutil
import pytest
from blockbuster import BlockBuster
from hypothesis import HealthCheck, settings

from headrace import build
from tests import leftovers
from tests.sources import prefer_sources

PACKAGE = Path(build.__file__).parent
# Tests of the hot modules are known by the names in their path: unit/cache/test_memory.py, properties/test_policies.py
HOT_NAMES = {name for path in build.hot_files() for name in (path.stem, path.parent.name)} - {"cache", "monitor"}
HOT_PATH = re.compile(rf"(?<![a-z0-9])({'|'.join(sorted(HOT_NAMES))})(?![a-z0-9])")

STDERR = pytest.StashKey[int]()
PIDS_BEFORE_CALL = pytest.StashKey[set[int]]()
SKIPPED = pytest.StashKey[list[str]]()
LEFT_BY_WORKERS = pytest.StashKey[list[str]]()
LEFT = "left"
END_OF_HANG = pytest.StashKey[threading.Timer]()
LAST_RESORT_SECONDS = 30.0  # after which a thread that never lets another run is dumped by force

if os.environ.get("HEADRACE_PLAIN") == "1" or build.is_stale():
    prefer_sources(PACKAGE)


def pytest_configure(config: pytest.Config) -> None:
    """Prepare what the hooks below note."""
    config.stash[STDERR] = os.dup(sys.stderr.fileno())  # the real one: tests run with another
    config.stash[SKIPPED] = []
    config.stash[LEFT_BY_WORKERS] = []
    config.pluginmanager.register(SkipLog(config.stash[SKIPPED]))
    leftovers.mark_session()
    # How long an example takes says something of the machine and nothing of the code.
    settings.register_profile("untimed", settings(), deadline=None, suppress_health_check=[HealthCheck.too_slow])
    settings.load_profile("untimed")


def pytest_report_header() -> str:
    """Say which of the two forms of the hot modules is under test."""
    return f"headrace: hot modules are {'compiled' if build.is_compiled() else 'plain Python'}"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark what has to hold for the hot modules in both of their forms."""
    root = Path(__file__).parent
    for item in items:
        if item.path.is_relative_to(root) and HOT_PATH.search(str(item.path.relative_to(root))):
            item.add_marker("hot")


class SkipLog:
    """Notes every skipped test and module."""

    def __init__(self, skipped: list[str]) -> None:
        self.skipped = skipped

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Note a skip; an expected failure is reported as one too, but it did run."""
        if report.skipped and not hasattr(report, "wasxfail"):
            self.skipped.append(report.nodeid)

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        """Note a module that skips itself as a whole."""
        if report.skipped:
            self.skipped.append(report.nodeid)


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: Any) -> None:
    """Take over what a worker of a parallel session found at its end; one that crashed has found nothing."""
    node.config.stash[LEFT_BY_WORKERS] += getattr(node, "workeroutput", {}).get(LEFT, [])


def pytest_sessionfinish(session: pytest.Session) -> None:
    """Fail the session for a skip in CI, where everything must run, and for a process that outlives it."""
    config = session.config
    left = [f"left running: {leftovers.end(process)}" for process in leftovers.processes(psutil.pids())]
    if (output := getattr(config, "workeroutput", None)) is not None:
        output[LEFT] = left
        return
    problems = config.stash[LEFT_BY_WORKERS] + left
    if os.environ.get("CI") == "true":
        problems += [f"skipped, and in CI a skip is a failure: {nodeid}" for nodeid in config.stash[SKIPPED]]
    if problems:
        session.exitstatus = pytest.ExitCode.TESTS_FAILED
        reporter = config.pluginmanager.get_plugin("terminalreporter")
        assert reporter is not None, "pytest runs with its terminal reporter"
        reporter.write_line("")
        for problem in problems:
            reporter.write_line(problem, red=True)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Item) -> Iterator[None]:
    """Note which processes are there before the test itself, but after its fixtures, may start some."""
    item.stash[PIDS_BEFORE_CALL] = set(psutil.pids())
    return (yield)


@pytest.hookimpl(trylast=True)
def pytest_exception_interact(node: pytest.Item | pytest.Collector) -> None:
    """Bound the teardown of a failed test: a task that will not be cancelled would hold the session for ever.

    pytest's own watch stops when a test has failed; this one goes on until the test has been torn down. The stacks are
    dumped by a thread that holds the interpreter's lock: faulthandler's timer does not, and reading the frames of a
    loop that goes on running has crashed before it had printed them.
    """
    seconds, stderr = float(node.config.getini("faulthandler_timeout")), node.config.stash[STDERR]
    if isinstance(node, pytest.Item) and seconds > 0 and END_OF_HANG not in node.stash:
        faulthandler.dump_traceback_later(seconds + LAST_RESORT_SECONDS, exit=True, file=stderr)
        timer = node.stash[END_OF_HANG] = threading.Timer(seconds, end_hang, (seconds, stderr))
        timer.daemon = True
        timer.start()


def end_hang(seconds: float, stderr: int) -> None:
    """End the session with the stacks of all threads."""
    os.write(stderr, f"Timeout ({timedelta(seconds=seconds)})!\n".encode())
    faulthandler.dump_traceback(stderr, all_threads=True)
    os._exit(1)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Iterator[object]:
    """Stop the watch of a failed test that could be torn down."""
    try:
        return (yield)
    finally:
        if timer := item.stash.get(END_OF_HANG, None):
            timer.cancel()


@pytest.fixture(autouse=True)
def clean(request: pytest.FixtureRequest) -> Iterator[None]:
    """Refuse what a test leaves running. Set up before its other fixtures, and so torn down after them."""
    if inspect.iscoroutinefunction(getattr(request.node, "obj", None)):
        request.getfixturevalue("clean_loop")
    threads_before = set(threading.enumerate())
    yield
    before = request.node.stash.get(PIDS_BEFORE_CALL, None)
    new = set(psutil.pids()) - before if before is not None else set()
    left = [leftovers.end(process) for process in leftovers.processes(new, before=before)] if new else []
    if timer := request.node.stash.get(END_OF_HANG, None):
        threads_before.add(timer)
    left += [f"thread {thread.name}" for thread in leftovers.threads(threads_before)]
    if left:
        pytest.fail("The test left running: " + "; ".join(left))


@cache
def loop_guard() -> BlockBuster:
    """What raises when code of headrace blocks a running loop; tests themselves may."""
    return BlockBuster("headrace")


@pytest.fixture
async def clean_loop() -> AsyncIterator[None]:
    """Refuse calls from headrace that block the event loop, and tasks that outlive the test."""
    before = asyncio.all_tasks()
    loop_guard().activate()
    try:
        yield
    finally:
        loop_guard().deactivate()
    if left := leftovers.tasks(before):
        pytest.fail("The test left tasks: " + "; ".join(repr(task) for task in left))
