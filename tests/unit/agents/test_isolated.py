"""Isolated versions in a host, with real workers: the host's promises hold for them, and their code is never in it."""

import asyncio
import os
import signal
import sys
import time
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import psutil
import pytest

from headrace.agents import AgentHost, AgentsConfig, Execution
from headrace.agents.isolation import IsolationConfig, Limits, probe
from headrace.errors import (
    AgentInvalid,
    AgentNotFound,
    AgentUnhealthy,
    ConfigError,
    InvalidRequest,
    IsolationRequired,
    IsolationUnavailable,
    Overloaded,
    VersionConflict,
)

achievable = probe()
pytestmark = pytest.mark.skipif(achievable.level != "process", reason=f"this kernel lacks {achievable.missing}")

AGENT = """
import asyncio, os, sys, time

calls = []

class Agent:
    def get_capabilities(self):
        return {"can": ["count"]}

    async def execute(self, input, context):
        calls.append(context.execution_id)
        match input:
            case "process":
                return os.getppid(), len(calls)
            case "speak":
                context.progress(1, 2, "half\\x00")
                context.emit({"n": 1})
                print("to stdout")
                print("to stderr", file=sys.stderr)
                await asyncio.sleep(0.05)
                return [context.tenant, context.agent_id, context.version, context.attempt]
            case "count":
                context.state["n"] = context.state.get("n", 0) + 1
                return context.state["n"]
            case "wait":
                context.progress(0, 1)
                try:
                    await asyncio.sleep(60)
                finally:
                    end = time.thread_time() + 0.02
                    while time.thread_time() < end:
                        pass
            case "spin":
                while True:
                    await asyncio.sleep(0)
            case "gigabyte":
                return len(bytearray(1 << 30))
            case "twice":
                if context.attempt == 1:
                    raise ValueError("the first time")
                return context.attempt
        return input
"""


def config(**changes: Any) -> AgentsConfig:
    isolation = IsolationConfig(cancel_grace_s=20.0, watch_s=0.02, **changes.pop("isolation", {}))
    return AgentsConfig(isolation=isolation, isolation_default="process", cancel_grace_s=20.0, **changes)


async def until(condition: Callable[[], bool], *, within_s: float = 60.0) -> None:
    async with asyncio.timeout(within_s):
        while not condition():
            await asyncio.sleep(0.005)


def workers(host: AgentHost) -> int:
    """Workers that have an agent: not those that are warm, nor those that are on their way to be."""
    return len(host._isolated._pool._owners)


@pytest.fixture
async def host() -> AsyncIterator[AgentHost]:
    async with AgentHost(config()) as host:
        await host.deploy("a", AGENT, version="1.0.0")
        yield host


# -- where it runs ------------------------------------------------------------------------------------------------


async def test_no_source_of_an_isolated_version_is_compiled_or_run_in_the_host() -> None:
    """Deploying, redeploying, refusing, a canary and executions: each mark that the top level leaves is a worker's."""
    noted: list[str] = []
    is_on = [True]

    def note(event: str, arguments: tuple[Any, ...]) -> None:
        if is_on[0] and event in {"compile", "exec"}:
            noted.append(repr(arguments))

    source = "import builtins\nbuiltins.left_mark = 'left mark'\n" + AGENT
    sys.addaudithook(note)
    try:
        async with AgentHost(config()) as host:
            for _ in range(2):
                await host.deploy("a", source, version="1.0.0")
            await host.deploy("a", source + "\n# more", version="1.1.0", canary=0.5)
            with pytest.raises(AgentInvalid):
                await host.deploy("a", source + "\nraise RuntimeError('left mark')", version="1.2.0")
            done = [await host.execute("a", number) for number in range(10)]
    finally:
        is_on[0] = False

    assert [execution.output for execution in done] == list(range(10))
    assert not hasattr(__builtins__, "left_mark")
    assert not any("left_mark" in each or "<agent a" in each for each in noted)
    assert not any(
        name.startswith("headrace_agent_") and "left_mark" in dir(module) for name, module in sys.modules.items()
    )


