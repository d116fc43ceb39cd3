"""What instances remember: one turn at a time, kept with the result, asleep when idle."""

import asyncio

from headrace.agents import AgentHost, AgentsConfig
from headrace.agents.execution import Execution
from headrace.agents.running.states import States
from headrace.agents.store import State
from headrace.agents.stores.memory import MemoryStore
from headrace.clock import SystemClock
from headrace.testing import FakeClock

COUNTS = """
import asyncio
inside = most = 0
async def Agent(input, context):
    global inside, most
    inside += 1
    most = max(most, inside)
    n = context.state.get("n", 0)
    await asyncio.sleep(0)
    context.state["n"] = n + 1
    inside -= 1
    if input == "fail":
        raise ValueError
    return context.state["n"]
"""


async def test_executions_of_one_instance_take_turns():
    """In the order of their calls, each seeing what the one before left; other instances are not waited for."""
    import sys

    async with AgentHost() as host:
        await host.deploy("a", COUNTS, version="1.0.0")
        module = sys.modules[host._shelf.find(("default", "a", "1.0.0")).definition.module]
        results = await asyncio.gather(*(host.execute("a", None, instance="one") for _ in range(20)))
        assert [result.output for result in results] == list(range(1, 21))
        assert module.most == 1
        assert (await host.execute("a", None, instance="two")).output == 1


async def test_a_failed_execution_leaves_the_state_as_it_was():
    """What it had written is forgotten, and the next one takes its turn."""
    async with AgentHost() as host:
        await host.deploy("a", COUNTS, version="1.0.0")
        await host.execute("a", None, instance="i")
        assert (await host.execute("a", "fail", instance="i")).status == "failed"
        assert (await host.execute("a", None, instance="i")).output == 2


async def test_tenants_and_agents_do_not_share_instances():
    """The same name under another owner is another instance."""
    async with AgentHost() as host:
        for tenant, agent_id in [("t", "a"), ("u", "a"), ("t", "b")]:
            await host.deploy(agent_id, COUNTS, version="1.0.0", tenant=tenant)
            assert (await host.execute(agent_id, None, instance="i", tenant=tenant)).output == 1


async def test_without_an_instance_there_is_no_state():
    """The agent is told what to ask for."""
    async with AgentHost() as host:
        await host.deploy("a", COUNTS, version="1.0.0")
        result = await host.execute("a", None)
    assert result.status == "failed"
    assert "has no instance" in result.error


async def test_a_state_that_is_too_large_or_no_json_fails_the_execution():
    """And is not kept."""
    text = "async def Agent(input, context):\n    context.state['x'] = 'y' * input if input else object()"
    async with AgentHost(AgentsConfig(state_bytes_max=100)) as host:
        await host.deploy("a", text, version="1.0.0")
        for value, named in [(500, "bytes; at most 100"), (0, "cannot be written as JSON")]:
            result = await host.execute("a", value, instance="i")
            assert (result.status, named in result.error) == ("failed", True)
        assert (await host.execute("a", 10, instance="i")).status == "completed"


async def test_turns_that_wait_are_bounded():
    """By number, and by the time that the call has."""
    text = "import asyncio\nasync def Agent(input, context): await asyncio.sleep(input)"
    async with AgentHost(AgentsConfig(state_turns_max=1)) as host:
        await host.deploy("a", text, version="1.0.0")
        calls = [asyncio.create_task(host.execute("a", 0.3, instance="i")) for _ in range(3)]
        results = await asyncio.gather(
            *calls, host.execute("a", 0, instance="i", timeout=0.01), return_exceptions=True
        )
        assert [type(result).__name__ for result in results] == ["Execution", "Execution", "Overloaded", "Overloaded"]
        assert host.running == 0


def execution(n):
    return Execution(id=str(n), agent_id="a", version="1", status="running", tenant="t")


async def test_idle_instances_fall_asleep_and_busy_ones_do_not():
    """A hundred thousand may have been there; in memory are those of the last minute."""
    clock = FakeClock()
    states = States(MemoryStore(clock=clock), AgentsConfig(state_idle_s=60), clock=clock)
    for n in range(1000):
        await states.begin(execution(n), f"i{n}")
        if n != 500:
            states.end(execution(n))
    states.sleep_idle()
    assert len(states) == 1000
    clock.advance(61)
    await states.begin(execution("young"), "young")
    states.end(execution("young"))
    states.sleep_idle()
    assert len(states) == 2
    states.end(execution(500))


