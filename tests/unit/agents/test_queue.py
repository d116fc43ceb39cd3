"""Submitting, retrying and cancelling in one host."""

import asyncio
import sys

import pytest

from headrace.agents import AgentHost, AgentsConfig, TenantConfig, TierConfig
from headrace.agents.stores.memory import MemoryStore
from headrace.clock import SystemClock
from headrace.errors import ExecutionConflict, ExecutionNotFound, InvalidRequest, Overloaded, RateLimited
from headrace.testing import FakeClock

ECHO = "async def Agent(input, context): return input"
GATED = """
import asyncio
gate, order = asyncio.Event(), []
async def Agent(input, context):
    order.append(input)
    await gate.wait()
    return input
"""
FLAKY = """
attempts = []
async def Agent(input, context):
    attempts.append(context.attempt)
    if context.attempt < input:
        raise ConnectionError(f"attempt {context.attempt}")
    return context.attempt
"""
THREADED = """
import threading
gate, begun = threading.Event(), threading.Event()
class Agent:
    def execute(self, input, context):
        begun.set()
        gate.wait(100)
        return 1
"""
QUICK = {"retry_first_s": 0.01, "retry_max_s": 0.02, "queue_poll_s": 0.05}


def module_of(host, agent_id="a", version="1.0.0"):
    return sys.modules[host._shelf.find(("default", agent_id, version)).definition.module]


async def finished(host, execution_id, agent_id="a", tenant=None):
    """The execution when it has ended."""
    async with asyncio.timeout(60):
        while not (found := await host.execution(agent_id, execution_id, tenant=tenant)).is_finished:
            await asyncio.sleep(0.005)
    return found


async def test_what_does_not_fit_waits_and_the_most_urgent_goes_first():
    """Executions that are submitted are not refused for want of places."""
    async with AgentHost(AgentsConfig(executions_max=3)) as host:
        await host.deploy("a", GATED, version="1.0.0")
        module = module_of(host)
        first = [await host.submit("a", n) for n in (1, 2)]
        while len(module.order) < 2:
            await asyncio.sleep(0)
        later = [
            await host.submit("a", name, priority=priority)
            for name, priority in [("low", "low"), ("normal", "normal"), ("high", "high")]
        ]
        module.gate.set()
        for one in [*first, *later]:
            assert (await finished(host, one.id)).status == "completed"
        assert module.order == [1, 2, "high", "normal", "low"]


async def test_queue_time_is_told():
    """From the submission to the first step."""
    async with AgentHost(AgentsConfig(executions_max=2)) as host:
        await host.deploy("a", GATED, version="1.0.0")
        await host.submit("a", 1)
        waiting = await host.submit("a", 2)
        while not module_of(host).order:
            await asyncio.sleep(0)
        asyncio.get_running_loop().call_later(0.1, module_of(host).gate.set)
        assert (await finished(host, waiting.id)).queue_ms > 80


async def test_a_submission_stands_for_one_input():
    """The same id again is the same execution; with another input it is refused."""
    async with AgentHost() as host:
        await host.deploy("a", ECHO, version="1.0.0")
        await host.submit("a", 1, execution_id="e")
        assert (await finished(host, "e")).output == 1
        assert (await host.submit("a", 1, execution_id="e")).status == "completed"
        with pytest.raises(ExecutionConflict):
            await host.submit("a", 2, execution_id="e")


@pytest.mark.parametrize("other", [{"instance": "j"}, {"version": "1.0.0"}, {}])
async def test_an_id_stands_for_one_version_and_instance_too(other):
    """The result of another instance, or of another version than the one asked for, is not what was asked for."""
    async with AgentHost() as host:
        await host.deploy("a", ECHO, version="1.0.0")
        for begin in (host.execute, host.submit):
            await host.execute("a", 1, execution_id="e", instance="i")
            assert (await begin("a", 1, execution_id="e", instance="i")).id == "e"
            with pytest.raises(ExecutionConflict):
                await begin("a", 1, execution_id="e", **other)


async def test_an_input_that_is_no_json_is_refused():
    """As the caller's mistake, and no place stays taken."""
    async with AgentHost() as host:
        await host.deploy("a", ECHO, version="1.0.0")
        for begin in (host.execute, host.submit):
            with pytest.raises(InvalidRequest, match="cannot be written as JSON"):
                await begin("a", object(), execution_id="e")
        assert host.running == 0


async def test_a_queue_is_bounded():
    """What would not fit any more is refused with a time to come back, and nothing of it is kept."""
    async with AgentHost(AgentsConfig(executions_max=2, queued_max=3)) as host:
        await host.deploy("a", GATED, version="1.0.0")
        for n in range(3):
            await host.submit("a", n)
        with pytest.raises(Overloaded, match="3 executions of the tenant") as refused:
            await host.submit("a", 4, execution_id="no")
        assert refused.value.retry_after_s == 1.0
        with pytest.raises(ExecutionNotFound):
            await host.execution("a", "no")
        module_of(host).gate.set()