async def test_nothing_is_deployed_where_a_part_is_lacking() -> None:
    """The error names it; the version in service stays, and trusted ones go on."""
    lacking = config(isolation={"readable": ("/no/such/directory",)})
    async with AgentHost(lacking) as host:
        await host.deploy("a", "async def Agent(input, context): return 1", version="1.0.0", isolation="trusted")
        with pytest.raises(IsolationUnavailable, match="private root"):
            await host.deploy("a", AGENT, version="1.1.0")
        with pytest.raises(IsolationUnavailable, match="private root"):
            await host.deploy("b", AGENT, version="1.0.0")

        assert (await host.agent("a")).version == "1.0.0"
        assert (await host.execute("a", None)).output == 1
        with pytest.raises(AgentNotFound):
            await host.agent("b")


async def test_a_host_without_isolated_versions_has_no_pool() -> None:
    """Nobody pays for what nobody uses."""
    async with AgentHost() as host:
        await host.deploy("a", AGENT, version="1.0.0")
        assert not host._isolated.is_open


async def test_a_closed_host_leaves_no_worker() -> None:
    """Neither zygote nor workers."""
    before = set(psutil.Process().children())
    async with AgentHost(config()) as host:
        await host.deploy("a", AGENT, version="1.0.0")
        await host.execute("a", 1)
    assert set(psutil.Process().children()) <= before


# -- what comes back ----------------------------------------------------------------------------------------------


async def test_what_a_worker_says_is_on_the_execution(host: AgentHost) -> None:
    """Output, progress, CPU time and memory; what it emits and prints are its events."""
    submitted = await host.submit("a", "speak", tenant=None)
    events = [event async for event in host.events(submitted.id)]
    done = await host.execution("a", submitted.id)

    assert (done.status, done.output) == ("completed", ["default", "a", "1.0.0", 1])
    assert (done.progress.done, done.progress.total, done.progress.note) == (1, 2, "half\N{REPLACEMENT CHARACTER}")
    assert done.cpu_ms > 0
    assert done.memory_bytes > 1 << 20
    said = {bytes(event.data) for event in events}
    assert said == {b'{"n":1}', b'{"stdout":"to stdout\\n"}', b'{"stderr":"to stderr\\n"}'}


async def test_capabilities_and_health_are_asked_in_the_worker(host: AgentHost) -> None:
    """A version whose hook fails there does not serve; the reason is the deployer's."""
    unwell = AGENT.replace("def get_capabilities", "async def check")
    with pytest.raises(AgentUnhealthy, match=r"start\(\) of 'a' 1.1.0 fails: ValueError: no model"):
        await host.deploy("a", AGENT + "\n    def start(self):\n        raise ValueError('no model')", version="1.1.0")
    with pytest.raises(AgentUnhealthy, match="it returned False"):
        await host.deploy("a", unwell.replace('return {"can": ["count"]}', "return False"), version="1.2.0")

    assert bytes((await host.version("a", "1.0.0")).capabilities) == b'{"can":["count"]}'
    assert (await host.agent("a")).version == "1.0.0"


async def test_an_agent_that_yields_emits_from_its_worker(host: AgentHost) -> None:
    """Its output is what it yielded last."""
    text = (
        "class Agent:\n    async def execute(self, input, context):\n        for n in range(3):\n            yield n"
    )
    await host.deploy("y", text, version="1.0.0")
    submitted = await host.submit("y", None)
    said = [bytes(event.data) async for event in host.events(submitted.id)]
    assert said == [b"0", b"1", b"2"]
    assert (await host.execution("y", submitted.id)).output == 2


async def test_a_state_is_remembered_across_workers(host: AgentHost) -> None:
    """It goes into the worker and comes back; another instance begins anew."""
    first = [(await host.execute("a", "count", instance="x")).output for _ in range(3)]
    other = (await host.execute("a", "count", instance="y")).output
    none = await host.execute("a", "count")
    assert (first, other) == ([1, 2, 3], 1)
    assert none.status == "failed"
    assert "has no instance" in none.error


async def test_an_idempotent_version_is_tried_again(host: AgentHost) -> None:
    """Its second attempt knows that it is one."""
    await host.deploy("i", AGENT, version="1.0.0", idempotent=True, attempts_max=2)
    done = await host.execute("i", "twice", timeout=20)
    assert (done.status, done.output, done.attempt) == ("completed", 2, 2)


