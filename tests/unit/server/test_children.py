"""What the supervisor knows of its own processes."""

import asyncio
import select
import signal

import psutil
import pytest

from headrace.server.assignment import Assignment
from headrace.server.children import OwnChild
from headrace.testing import FakeClock

BEATING = """
import json, os, sys, time

alive_fd = json.loads(sys.argv[1])["alive_fd"]
while True:
    os.write(alive_fd, b".")
    time.sleep(0.01)
"""


@pytest.fixture
def clock():
    """The clock of who listens; it stands still until it is told otherwise."""
    return FakeClock()


@pytest.fixture
def with_child(tmp_path, monkeypatch, clock):
    """Calls a function with a process that beats, on a loop that is not watched for what blocks it."""
    (tmp_path / "beating.py").write_text(BEATING)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))

    def assign(alive_fd):
        return Assignment(config_path=None, run_directory=str(tmp_path), supervisor_pid=1, alive_fd=alive_fd)

    async def whole(look):
        child = OwnChild("beating", "beating", assign, clock=clock, stop_timeout_s=0.0)
        process = child.spawn()
        try:
            async with asyncio.timeout(60):
                await child.wait_until_ready(process)
            look(child, psutil.Process(process.pid))
        finally:
            process.kill()
            process.wait()
            await child.stop(process)

    return lambda look: asyncio.run(whole(look))


def test_a_sign_of_life_counts_although_it_was_not_heard_in_time(with_child, clock):
    """Who was held up himself does not take that for the silence of the others."""

    def look(child, process):
        clock.advance(100.0)
        beats, _, _ = select.select([child._read_fd], [], [], 10)
        assert beats
        assert child.silent_s() == 0.0

    with_child(look)


def test_a_process_that_hangs_is_silent(with_child, clock):
    """What it had said before is heard once, and nothing after that."""

    def look(child, process):
        process.send_signal(signal.SIGSTOP)
        while process.status() != psutil.STATUS_STOPPED:
            assert process.is_running()
        child.silent_s()
        clock.advance(100.0)
        assert child.silent_s() == 100.0

    with_child(look)
