"""Versions in one host: hooks, health, aliases, canaries, undeploying."""

import asyncio
import sys

import pytest

from headrace.agents import AgentHost, AgentsConfig
from headrace.agents.stores.memory import MemoryStore
from headrace.cache import Cache
from headrace.clock import SystemClock
from headrace.errors import (
    AgentNotFound,
    AgentUnhealthy,
    InvalidRequest,
    TrialNotFound,
    VersionNotFound,
)
from headrace.events import AgentUndeployed, CanaryAborted, CanaryPromoted, CanaryStarted
from headrace.testing import FakeClock

ECHO = "async def Agent(input, context): return input"
FAILS = "async def Agent(input, context): raise ValueError('no')"
HOOKED = """
import asyncio
calls = []
gate, begun = asyncio.Event(), asyncio.Event()
class Agent:
    async def start(self): calls.append("start")
    def check(self): calls.append("check")
    def get_capabilities(self): return {"name": "hooked"}
    async def stop(self): calls.append("stop")
    async def execute(self, input, context):
        if input == "wait":
            begun.set()
            await gate.wait()
        return context.version
"""


class Notes:
    """Keeps every event."""

    def __init__(self):
        self.events = []

    def on(self, event):
        self.events.append(event)

    def of(self, kind):
        return [event for event in self.events if isinstance(event, kind)]


def module_of(host, agent_id="a", version="1.0.0"):
    return sys.modules[host._shelf.find(("default", agent_id, version)).definition.module]


async def test_hooks_run_once_for_all_executions():
    """Started and checked before it serves, stopped when its host closes."""
    async with AgentHost() as host:
        await host.deploy("a", HOOKED, version="1.0.0")
        calls = module_of(host).calls
        await asyncio.gather(*(host.execute("a", n) for n in range(5)))
        assert calls == ["start", "check"]
        assert bytes((await host.version("a", "1.0.0")).capabilities) == b'{"name":"hooked"}'
    assert calls == ["start", "check", "stop"]


async def test_a_replaced_version_is_stopped_when_its_last_execution_has_ended():
    """Not before: it may need what start made."""
    async with AgentHost(AgentsConfig(definitions_max=1)) as host:
        await host.deploy("a", HOOKED, version="1.0.0")
        module = module_of(host)
        running = asyncio.create_task(host.execute("a", "wait"))
        await module.begun.wait()
        await host.deploy("a", ECHO, version="2.0.0")
        assert "stop" not in module.calls
        module.gate.set()
        assert (await running).output == "1.0.0"
        while "stop" not in module.calls:
            await asyncio.sleep(0)


@pytest.mark.parametrize(
    ("hook", "named"),
    [
        ("async def start(self): raise OSError('no model')", "OSError: no model"),
        ("def start(self): raise OSError('no model')", "OSError: no model"),
        ("async def check(self): return False", "returned False"),
        ("async def start(self): await __import__('asyncio').sleep(60)", "longer than 0.1 s"),
        ("def check(self): __import__('threading').Event().wait(0.5)", "longer than 0.1 s"),
        ("def get_capabilities(self): return object()", "no JSON"),
        ("def __init__(self): raise KeyError('token')", "KeyError"),
    ],
)
async def test_a_version_that_is_not_healthy_never_serves(hook, named):
    """The one in service stays, for every call from before and after."""
    text = f"class Agent:\n    {hook}\n    def stop(self): ...\n    async def execute(self, input, context): return 2"
    health_timeout_s = 0.1 if "0.1 s" in named else 60.0
    async with AgentHost(AgentsConfig(health_timeout_s=health_timeout_s)) as host:
        await host.deploy("a", ECHO, version="1.0.0")
        with pytest.raises(AgentUnhealthy, match=named):
            await host.deploy("a", text, version="2.0.0")
        assert (await host.execute("a", 1)).version == "1.0.0"
        with pytest.raises(VersionNotFound):
            await host.version("a", "2.0.0")


async def test_who_asks_for_it_fresh_sees_at_once_what_another_process_switched_to():
    """However long ago this one has looked: by it is decided what a roll-back goes back to."""
    store = MemoryStore(clock=SystemClock())
    async with (
        Cache() as near,
        Cache() as far,
        AgentHost(store=store, cache=near) as here,
        AgentHost(store=store, cache=far) as there,
    ):
        await there.deploy("a", ECHO, version="1.0.0")
        assert (await here.agent("a")).version == "1.0.0"
        await there.deploy("a", ECHO + "\n", version="2.0.0")

        assert (await here.agent("a", fresh=True)).version == "2.0.0"
        await there.undeploy("a")
        with pytest.raises(AgentNotFound):
            await here.agent("a", fresh=True)