async def test_one_id_from_many_callers_runs_once_in_a_worker(host: AgentHost) -> None:
    """All get the same result."""
    done = await asyncio.gather(*(host.execute("a", "process", execution_id="once") for _ in range(20)))
    assert {tuple(execution.output) for execution in done} == {tuple(done[0].output)}
    assert done[0].output[1] == 1


# -- how it is stopped --------------------------------------------------------------------------------------------


async def test_a_cancelled_execution_is_reported_when_its_work_has_stopped(host: AgentHost) -> None:
    """What it did while it cleaned up is still counted."""
    submitted = await host.submit("a", "wait")
    run = None
    while run is None or run.execution.progress is None:
        run = host._runs.find(("default", submitted.id))
        await asyncio.sleep(0.005)

    cancelled = await host.cancel(submitted.id)

    assert cancelled.status == "cancelled"
    assert host._isolated._pool.statistics().executing == 0
    assert cancelled.cpu_ms >= 20


@pytest.mark.parametrize("input", ["wait", "spin"])
async def test_a_deadline_ends_it(host: AgentHost, input: str) -> None:
    """The error is the one of the host; the time that it took is known."""
    await host.execute("a", "fine")  # the start of the worker counts, too
    done = await host.execute("a", input, timeout=5.0)
    assert (done.status, done.error) == ("timeout", "It ran longer than 5 s and was stopped.")
    assert done.cpu_ms > 1


async def test_a_worker_that_is_killed_costs_its_execution_only(host: AgentHost) -> None:
    """The next one gets another worker."""
    running = asyncio.ensure_future(host.execute("a", "wait"))
    await until(lambda: workers(host) == 1 and host._isolated._pool.statistics().executing == 1)
    for pid in host._isolated._pool.pids(("default", "a", "1.0.0")):
        os.kill(pid, 9)

    assert (await running).status == "failed"
    assert (await host.execute("a", "fine")).output == "fine"


async def test_memory_is_bounded_by_the_limits_of_the_version(host: AgentHost) -> None:
    """A gigabyte is a MemoryError in the default limits; a version keeps those that it was deployed with."""
    bounded = await host.execute("a", "gigabyte")
    await host.deploy("wide", AGENT, version="1.0.0", limits=Limits(memory_bytes=64 << 20))
    kept = await host.version("wide", "1.0.0")
    assert (bounded.status, bounded.error) == ("failed", "MemoryError: ")
    assert (kept.isolation, kept.limits) == ("process", Limits(memory_bytes=64 << 20))


async def test_a_full_version_refuses_and_its_queue_waits() -> None:
    """A direct call is told to come back; a submitted one gets its turn."""
    async with AgentHost(config(isolation={"workers_per_agent_max": 1})) as host:
        await host.deploy("a", AGENT, version="1.0.0", limits=Limits(concurrent=1))
        running = await host.submit("a", "wait")
        await until(lambda: host._isolated._pool.statistics().executing == 1)

        with pytest.raises(Overloaded, match="no more fit"):
            await host.execute("a", 1)
        waiting = await host.submit("a", 2)
        await host.cancel(running.id)
        await until(lambda: host._store._executions["default", waiting.id].is_finished)

        assert (await host.execution("a", waiting.id)).output == 2


# -- versions -----------------------------------------------------------------------------------------------------


async def test_undeploying_stops_the_workers_when_their_executions_have_ended(host: AgentHost) -> None:
    """What runs goes on until then."""
    (pid,) = host._isolated._pool.pids(("default", "a", "1.0.0"))
    os.kill(pid, signal.SIGSTOP)
    running = asyncio.ensure_future(host.execute("a", "speak"))
    await until(lambda: host._isolated._pool.statistics().executing == 1)

    await host.undeploy("a")
    os.kill(pid, signal.SIGCONT)

    assert (await running).status == "completed"
    await until(lambda: workers(host) == 0)
    with pytest.raises(AgentNotFound):
        await host.execute("a", 1)


