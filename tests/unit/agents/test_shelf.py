"""Hooks of loaded versions that do not end: nobody waits for them longer than they may take."""

import asyncio

import pytest

from headrace.agents import AgentHost, AgentsConfig
from headrace.errors import AgentUnhealthy

QUICK = {"health_timeout_s": 0.1, "cancel_grace_s": 0.05, "drain_s": 0.05}
# Swallows every cancellation for a while; a real one does so for ever.
STUBBORN = """
import asyncio, time
class Agent:
    async def {hook}(self):
        end = time.monotonic() + 3
        while time.monotonic() < end:
            try:
                await asyncio.sleep(0.05)
            except asyncio.CancelledError:
                continue
    async def execute(self, input, context):
        return input
"""


async def ended(host):
    """Nothing of a hook is left."""
    async with asyncio.timeout(10):
        while host._shelf._hooks:
            await asyncio.sleep(0.01)


@pytest.mark.parametrize("hook", ["start", "check", "get_capabilities"])
async def test_a_hook_that_swallows_its_cancellation_fails_its_deployment(hook):
    """When its time is over, not when it ends."""
    async with AgentHost(AgentsConfig(**QUICK)) as host:
        with pytest.raises(AgentUnhealthy, match=f"{hook}.* longer than 0.1 s"):
            async with asyncio.timeout(2):
                await host.deploy("a", STUBBORN.format(hook=hook), version="1.0.0")
    await ended(host)


async def test_a_host_closes_beside_a_stop_that_does_not_end():
    """After the time that a hook has."""
    host = AgentHost(AgentsConfig(**QUICK))
    async with asyncio.timeout(2):
        async with host:
            await host.deploy("a", STUBBORN.format(hook="stop"), version="1.0.0")
            assert (await host.execute("a", 1)).output == 1
    await ended(host)


async def test_a_host_closes_beside_a_load_that_does_not_end():
    """Whoever waited for it is let go."""
    config = AgentsConfig(**{**QUICK, "health_timeout_s": 60.0})
    async with asyncio.timeout(2):
        async with AgentHost(config) as host:
            deploying = asyncio.create_task(host.deploy("a", STUBBORN.format(hook="start"), version="1.0.0"))
            while not host._shelf._hooks:
                await asyncio.sleep(0)
        deploying.cancel()
        await asyncio.gather(deploying, return_exceptions=True)
    await ended(host)
    assert deploying.cancelled()