@pytest.mark.parametrize("how", ["execute", "submit"])
async def test_an_idempotent_agent_is_tried_again(how):
    """Until it succeeds; the caller of execute waits for it and gets the one result."""
    async with AgentHost(AgentsConfig(**QUICK)) as host:
        await host.deploy("a", FLAKY, version="1.0.0", idempotent=True)
        result = await getattr(host, how)("a", 3)
        result = await finished(host, result.id)
        assert (result.status, result.output, result.attempt) == ("completed", 3, 3)
        assert module_of(host).attempts == [1, 2, 3]


async def test_attempts_are_bounded():
    """The last failure is the result."""
    async with AgentHost(AgentsConfig(**QUICK)) as host:
        await host.deploy("a", FLAKY, version="1.0.0", idempotent=True, attempts_max=2)
        result = await host.execute("a", 9)
        assert (result.status, result.error, result.attempt) == ("failed", "ConnectionError: attempt 2", 2)


async def test_an_agent_that_may_not_run_twice_runs_once():
    """Which is what every agent is that does not say otherwise."""
    async with AgentHost(AgentsConfig(**QUICK)) as host:
        await host.deploy("a", FLAKY, version="1.0.0")
        submitted = await host.submit("a", 2)
        assert (await finished(host, submitted.id)).status == "failed"
        assert module_of(host).attempts == [1]


async def test_a_running_execution_is_cancelled_when_its_work_has_stopped():
    """Not before; to cancel again changes nothing, and a finished one stays."""
    text = """
import asyncio
stopping, gate, begun = asyncio.Event(), asyncio.Event(), asyncio.Event()
async def Agent(input, context):
    begun.set()
    try:
        await asyncio.sleep(60)
    finally:
        stopping.set()
        await gate.wait()
"""
    async with AgentHost(AgentsConfig(cancel_grace_s=0.05)) as host:
        await host.deploy("a", text, version="1.0.0")
        await host.submit("a", None, execution_id="e")
        await module_of(host).begun.wait()
        for _ in range(2):
            assert (await host.cancel("e")).status == "cancelling"
        assert module_of(host).stopping.is_set()
        assert not (await host.execution("a", "e")).is_finished
        module_of(host).gate.set()
        assert (await finished(host, "e")).status == "cancelled"
        assert (await host.cancel("e")).status == "cancelled"


async def test_a_synchronous_agent_is_cancelling_until_its_function_returns():
    """What it returns then is not its result any more."""
    async with AgentHost(AgentsConfig(cancel_grace_s=0.05)) as host:
        await host.deploy("a", THREADED, version="1.0.0")
        await host.submit("a", None, execution_id="e")
        while not (module := module_of(host)).begun.is_set():
            await asyncio.sleep(0.001)
        assert (await host.cancel("e", agent_id="a")).status == "cancelling"
        module.gate.set()
        ended = await finished(host, "e")
        assert (ended.status, ended.output) == ("cancelled", None)


async def test_a_cancel_tells_no_end_that_is_not_on_record():
    """The agent has ended, and whether that can be written down is not known yet: it is cancelling."""
    gate = asyncio.Event()

    class Store(MemoryStore):
        async def finish(self, execution, **options):
            await gate.wait()
            return await super().finish(execution, **options)

    async with AgentHost(AgentsConfig(cancel_grace_s=0.05), store=Store(clock=SystemClock())) as host:
        await host.deploy("a", ECHO, version="1.0.0")
        call = asyncio.create_task(host.execute("a", 1, execution_id="e"))
        while host._runs.find(("default", "e")) is None:
            await asyncio.sleep(0)
        told = await host.cancel("e")
        assert (told.status, told.output, told.finished_at) == ("cancelling", None, None)
        gate.set()
        ended = await call
        assert (await host.cancel("e")).status == ended.status == (await host.execution("a", "e")).status


async def test_a_direct_execution_can_be_cancelled_too():
    """Its caller gets the result; another agent's id does not reach it."""
    async with AgentHost() as host:
        await host.deploy("a", GATED, version="1.0.0")
        call = asyncio.create_task(host.execute("a", 1, execution_id="e"))
        while not module_of(host).order:
            await asyncio.sleep(0)
        with pytest.raises(ExecutionNotFound):
            await host.cancel("e", agent_id="b")
        await host.cancel("e", agent_id="a")
        assert (await call).status == "cancelled"
        with pytest.raises(ExecutionNotFound):
            await host.cancel("unknown")


