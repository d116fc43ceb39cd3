"""One run and its end: stopped before it began, cancelled, overdue, left behind, and what it still says then."""

import asyncio
import sys

import msgspec
import pytest

from headrace.agents import AgentHost, AgentsConfig
from headrace.agents.stores.memory import MemoryStore
from headrace.clock import SystemClock
from headrace.errors import DatabaseUnavailable, StatementFailed

QUICK = {
    "retry_first_s": 0.001,
    "retry_max_s": 0.002,
    "queue_poll_s": 0.02,
    "cancel_grace_s": 0.05,
    "drain_s": 0.05,
}
THREADED = """
import threading
gate, begun, ended, attempts = threading.Event(), threading.Event(), threading.Event(), []
class Agent:
    def execute(self, input, context):
        attempts.append(context.attempt)
        begun.set()
        gate.wait(100)
        try:
            context.emit("after the end")
        finally:
            ended.set()
        return 1
"""
STUBBORN = """
import asyncio, time
gate, begun, attempts = asyncio.Event(), asyncio.Event(), []
async def Agent(input, context):
    attempts.append(context.attempt)
    begun.set()
    end = time.monotonic() + 100
    while not gate.is_set() and time.monotonic() < end:
        try:
            await asyncio.sleep(0.01)
        except asyncio.CancelledError:
            continue
    return 1
"""


def module_of(host, agent_id="a", version="1.0.0"):
    """The agent's own module, to open its gates."""
    return sys.modules[host._shelf.find(("default", agent_id, version)).definition.module]


async def until(condition, *, within_s=60):
    """Return when it holds."""
    async with asyncio.timeout(within_s):
        while not condition():
            await asyncio.sleep(0.005)


def deadline_passes(host, execution_id):
    """The run's time is over, now; what it has until then by the clock is more than any machine needs."""
    run = host._runs.find(("default", execution_id))
    host._runs._deadlines.remove(run)
    run.overdue()
    return run


async def finished(host, execution_id):
    """The execution when it has ended."""
    async with asyncio.timeout(60):
        while not (found := await host.execution("a", execution_id)).is_finished:
            await asyncio.sleep(0.005)
    return found


@pytest.mark.parametrize("source", [THREADED, STUBBORN])
async def test_what_was_cancelled_is_never_tried_again(source):
    """Not even when it does not stop and its deadline ends it; and everybody is told that it is to stop."""
    async with AgentHost(AgentsConfig(**QUICK)) as host:
        await host.deploy("a", source, version="1.0.0", idempotent=True)
        module = module_of(host)
        submitted = await host.submit("a", None, timeout=600)
        await until(module.begun.is_set)
        assert (await host.cancel(submitted.id)).status == "cancelling"
        assert (await host.execution("a", submitted.id)).status == "cancelling"
        deadline_passes(host, submitted.id)
        assert (await finished(host, submitted.id)).status == "timeout"
        module.gate.set()
        assert module.attempts == [1]


@pytest.mark.parametrize("source", [THREADED, STUBBORN])
async def test_an_attempt_that_has_not_stopped_is_not_repeated_beside_itself(source):
    """One that is left behind at its deadline is the last one, however often its agent may run."""
    async with AgentHost(AgentsConfig(**QUICK)) as host:
        await host.deploy("a", source, version="1.0.0", idempotent=True)
        module = module_of(host)
        submitted = await host.submit("a", None, timeout=600)
        await until(module.begun.is_set)
        deadline_passes(host, submitted.id)
        ended = await finished(host, submitted.id)
        assert (ended.status, "has not stopped" in ended.error, ended.attempt) == ("timeout", True, 1)
        module.gate.set()
        assert module.attempts == [1]


@pytest.mark.parametrize("source", [THREADED, STUBBORN])
async def test_an_attempt_that_a_closing_host_could_not_stop_is_not_repeated_elsewhere(source):
    """It would run beside the next one until its process has ended: it is interrupted, and not queued again."""
    async with AgentHost(AgentsConfig(**QUICK)) as host:
        await host.deploy("a", source, version="1.0.0", idempotent=True)
        module, store, kept = module_of(host), host._store, []

        async def close():
            kept.extend(held.status for held in store._executions.values())

        store.close = close
        await host.submit("a", None, execution_id="e")
        while not module.begun.is_set():
            await asyncio.sleep(0)
        task = host._runs.find(("default", "e")).task
    module.gate.set()
    await asyncio.wait([task], timeout=60)
    assert (kept, module.attempts) == (["interrupted"], [1])