async def test_a_version_or_an_alias_can_be_asked_for():
    """Whatever is in service."""
    async with AgentHost() as host:
        for version in ("1.0.0", "2.0.0"):
            await host.deploy("a", ECHO + f"  # {version}", version=version)
        await host.alias("a", "stable", "1.0.0")
        asked = [(await host.execute("a", 1, version=name)).version for name in ("1.0.0", "stable", "2.0.0", None)]
        assert asked == ["1.0.0", "1.0.0", "2.0.0", "2.0.0"]
        assert (await host.submit("a", 1, version="stable")).version == "1.0.0"
        for unknown in ("3.0.0", "nightly"):
            with pytest.raises(VersionNotFound):
                await host.execute("a", 1, version=unknown)
        with pytest.raises(InvalidRequest, match="could be taken for a version"):
            await host.alias("a", "1.0.0", "2.0.0")


async def test_a_canary_gets_its_share_and_an_id_keeps_its_version():
    """The same execution id goes to the same version, however often it is asked."""
    notes = Notes()
    async with AgentHost(observer=notes) as host:
        await host.deploy("a", ECHO, version="1.0.0")
        await host.deploy("a", ECHO + "\n", version="2.0.0", canary=0.3)
        versions = [(await host.execute("a", 1, execution_id=f"e{n}")).version for n in range(300)]
        assert 60 < versions.count("2.0.0") < 120
        assert (await host.execute("a", 1, version="1.0.0")).version == "1.0.0"
        assert (await host.agent("a")).version == "1.0.0"
        await host.promote("a")
        assert {(await host.execute("a", 1)).version for _ in range(20)} == {"2.0.0"}
        with pytest.raises(TrialNotFound):
            await host.promote("a")
    assert notes.of(CanaryStarted) == [CanaryStarted("a", "2.0.0", 0.3)]
    assert notes.of(CanaryPromoted) == [CanaryPromoted("a", "2.0.0")]


async def test_a_canary_that_fails_is_rolled_back_by_itself():
    """After a bounded number of failures, once, with the reason."""
    notes = Notes()
    async with AgentHost(observer=notes) as host:
        await host.deploy("a", ECHO, version="1.0.0")
        await host.deploy("a", FAILS, version="2.0.0", canary=0.5)
        failures = 0
        while not notes.of(CanaryAborted):
            failures += (await host.execute("a", 1)).status == "failed"
            await asyncio.sleep(0)
        after = [(await host.execute("a", 1)).status for _ in range(30)]
    assert failures <= 25
    assert set(after) == {"completed"}
    (told,) = notes.of(CanaryAborted)
    assert (told.version, told.by_itself) == ("2.0.0", True)


async def test_a_good_canary_is_left_alone():
    """However long it runs beside the other: both take the same time here, which a busy machine has no part in."""
    notes = Notes()
    async with AgentHost(observer=notes, clock=FakeClock()) as host:
        await host.deploy("a", ECHO, version="1.0.0")
        await host.deploy("a", ECHO + "\n", version="2.0.0", canary=0.5)
        await asyncio.gather(*(host.execute("a", n) for n in range(500)))
        await host._trials.exchange()
        assert (await host.agent("a")).canary.version == "2.0.0"
        await host.abort("a", reason="enough")
        assert (await host.agent("a")).canary is None
    assert notes.of(CanaryAborted) == [CanaryAborted("a", "2.0.0", "enough", by_itself=False)]


@pytest.mark.parametrize("share", [0, 1, -0.1, 1.5])
async def test_a_canary_has_a_part_of_the_executions(share):
    """Neither none nor all; and there must be another version to compare it with."""
    async with AgentHost() as host:
        with pytest.raises(InvalidRequest, match="between 0 and 1"):
            await host.deploy("a", ECHO, version="1.0.0", canary=share)
        with pytest.raises(AgentNotFound):
            await host.deploy("a", ECHO, version="1.0.0", canary=0.5)


async def test_an_undeployed_agent_takes_no_more_and_lets_the_running_ones_end():
    """Queued ones are cancelled; it comes back with a deployment."""
    notes = Notes()
    async with AgentHost(AgentsConfig(executions_max=1), observer=notes) as host:
        await host.deploy("a", HOOKED, version="1.0.0")
        module = module_of(host)
        running = asyncio.create_task(host.execute("a", "wait", priority="high"))
        await module.begun.wait()
        queued = await host.submit("a", 1)
        assert await host.undeploy("a") == 1
        with pytest.raises(AgentNotFound):
            await host.execute("a", 1)
        assert (await host.execution("a", queued.id)).status == "cancelled"
        module.gate.set()
        assert (await running).status == "completed"
        await host.deploy("a", HOOKED, version="1.0.0")
        assert (await host.execute("a", 1, priority="high")).status == "completed"
    assert notes.of(AgentUndeployed) == [AgentUndeployed("a", 1)]


@pytest.mark.parametrize(
    ("idempotent", "attempts_max", "named"),
    [(False, 2, "not declared idempotent"), (True, 0, "between 1 and"), (True, 99, "99")],
)
async def test_only_what_does_no_harm_twice_has_several_attempts(idempotent, attempts_max, named):
    """And not without a bound."""
    async with AgentHost() as host:
        with pytest.raises(InvalidRequest, match=named):
            await host.deploy("a", ECHO, version="1.0.0", idempotent=idempotent, attempts_max=attempts_max)
