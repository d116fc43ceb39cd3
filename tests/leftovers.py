"""What a test left running: asyncio tasks, threads and operating-system processes.

A process counts as ours when it descends from the test session or, because a daemon gives up its parent, when it
carries the session's mark in its environment.
"""

import asyncio
import os
import threading
import time
from collections.abc import Collection, Iterable, Iterator
from contextlib import suppress

import psutil

MARK = "HEADRACE_TEST_SESSION"

# A process or thread that was told to end may need a moment to be gone, and a busy machine some more.
GRACE_S = 10.0
COMMAND_CHARACTERS_MAX = 120


def mark_session() -> None:
    """Let every process that is started from here on carry this session's mark."""
    os.environ[MARK] = str(os.getpid())


def tasks(before: Collection["asyncio.Task[object]"]) -> list["asyncio.Task[object]"]:
    """The tasks of the running loop that are not done, without `before` and the caller's own."""
    return [task for task in asyncio.all_tasks() if task not in before and task is not asyncio.current_task()]


def threads(before: Collection[threading.Thread]) -> list[threading.Thread]:
    """The threads of this process that outlive the grace, without `before`.

    Those of a loop's default executor are not counted: they end with the loop, which ends after the test's fixtures.
    Neither are threads that Python did not start, which it can neither join nor see end.
    """
    new = (thread for thread in threading.enumerate() if thread not in before)
    found = [thread for thread in new if not thread.name.startswith(("asyncio_", "Dummy-"))]
    deadline = time.monotonic() + GRACE_S
    for thread in found:
        thread.join(max(0.0, deadline - time.monotonic()))
    return [thread for thread in found if thread.is_alive()]


def processes(pids: Iterable[int], *, before: Collection[int] = ()) -> list[psutil.Process]:
    """Our processes among `pids` that outlive the grace.

    Those in `before` are not counted, and neither is what they started: a server of wider scope than one test may
    renew its workers while the test runs.
    """
    family = {process.pid for process in psutil.Process().children(recursive=True)}
    elders = {process.pid for process in _ours(before, family)}
    found = [process for process in _ours(set(pids).difference(before), family) if not _descends(process, elders)]
    return psutil.wait_procs(found, timeout=GRACE_S)[1]


def end(process: psutil.Process) -> str:
    """Kill a process, so that it cannot disturb the next test; return what it was and which test started it."""
    with suppress(psutil.NoSuchProcess):
        command = " ".join(" ".join(process.cmdline()).split()) or process.name()
        started_in = process.environ().get("PYTEST_CURRENT_TEST", "an unknown test")
        process.kill()
        with suppress(psutil.TimeoutExpired):
            process.wait(GRACE_S)
        return f"pid {process.pid}: {command[:COMMAND_CHARACTERS_MAX]} (started in {started_in})"
    return f"pid {process.pid}: gone meanwhile"


def _ours(pids: Iterable[int], family: Collection[int]) -> Iterator[psutil.Process]:
    for pid in pids:
        with suppress(psutil.NoSuchProcess, psutil.AccessDenied):
            process = psutil.Process(pid)
            # An ended process only waits to be collected; the tracker belongs to the interpreter and ends with it.
            if process.status() == psutil.STATUS_ZOMBIE or "multiprocessing.resource_tracker" in str(
                process.cmdline()
            ):
                continue
            if pid in family or (pid != os.getpid() and process.environ().get(MARK) == os.environ[MARK]):
                yield process


def _descends(process: psutil.Process, elders: Collection[int]) -> bool:
    with suppress(psutil.NoSuchProcess):
        return any(parent.pid in elders for parent in process.parents())
    return False
