"""The zygote as its host sees it."""

import asyncio
import os

import psutil
import pytest

from headrace.agents.isolation import IsolationConfig, page, probe
from headrace.agents.isolation.nursery import Nursery
from headrace.clock import SystemClock
from headrace.events import Silent

achievable = probe()
pytestmark = pytest.mark.skipif(achievable.level != "process", reason=f"this kernel lacks {achievable.missing}")


async def test_a_worker_that_comes_together_with_the_cancellation_is_collected() -> None:
    """Its pid was told already and nobody heard it: no process is left, not even an ended one."""
    before = set(psutil.Process().children())
    nursery = Nursery(IsolationConfig(), clock=SystemClock(), observer=Silent())
    await nursery.open()
    descriptor, shared = page.create()
    reading, writing = os.pipe()
    call = asyncio.ensure_future(nursery.fork(0, (writing, writing, descriptor)))
    connection = nursery._socket
    assert connection is not None

    def hear_and_leave() -> None:
        nursery._receive()
        call.cancel()

    asyncio.get_running_loop().add_reader(connection.fileno(), hear_and_leave)
    with pytest.raises(asyncio.CancelledError):
        await call
    for each in (descriptor, reading, writing):
        os.close(each)
    shared.close()
    await nursery.close()

    assert set(psutil.Process().children()) <= before