async def test_to_look_for_idle_instances_takes_one_look_at_each():
    """However many are busy: ten thousand of them must not hold the loop."""
    clock, looks = FakeClock(), []

    class Awake:
        idle_since = 0.0

        def __init__(self, *, busy):
            self.busy = busy

        @property
        def is_busy(self):
            looks.append(self)
            return self.busy

    states = States(MemoryStore(clock=clock), AgentsConfig(), clock=clock)
    clock.advance(1000)
    states._awake.update({("t", "a", str(n)): Awake(busy=n < 99) for n in range(100)})
    states.sleep_idle()
    assert (len(states), len(looks)) == (99, 100)


async def test_a_change_that_another_node_made_is_seen_and_never_overwritten():
    """Each turn begins with the newest version; one that was overtaken is refused."""
    clock = FakeClock()
    store = MemoryStore(clock=clock)
    here, there = (States(store, AgentsConfig(), clock=clock) for _ in range(2))
    await here.begin(execution(1), "i")
    here.of(execution(1))["n"] = 1
    await there.begin(execution(2), "i")
    there.of(execution(2))["n"] = 2
    assert await store.finish(execution(2), change=there.change(execution(2))) is not None
    assert await store.finish(execution(1), change=here.change(execution(1))) is None
    here.end(execution(1))
    await here.begin(execution(3), "i")
    assert here.of(execution(3)) == {"n": 2}
    assert await store.state("t", "a", "i", known=0) == State(1, b'{"n":2}')


async def test_a_turn_that_was_given_up_is_passed_on():
    """Whoever leaves while it waits, or just as its turn comes, holds nobody up."""
    clock = FakeClock()
    states = States(MemoryStore(clock=clock), AgentsConfig(), clock=clock)
    await states.begin(execution(0), "i")
    waiting = [asyncio.create_task(states.begin(execution(n), "i")) for n in (1, 2, 3)]
    await asyncio.sleep(0)
    waiting[0].cancel()
    await asyncio.sleep(0)
    states.end(execution(0))
    waiting[1].cancel()
    await asyncio.gather(*waiting, return_exceptions=True)
    assert [task.cancelled() for task in waiting] == [True, True, False]
    states.end(execution(3))


async def test_a_turn_that_is_given_up_while_the_one_before_it_ends_is_passed_on():
    """It was passed over before its waiter could take back that it waits, and the waiter is cancelled all the same."""
    clock = FakeClock()
    states = States(MemoryStore(clock=clock), AgentsConfig(), clock=clock)
    await states.begin(execution(0), "i")
    waiting = [asyncio.create_task(states.begin(execution(n), "i")) for n in (1, 2)]
    await asyncio.sleep(0)
    waiting[0].cancel()
    states.end(execution(0))
    await asyncio.gather(*waiting, return_exceptions=True)
    assert [task.cancelled() for task in waiting] == [True, False]
    states.end(execution(2))


async def test_a_busy_instance_holds_up_nobody_elses_queue():
    """What is queued for it waits in the queue, without a place; its turns come one by one."""
    text = """
import asyncio
gate = asyncio.Event()
async def Agent(input, context):
    await gate.wait()
    context.state["n"] = context.state.get("n", 0) + 1
    return context.state["n"]
"""
    import sys

    config = AgentsConfig(queue_batch_max=2, queue_poll_s=0.02)
    async with AgentHost(config) as host:
        await host.deploy("a", text, version="1.0.0")
        await host.deploy("b", "async def Agent(input, context): return input", version="1.0.0")
        busy = [await host.submit("a", n, instance="i") for n in range(10)]
        other = await host.submit("b", 1)

        async def result(agent_id, execution):
            async with asyncio.timeout(60):
                while not (found := await host.execution(agent_id, execution.id)).is_finished:
                    await asyncio.sleep(0.005)
            return found.output

        assert await result("b", other) == 1
        assert host.running == 1
        sys.modules[host._shelf.find(("default", "a", "1.0.0")).definition.module].gate.set()
        assert sorted([await result("a", one) for one in busy]) == list(range(1, 11))