async def test_what_is_retired_between_its_choice_and_its_run_still_runs(host: AgentHost) -> None:
    """In a worker that goes with it; who stops it twice stops nobody else's."""
    loaded = host._shelf.find(("default", "a", "1.0.0"))
    host._shelf.retire(loaded)
    await until(lambda: workers(host) == 0)

    execution = Execution(id="e", agent_id="a", version="1.0.0", status="running")
    outcome = await loaded.isolated.execute(execution, 7, deadline_s=10.0, due_at=time.monotonic() + 10.0, room=None)
    for _ in range(2):
        await loaded.isolated.stop()

    assert outcome.output_json == b"7"
    await until(lambda: workers(host) == 0)


async def test_a_switch_stops_the_workers_of_what_it_replaces(host: AgentHost) -> None:
    """Of a new version and of a roll-back; asked for by name, an old version gets workers again."""
    await host.execute("a", 1)
    await host.deploy("a", AGENT + "\n# better", version="1.1.0")
    await until(lambda: workers(host) == 1)
    await host.rollback("a", "1.0.0")
    assert (await host.execute("a", 1)).version == "1.0.0"
    await until(lambda: workers(host) == 1)
    assert (await host.execute("a", 1, version="1.1.0")).version == "1.1.0"


async def test_deploying_a_version_again_keeps_its_workers(host: AgentHost) -> None:
    """It serves on, with another timeout if one is given."""
    await host.deploy("a", AGENT, version="1.0.0", timeout_s=0.2)
    assert workers(host) == 1
    assert (await host.execute("a", "wait")).status == "timeout"


async def test_a_canary_runs_isolated_beside_a_trusted_version() -> None:
    """Each version runs where it was deployed to."""
    async with AgentHost(config()) as host:
        await host.deploy("a", AGENT, version="1.0.0", isolation="trusted")
        await host.deploy("a", AGENT, version="1.1.0", canary=0.5)
        # An id goes to the same version in every run of this test: of these, some to each.
        done = [await host.execute("a", "process", execution_id=f"e{number}") for number in range(20)]
    assert {(execution.version, execution.memory_bytes is not None) for execution in done} == {
        ("1.0.0", False),
        ("1.1.0", True),
    }


@pytest.mark.parametrize("change", [{"isolation": "trusted"}, {"limits": Limits(files=32)}])
async def test_a_version_stands_for_one_isolation_and_its_limits(host: AgentHost, change: dict[str, Any]) -> None:
    """Nobody makes an isolated version a trusted one by deploying it again."""
    with pytest.raises(VersionConflict, match="another source"):
        await host.deploy("a", AGENT, version="1.0.0", **change)
    assert (await host.execute("a", 1)).memory_bytes is not None


async def test_limits_are_asked_for_within_bounds(host: AgentHost) -> None:
    """Above the service's they are refused, as for a version that has no workers."""
    with pytest.raises(InvalidRequest, match=r"limits.memory_bytes is 2,147,483,648; at most 1,073,741,824"):
        await host.deploy("b", AGENT, version="1.0.0", limits=Limits(memory_bytes=2 << 30))
    with pytest.raises(InvalidRequest, match="isolated workers"):
        await host.deploy("b", AGENT, version="1.0.0", isolation="trusted", limits=Limits())


async def test_there_are_no_instances_of_it_in_the_host(host: AgentHost) -> None:
    """It can be executed only."""
    with pytest.raises(InvalidRequest, match="runs in isolated processes"):
        host.instantiate("a")


# -- who may be trusted -------------------------------------------------------------------------------------------


async def test_a_service_can_demand_isolation_of_every_version() -> None:
    """Of those that are deployed, and of those that were deployed as trusted before."""
    async with AgentHost(config()) as before:
        await before.deploy("a", AGENT, version="1.0.0", isolation="trusted")
        async with AgentHost(config(trusted_allowed=False), store=before._store) as host:
            with pytest.raises(IsolationRequired):
                await host.deploy("b", AGENT, version="1.0.0", isolation="trusted")
            with pytest.raises(IsolationRequired):
                await host.execute("a", 1)
            await host.deploy("b", AGENT, version="1.0.0")
            assert (await host.execute("b", 1)).memory_bytes is not None