@pytest.mark.parametrize("source", [THREADED, STUBBORN])
async def test_an_attempt_that_has_not_stopped_is_known_although_its_end_was_lost(source):
    """Its row says that it runs, and given up to others it would be run beside itself: that waits until it has."""
    disowned = []

    class Store(MemoryStore):
        async def finish(self, execution, **options):
            raise DatabaseUnavailable("It is away.")

        async def disown(self, shard, *, owner, known, older_than_s):
            disowned.append(("default", "e") not in known)

    config = AgentsConfig(**QUICK, node_lease_s=600)  # it beats when it is told to
    async with AgentHost(config, store=Store(clock=SystemClock())) as host:
        await host.deploy("a", source, version="1.0.0", idempotent=True)
        module, membership = module_of(host), host._membership
        (shard,) = host._store.shards
        await host.submit("a", None, execution_id="e", timeout=600)
        await until(module.begun.is_set)
        task = deadline_passes(host, "e").task
        await until(lambda: host._runs.find(("default", "e")) is None)
        membership.doubt(shard)  # for another's sake
        await membership.beat(shard)
        membership._doubts.clear()  # it takes longer to stop than lost answers are looked for
        module.gate.set()
        await asyncio.wait([task], timeout=60)
        await membership.beat(shard)
    assert disowned == [False, True]


async def test_an_attempt_that_stopped_at_its_deadline_is_repeated():
    """There is nothing beside which the next one would run."""
    text = """
import asyncio
attempts = []
async def Agent(input, context):
    attempts.append(context.attempt)
    await asyncio.sleep(600 if context.attempt < 3 else 0)
"""
    async with AgentHost(AgentsConfig(**QUICK)) as host:
        await host.deploy("a", text, version="1.0.0", idempotent=True)
        submitted = await host.submit("a", None, timeout=600)
        for attempt in (1, 2):
            await until(lambda attempt=attempt: attempt in module_of(host).attempts)
            deadline_passes(host, submitted.id)
        ended = await finished(host, submitted.id)
    assert (ended.status, ended.attempt) == ("completed", 3)


async def test_what_is_said_after_the_end_is_nobodys():
    """An agent that was left behind holds no stream open, and readers of its execution come to the end."""
    async with AgentHost(AgentsConfig(**QUICK)) as host:
        await host.deploy("a", THREADED, version="1.0.0")
        module = module_of(host)
        submitted = await host.submit("a", None, timeout=600)
        await until(module.begun.is_set)
        deadline_passes(host, submitted.id)
        await finished(host, submitted.id)
        module.gate.set()
        await until(module.ended.is_set)
        async with asyncio.timeout(60):
            assert [event.id async for event in host.events(submitted.id)] == []
        assert len(host._streams._streams) == 0


@pytest.mark.parametrize("how", ["cancel", "overdue", "interrupt"])
async def test_what_is_stopped_before_its_first_step_does_not_begin(how):
    """In a thread as little as in the loop, and its thread is free again."""
    async with AgentHost(AgentsConfig(**QUICK)) as host:
        await host.deploy("a", THREADED, version="1.0.0")
        module = module_of(host)
        calling = asyncio.create_task(host.execute("a", None, execution_id="e"))
        while (run := host._runs.find(("default", "e"))) is None:
            await asyncio.sleep(0)
        begun_here = run._coroutine is not None
        if how == "overdue":
            deadline_passes(host, "e")
        else:
            getattr(run, how)()
        ended = await calling
        module.gate.set()
        assert not begun_here
        assert ended.status in {"cancelled", "timeout", "interrupted"}
        assert module.attempts == []
        assert host._threads.busy == 0


async def test_a_thread_that_looks_whether_it_should_stop_ends_long_before_its_deadline():
    """A cancellation cannot interrupt a thread; the agent sees it and returns, and its place is free again."""
    text = """
import threading
begun, pause = threading.Event(), threading.Event()
class Agent:
    def execute(self, input, context):
        begun.set()
        while not context.should_stop:
            pause.wait(0.005)
        return context.remaining_s()
"""
    async with AgentHost(AgentsConfig(timeout_s=600.0)) as host:
        await host.deploy("a", text, version="1.0.0")
        call = asyncio.create_task(host.execute("a", 1, execution_id="e"))
        await until(lambda: host.running and module_of(host).begun.is_set())
        cancelled = await host.cancel("e")
        assert (await call).status == cancelled.status == "cancelled"
        assert host._threads.busy == 0