async def test_a_cancelled_execution_is_not_tried_again():
    """Although its agent is idempotent."""
    async with AgentHost(AgentsConfig(**QUICK)) as host:
        await host.deploy("a", GATED, version="1.0.0", idempotent=True)
        await host.submit("a", 1, execution_id="e")
        while not module_of(host).order:
            await asyncio.sleep(0)
        assert (await host.cancel("e")).status == "cancelled"
        assert module_of(host).order == [1]


def tiered(**limits):
    tier = TierConfig(name="small", **{"executions_max": 2, **limits})
    return AgentsConfig(tiers=(tier,), tenants=(TenantConfig(name="t", tier="small"),), queue_poll_s=0.05)


async def test_a_tenant_over_its_concurrency_is_told_to_come_back():
    """Others are served; what it submits instead is run as its places become free."""
    async with AgentHost(tiered()) as host:
        for tenant in ("t", "default"):
            await host.deploy("a", GATED, version="1.0.0", tenant=tenant)
        gate = sys.modules[host._shelf.find(("t", "a", "1.0.0")).definition.module].gate
        calls = [asyncio.create_task(host.execute("a", n, tenant="t")) for n in range(2)]
        while host.running < 2:
            await asyncio.sleep(0)
        with pytest.raises(RateLimited, match="at most 2 by its tier small") as refused:
            await host.execute("a", 3, tenant="t")
        assert refused.value.retry_after_s == 1.0
        other = asyncio.create_task(host.execute("a", 1))
        submitted = [await host.submit("a", n, tenant="t") for n in range(5)]
        while host.running < 3:
            await asyncio.sleep(0)
        gate.set()
        await asyncio.gather(*calls)
        for one in submitted:
            assert (await finished(host, one.id, tenant="t")).status == "completed"
        module_of(host).gate.set()
        assert (await other).status == "completed"


async def test_a_tenant_over_its_rate_or_quota_is_refused():
    """With the time after which it is not."""
    async with AgentHost(tiered(rate_per_s=0.01, burst=3)) as host:
        await host.deploy("a", ECHO, version="1.0.0", tenant="t")
        for n in range(3):
            await host.execute("a", n, tenant="t")
        with pytest.raises(RateLimited, match="times a second") as refused:
            await host.execute("a", 4, tenant="t")
        assert 0 < refused.value.retry_after_s <= 100
    noon = FakeClock(wall=86_400.0 * 20_000 + 43_200)
    async with AgentHost(tiered(executions_per_day=3), clock=noon) as host:
        await host.deploy("a", ECHO, version="1.0.0", tenant="t")
        for n in range(3):
            await host.submit("a", n, tenant="t")
        with pytest.raises(RateLimited, match="of today") as refused:
            await host.execute("a", 4, tenant="t")
        assert refused.value.retry_after_s == 43_200


async def test_the_tier_of_a_tenant_may_be_known_elsewhere():
    """By whoever knows its API key."""
    async with AgentHost(tiered(rate_per_s=0.01, burst=1), tier_of={"key": "small"}.get) as host:
        await host.deploy("a", ECHO, version="1.0.0", tenant="key")
        await host.execute("a", 1, tenant="key")
        with pytest.raises(RateLimited):
            await host.execute("a", 1, tenant="key")


async def test_a_closed_host_leaves_nothing_begun_and_unfinished():
    """What runs is interrupted on record, or waits for another node when it may run again."""
    async with AgentHost(AgentsConfig(drain_s=0.05, cancel_grace_s=0.05)) as host:
        store = host._store
        await host.deploy("a", GATED, version="1.0.0", idempotent=True)
        await host.deploy("b", GATED, version="1.0.0")
        kept = {}

        async def close():
            kept.update({key[1]: held.status for key, held in store._executions.items()})

        store.close = close
        for agent_id in ("a", "b"):
            await host.submit(agent_id, 1, execution_id=agent_id)
        while host.started < 2:
            await asyncio.sleep(0)
    assert kept == {"a": "queued", "b": "interrupted"}


async def test_a_fault_of_ours_ends_the_execution_that_it_hits():
    """It is told where such faults are told, and is not carried from node to node for ever."""
    told = []
    asyncio.get_running_loop().set_exception_handler(lambda _, context: told.append(context["message"]))
    async with AgentHost(AgentsConfig(**QUICK)) as host:
        await host.deploy("a", ECHO, version="1.0.0")
        store = host._store

        async def take(shard, **options):
            taken = await type(store).take(store, shard, **options)
            for submission in taken:
                submission.input_json = b"not JSON"
            return taken

        store.take = take
        one = await host.submit("a", 1)
        ended = await finished(host, one.id)
        assert (ended.status, "could not begin" in ended.error, host.running) == ("failed", True, 0)
    assert told == ["no execution began"]
