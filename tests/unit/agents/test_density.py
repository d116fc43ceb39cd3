"""Many executions at once: what each of them holds, that they keep apart, and that all of them end."""

import asyncio
import gc
import inspect
import sys
import tracemalloc

import pytest

from headrace.agents import AgentHost, AgentsConfig, CodeCache
from headrace.agents.stores.memory import MemoryStore
from headrace.clock import SystemClock
from headrace.errors import AgentNotFound

ECHO = "async def Agent(input, context): return input"
PARKED = """
import asyncio

class Agent:
    async def execute(self, input, context):
        gate = asyncio.get_running_loop().create_future()
        gates.append(gate)
        await gate
        return input

gates = []
"""
TELLTALE = """
import asyncio
from contextvars import ContextVar

spoken = ContextVar("spoken", default=None)
common = {"who": None}

class Agent:
    seen = None

    def __init__(self):
        self.mine = []

    async def execute(self, input, context):
        for turn in range(20):
            self.mine.append(input)
            spoken.set(input)
            Agent.seen = common["who"] = input
            await asyncio.sleep(0)
            if self.mine != [input] * (turn + 1) or spoken.get() != input:
                return "somebody else's instance or context"
            if Agent.seen != input or common["who"] != input:
                return "somebody else's class or module"
            if context.tenant != input:
                return "somebody else's context"
        return "alone"
"""


@pytest.fixture
async def host():
    """A host for many executions, which a record of each in memory does not hold up."""
    config = AgentsConfig(executions_max=10_000, timeout_s=600, cancel_grace_s=100)
    async with AgentHost(config, store=MemoryStore(clock=SystemClock()), code_cache=CodeCache()) as host:
        yield host


def gates(host):
    """The futures that executions of the agent `a` wait for."""
    return sys.modules[host._versions._shelf._loaded["default", "a", "1.0.0"].definition.module].gates


async def until(condition):
    """Let the loop go on until something holds."""
    async with asyncio.timeout(100):
        while not condition():
            await asyncio.sleep(0)


async def test_a_waiting_execution_and_its_instance_hold_two_kilobytes(host):
    """400 bytes for the instance and 1,600 for the execution, after its caller has left."""
    count = 2_000
    await host.deploy("a", PARKED, version="1.0.0")
    gc.collect()
    tracemalloc.start()
    before = tracemalloc.get_traced_memory()[0]

    for index in range(count):
        caller = asyncio.create_task(host.execute("a", index))
        await until(lambda index=index: len(gates(host)) > index)
        caller.cancel()
        await until(caller.done)
    gc.collect()
    each = (tracemalloc.get_traced_memory()[0] - before) / count
    tracemalloc.stop()
    for gate in gates(host):
        gate.set_result(None)
    await until(lambda: not host.running)

    assert each <= 2_000


async def test_thousands_submitted_at_once_all_complete(host):
    """Each with its own result."""
    await host.deploy("a", PARKED, version="1.0.0")

    ids = [(await host.submit("a", number)).id for number in range(2_000)]
    await until(lambda: len(gates(host)) == 2_000)
    for gate in gates(host):
        gate.set_result(None)
    await until(lambda: not host.running)

    results = [await host.execution("a", name) for name in ids]
    assert [(result.status, result.output) for result in results] == [("completed", n) for n in range(2_000)]


async def test_thousands_that_wait_can_all_be_cancelled(host):
    """Each is cancelled when `cancel` returns, and none is left running."""
    await host.deploy("a", PARKED, version="1.0.0")
    ids = [(await host.submit("a", number)).id for number in range(2_000)]
    await until(lambda: len(gates(host)) == 2_000)

    ended = await asyncio.gather(*(host.cancel(name) for name in ids))

    assert {execution.status for execution in ended} == {"cancelled"}
    assert host.running == 0


async def test_a_burst_of_submissions_leaves_the_loop_its_turns(host):
    """Submitting never waits for anything here, and yet others go on meanwhile."""
    turns = 0

    async def count():
        nonlocal turns
        while True:
            turns += 1
            await asyncio.sleep(0)

    await host.deploy("a", ECHO, version="1.0.0")
    counting = asyncio.create_task(count())
    for number in range(1_000):
        await host.submit("a", number)
    counting.cancel()

    assert turns >= 30


async def test_two_tenants_share_nothing_at_any_await(host):
    """The same source for both, interleaved at every await: instance, contextvars, class and module are their own."""
    for tenant in ("red", "blue"):
        await host.deploy("a", TELLTALE, version="1.0.0", tenant=tenant)

    red, blue = await asyncio.gather(*(host.execute("a", name, tenant=name) for name in ("red", "blue")))

    assert (red.output, blue.output) == ("alone", "alone")


async def test_executions_of_one_tenant_have_instances_and_contextvars_of_their_own(host):
    """Of one definition they share the module, which is its author's choice, and nothing else."""
    text = TELLTALE.replace('if Agent.seen != input or common["who"] != input', "if False").replace(
        "context.tenant != input", "False"
    )
    await host.deploy("a", text, version="1.0.0")

    ends = await asyncio.gather(*(host.execute("a", number) for number in range(20)))

    assert {end.output for end in ends} == {"alone"}