@pytest.mark.parametrize(("how", "pause"), [("def", "time.sleep(0.001)"), ("async def", "await asyncio.sleep(0)")])
async def test_what_is_returned_after_the_deadline_is_not_kept(how, pause):
    """An agent that sees that its time is over returns a part, perhaps before its host does: it is no result."""
    text = f"""
import asyncio, time
class Agent:
    {how} execute(self, input, context):
        while not context.should_stop:
            {pause}
        return "a part"
"""
    async with AgentHost(AgentsConfig(timeout_s=0.05)) as host:
        await host.deploy("a", text, version="1.0.0")
        for _ in range(5):
            done = await host.execute("a", 1)
            assert (done.status, done.output) == ("timeout", None)
            assert done.error.startswith("It ran longer than 0.05 s")


async def test_a_thread_may_end_while_its_host_closes():
    """Nothing can stop it, so it has until the grace is over to be what it is: completed."""
    host = AgentHost(AgentsConfig(**{**QUICK, "cancel_grace_s": 60.0}))
    async with host:
        await host.deploy("a", THREADED, version="1.0.0")
        module = module_of(host)
        calling = asyncio.create_task(host.execute("a", None))
        await until(module.begun.is_set)
        asyncio.get_running_loop().call_later(0.2, module.gate.set)
    assert (await calling).status == "completed"


@pytest.mark.parametrize("what", ["output", "event", "state"])
async def test_what_only_looks_like_json_fails_its_execution(what):
    """A `msgspec.Raw` is written as it stands: what is no JSON is found before a database refuses it."""
    text = f"""
import msgspec
async def Agent(input, context):
    bad = msgspec.Raw(b"{{'no': json")
    if {what!r} == "event":
        context.emit([bad])
    elif {what!r} == "state":
        context.state["x"] = bad
    else:
        return bad
"""
    async with AgentHost(AgentsConfig(**QUICK)) as host:
        await host.deploy("a", text, version="1.0.0")
        ended = await host.execute("a", None, instance="i")
    assert ended.status == "failed"
    assert "cannot be written as JSON" in ended.error
    assert msgspec.json.encode(ended.error)


async def test_a_fault_while_reports_are_written_does_not_end_the_writing():
    """It is told where faults are told, and the next round writes."""
    told = []
    loop = asyncio.get_running_loop()
    loop.set_exception_handler(lambda _, context: told.append(context["message"]))
    async with AgentHost(AgentsConfig(**QUICK)) as host:
        report, failures = host._store.report, [RuntimeError("dictionary changed size")]

        async def failing(shard, submissions):
            if failures:
                raise failures.pop()
            await report(shard, submissions)

        host._store.report = failing
        text = """
import asyncio
gate = asyncio.Event()
async def Agent(input, context):
    for done in range(1, 1000):
        context.progress(done, 1000)
        await asyncio.sleep(0.01)
"""
        await host.deploy("a", text, version="1.0.0")
        submitted = await host.submit("a", None)
        async with asyncio.timeout(60):
            while (await host.execution("a", submitted.id)).progress is None:
                await asyncio.sleep(0.01)
        await host.cancel(submitted.id)
    assert not failures
    assert len(told) == 1


@pytest.mark.parametrize("refused", ["finish", "keep_events"])
async def test_what_a_database_refuses_does_not_leave_an_execution_running(refused):
    """An output that it will not take is a failure on record; events that it will not take are lost alone."""

    class Store(MemoryStore):
        async def finish(self, execution, **more):
            if refused == "finish" and execution.output_json is not None:
                raise StatementFailed("value too long")
            return await super().finish(execution, **more)

        async def keep_events(self, shard, events, **more):
            if refused == "keep_events":
                raise StatementFailed("value too long")
            await super().keep_events(shard, events, **more)

    text = "async def Agent(input, context):\n    context.emit(1)\n    return 1"
    async with AgentHost(AgentsConfig(**QUICK), store=Store(clock=SystemClock())) as host:
        await host.deploy("a", text, version="1.0.0")
        submitted = await host.submit("a", None)
        ended = await finished(host, submitted.id)
    expected = ("failed", "value too long") if refused == "finish" else ("completed", "None")
    assert (ended.status, expected[1] in str(ended.error)) == (expected[0], True)
