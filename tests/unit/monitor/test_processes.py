"""Telling a process from another one that was given its id later."""

import os
import subprocess
import sys

from headrace.monitor.processes import is_alive, started

SLEEPER = [sys.executable, "-c", "import sys; sys.stdin.read()"]


def test_a_process_keeps_its_mark():
    """The same process, asked twice, began at the same moment."""
    assert started(os.getpid()) == started(os.getpid()) > 0
    assert is_alive(os.getpid(), started(os.getpid()))


def test_the_id_alone_is_not_enough():
    """Another mark under the same id is another process, and the empty mark is nobody."""
    assert not is_alive(os.getpid(), started(os.getpid()) + 1)
    assert not is_alive(os.getpid(), 0)


def test_a_dead_process_has_no_mark_even_before_it_is_buried():
    """A zombie still has its id, but it writes no more."""
    process = subprocess.Popen(SLEEPER, stdin=subprocess.PIPE)
    mark = started(process.pid)
    assert is_alive(process.pid, mark)

    process.stdin.close()
    os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)

    assert not is_alive(process.pid, mark)
    process.wait()
    assert started(process.pid) == 0


def test_an_id_that_nobody_has():
    """No process, no mark, no error."""
    assert started(2**22 + 1) == 0