def test_a_default_that_is_not_allowed_is_refused() -> None:
    """Else every deployment that does not say it would be refused one by one."""
    with pytest.raises(ConfigError, match="isolation_default"):
        AgentsConfig(trusted_allowed=False)
    with pytest.raises(ConfigError, match=r"limits\.files"):
        AgentsConfig(limits=Limits(files=10_000))


# -- tenants ------------------------------------------------------------------------------------------------------

STEPS = """
import asyncio, contextvars, os, time

everybody = []
current = contextvars.ContextVar("current")

def is_there(path):
    try:
        os.close(os.open(path, os.O_RDONLY))  # os.stat is refused on the loop here
    except FileNotFoundError:
        return False
    return True

class Agent:
    seen = {}

    def __init__(self):
        self.mine = []

    async def execute(self, input, context):
        name = input["name"]
        current.set(name)
        at = []
        while not is_there(input["gate"]) or len(at) < 50:
            self.mine.append(name)
            everybody.append(context.tenant)
            self.seen[context.tenant] = True
            context.progress(len(at), 50, name)
            context.emit(name)
            at.append(time.monotonic())
            await asyncio.sleep(0)
            await asyncio.sleep(0.005)
            assert current.get() == name
        context.state["who"] = name
        return {"mine": sorted(set(self.mine)), "everybody": sorted(set(everybody)), "seen": sorted(self.seen),
                "steps": len(self.mine) - len(at), "span": [at[0], time.monotonic()]}
"""


@pytest.mark.parametrize("isolation", ["trusted", "process"])
async def test_two_tenants_interleaved_at_every_await_share_nothing(isolation: Any, tmp_path: Path) -> None:
    """Not the instance, the class, the module, context variables, progress, events nor state; nor do two executions
    of one tenant, which share a module only."""
    shown = tmp_path / "shown"
    shown.mkdir(mode=0o755)
    gate = shown / "gate"
    async with AgentHost(config(isolation={"readable": (str(shown),)})) as host:
        for tenant in ("red", "blue"):
            await host.deploy("a", STEPS, version="1.0.0", tenant=tenant, isolation=isolation)

        async def one(tenant: str, name: str) -> Any:
            submitted = await host.submit(
                "a",
                {"name": name, "gate": str(gate)},
                tenant=tenant,
                instance=name,
                execution_id="same-" + name[-1],
            )
            events = [event.data async for event in host.events(submitted.id, tenant=tenant)]
            return tenant, name, await host.execution("a", submitted.id, tenant=tenant), set(map(bytes, events))

        named = [("red", "red-1"), ("red", "red-2"), ("blue", "blue-1"), ("blue", "blue-2")]
        under_way = asyncio.gather(*(one(*each) for each in named))
        runs = [(tenant, "same-" + name[-1]) for tenant, name in named]
        await until(lambda: all((run := host._runs.find(key)) and run.execution.progress for key in runs))
        gate.touch()
        done = await under_way
        states = {name: await host._store.state(tenant, "a", name, known=0) for tenant, name in named}

    for tenant, name, execution, events in done:
        output = execution.output
        assert execution.status == "completed", execution.error
        assert (output["mine"], output["steps"]) == ([name], 0)
        assert output["everybody"] == output["seen"] == [tenant]
        assert execution.progress.note == name
        assert events == {b'"%s"' % name.encode()}
        assert states[name].value_json == b'{"who":"%s"}' % name.encode()
    spans = [execution.output["span"] for *_, execution, _ in done]
    assert max(begin for begin, _ in spans) < min(end for _, end in spans), "all four ran at the same time"


async def test_what_a_worker_sends_is_only_so_deep():
    """An output or a state that could not be read everywhere fails the execution in the host."""
    text = """
async def Agent(input, context):
    deep = []
    for _ in range(400):
        deep = [deep]
    if input == "state":
        context.state["x"] = deep
    return deep if input == "output" else None
"""
    async with AgentHost() as host:
        await host.deploy("a", text, version="1.0.0", isolation="process")
        for what in ("output", "state"):
            result = await host.execute("a", what, instance="i")
            assert (result.status, "deeper than" in result.error) == ("failed", True)
        assert (await host.execute("a", None, instance="i")).status == "completed"