async def test_a_long_queue_of_a_busy_instance_is_not_asked_over_and_over():
    """Those who found it busy come again one by one, so what they cost does not grow with their number."""
    text = """
import asyncio
gate = asyncio.Event()
async def Agent(input, context): await gate.wait()
"""
    import sys

    class Store(MemoryStore):
        given_back, since, sent_away = 0, 0.0, frozenset()

        async def give_back(self, submission, *, delay_s):
            self.since = self.since or asyncio.get_running_loop().time()
            self.given_back += 1
            self.sent_away |= {submission.key}
            await super().give_back(submission, delay_s=delay_s)

    store = Store(clock=SystemClock())
    async with AgentHost(AgentsConfig(queue_poll_s=0.02, drain_s=0.1, cancel_grace_s=0.1), store=store) as host:
        await host.deploy("a", text, version="1.0.0")
        for n in range(300):
            await host.submit("a", n, instance="i")
        loop = asyncio.get_running_loop()
        async with asyncio.timeout(60):
            while len(store.sent_away) < 299:
                await asyncio.sleep(0.01)
        end = loop.time() + 1.0
        while loop.time() < end:
            await asyncio.sleep(0.01)
        # One in a twentieth of a second comes again, since the first one was sent away, however long it took.
        again = store.given_back - 299
        assert again <= 20 * (loop.time() - store.since) + 1
        sys.modules[host._shelf.find(("default", "a", "1.0.0")).definition.module].gate.set()


SLEEPS = "import asyncio\nasync def Agent(input, context):\n    await asyncio.sleep(input)\n    return input"


async def busy(host):
    """A host whose agent `a` is busy with its instance `i` for as long as the call that is returned goes on."""
    await host.deploy("a", SLEEPS, version="1.0.0")
    call = asyncio.create_task(host.execute("a", 60, instance="i"))
    while not host.running:
        await asyncio.sleep(0)
    return call


async def free(call, host):
    """The instance is free again."""
    key = next(iter(host._runs.known()))
    await host.cancel(key[1])
    await call


async def test_a_call_with_an_id_that_is_cancelled_before_its_turn_never_starts():
    """Its caller gets a cancelled execution at once, and so does whoever asks for the id later."""
    async with AgentHost() as host:
        first = await busy(host)
        call = asyncio.create_task(host.execute("a", 0, execution_id="x", instance="i"))
        while ("default", "x") not in host._store._executions:
            await asyncio.sleep(0)
        async with asyncio.timeout(60):
            cancelled = await host.cancel("x")
            ended = await call
        assert (cancelled.status, ended.status, host.started, host.running) == ("cancelled", "cancelled", 1, 1)
        await free(first, host)
        assert (await host.execute("a", 0, execution_id="x", instance="i")).status == "cancelled"
        assert (await host.execute("a", 0, execution_id="y", instance="i")).status == "completed"
        assert (host.started, host.running) == (2, 0)


async def test_a_call_with_an_id_that_got_no_turn_may_be_made_again():
    """A refusal before the start is nobody's result; the id is free again."""
    async with AgentHost() as host:
        first = await busy(host)
        refused = await asyncio.gather(
            host.execute("a", 0, execution_id="x", instance="i", timeout=0.02),
            host.execute("a", 0, execution_id="x", instance="i"),
            return_exceptions=True,
        )
        assert [type(error).__name__ for error in refused] == ["Overloaded", "Overloaded"]
        await free(first, host)
        assert (await host.execute("a", 0, execution_id="x", instance="i")).status == "completed"
        assert host.running == 0


async def test_a_state_is_only_so_deep():
    """What could not be read again everywhere fails the execution instead."""
    text = """
async def Agent(input, context):
    for _ in range(input):
        context.state["x"] = [context.state.get("x")]
"""
    async with AgentHost() as host:
        await host.deploy("a", text, version="1.0.0")
        result = await host.execute("a", 400, instance="i")
        assert (result.status, "deeper than" in result.error) == ("failed", True)
        assert (await host.execute("a", 50, instance="i")).status == "completed"