async def test_instances_are_fresh_and_share_their_definition(host):
    """An object of the agent's class each; a function agent is its function."""
    await host.deploy("a", PARKED, version="1.0.0")
    await host.deploy("f", ECHO, version="1.0.0")

    first, second = host.instantiate("a"), host.instantiate("a")

    assert first is not second
    assert type(first) is type(second)
    assert host.instantiate("f") is host.instantiate("f")
    assert asyncio.iscoroutinefunction(host.instantiate("f"))


async def test_instances_are_of_the_version_in_service(host):
    """After a deployment of the new one, after a rollback of the old one, after its end of none."""
    await host.deploy(
        "a", "class Agent:\n    v = 1\n    async def execute(self, input, context): ...", version="1.0.0"
    )
    await host.deploy(
        "a", "class Agent:\n    v = 2\n    async def execute(self, input, context): ...", version="2.0.0"
    )
    new = host.instantiate("a").v
    await host.rollback("a", "1.0.0")
    old = host.instantiate("a").v
    await host.undeploy("a")

    assert (new, old) == (2, 1)
    with pytest.raises(AgentNotFound, match="loaded in this process"):
        host.instantiate("a")


async def test_what_another_process_deployed_is_instantiated_after_loading():
    """A host that has only the store in common finds it there."""
    store = MemoryStore(clock=SystemClock())
    async with AgentHost(store=store) as first, AgentHost(store=store) as second:
        await first.deploy("a", PARKED, version="1.0.0")
        with pytest.raises(AgentNotFound):
            second.instantiate("a")

        await second.load("a")

        assert second.instantiate("a").execute


async def test_a_run_cancelled_before_its_first_step_is_put_on_record(host):
    """None of the agent runs, and whoever waits is told."""
    await host.deploy("a", PARKED, version="1.0.0")
    runs = host._runs
    loaded = host._versions._shelf.find(("default", "a", "1.0.0"))
    accepted = await host._acceptance._accept(
        type(
            "Asked", (), {"tenant": "default", "agent_id": "a", "execution_id": "e", "version": None, "timeout": 1}
        )(),
        queued=False,
    )
    host._places.take("normal", threaded=False)
    host._admission.begin("default")

    run = runs.begin(loaded, accepted[2], None, deadline_s=1.0)
    run.cancel()
    end = await run.end()

    assert (end.status, gates(host)) == ("cancelled", [])


async def test_whoever_stops_waiting_leaves_nothing_behind(host):
    """A cancelled future would hold the frames of its waiter as long as the execution lasts."""
    await host.deploy("a", PARKED, version="1.0.0")
    callers = [asyncio.create_task(host.execute("a", 1)) for _ in range(2)]
    await until(lambda: len(gates(host)) == 2)
    run = next(iter(host._runs._runs.values()))

    callers[0].cancel()
    await run.wait(within_s=0.001)
    await until(callers[0].done)

    assert not run._waiters
    for gate in gates(host):
        gate.set_result(None)
    assert (await callers[1]).status == "completed"


async def test_a_run_looks_like_its_agent_from_outside(host):
    """Its task is named after the agent, and its stack and state are those of the agent's coroutine."""
    await host.deploy("a", PARKED, version="1.0.0")
    caller = asyncio.create_task(host.execute("a", 1))
    await until(lambda: gates(host))
    task = next(task for task in asyncio.all_tasks() if task.get_name() == "a")

    stack, state = task.get_stack(), inspect.getcoroutinestate(task.get_coro())
    gates(host)[0].set_result(None)
    await caller

    assert [frame.f_code.co_name for frame in stack] == ["execute"]
    assert state == inspect.CORO_SUSPENDED
    assert inspect.getcoroutinestate(task.get_coro()) == inspect.CORO_CLOSED


async def test_an_agent_may_use_scopes_of_anyio(host):
    """Which look at the coroutines of tasks: time limits, task groups, and a cancellation that goes through them."""
    text = """
import anyio

async def child(gate):
    await gate.wait()

async def Agent(input, context):
    gate = anyio.Event()
    with anyio.move_on_after(0.01) as scope:
        await anyio.sleep(60)
    async with anyio.create_task_group() as outer:
        async with anyio.create_task_group() as inner:
            outer.start_soon(child, gate)
            inner.start_soon(child, gate)
            if input:
                gate.set()
            else:
                context.progress(1, 2)
                outer.cancel_scope.cancel()
        await gate.wait()
    return [scope.cancelled_caught, outer.cancel_scope.cancelled_caught]
"""
    await host.deploy("a", text, version="1.0.0")

    ended, cancelled = await host.execute("a", 1), await host.execute("a", 0)

    assert (ended.status, ended.output) == ("completed", [True, False])
    assert (cancelled.status, cancelled.output) == ("completed", [True, True])


async def test_a_stop_iteration_of_a_constructor_is_a_failure(host):
    """It is not taken for the end of the agent's coroutine."""
    text = "class Agent:\n    def __init__(self): next(iter(()))\n    async def execute(self, input, context): ..."
    await host.deploy("a", text, version="1.0.0")

    end = await host.execute("a", None)

    assert (end.status, end.error) == ("failed", "RuntimeError: StopIteration: ")
