"""Hooks of loaded versions that do not end: nobody waits for them longer than they may take."""

import asyncio
import builtins
import threading
from dataclasses import replace
from functools import partial

import pytest

from headrace.agents import AgentHost, AgentsConfig
from headrace.errors import AgentUnhealthy
from headrace.testing import FakeClock

QUICK = {"cancel_grace_s": 0.05, "drain_s": 0.05}
# Swallows every cancellation until it is released; a real one does so for ever.
STUBBORN = """
import asyncio, builtins
class Agent:
    async def {hook}(self):
        while not builtins.headrace_released.is_set():
            try:
                await asyncio.sleep(0.05)
            except asyncio.CancelledError:
                continue
    async def execute(self, input, context):
        return input
"""


@pytest.fixture
def released(monkeypatch):
    """Set, it lets the hook above end."""
    event = threading.Event()
    monkeypatch.setattr(builtins, "headrace_released", event, raising=False)
    return event


def hasty(host):
    """The host, in which hooks have a tenth of a second; what comes before the first one has what it needs."""
    shelf = host._shelf
    hook = shelf._hook

    async def call(loaded, name):
        if callable(getattr(loaded.caretaker, name, None)):
            shelf._config = replace(shelf._config, health_timeout_s=0.1)
        return await hook(loaded, name)

    shelf._hook = call
    return host


async def ended(host, released):
    """Nothing of a hook is left once it is let go."""
    assert host._shelf._hooks
    released.set()
    async with asyncio.timeout(60):
        while host._shelf._hooks:
            await asyncio.sleep(0.01)


@pytest.mark.parametrize("hook", ["start", "check", "get_capabilities"])
async def test_a_hook_that_swallows_its_cancellation_fails_its_deployment(hook, released):
    """When its time is over, not when it ends."""
    async with hasty(AgentHost(AgentsConfig(**QUICK))) as host:
        with pytest.raises(AgentUnhealthy, match=f"{hook}.* longer than 0.1 s"):
            async with asyncio.timeout(60):
                await host.deploy("a", STUBBORN.format(hook=hook), version="1.0.0")
    await ended(host, released)


async def test_a_host_closes_beside_a_stop_that_does_not_end(released):
    """After the time that a hook has."""
    host = hasty(AgentHost(AgentsConfig(**QUICK)))
    async with asyncio.timeout(60):
        async with host:
            await host.deploy("a", STUBBORN.format(hook="stop"), version="1.0.0")
            assert (await host.execute("a", 1)).output == 1
    await ended(host, released)


async def test_a_host_closes_beside_a_load_that_does_not_end(released):
    """Whoever waited for it is let go."""
    async with asyncio.timeout(60):
        async with AgentHost(AgentsConfig(**QUICK, health_timeout_s=60.0)) as host:
            deploying = asyncio.create_task(host.deploy("a", STUBBORN.format(hook="start"), version="1.0.0"))
            while not host._shelf._hooks:
                await asyncio.sleep(0)
        deploying.cancel()
        await asyncio.gather(deploying, return_exceptions=True)
    await ended(host, released)
    assert deploying.cancelled()


BROKEN = """
import builtins
builtins.headrace_starts = getattr(builtins, "headrace_starts", 0) + 1
class Agent:
    def check(self): return builtins.headrace_works
    async def execute(self, input, context): return input
"""


@pytest.fixture
def world():
    """Where the agent above counts its loads, and learns whether it works."""
    builtins.headrace_starts, builtins.headrace_works = 0, True
    yield builtins
    del builtins.headrace_starts, builtins.headrace_works


async def test_a_version_that_does_not_load_is_not_loaded_by_every_request(world):
    """Its failure is told again until its time has come, which is later each time; other versions are not waited
    for, and what loads at last serves."""
    clock = FakeClock()
    async with AgentHost(clock=clock) as host:
        await host.deploy("a", BROKEN, version="1.0.0")
        await host.deploy("b", BROKEN, version="1.0.0")
        host._shelf.drop("default", "a")
        world.headrace_starts, world.headrace_works = 0, False
        for after_s, loads in [(0, 1), (0, 1), (0.9, 1), (0.1, 2), (1.9, 2), (0.1, 3)]:
            clock.advance(after_s)
            with pytest.raises(AgentUnhealthy, match=r"check.*it returned False"):
                await host.execute("a", 1)
            assert world.headrace_starts == loads
        assert (await host.execute("b", 1)).output == 1
        world.headrace_works = True
        clock.advance(4)
        assert (await host.execute("a", 1)).output == 1
        assert host._shelf._failures == {}


async def test_a_version_that_is_deployed_again_is_not_held_to_its_failure(world):
    """Whoever mended the world around it does not wait."""
    async with AgentHost(clock=FakeClock()) as host:
        await host.deploy("a", BROKEN, version="1.0.0")
        host._shelf.drop("default", "a")
        world.headrace_works = False
        with pytest.raises(AgentUnhealthy):
            await host.execute("a", 1)
        world.headrace_works = True
        await host.deploy("a", BROKEN, version="1.0.0")
        assert (await host.execute("a", 1)).output == 1


async def test_a_part_that_fails_to_close_keeps_no_other_open():
    """Its error is told when everything else is closed."""
    closed, names = [], ["_queue", "_callbacks", "_runs", "_membership", "_store", "_shelf", "_isolated"]
    host = await AgentHost(AgentsConfig(**QUICK)).__aenter__()

    async def close(name, really):
        await really()
        closed.append(name)
        raise OSError(name)

    for part, name in [(getattr(host, name), name) for name in names]:
        part.close = partial(close, name, part.close)
    with pytest.raises(OSError, match="_isolated"):
        await host.__aexit__(None, None, None)
    assert closed == names


async def test_a_host_that_does_not_open_leaves_nothing_open():
    """What was opened before is closed again."""
    host = AgentHost(AgentsConfig(**QUICK))

    async def fail():
        raise OSError("no queue")

    host._queue.open = fail
    with pytest.raises(OSError, match="no queue"):
        await host.__aenter__()
    assert not host._runs._tasks
